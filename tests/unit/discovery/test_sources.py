"""Installed copies of an app's modules name the files of their author."""

import importlib
import sys
import traceback

import pytest

from qubes_itests.discovery.sources import name_authors_files
from qubes_itests.host.tree import Originals

TEST = "def fail():\n    def inner():\n        return 1 // 0\n    return inner()\n"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Return an app's directory and one of installed packages, in the path."""
    app, packages = tmp_path / "app", tmp_path / "cache" / "site-packages"
    for place in (app / "tests", app / "other", packages / "my_tests"):
        place.mkdir(parents=True)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setattr(sys, "path_hooks", [*sys.path_hooks])
    yield app, packages
    for name in [n for n in sys.modules if n.partition(".")[0] == "my_tests"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def write(*paths, text=TEST):
    for path in paths:
        path.write_text(text)


def frames_of(module):
    with pytest.raises(ZeroDivisionError) as caught:
        module.fail()
    return [f.filename for f in traceback.extract_tb(caught.tb)][1:]


@pytest.mark.parametrize("times", [1, 2])  # the second time from compiled code
def test_code_has_the_name_of_the_file_it_is_a_copy_of(places, times):
    app, packages = places
    write(packages / "my_tests/__init__.py", app / "tests/__init__.py", text="")
    write(packages / "my_tests/suite.py", app / "tests/suite.py")
    write(app / "other/suite.py", text="# another\n")
    name_authors_files({str(packages): str(app)})
    for _ in range(times):
        module = importlib.import_module("my_tests.suite")
        assert frames_of(module) == [str(app / "tests/suite.py")] * 2
        assert module.__file__ == str(packages / "my_tests/suite.py")
        del sys.modules["my_tests.suite"]


def test_a_module_that_is_loaded_again_is_what_its_author_has_made_of_it(places):
    app, packages = places
    write(packages / "my_tests/__init__.py", text="")
    write(packages / "my_tests/suite.py", app / "tests/suite.py")
    for text in (TEST, TEST + "edited = True\n", TEST):
        write(app / "tests/suite.py", text=text)
        # as each discovery does
        name_authors_files({str(packages): str(app)})
        module = importlib.import_module("my_tests.suite")
        assert hasattr(module, "edited") == (text != TEST)
        assert frames_of(module) == [str(app / "tests/suite.py")] * 2
        del sys.modules["my_tests.suite"]


def test_what_was_generated_or_changed_keeps_its_own_name(places):
    app, packages = places
    write(packages / "my_tests/__init__.py", text="")
    write(packages / "my_tests/suite.py")
    write(app / "tests/suite.py", text=TEST + "# changed since\n")
    name_authors_files({str(packages): str(app)})
    module = importlib.import_module("my_tests.suite")
    assert frames_of(module) == [str(packages / "my_tests/suite.py")] * 2


def test_of_equal_files_that_in_a_folder_of_the_same_name_is_meant(places):
    app, packages = places
    write(packages / "my_tests/__init__.py", text="")
    (app / "my_tests").mkdir()
    write(packages / "my_tests/suite.py", app / "other/suite.py")
    write(app / "my_tests/suite.py", app / "tests/suite.py")
    name_authors_files({str(packages): str(app)})
    module = importlib.import_module("my_tests.suite")
    assert frames_of(module) == [str(app / "my_tests/suite.py")] * 2


def test_a_file_that_vanishes_or_cannot_be_read_is_nobodys_original(places):
    app, packages = places
    write(packages / "my_tests/__init__.py", text="")
    write(packages / "my_tests/suite.py", app / "tests/suite.py", app / "other/x.py")
    originals = Originals(app)
    assert originals.find(packages / "my_tests/suite.py") == app / "tests/suite.py"
    (app / "tests/suite.py").unlink()
    assert originals.find(packages / "my_tests/suite.py") is None
    assert originals.find(packages / "my_tests/gone.py") is None
    assert Originals(app / "gone").find(packages / "my_tests/suite.py") is None
