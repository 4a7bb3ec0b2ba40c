"""Tools of the client, run in this process."""

import sys

import pytest

from qubes_itests.exc import UsageError
from qubes_itests.serve import tools
from qubes_itests.serve.place import Place


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Give a package of the client's name whose tool is a coroutine function."""
    package = tmp_path / "qubesadmin" / "tools"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "qvm_wait.py").write_text("async def main():\n    return 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tools, "HOOK", tmp_path)
    (tmp_path / "sitecustomize.py").write_text("")
    monkeypatch.setattr(sys, "argv", ["qvm"])
    yield
    for name in [name for name in sys.modules if name.startswith("qubesadmin")]:
        del sys.modules[name]


@pytest.mark.usefixtures("client")
def test_a_tool_that_is_a_coroutine_function_is_run_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "variables", lambda _place: {})
    assert tools.run_tool(Place(tmp_path), "wait", []) == 3


def test_a_missing_client_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "installed_tools", list)
    with pytest.raises(UsageError, match=r"pip install \./qubes-core-admin"):
        tools.run_tool(Place(tmp_path), "qvm-ls", [])
