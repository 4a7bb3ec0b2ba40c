"""``--app DIR``: all that the maintainer of an app types; what bad ones are told."""

import os
import re
import shutil
import subprocess
import textwrap

import pytest

from qubes_itests.host.filesystem import mount_tmpfs

SETUP = """\
from setuptools import setup
setup(
    name="{name}-tests",
    version=open("../version").read().strip(),
    packages=["{module}"],
    entry_points={{"qubes.tests.extra.for_template": ["{name} = {module}:list_tests"]}},
)
"""
TESTS = """\
from qubes.tests.extra import ExtraTestCase

class TC_App(ExtraTestCase):
    def test_service(self):
        (vm,) = self.create_vms(["work"])
        vm.start()
        self.assertEqual(vm.run_service("{name}.Hello", wait=True), 0)

def list_tests():
    return [TC_App]
"""
SPEC = """\
[qubes_itests:template:mine]
base = tiny
copy = src -> /etc/qubes-rpc
run = chmod 755 /etc/qubes-rpc/{name}.Hello
"""


class Apps:
    """Makes apps in folders of their own, and runs the program on them."""

    def __init__(self, directory, site):
        self.directory = directory
        self.site = site

    def make(self, name, *, spec=SPEC, setup=SETUP, tests=TESTS):
        app = self.directory / name
        module = f"{name}_tests"
        (app / "src").mkdir(parents=True)
        (app / "tests" / module).mkdir(parents=True)
        (app / "version").write_text("1.2\n")
        (app / f"src/{name}.Hello").write_text("#!/bin/sh\necho hello\n")
        values = {"name": name, "module": module}
        (app / "setup.cfg").write_text(spec.format(**values))
        (app / "tests/setup.py").write_text(setup.format(**values))
        (app / "tests" / module / "__init__.py").write_text(tests.format(**values))
        return app

    def run(self, *apps, words=()):
        given = [word for app in apps for word in ("--app", str(app))]
        done = self.site.run(*given, *words)
        done.outcomes = re.findall(r"^([A-Z]{5,6}) +(\S+)", done.stdout, re.MULTILINE)
        return done


@pytest.fixture
def apps(tmp_path, site):
    return Apps(tmp_path / "apps", site)


def files(app):
    return sorted(str(path.relative_to(app)) for path in app.rglob("*"))


def test_an_app_is_installed_layered_and_tested_and_stays_as_it_is(apps):
    """Its setup.py reads what lies beside it; the plugins installed here do not run."""
    app = apps.make("one")
    before = files(app)
    done = apps.run(app)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.outcomes == [("PASSED", "one::TC_App_mine::test_service")]
    assert "templates: mine" in done.stdout
    times = r"test_service  [\d.]+ s  \(setUp [\d.]+, test [\d.]+, tearDown [\d.]+\)"
    assert re.search(times, done.stdout)
    assert files(app) == before


def test_an_app_whose_tests_are_all_skipped_is_told_how_to_say_what_they_need(apps):
    tests = TESTS.replace("(vm,)", "self.skipTest('not installed')  #")
    app = apps.make("bare", spec="", tests=tests)
    assert "All tests were skipped: nothing is tested." in apps.run(app).stdout


def test_what_has_not_changed_is_not_made_again(apps):
    app = apps.make("cached")
    assert "cached: installing" in apps.run(app, words=["--collect-only"]).stderr
    again = apps.run(app, words=["--collect-only"])
    assert again.stderr == ""
    assert "cached::TC_App_mine::test_service" in again.stdout
    (app / "tests/cached_tests/__init__.py").write_text("def list_tests(): return []\n")
    changed = apps.run(app, words=["--collect-only"])
    assert "cached: installing" in changed.stderr
    assert "test_service" not in changed.stdout


def test_each_app_runs_on_its_own_template(apps):
    other = apps.make("other", spec=SPEC.replace("template:mine", "template:yours"))
    done = apps.run(apps.make("one"), other, words=["list"])
    assert [line for line in done.stdout.splitlines() if line[0] != "#"] == [
        "one::TC_App_mine::test_service",
        "other::TC_App_yours::test_service",
    ]


def test_several_apps_share_one_template(apps):
    """Even if two give their entry points one name, or have odd files."""
    again = SETUP.replace('["{name} =', '["low =')
    odd = apps.make("odd")
    (odd / os.fsdecode(b"src/caf\xe9")).write_text("x")
    (odd / "setup.py").symlink_to("nowhere")
    (odd / "more/pyproject.toml").mkdir(parents=True)
    done = apps.run(apps.make("low"), apps.make("high", setup=again), odd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.outcomes == [
        ("PASSED", "low::TC_App_mine::test_service"),
        ("PASSED", "low+::TC_App_mine::test_service"),
        ("PASSED", "odd::TC_App_mine::test_service"),
    ]


def test_commands_that_fail_fail_the_tests_with_what_they_said(apps):
    spec = SPEC + "    echo now it goes wrong; exit 3\n"
    done = apps.run(apps.make("wrong", spec=spec))
    assert done.returncode == 1
    assert done.outcomes[0] == ("FAILED", "wrong::TC_App_mine::test_service")
    assert "template mine: failed after" in done.stderr
    assert "could not run the commands of wrong: exit status 3" in done.stdout
    assert re.search(r"^(E +)?\| now it goes wrong$", done.stdout, re.MULTILINE)
    log = "itests-artifacts/template-mine.log"
    assert (apps.site.work / log).read_text().endswith("now it goes wrong\n")
    assert log in done.stdout
    command = rf"run again +.*--app {apps.directory}/wrong .*wrong::TC_App_mine"
    assert re.search(command, done.stdout)
    assert re.search(command, apps.site.run("report").stdout)


def test_commands_that_hang_are_ended_at_their_deadline(apps):
    spec = SPEC + "    sleep 1000\ntimeout = 1\n"
    done = apps.run(apps.make("hanging", spec=spec))
    assert done.returncode == 1
    assert "it did not end within 1 s" in done.stdout


BROKEN_SETUP = '# "qubes.tests.extra"\nraise SystemExit("no luck with " + {name!r})\n'
BROKEN = {
    "setup": ({"setup": BROKEN_SETUP}, "no luck with setup"),
    "spec": (
        {"spec": "[qubes_itests:template:mine]\nbas = tiny\n"},
        "unknown key 'bas'",
    ),
    "silent": ({"setup": "# nothing\n"}, "names the entry point group"),
    "tests": ({"tests": "import nothing_of_that_name\n"}, "nothing_of_that_name"),
}


def test_a_broken_app_is_one_failing_test_and_the_others_run(apps):
    bad = [apps.make(name, **parts) for name, (parts, _) in BROKEN.items()]
    done = apps.run(*bad, apps.make("good"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert set(done.outcomes) == {
        *(("FAILED", f"{name}::plugin") for name in BROKEN),
        ("PASSED", "good::TC_App_mine::test_service"),
    }
    for _, said in BROKEN.values():
        assert said in done.stdout


def test_a_base_that_is_not_there_is_told(apps):
    spec = "[qubes_itests:template:mine]\nbase = debain-12\n"
    done = apps.run(apps.make("lost", spec=spec))
    assert done.returncode == 1
    assert "base: expected one of tiny, " in done.stdout
    assert "got 'debain-12'" in done.stdout


def test_an_app_that_brings_no_template_runs_on_the_one_that_is_asked_for(apps):
    tests = TESTS.replace("self.assertEqual(", "print(").replace(", 0)", ")")
    app = apps.make("plain", spec="[metadata]\n", tests=tests)
    done = apps.run(app, words=["--template", "tiny"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.outcomes == [("PASSED", "plain::TC_App_tiny::test_service")]


def test_list_shows_the_tests_of_an_app(apps):
    done = apps.site.run("list", "--app", str(apps.make("shown")))
    assert done.stdout.splitlines()[1:] == ["shown::TC_App_mine::test_service"]


def test_a_template_is_built_by_itself_from_a_file(apps, tmp_path):
    path = tmp_path / "more.cfg"
    path.write_text("[qubes_itests:template:more]\nbase = tiny\nrun = : >/etc/more\n")
    words = ["--template-spec", str(path)]
    assert "more" in apps.site.run("template", "list", *words).stdout.split()
    done = apps.site.run("template", "build", "more", *words)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"more: /\S+/layer/\w+/root.img \(\d+ MiB\)\n", done.stdout)
    path.write_text(path.read_text() + "    exit 4\n")
    done = apps.site.run("template", "build", "more", *words)
    assert done.returncode == 3
    assert "exit status 4" in done.stderr


PLAIN = """
    def test_marked(vm_factory):
        assert vm_factory("one").run("[ -e /etc/marked ]", wait=True) == 0
        assert False, "on purpose"
"""


def test_a_plain_suite_of_pytest_has_derived_templates_too(apps, tmp_path):
    path = tmp_path / "spec.cfg"
    path.write_text(
        "[qubes_itests:template:marked]\nbase = tiny\nrun = echo so >/etc/marked\n"
        "artifacts = /etc/mark* /nothing\n"
    )
    (apps.site.work / "test_it.py").write_text(textwrap.dedent(PLAIN))
    words = ("-p", "qubes_itests", "-q", "--itests-template-spec", str(path))
    done = apps.site.run(*words, program="pytest")
    assert done.returncode == 1
    assert "cause       AssertionError: on purpose" in done.stdout
    (kept,) = apps.site.work.glob("itests-artifacts/*/one.file.etc_marked.txt")
    assert kept.read_text() == "so\n"
    page = apps.site.work / "itests-artifacts/report.html"
    assert f"{kept.parent.name}/{kept.name}" in page.read_text()


def test_settings_of_pip_and_of_python_do_not_say_where_tests_go(apps, tmp_path):
    home = tmp_path / "home"
    (home / ".config/pip").mkdir(parents=True)
    target = f"target = {tmp_path}/elsewhere"
    (home / ".config/pip/pip.conf").write_text(f"[install]\nuser = yes\n{target}\n")
    (home / ".pydistutils.cfg").write_text(f"[install]\nprefix = {tmp_path}/other\n")
    for name, value in {
        "HOME": home,
        "PIP_USER": "1",
        "PIP_PREFIX": tmp_path / "elsewhere",
        "PIP_REQUIRE_VIRTUALENV": "1",
        "PYTHONUSERBASE": tmp_path / "elsewhere",
        "GIT_DIR": "/nowhere",
        "PIP_NO_BUILD_ISOLATION": "1",
        "TMPDIR": "/nowhere",
    }.items():
        apps.site.environment[name] = str(value)
    done = apps.run(apps.make("set"), words=["--collect-only"])
    assert "set::TC_App_mine::test_service" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "elsewhere").exists()
    assert not (home / ".local").exists()


#: As an overlay of a container whose own root is one: two are as many as may lie over
#: one another.
OVERLAYS = """\
cd {directory}
mkdir lower upper work upper2 work2 mid
mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay mid
mount -t overlay -o lowerdir=mid,upperdir=upper2,workdir=work2 overlay {apps}
"""


def test_an_app_may_lie_on_an_overlay_over_another(apps, tmp_path):
    app = apps.make("deep")
    over = tmp_path / "over"
    over.mkdir()
    moved = tmp_path / "moved"
    moved.mkdir()
    mount_tmpfs(over, 64 << 20)
    try:
        script = OVERLAYS.format(directory=over, apps=moved)
        subprocess.run(["sh", "-ec", script], check=True)
        shutil.copytree(app, moved / "deep")
        done = apps.run(moved / "deep", words=["--collect-only"])
        assert "deep::TC_App_mine::test_service" in done.stdout, done.stderr
        assert not (moved / "deep/tests/build").exists()
    finally:
        for place in (moved, over / "mid", over):
            subprocess.run(["umount", place], check=False)


def test_a_selection_does_not_hide_why_an_app_cannot_be_run(apps):
    setup = '# "qubes.tests.extra"\nraise SystemExit("no luck")\n'
    app = apps.make("bad", setup=setup)
    done = apps.run(app, words=["bad::TC_App_mine"])
    assert done.returncode == 1
    assert set(done.outcomes) == {("FAILED", "bad::plugin")}
    assert "no luck" in done.stdout
    assert f"app bad: {app} cannot be installed: " in done.stderr


#: What make, mount, apt, overlayfs, QEMU or libvirt may take for something else.
ODD = "o d'd\"&$(x)\\,;%s#=\nline"


def test_the_cache_may_have_any_name_and_forbid_programs(apps, tmp_path):
    cache = tmp_path / ODD
    cache.mkdir()
    options = "noexec,nodev,nosuid,size=2g"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", cache], check=True)
    try:
        apps.site.environment["QUBES_ITESTS_CACHE"] = str(cache)
        done = apps.run(apps.make("any"))
    finally:
        subprocess.run(["umount", cache], check=True)
    assert done.returncode == 0, done.stdout + done.stderr
