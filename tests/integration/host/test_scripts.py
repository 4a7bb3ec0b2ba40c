"""The scripts: what they refuse, what they set up, and how little they add after that.

They run in a small checkout with a real virtual environment and a real pip; only the
project in it is a tiny one without dependencies, so that no network is needed.
"""

import contextlib
import glob
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conditions import wait_until

from qubes_itests.host import packages

_ROOT = Path(__file__).parents[3]
_NOBODY = 65534
#: What `run-tests` checks with, by name.
CHECKS = (
    *("ruff", "mypy", "lint-imports", "shellcheck", "towncrier", "check-jsonschema"),
    "zizmor",
)

_BACKEND = """
import zipfile
from collections.abc import Iterator
from pathlib import Path

def build_editable(directory, config_settings=None, metadata_directory=None):
    requires = Path("requires").read_text() if Path("requires").exists() else ""
    info = "NAME-0.1.dist-info"
    files = {
        "NAME.pth": str(Path.cwd()),
        f"{info}/METADATA": "Metadata-Version: 2.1\\nName: NAME\\n"
        f"Version: 0.1\\nProvides-Extra: dev\\n{requires}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\n"
        "Tag: py3-none-any\\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\\n" for name in files)
    name = "NAME-0.1-py3-none-any.whl"
    with zipfile.ZipFile(Path(directory, name), "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return name
"""
_PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


def _write_project(root: Path, name: str) -> None:
    (root / "backend.py").write_text(_BACKEND.replace("NAME", name))
    (root / "pyproject.toml").write_text(_PYPROJECT)


class Checkout:
    """A checkout to run the scripts in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHON", "GITHUB_ACTIONS", "GITLAB_CI", "PYTHONPATH")
        }
        self.environment |= {
            "QUBES_ITESTS_CACHE": str(root / "cache"),
            "QUBES_ITESTS_KERNEL": "/named",
            "PIP_RETRIES": "0",
            "PIP_CACHE_DIR": str(root / "pip-cache"),
            # The interpreter of the tests may itself be that of an environment.
            "PYTHON": str(Path(sys.executable).resolve()),
        }
        self._make()

    def _make(self) -> None:
        for name in ("itests", "run-tests", "setup.sh", "setup.cfg"):
            shutil.copy(_ROOT / name, self.root / name)
        package = self.root / "qubes_itests"
        (package / "host").mkdir(parents=True)
        shutil.copy(_ROOT / "qubes_itests/host/pip_settings.py", package / "host")
        self.table.write_text((_ROOT / "qubes_itests/host/packages.tsv").read_text())
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(
            "import os, sys\nprint('ran', *sys.argv[1:])\n"
            "print(sorted(os.listdir('/proc/self/fd'), key=int), file=sys.stderr)\n"
        )
        _write_project(self.root, "qubes_itests")
        # on no index: the project is installed together with it, or not at all
        (self.root / "requires").write_text("Requires-Dist: qubes-storage\n")
        (self.root / "storage").mkdir()
        _write_project(self.root / "storage", "qubes_storage")
        (self.root / "pytest.py").write_text("print('pytest ran')\n")

    @property
    def table(self) -> Path:
        return self.root / "qubes_itests/host/packages.tsv"

    @property
    def python(self) -> Path:
        return self.root / ".venv/bin/python"

    def run(
        self, *words: str, before: str = "", **options
    ) -> subprocess.CompletedProcess:
        """Run a script, after shell commands in a mount namespace of its own."""
        script = f'set -e; {before}\nexec "$0" "$@"'
        namespace = ["unshare", "--mount", "bash", "-c", script] if before else []
        environment = self.environment | options.pop("env", {})
        return subprocess.run(
            [*namespace, self.root / words[0], *words[1:]],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **options,
        )

    def need(self, line: str) -> None:
        with self.table.open("a") as table:
            table.write(line + "\n")


@contextlib.contextmanager
def _new_checkout() -> Iterator[Checkout]:
    # Not tmp_path, where nobody but root may look.
    with tempfile.TemporaryDirectory(prefix="itests-scripts-") as directory:
        Path(directory).chmod(0o755)
        yield Checkout(Path(directory))


@pytest.fixture
def checkout():
    """Make a fresh checkout."""
    with _new_checkout() as fresh:
        yield fresh


@pytest.fixture(scope="module")
def shared_checkout():
    with _new_checkout() as shared:
        assert shared.run("run-tests", "--version").returncode == 0
        yield shared


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("pip") / "elsewhere"


@pytest.fixture(scope="module")
def set_up_by_two(elsewhere):
    """Return a checkout that two runs set up at once, and what each of them said.

    Their user's settings of pip are such as whoever installs programs for himself has.
    """
    config = elsewhere.with_name("pip.conf")
    config.write_text(f"[global]\nuser = yes\n[install]\ntarget = {elsewhere}\n")
    with _new_checkout() as checkout:
        unwanted = {"PIP_CONFIG_FILE": str(config), "PIP_PREFIX": str(elsewhere)}
        both = [
            subprocess.Popen(
                [checkout.root / "itests", "one", "two words"],
                env={**checkout.environment, **unwanted, "PIP_USER": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        outputs = [one.communicate(timeout=300) for one in both]
        assert [one.returncode for one in both] == [0, 0], outputs
        yield checkout, outputs


@pytest.fixture
def ready(shared_checkout):
    """Return a checkout that is set up for runs and tests, or can be in a moment."""
    done = shared_checkout.run("run-tests", "--version")
    assert done.returncode == 0, done.stderr
    return shared_checkout


@pytest.fixture
def apt(checkout, tmp_path):
    """Point apt at an archive, and at directories of its own."""
    state = tmp_path / "apt"
    for sub in ("state/lists/partial", "cache/archives/partial", "parts", "archive"):
        (state / sub).mkdir(parents=True)
    (state / "status").touch()
    (state / "archive/Packages").touch()
    (state / "apt.conf").write_text(
        f'Dir::State "{state}/state"; Dir::State::status "{state}/status";\n'
        f'Dir::Cache "{state}/cache"; Dir::Etc::sourcelist "{state}/sources.list";\n'
        f'Dir::Etc::sourceparts "{state}/parts"; Acquire::Languages "none";\n'
        "Acquire::Retries 0;\n"
    )
    checkout.environment["APT_CONFIG"] = str(state / "apt.conf")

    def use(address: str) -> None:
        line = f"deb [trusted=yes] {address.format(state / 'archive')} ./\n"
        (state / "sources.list").write_text(line)

    return use


def _last_line(done: subprocess.CompletedProcess) -> str:
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", ["itests", "run-tests"])
def test_without_root_one_sentence(checkout, script):
    done = checkout.run(script, user=_NOBODY, group=_NOBODY, extra_groups=[])
    assert done.returncode == 10
    assert done.stderr.startswith(f"{script}: this must run as root")
    assert "sudo" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_loop_devices_one_sentence(checkout, tmp_path):
    (tmp_path / "none").touch()
    before = f"mount --bind {tmp_path}/none /dev/loop-control"
    done = checkout.run("itests", before=before)
    assert done.returncode == 11
    assert done.stderr.startswith("itests: there are no loop devices")
    assert "modprobe loop" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_package_and_no_network(checkout, apt):
    """No archive answers: what is missing, and that the network is, in the end."""
    apt("http://127.0.0.1:9")
    checkout.need("tool:no-such-tool\tis for this test\tno-such-pkg\tno-such-pkg")
    done = checkout.run("itests")
    assert done.returncode == 15
    assert "missing: no-such-tool" in _last_line(done)
    assert "cannot be reached" in _last_line(done)


def test_what_only_tests_need_is_no_matter_of_a_run(checkout, apt):
    checkout.need("test:no-such-tool\topens nothing\tno-such-pkg\tno-such-pkg")
    apt("file:{}")
    assert checkout.run("itests", "x").stdout == "ran x\n"
    done = checkout.run("run-tests", "--version")
    assert done.returncode == 12
    assert "apt-get cannot install no-such-pkg" in _last_line(done)


def test_a_package_that_the_archive_does_not_have(checkout, apt):
    apt("file:{}")
    checkout.need("tool:no-such-tool\tis for this test\tno-such-pkg\tno-such-pkg")
    done = checkout.run("itests")
    assert done.returncode == 12
    assert "apt-get cannot install no-such-pkg" in _last_line(done)
    assert "Unable to locate package no-such-pkg" in done.stderr


def test_another_distribution_is_told_what_to_install(checkout, tmp_path):
    (tmp_path / "os-release").write_text("ID=fedora\n")
    checkout.need("tool:no-such-tool\tis for this test\tno-such-pkg\tno-such-pkg")
    before = f'mount --bind {tmp_path}/os-release "$(readlink -f /etc/os-release)"'
    done = checkout.run("itests", before=before)
    assert done.returncode == 12
    assert "no-such-tool" in done.stderr
    assert "no-such-pkg" in done.stderr


def test_apt_is_not_called_when_nothing_is_missing(ready, tmp_path):
    """An apt that would leave a trace does not."""
    (tmp_path / "apt-get").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    (tmp_path / "apt-get").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    (ready.root / ".venv/.set-up").unlink()
    assert ready.run("itests", env={"PATH": path}).returncode == 0
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/false"])
def test_an_unusable_python_is_refused(checkout, python):
    done = checkout.run("itests", env={"PYTHON": python})
    assert done.returncode == 12
    assert done.stderr.startswith(f"itests: {python} is not Python 3.11 or newer")


def test_a_package_index_that_cannot_be_reached(ready):
    requires = ready.root / "requires"
    before = requires.read_text()
    requires.write_text("Requires-Dist: no-such-distribution\n")
    (ready.root / ".venv/.set-up").unlink()
    index = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INDEX": ""}
    done = ready.run("itests", env=index)
    requires.write_text(before)
    assert done.returncode == 15
    assert "package index cannot be reached" in _last_line(done)


def test_the_kernel_is_fetched_or_the_lack_is_passed_on(ready):
    """With what the kernel's own command says, and its exit status."""
    module = ready.root / "qubes_itests/host/kernel.py"
    module.write_text(
        "import sys\nprint('no kernel today', file=sys.stderr)\nsys.exit(15)\n"
    )
    done = ready.run("itests", env={"QUBES_ITESTS_KERNEL": ""})
    module.unlink()
    assert done.returncode == 15
    assert _last_line(done) == "no kernel today"


def test_set_up_once_then_nothing_but_the_command(set_up_by_two):
    """The first run says what it does; the second is silent and hands all on."""
    checkout, outputs = set_up_by_two
    assert [stdout for stdout, _ in outputs] == ["ran one two words\n"] * 2
    first = max((stderr for _, stderr in outputs), key=len)
    assert first.splitlines()[:2] == [
        f"itests: making .venv with {checkout.environment['PYTHON']}",
        "itests: installing the project and its Python dependencies",
    ]
    second = checkout.run("itests", "three")
    assert second.stdout == "ran three\n"
    # Only the standard streams, and the one that lists them.
    assert second.stderr == "['0', '1', '2', '3']\n"
    # The tests need more than the runs, whom that serves as well.
    more = checkout.run("run-tests", "--version")
    assert "run-tests: installing the project" in more.stderr
    assert checkout.run("itests").stderr == second.stderr


def test_two_at_once_set_up_once(set_up_by_two):
    _, outputs = set_up_by_two
    assert "".join(stderr for _, stderr in outputs).count("making .venv") == 1


def test_settings_of_pip_do_not_say_where_the_project_goes(set_up_by_two, elsewhere):
    """They may, for whoever installs programs for himself with the same pip."""
    checkout, _ = set_up_by_two
    assert list(checkout.python.parents[1].glob("lib/*/site-packages/qubes_*"))
    assert not elsewhere.exists()


def test_it_works_from_anywhere_and_through_a_link(ready, tmp_path):
    """Whatever lies there: even a module of the same name."""
    (tmp_path / "link").symlink_to(ready.root / "itests")
    (tmp_path / "qubes_itests.py").write_text("raise SystemExit('the wrong one')")
    done = subprocess.run(
        [tmp_path / "link", "x"],
        cwd=tmp_path,
        env=ready.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "ran x\n"), done.stderr


def test_changed_inputs_are_installed_again_into_the_same_environment(ready):
    marker = ready.root / ".venv/marker"
    marker.touch()
    with (ready.root / "setup.cfg").open("a") as file:
        file.write("# changed\n")
    done = ready.run("itests")
    assert "installing the project" in done.stderr
    assert "making" not in done.stderr
    assert marker.exists()


def test_bundled_plugins_are_installed(ready):
    """Like any other plugin, and one that is new at the next start."""
    plugin = ready.root / "plugins/extra"
    plugin.mkdir(parents=True)
    (plugin / "setup.py").touch()
    _write_project(plugin, "extra_plugin")
    done = ready.run("itests")
    code = "import importlib.metadata as m; print(m.version('extra-plugin'))"
    version = subprocess.run(
        [ready.python, "-c", code], capture_output=True, text=True, check=False
    )
    shutil.rmtree(plugin.parent)
    assert done.returncode == 0, done.stderr
    assert version.stdout == "0.1\n", version.stderr


def test_a_virtual_environment_whose_python_vanished_is_remade(ready):
    ready.python.unlink()
    ready.python.symlink_to("/no/such/python3")
    done = ready.run("itests", "again")
    assert "making .venv" in done.stderr
    assert done.stdout == "ran again\n"


def test_set_up_that_was_killed_is_taken_up_again(checkout):
    """Wherever it was: the next run completes it, whatever was half made.

    A pip of which the first files are there can be imported, and does not run; a
    project without the last file of its installation can be neither used nor removed.
    """
    packages = ".venv/lib/python3*/site-packages"
    for sign in (
        "build/setup.log",
        f"{packages}/pip/__init__.py",
        f"{packages}/qubes_*.dist-info",
    ):
        with subprocess.Popen(
            checkout.root / "itests",
            env=checkout.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                # other than that of Path it does not mind what is removed meanwhile
                while not glob.glob(str(checkout.root / sign)):  # noqa: PTH207
                    assert process.poll() is None, f"it ended without {sign}"
                    time.sleep(0.001)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    done = checkout.run("itests", "whole")
    assert done.stdout == "ran whole\n", done.stderr


def test_set_up_for_tests_that_was_killed_leaves_no_half_a_program(ready):
    """The project is installed anew for them, and was set up for runs before."""
    (ready.root / ".venv/.unfinished").touch()
    done = ready.run("itests", "whole")
    assert "making .venv" in done.stderr
    assert done.stdout == "ran whole\n"


def test_once_set_up_it_adds_little_time(ready, record_property):
    """Half a second is what it may add to the bare command, in time of the CPU."""

    def median(command: list) -> float:
        times = []
        for _ in range(7):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                command,
                cwd=ready.root,
                env=ready.environment,
                check=True,
                capture_output=True,
                timeout=300,
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            user = after.ru_utime - before.ru_utime
            times.append(user + after.ru_stime - before.ru_stime)
        return statistics.median(times)

    bare = median([ready.python, "-m", "qubes_itests"])
    added = median([ready.root / "itests"]) - bare
    record_property("set_up_ms", round(added * 1000))
    sys.stdout.write(f"itests adds {added * 1000:.0f} ms to {bare * 1000:.0f} ms\n")
    assert added < 0.5


def test_run_tests_explains_itself_without_setting_up(checkout):
    done = checkout.run("run-tests", "--help")
    assert done.returncode == 0
    assert "--fast" in done.stdout
    assert not (checkout.root / ".venv").exists()
    assert checkout.run("run-tests", "--fast", "x").returncode == 4


def test_a_failed_check_fails_the_run_and_the_others_still_run(ready):
    """With programs in place of the real checks: one of them fails."""
    for name in CHECKS:
        tool = ready.python.with_name(name)
        status = int(name == "mypy")
        tool.write_text(f"#!/bin/sh\necho {name} ran >&2\nexit {status}\n")
        tool.chmod(0o755)
    done = ready.run("run-tests", "--fast", env={"GITHUB_ACTIONS": "true"})
    ran = re.findall(r"(\S+) ran", done.stdout)
    assert set(ran) == {*CHECKS, "pytest"}
    folds = done.stdout.count("::group::")
    assert folds == done.stdout.count("::endgroup::") == len(ran)
    assert (done.returncode, _last_line(done)) == (1, "run-tests: failed: mypy")


def test_the_status_of_failed_tests_is_that_of_the_run(ready):
    pytest_module = ready.root / "pytest.py"
    pytest_module.write_text("raise SystemExit(21)\n")
    for name in CHECKS:
        tool = ready.python.with_name(name)
        tool.write_text("#!/bin/sh\nexit 1\n")
        tool.chmod(0o755)
    status = ready.run("run-tests", "--fast").returncode
    pytest_module.write_text("print('pytest ran')\n")
    assert status == 21


def test_what_runs_beside_the_tests_ends_with_the_script(ready, tmp_path):
    """It is killed while a check still runs, which would go on for ever."""
    (ready.root / "pytest.py").write_text(
        "import os, pathlib, signal, time\n"
        "while not os.path.exists('begun') or not pathlib.Path('begun').read_text():\n"
        "    time.sleep(0.01)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
    )
    for name in CHECKS:
        tool = ready.python.with_name(name)
        slow = name == "mypy"
        tool.write_text(f"#!/bin/sh\n{'echo $$ >begun; exec sleep 1000' * slow}\n")
        tool.chmod(0o755)
    done = ready.run("run-tests", "--fast", env={"TMPDIR": str(tmp_path)})
    (ready.root / "pytest.py").write_text("print('pytest ran')\n")
    begun = ready.root / "begun"
    check = Path("/proc", begun.read_text().strip(), "cmdline")
    begun.unlink()
    assert done.returncode != 0
    wait_until(lambda: not check.exists(), "the check's end")
    assert list(tmp_path.iterdir()) == []


def test_this_machine_is_one_of_those_in_the_table():
    """Otherwise the refusals above would have other reasons than they say."""
    assert packages.distribution() in ("debian", "ubuntu")
