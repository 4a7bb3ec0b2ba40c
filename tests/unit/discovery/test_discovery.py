"""Discovery, with plugins that are installed the way pip leaves them."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
import unittest
from pathlib import Path

import pytest

from qubes_itests import import_alias
from qubes_itests.core.app import Qubes
from qubes_itests.core.device.collections import DEVICE_CLASSES
from qubes_itests.core.ext import registered_extensions
from qubes_itests.discovery import (
    GROUP,
    GROUP_FOR_TEMPLATE,
    Selection,
    discover,
)

BOTH = Selection(templates=("tiny", "debian-12"))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a distribution with one module of this text."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)
    ours = iter(range(1000))

    def install(text, *entries, name=None, more=""):
        name = name or f"made_plugin_{next(ours)}"
        (site / f"{name}.py").write_text(textwrap.dedent(text))
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        entries = entries or ((GROUP, name),)
        lines = [f"[{g}]\n{e} = {name}:list_tests\n" for g, e in entries]
        lines.append(textwrap.dedent(more).format(name=name))
        (info / "entry_points.txt").write_text("\n".join(lines))
        importlib.invalidate_caches()
        return name

    yield install
    for name in set(sys.modules) - before:
        if name.startswith(("made_plugin", "qubes.")) or name == "qubes":
            del sys.modules[name]


def find(name, selection=BOTH, group=GROUP):
    (plugin,) = [
        plugin
        for plugin in discover(selection)
        if plugin.name == name and plugin.group == group
    ]
    return plugin


GOOD = """
    import unittest

    class TC_Good(unittest.TestCase):
        template = None
        def test_000(self):
            pass

    def list_tests():
        return [TC_Good]
"""


def test_a_good_plugin_in_both_groups(install):
    """One name may be in both groups; the template classes are new ones."""
    name = install(GOOD, (GROUP, "good"), (GROUP_FOR_TEMPLATE, "good"))
    once = find("good")
    assert once.distribution == name
    assert once.target == f"{name}:list_tests"
    assert once.module is sys.modules[name]
    assert once.problems == ()
    assert [c.cls for c in once.classes] == [sys.modules[name].TC_Good]
    each = find("good", group=GROUP_FOR_TEMPLATE)
    assert [(c.name, c.template) for c in each.classes] == [
        ("TC_Good_tiny", "tiny"),
        ("TC_Good_debian-12", "debian-12"),
    ]
    for found in each.classes:
        assert found.cls.template == found.template
        assert getattr(sys.modules[name], found.name) is found.cls
        assert found.cls.__module__ == name


def test_a_generator_is_a_list(install):
    name = install(GOOD.replace("return [TC_Good]", "yield TC_Good"))
    assert [c.name for c in find(name).classes] == ["TC_Good"]
    assert find(name).problems == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("class Odd(BaseException): pass\nraise Odd('oops')", "Odd: oops"),
        ("this is no python", "SyntaxError"),
        ("", "list_tests"),
        ("list_tests = 5", "no callable"),
        ("def list_tests(): return 1 / 0", "ZeroDivisionError"),
        ("def list_tests(): return None", "cannot be read"),
        ("def list_tests(): return ['TC']", "'TC', which is no class"),
        ("def list_tests(): return [dict]", "dict, which is no unittest.TestCase"),
    ],
)
def test_a_broken_plugin_is_a_problem_and_stops_nothing(install, text, said):
    broken = install(text)
    good = install(GOOD)
    (problem,) = find(broken).problems
    assert said in str(problem)
    assert find(broken).classes == ()
    assert len(find(good).classes) == 1


def test_a_module_that_is_not_there(install):
    """A published plugin registers a module that does not exist."""
    install(GOOD, name="made_plugin_there")
    sys.path_importer_cache.clear()
    info = install("", name="made_plugin_gone")
    site = sys.path[0]
    importlib.import_module("pathlib").Path(site, f"{info}.py").unlink()
    importlib.invalidate_caches()
    plugin = find(info)
    assert plugin.module is None
    assert "ModuleNotFoundError" in plugin.problems[0].summary
    assert plugin.problems[0].summary.endswith(
        "; where the app's tests are is said by --plugin, or by plugin in the app's"
        " section"
    )
    assert "importlib" not in plugin.problems[0].detail


def test_who_misses_a_library_is_told_how_to_name_it(install):
    name = install("import no_such_library.part\n" + textwrap.dedent(GOOD))
    (problem,) = find(name).problems
    assert problem.summary.endswith(
        "No module named 'no_such_library'; what brings it is named by --requires, or"
        " by requires in the app's section"
    )


def test_a_traceback_shows_the_plugin_only(install):
    name = install("def list_tests():\n    raise KeyError('deep')")
    (problem,) = find(name).problems
    assert f"{name}.py" in problem.detail
    assert "qubes_itests" not in problem.detail


def test_what_came_before_the_error_is_run(install):
    name = install(GOOD.replace("return [TC_Good]", "yield TC_Good; yield 1 / 0"))
    plugin = find(name)
    assert [c.name for c in plugin.classes] == ["TC_Good"]
    assert "ZeroDivisionError" in plugin.problems[0].summary


def test_two_classes_of_one_name(install):
    name = install(
        """
        import unittest
        def made():
            class TC(unittest.TestCase):
                def test(self): pass
            return TC
        def list_tests():
            first = made()
            return [first, made(), first]
        """
    )
    plugin = find(name)
    assert len(plugin.classes) == 1
    assert ["two classes named TC" in p.summary for p in plugin.problems] == [True]


def test_two_tests_of_one_name(install):
    """Also in a base class of the plugin; not where a decorator builds on the first."""
    name = install(
        """
        import unittest
        class Base(unittest.TestCase):
            def test_twice(self): pass
            def test_once(self): pass
            def test_twice(self): pass
            def helper(self): pass
            def helper(self): pass
            @property
            def test_property(self): pass
            @test_property.setter
            def test_property(self, value): pass
        class TC(Base):
            def test_once(self): pass
        def list_tests():
            return [TC]
        """
    )
    (problem,) = find(name).problems
    assert (
        problem.summary == "TC defines test_twice twice; the first definition is lost"
    )
    assert len(find(name).classes) == 1


def test_tests_that_would_pass_without_running(install):
    """They become a problem, and no runner sees them; the good test stays."""
    name = install(
        """
        import unittest
        class TC(unittest.TestCase):
            async def test_async(self): raise AssertionError
            def test_generator(self): yield
            def test_good(self): pass
        class TC_Isolated(unittest.IsolatedAsyncioTestCase):
            async def test_async(self): pass
        def list_tests():
            return [TC, TC_Isolated]
        """,
        (GROUP, "async"),
        (GROUP_FOR_TEMPLATE, "async"),
    )
    names = unittest.TestLoader().getTestCaseNames
    once = find("async")
    assert names(once.classes[0].cls) == ["test_good"]
    assert once.classes[0].name == "TC"
    assert names(once.classes[1].cls) == ["test_async"]
    assert [p.summary.partition(" ")[0] for p in once.problems] == [
        "TC.test_async",
        "TC.test_generator",
    ]
    each = find("async", group=GROUP_FOR_TEMPLATE)
    assert names(each.classes[0].cls) == ["test_good"]
    assert len(each.problems) == 2, "said once, not per template"
    assert issubclass(each.classes[0].cls, sys.modules[name].TC)


def test_tampering_is_undone_and_told(install):
    """What a plugin replaced or removed is back for the next one, and it is told."""
    json = importlib.import_module("json")
    decoder = importlib.import_module("json.decoder")
    name = install(
        """
        import sys, types
        sys.modules["json"] = types.ModuleType("json")
        del sys.modules["json.decoder"]
        def list_tests():
            return []
        """
    )
    (problem,) = find(name).problems
    assert "json, json.decoder" in problem.summary
    assert sys.modules["json"] is json
    assert sys.modules["json.decoder"] is decoder
    assert json.decoder is decoder


def test_a_stand_in_for_qubes_is_removed(install):
    """A plugin whose fake fills a gap is well; the next one must not see the fake."""
    name = install(
        """
        import sys, types, unittest, unittest.mock
        sys.modules["qubes.faked"] = types.ModuleType("qubes.faked")
        sys.modules["qubes.mocked"] = unittest.mock.MagicMock()
        sys.modules["made_plugin_of_mine"] = types.ModuleType("made_plugin_of_mine")
        class TC(unittest.TestCase):
            def test(self): pass
        def list_tests():
            return [TC]
        """
    )
    assert find(name).problems == ()
    assert "qubes.faked" not in sys.modules
    assert "qubes.mocked" not in sys.modules
    assert "made_plugin_of_mine" in sys.modules


def test_selection_from_the_environment():
    environment = {
        "QUBES_TEST_EXTRA_INCLUDE": "one two",
        "QUBES_TEST_EXTRA_EXCLUDE": "two",
        "QUBES_TEST_TEMPLATES": "b a b",
    }
    selection = Selection.from_environment(environment, ["tiny"])
    assert selection.templates == ("b", "a")
    assert [n for n in ("one", "two", "three") if selection.takes(n)] == ["one"]
    everything = Selection.from_environment({"QUBES_TEST_TEMPLATES": " "}, ["tiny"])
    assert everything.templates == ("tiny",)
    assert everything.takes("three")


def test_included_excluded_and_unknown_names(install):
    """An excluded plugin is not even imported; an unknown name is not passed over."""
    good = install(GOOD)
    out = install("raise SystemExit")
    selection = Selection(
        templates=(), include=frozenset({good, out, "typo"}), exclude=frozenset({out})
    )
    found = {plugin.name: plugin for plugin in discover(selection)}
    assert set(found) == {good, "typo"}
    assert "QUBES_TEST_EXTRA_INCLUDE names 'typo'" in found["typo"].problems[0].summary
    assert out not in sys.modules


def test_interrupt_is_not_a_problem_of_the_plugin(install):
    install("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discover(BOTH)


def test_a_plugin_may_make_its_classes_per_template_itself(install, monkeypatch):
    """It gets the run's templates, though nothing in its environment names them."""
    monkeypatch.delenv("QUBES_TEST_TEMPLATES", raising=False)
    name = install(
        """
        import sys
        import unittest
        from qubes_itests.testcase import create_testcases_for_templates

        class Mixin:
            def test_one(self):
                pass

        def list_tests():
            module = sys.modules[__name__]
            names = create_testcases_for_templates(
                "TC_Own", Mixin, unittest.TestCase, module=module)
            return [getattr(module, full.rpartition(".")[2]) for full in names]
        """
    )
    plugin = find(name)
    assert not plugin.problems
    made = [found.cls for found in plugin.classes]
    assert [c.__name__ for c in made] == ["TC_Own_tiny", "TC_Own_debian-12"]
    assert [c.template for c in made] == ["tiny", "debian-12"]
    assert "QUBES_TEST_TEMPLATES" not in os.environ


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("[]", "lists no test class, so nothing is tested"),
        ("[TC_Empty, TC_Base]", "lists 2 classes without tests"),
    ],
)
def test_a_plugin_that_lists_no_test_is_a_problem(install, listed, said):
    name = install(
        f"""
        import unittest
        class TC_Base(unittest.TestCase): pass
        class TC_Empty(TC_Base):
            def setUp(self): raise AssertionError
        def list_tests():
            return {listed}
        """
    )
    (problem,) = find(name).problems
    assert said in problem.summary


def test_what_it_looked_for_in_vain_is_said(install):
    """A plugin that hides its tests where it finds no Qubes OS says no word itself."""
    name = install(
        """
        import json, pathlib
        try:
            import qubes_extension_that_is_not_there.part
        except ImportError:
            try:
                from textwrap import dedent, nothing_of_that_kind
            except ImportError:
                pass
        def list_tests():
            return []
        """
    )
    (problem,) = find(name).problems
    _, _, missing = problem.summary.partition("asked for what is not there: ")
    assert missing == "qubes_extension_that_is_not_there"


def heard(event):
    """Return which of its extensions tell a new app's VM that they hear of an event."""
    app = Qubes(hypervisor=None, directory=Path("/nonexistent"))
    return app.domains["dom0"].fire_event(event)


EXTENSIONS = """
    import unittest
    from qubes.ext import Extension, handler

    class Installed(Extension):
        @handler("firewall-changed")
        def on_event(self, vm, event):
            return "installed"

    class Other(Extension):
        @handler("firewall-changed")
        def on_event(self, vm, event):
            return "other"

    Other()

    class TC(unittest.TestCase):
        def test(self): pass

    def list_tests():
        return [TC]
"""
MORE = """\
    [qubes.ext]
    made = {name}:Installed
    [qubes.devices]
    made = {name}:Installed
"""


@pytest.fixture
def alias():
    import_alias.install()
    yield
    import_alias.uninstall()


@pytest.mark.usefixtures("alias")
def test_extensions_are_there_while_their_plugin_is_tested(install):
    """Those of entry points, and those that the plugin makes, be it while it loads."""
    core = registered_extensions()
    name = install(EXTENSIONS, more=MORE)
    plugin = find(name)
    assert plugin.problems == ()
    assert heard("firewall-changed") == []
    for _ in range(2):
        plugin.extensions.enter()
        assert heard("firewall-changed") == ["other", "installed"]
        assert "made" in DEVICE_CLASSES
        plugin.extensions.leave()
        assert heard("firewall-changed") == []
        assert "made" not in DEVICE_CLASSES
    assert registered_extensions() == core


@pytest.mark.usefixtures("alias")
def test_extensions_of_one_plugin_are_none_of_another(install):
    first, second = install(EXTENSIONS, more=MORE), install(GOOD)
    plugins = {plugin.name: plugin for plugin in discover(BOTH)}
    plugins[second].extensions.enter()
    assert heard("firewall-changed") == []
    plugins[second].extensions.leave()
    plugins[first].extensions.enter()
    assert heard("firewall-changed") == ["other", "installed"]
    plugins[first].extensions.leave()


@pytest.mark.usefixtures("alias")
def test_an_extension_that_cannot_be_made_is_told_and_leaves_nothing(install):
    name = install(EXTENSIONS, more=MORE.replace("{name}:Installed", "{name}:Missing"))
    plugin = find(name)
    with pytest.raises(AttributeError, match="Missing"):
        plugin.extensions.enter()
    plugin.extensions.leave()
    assert heard("firewall-changed") == []
    assert "made" not in DEVICE_CLASSES
