"""The modules of Qubes OS that plugins import, where no Qubes OS is installed."""

# ruff: noqa: PLC0415 - the imports are what is tested

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
import textwrap
from unittest import mock

import pytest

from qubes_itests.import_alias import install, uninstall
from qubes_itests.import_alias.table import ALIASES


@pytest.fixture
def _installed():
    install()
    yield
    uninstall()


pytestmark = pytest.mark.usefixtures("_installed")


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_every_name_of_the_table_is_there(name):
    module = importlib.import_module(name)
    assert module.__spec__.name == name
    assert module.__all__ or any(n.startswith(f"{name}.") for n in ALIASES)
    for public in module.__all__:
        getattr(module, public)


def test_every_parent_is_in_the_table():
    assert {n.rpartition(".")[0] for n in ALIASES} - {""} <= set(ALIASES)


def test_the_classes_are_our_own():
    """isinstance() across the two names must hold."""
    import qubes.exc
    import qubes.tests.extra
    import qubes.vm.appvm
    from qubes import Qubes
    from qubes.ext import Extension, handler
    from qubes.vm import BaseVM

    from qubes_itests import testcase
    from qubes_itests.core import app, exc, ext
    from qubes_itests.core.vm import appvm, base

    assert qubes.tests.extra.ExtraTestCase is testcase.ExtraTestCase
    assert qubes.vm.appvm.AppVM is appvm.AppVM
    assert qubes.exc.QubesException is exc.QubesException
    assert (Qubes, BaseVM) == (app.Qubes, base.BaseVM)
    assert (Extension, handler) == (ext.Extension, ext.handler)


def test_submodules_need_no_import_of_their_own():
    """As with Qubes OS, `import qubes` is enough to reach what it imports itself."""
    import qubes

    assert qubes.config.vm_name_length == 31


@pytest.mark.parametrize(
    "statement",
    [
        "import qubes.backup",
        "from qubes.vm import dispvm_of_tomorrow",
        "from qubes.exc import NoSuchError",
        "import qubes.exc.deeper",
    ],
)
def test_what_is_missing_is_said(statement):
    with pytest.raises(ImportError, match="qubes_itests does not provide qubes"):
        exec(statement, {})  # noqa: S102 - statements of the list above


def test_a_missing_attribute_is_said_and_hasattr_works():
    import qubes

    with pytest.raises(AttributeError, match=r"does not provide qubes\.nothing"):
        _ = qubes.nothing
    assert not hasattr(qubes, "nothing")
    with pytest.raises(ModuleNotFoundError, match=r"provide qubes\.nothing"):
        importlib.import_module("qubes.nothing")


def test_a_patch_reaches_the_real_thing():
    import qubes.utils

    from qubes_itests.import_alias import stderr_text

    real = stderr_text.sanitize_stderr_for_log
    with mock.patch("qubes.utils.sanitize_stderr_for_log", return_value="patched"):
        assert stderr_text.sanitize_stderr_for_log(b"") == "patched"
        assert qubes.utils.sanitize_stderr_for_log(b"") == "patched"
    assert stderr_text.sanitize_stderr_for_log is real
    assert qubes.utils.sanitize_stderr_for_log is real


def test_text_for_logs():
    """A guest can neither begin a line of the log nor fill it."""
    from qubes.utils import sanitize_stderr_for_log

    assert sanitize_stderr_for_log(b"a\tb\n\x1b[1m\xff ~") == "a_b__[1m_ ~"
    assert len(sanitize_stderr_for_log(bytes(1_000_000))) == 4096


def test_what_may_be_a_coroutine():
    """Suites of the core await what some storage drivers return at once."""
    from qubes.utils import coro_maybe, void_coros_maybe

    ran = []

    async def work(number):
        await asyncio.sleep(0)
        ran.append(number)
        return number

    async def fail():
        raise ArithmeticError

    assert asyncio.run(coro_maybe(5)) == 5
    assert asyncio.run(coro_maybe(work(6))) == 6
    assert asyncio.run(void_coros_maybe([None, work(1), 2, work(3)])) is None
    assert sorted(ran) == [1, 3, 6]
    with pytest.raises(ArithmeticError):
        asyncio.run(void_coros_maybe([fail(), work(9)]))
    assert ran[-1] == 9, "the others go on to their ends"


def test_install_twice_is_once():
    before = len(sys.meta_path)
    install()
    assert len(sys.meta_path) == before


def test_a_real_qubes_wins(tmp_path):
    """With a real package, nothing of ours is seen, not even what it lacks."""
    package = tmp_path / "qubes"
    package.mkdir()
    (package / "__init__.py").write_text("REAL = True\n")
    script = """
        import qubes_itests.import_alias as alias
        alias.install()
        import qubes
        assert qubes.REAL
        try:
            import qubes.vm
        except ModuleNotFoundError as error:
            assert error.name == "qubes.vm"
        else:
            raise AssertionError
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={"PYTHONPATH": str(tmp_path)},
        check=True,
        timeout=300,
    )


def test_uninstall_leaves_nothing():
    import qubes.vm.appvm  # noqa: F401

    uninstall()
    assert not [n for n in sys.modules if n.partition(".")[0] == "qubes"]
    with pytest.raises(ModuleNotFoundError, match="No module named 'qubes'"):
        importlib.import_module("qubes")
