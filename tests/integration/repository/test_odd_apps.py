"""Apps as they are: tests beside setup.py, files of neighbours, policy, extensions."""

import re
import textwrap

import pytest

#: No VM is started.
QUICK = ("--hypervisor", "test", "--template", "tiny")

SETUP = """\
from setuptools import setup
setup(name={name!r}, version="1", packages=[{package!r}], entry_points={entries!r})
"""
UNIT = """\
import unittest

class TC_{name}(unittest.TestCase):
    def test_it(self):
        {line}

def list_tests():
    return [TC_{name}]
"""


class Places:
    """Makes directories with files, and runs the program on some of them."""

    def __init__(self, directory, site):
        self.directory = directory
        self.site = site

    def make(self, name, files):
        for path, text in files.items():
            file = self.directory / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
        return self.directory / name

    def unit(self, name, line="pass", more=None):
        """Make an app with one test, of this line, and with these files besides."""
        entries = {"qubes.tests.extra": [f"{name} = {name}_tests:list_tests"]}
        setup = SETUP.format(name=name, package=f"{name}_tests", entries=entries)
        files = {
            "setup.py": setup,
            f"{name}_tests/__init__.py": UNIT.format(name=name, line=line),
        }
        return self.make(name, files | (more or {}))

    def run(self, *apps, words=()):
        given = [word for app in apps for word in ("--app", str(app))]
        done = self.site.run(*given, *words)
        done.outcomes = re.findall(r"^([A-Z]{5,6}) +(\S+)", done.stdout, re.MULTILINE)
        return done


@pytest.fixture
def places(tmp_path, site):
    return Places(tmp_path / "places", site)


ODD_TESTS = """\
import qubes.tests
from qubes.tests.extra import ExtraTestCase

import neighbour_lib

class TC_Odd(ExtraTestCase):
    def test_calls(self):
        vm, other = self.create_vms(["work", "other"])
        vm.start()
        call = f"qrexec-client-vm {{}} {neighbour_lib.SERVICE}"
        self.assertEqual(vm.run(call.format("@dispvm"), wait=True), 0)
        self.assertEqual(vm.run(call.format(other.name), wait=True), 126)

class TC_Once(ExtraTestCase):
    def test_template(self):
        self.assertEqual(self.app.default_template.name, "mine")
        self.assertEqual(qubes.tests.list_templates(), ("mine",))

def list_tests():
    return [TC_Odd]

def list_once():
    return [TC_Once]
"""


def test_an_app_whose_setup_is_for_something_else(places):
    """As split-gpg2 and the converters are; what it lacks is its neighbour's."""
    places.make(
        "neighbour",
        {
            "setup.py": 'from setuptools import setup\nsetup(name="neighbour", '
            'version=open("version").read(), py_modules=["neighbour_lib"])\n',
            "version": "1",
            "neighbour_lib.py": 'SERVICE = "odd.Hello"\n',
            "rpc/odd.Hello": "#!/bin/sh\necho hello\n",
        },
    )
    wrong = {"qubes.tests.extra.for_template": ["odd = odd.gone:list_tests"]}
    right = {
        "qubes.tests.extra": ["odd = odd_tests:list_once"],
        "qubes.tests.extra.for_template": ["odd = odd_tests:list_tests"],
    }
    app = places.make(
        "odd",
        {
            "setup.py": SETUP.format(name="odd", package="odd", entries=wrong),
            "odd/__init__.py": "",
            "setup-tests.py": SETUP.format(
                name="oddtests", package="odd_tests", entries=right
            ),
            "odd_tests/__init__.py": ODD_TESTS,
            "50-odd.policy": "odd.Hello * @anyvm @dispvm allow\n",
            "setup.cfg": """\
                [qubes_itests:template:mine]
                base = tiny
                plugin = setup-tests.py
                requires = neighbour:.
                policy = 50-odd.policy
                copy = neighbour:rpc -> /etc/qubes-rpc
                run = chmod 755 /etc/qubes-rpc/odd.Hello
            """,
        },
    )
    before = sorted(path for path in places.directory.rglob("*"))
    done = places.run(app)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.outcomes == [
        ("PASSED", "odd@once::TC_Once::test_template"),
        ("PASSED", "odd::TC_Odd_mine::test_calls"),
    ]
    assert sorted(path for path in places.directory.rglob("*")) == before


def section(**values):
    lines = "".join(f"{key} = {value}\n" for key, value in values.items())
    return {"setup.cfg": f"[qubes_itests:template:tiny]\nbase = tiny\n{lines}"}


def test_what_is_wrong_with_one_app_fails_its_tests_alone(places):
    """Each by one reason; an app that gives its tests a second is none of them."""
    places.make("broken", {"setup.py": "raise SystemExit('it cannot be built')\n"})
    policy = "30-it.policy"
    none = {"f_tests/__init__.py": "def list_tests():\n    return []\n"}
    brief = {"setup.cfg": "[qubes_itests]\ntimeout = 1\n"}
    first = section(policy=policy) | {policy: "# one\n"}
    second = section(policy=policy) | {policy: "# two\n"}
    done = places.run(
        places.unit("a", more=section(plugin="gone.py")),
        places.unit("b", more=section(requires="debian:no-such-thing")),
        places.unit("c", more=section(requires="gone:.")),
        places.unit("d", more=section(requires="broken:.")),
        places.unit("e", more=section(requires="-rfile")),
        places.unit("f", more=none),
        places.unit("g", more=first),
        places.unit("h", more=second),
        places.unit("slow", "import time; time.sleep(3)", brief),
        words=QUICK,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [("FAILED", f"{name}::plugin") for name in "abcdefh"]
    assert sorted(done.outcomes[:9]) == [
        *broken,
        ("FAILED", "slow::TC_slow::test_it"),
        ("PASSED", "g::TC_g::test_it"),
    ]
    for said in (
        "plugin: there is no file or folder 'gone.py' in it",
        "apt-get install no-such-thing",
        "there is no repository 'gone'",
        f"pip cannot install {places.directory}/broken",
        "requires: '-rfile' is neither a package of Python",
        "f_tests:list_tests lists no test class, so nothing is tested",
        f"policy: {policy} differs from the file of that name in",
        "no end within 1 s",
    ):
        assert said in done.stdout


def test_options_stand_in_for_what_an_app_does_not_say(places):
    """A policy with an error is told with its line, and the tests run."""
    brief = {"setup.cfg": "[qubes_itests]\ntimeout = 1\n"}
    app = places.unit("slow", "import time; time.sleep(2)", brief)
    (app / "setup.py").rename(app / "setup-tests.py")
    (app / "30-mine.policy").write_text("\na * b c allowed\n")
    words = ["--timeout", "60", "--plugin", "setup-tests.py", "--policy", str(app)]
    done = places.run(app, words=[*QUICK, *words])
    assert done.returncode == 0, done.stdout + done.stderr
    said = f"policy: it denies all calls, for {app}/30-mine.policy:2: "
    assert said in done.stdout
    assert "the action is one of allow, deny, ask" in done.stdout


EXTENSION = """\
from qubes.ext import Extension, handler

class Loud(Extension):
    @handler("domain-init")
    def on_init(self, vm, event):
        vm.is_heard = True
"""
HEARS = """\
from qubes.tests.extra import ExtraTestCase

class TC_{name}(ExtraTestCase):
    def test_it(self):
        heard = hasattr(self.app.domains["dom0"], "is_heard")
        self.assertEqual(heard, {heard})

def list_tests():
    return [TC_{name}]
"""


def test_an_extension_is_there_for_the_tests_of_its_app_alone(places):
    entries = {
        "qubes.tests.extra": ["b_loud = b_loud_tests:list_tests"],
        "qubes.ext": ["loud = b_loud_tests.ext:Loud"],
    }
    setup = SETUP.format(name="b_loud", package="b_loud_tests", entries=entries)
    apps = [
        places.unit(name, "pass", {f"{name}_tests/__init__.py": text, **more})
        for name, text, more in (
            ("a_quiet", HEARS.format(name="a", heard=False), {}),
            (
                "b_loud",
                HEARS.format(name="b", heard=True),
                {"setup.py": setup, "b_loud_tests/ext.py": EXTENSION},
            ),
            ("c_quiet", HEARS.format(name="c", heard=False), {}),
        )
    ]
    done = places.run(*apps, words=QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.outcomes) == 3
