"""The jobs for maintainers of apps: their users have sudo, their guests are real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from ci_jobs import GitHubJob, GitLabJob

_USER = 65534
#: It drops the environment, as the one that the systems have.
_SUDO = r"""
#define _GNU_SOURCE
#include <grp.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    char uid[32], gid[32];
    char *environment[] = {
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME=/root", uid, gid, NULL};
    snprintf(uid, sizeof uid, "SUDO_UID=%d", (int)getuid());
    snprintf(gid, sizeof gid, "SUDO_GID=%d", (int)getgid());
    if (argc < 3 || strcmp(argv[1], "--non-interactive") != 0)
        return 2;
    if (setgroups(0, NULL) || setgid(0) || setuid(0))
        return 3;
    execvpe(argv[2], argv + 2, environment);
    return 127;
}
"""
_RECORDER = """#!/bin/bash
[ "$1" = --app ] || exit 0
(umask 077 && mkdir -p "$4/test" "$QUBES_ITESTS_CACHE/debian/key")
(umask 077 && env | sort | tee "$4/test/environment" "${5#--junitxml=}" >/dev/null)
"""
_ITESTS = f"""#!/bin/sh
exec {sys.executable} -P -m qubes_itests "$@"
"""
_SETUP = """
from setuptools import setup

setup(
    name="app-of-ci",
    py_modules=["app_of_ci"],
    entry_points={
        "qubes.tests.extra.for_template": ["app-of-ci = app_of_ci:list_tests"]
    },
)
"""
_TESTS = """
from qubes.tests.extra import ExtraTestCase


class TC_00_App(ExtraTestCase):
    def test_000_run(self):
        (vm,) = self.create_vms(["vm"])
        vm.start()
        self.assertEqual(vm.run("exit 3", wait=True), 3)

    def test_010_other(self):
        self.fail("this was not asked for")


def list_tests():
    return [TC_00_App]
"""


@pytest.fixture
def place():
    """Make a directory in which every user may look, as tmp_path is not."""
    with tempfile.TemporaryDirectory(prefix="ci-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def path(place):
    """Return a PATH on which a user finds sudo."""
    sudo = place / "bin/sudo"
    sudo.parent.mkdir()
    command = ["gcc", "-x", "c", "-o", sudo, "-"]
    subprocess.run(command, input=_SUDO, text=True, check=True)
    sudo.chmod(0o4755)
    return f"{sudo.parent}:/usr/bin:/bin"


@pytest.fixture
def app(place):
    app = place / "source"
    app.mkdir()
    (app / "setup.py").write_text(_SETUP)
    (app / "app_of_ci.py").write_text(_TESTS)
    return app


@pytest.fixture
def github(place, app, path):
    """Return a function that makes the job of a user."""

    def make(itests, source=app, **environment):
        workspace = place / "workspace"
        workspace.mkdir()
        job = GitHubJob(
            workspace,
            itests,
            source,
            environment={"PATH": path, **environment},
            user=_USER,
            group=_USER,
            extra_groups=[],
        )
        subprocess.run(["chown", "-R", f"{_USER}:{_USER}", workspace], check=True)
        return job

    return make


def owners(*paths):
    return {path.stat().st_uid for path in paths}


def test_a_user_gets_what_root_has_made(github):
    given = {"QUBES_TEST_TEMPLATES": "a b", "ACTIONS_RUNTIME_TOKEN": "secret"}
    job = github(_RECORDER, **given)
    done = job.run(arguments="x")
    assert not done.failed, done.output
    here = job.workspace
    results = list((here / "itests-artifacts").rglob("*"))
    files = [here / "itests-junit.xml", here / "itests-cache.tar"]
    assert len(results) == 2
    assert owners(*results, *files) == {_USER}
    assert owners(here / "itests-cache/debian/key") == {0}
    seen = (here / "itests-junit.xml").read_text().splitlines()
    assert {"QUBES_TEST_TEMPLATES=a b", "GITHUB_ACTIONS=true"} <= set(seen)
    assert f"QUBES_ITESTS_CACHE={here}/itests-cache" in seen
    assert "PYTHON=/usr/bin/python3" in seen
    assert not [line for line in seen if "secret" in line]
    assert "Keep the cache" in done.ran


def passed(junit):
    cases = ET.parse(junit).getroot().iter("testcase")  # noqa: S314 - our own
    broken = ("failure", "error", "skipped")
    return [
        case.get("name")
        for case in cases
        if not any(case.findall(outcome) for outcome in broken)
    ]


def test_the_tests_of_an_app_run_on_both_systems(github, app, place, site):
    """GitLab's job finds in its cache what GitHub's has built."""
    chosen = "-k test_000"
    variables = {k: v for k, v in site.environment.items() if k.startswith("QUBES_")}
    job = github(_ITESTS, **variables)
    done = job.run(templates="tiny", arguments=chosen)
    assert not done.failed, done.output
    assert passed(job.workspace / "itests-junit.xml") == ["test_000_run"]
    assert "1 passed" in done.summary
    assert "::group::" in done.output
    kept = job.workspace / "itests-cache.tar"
    with tarfile.open(kept) as tar:
        kinds = {name.split("/")[1] for name in tar.getnames() if "/" in name}
    assert {"agent", "initramfs", "tiny"} <= kinds
    shutil.copy2(kept, app)
    before = (app / kept.name).stat()

    directory = place / "gitlab"
    directory.mkdir()
    environment = {**variables, "PATH": os.environ["PATH"]}
    job = GitLabJob(app, _ITESTS, directory, environment=environment)
    done = job.run(ITESTS_TEMPLATES="tiny", ITESTS_ARGUMENTS=chosen)
    assert not done.failed, done.output
    # its set-up shows what it has found
    assert "built: tiny" in done.output
    assert passed(app / "itests-junit.xml") == ["test_000_run"]
    assert (app / kept.name).stat().st_mtime == before.st_mtime


@pytest.fixture
def core(place):
    """Return a checkout in the shape of core-admin, and one of its core-qrexec."""
    core, qrexec = place / "core-admin", place / "core-qrexec"
    shutil.copytree(Path(__file__).parents[2] / "support/fake-core", core)
    qrexec.mkdir()
    (core / "qrexec").rename(qrexec / "qrexec")
    with (core / "qubes/config.py").open("a") as config:
        config.write("import qrexec\n")
    (qrexec / "setup.py").write_text(
        "import setuptools\n"
        "setuptools.setup(name='qrexec', packages=setuptools.find_packages())\n"
    )
    author = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
    commit = [*author, "commit", "--quiet", "--message=x"]
    for words in (["init", "--quiet"], ["add", "."], commit):
        subprocess.run(["git", *words], cwd=qrexec, check=True)
    return core, qrexec


def test_the_suites_of_a_core_run_on_both_systems(github, core, place, site):
    core, qrexec = core
    variables = {k: v for k, v in site.environment.items() if k.startswith("QUBES_")}
    job = github(_ITESTS, core, **variables)
    # its action only notes what it gets
    shutil.copytree(qrexec, job.workspace / "core-qrexec")
    given = "core::unit -k 'test_004 or test_007'"
    done = job.run(qrexec="OWNER/NAME", templates="tiny", arguments=given)
    assert not done.failed, done.output
    tests = ["test_004_templates_have_told_of_their_services"]
    tests += ["test_007_files_of_the_checkout"]
    assert passed(job.workspace / "itests-junit.xml") == tests
    assert "2 passed" in done.summary
    assert (job.workspace / "itests-artifacts/report.html").is_file()
    kept = job.workspace / "itests-cache.tar"
    shutil.copy2(kept, core)
    before = (core / kept.name).stat()

    directory = place / "gitlab"
    directory.mkdir()
    environment = {**variables, "PATH": os.environ["PATH"]}
    template = {"template": ".qubes-itests-core", "environment": environment}
    job = GitLabJob(core, _ITESTS, directory, **template)
    done = job.run(
        ITESTS_QREXEC=f"file://{qrexec}",
        ITESTS_TEMPLATES="tiny",
        ITESTS_ARGUMENTS=given,
    )
    assert not done.failed, done.output
    assert passed(core / "itests-junit.xml") == tests
    # the core that was installed on the other is found in it
    assert "installing it" not in done.output
    assert (core / kept.name).stat().st_mtime == before.st_mtime
