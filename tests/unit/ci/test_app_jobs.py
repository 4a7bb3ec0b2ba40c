"""The jobs for maintainers of apps: what they say, and their steps carried out.

In place of ``itests`` is a recorder, which leaves what a run leaves; the real one has
its turn in the integration tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from ci_jobs import GITHUB, GITHUB_MERGE, GITLAB, GitHubJob, GitLabJob
from documented import ROOT, blocks, page

SCRIPT = ROOT / "ci/app-tests"
#: Builds the entry that $STATE names, if there is none, and fails as $STATUS says.
RECORDER = """#!/bin/bash
[[ $1 = --* ]] || exec echo "$1 ran as $PYTHON"
printf '%s\\n' "$@" >"$RECORD"
ls -A "$2" >"$RECORD.app"
for entry in debian/$STATE tiny/always; do
    [ -d "$QUBES_ITESTS_CACHE/$entry" ] && continue
    mkdir -p "$QUBES_ITESTS_CACHE/$entry"
    truncate --size=64M "$QUBES_ITESTS_CACHE/$entry/root.img"
    touch --date=@"$NOW" "$QUBES_ITESTS_CACHE/$entry"
done
mkdir -p "$QUBES_ITESTS_CACHE"/{runs/x,kvm/x,directories/x,.locks} "$4"
touch "$QUBES_ITESTS_CACHE/.locks/tiny.always"
echo "$PWD" >"$4/console.log"
echo "<testsuites/>" >"${5#--junitxml=}"
echo '::group::plugin'
echo '<b>`a guest`</b>'
exit "$STATUS"
"""
STEPS = [
    "Get the app",
    "Get qubes_itests",
    "Get the cache",
    "Unpack the cache",
    "Set the machine up",
    "Run the tests",
    "Sum up",
    "Keep the results",
    "Pack the cache",
    "Keep the cache",
]


@pytest.fixture
def app(tmp_path):
    place = tmp_path / "an app"
    place.mkdir()
    (place / "setup.cfg").write_text("[qubes_itests:template:tiny]\n")
    return place


@pytest.fixture
def record(tmp_path):
    return tmp_path / "record"


@pytest.fixture
def variables(record):
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ITESTS_", "QUBES_", "GIT", "CI"))
    }
    own = {"RECORD": str(record), "STATUS": "0", "STATE": "one", "NOW": "1000"}
    return inherited | own


@pytest.fixture
def github(tmp_path, app, variables):
    """Return a function that makes the job, in one workspace after the other."""

    def make(*, archive=None, cache_hit=False, **changed):
        workspace = tmp_path / f"workspace-{len(list(tmp_path.iterdir()))}"
        workspace.mkdir()
        if archive:
            archive.rename(workspace / "itests-cache.tar")
        environment = variables | changed
        return GitHubJob(
            workspace, RECORDER, app, cache_hit=cache_hit, environment=environment
        )

    return make


@pytest.fixture
def gitlab(tmp_path, app, variables):
    def make(**changed):
        directory = tmp_path / f"gitlab-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        return GitLabJob(app, RECORDER, directory, environment=variables | changed)

    return make


def scripts():
    """Return every piece of shell in both files, as it runs."""
    (tests,) = yaml.safe_load(GITHUB.read_text())["jobs"].values()
    (merge,) = yaml.safe_load(GITHUB_MERGE.read_text())["jobs"].values()
    parts = ("before_script", "script", "after_script")
    steps = [*tests["steps"], *merge["steps"]]
    texts = [step["run"] for step in steps if "run" in step]
    for job in yaml.safe_load(GITLAB.read_text()).values():
        texts += ["\n".join(job[part]) for part in parts if part in job]
    return [f"set -e\n{text}" for text in texts]


def contents(archive):
    with tarfile.open(archive) as tar:
        return {name.removeprefix("./") for name in tar.getnames()}


@pytest.mark.parametrize("text", [*scripts(), SCRIPT.read_text()])
def test_shell_is_sound(text):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    command = [Path(sys.executable).with_name("shellcheck"), "--shell=bash", "-"]
    done = subprocess.run(
        command, input=text, text=True, capture_output=True, check=False
    )
    assert not done.stdout + done.stderr


def test_shell_is_found():
    assert len(scripts()) == 13


def test_the_workflow_is_where_github_looks_for_it():
    """GitHub takes workflows from one folder only, and no link for a file there."""
    assert GITHUB.resolve() == ROOT / ".github/workflows/app-tests.yml"
    assert not GITHUB.resolve().is_symlink()
    (job,) = yaml.safe_load(GITHUB.read_text())["jobs"].values()
    assert job["concurrency"]["cancel-in-progress"] is True
    assert job["timeout-minutes"] == "${{ inputs.timeout-minutes }}"


@pytest.mark.parametrize("workflow", [GITHUB, GITHUB_MERGE])
def test_a_workflow_can_be_called_and_do_little(workflow):
    definition = yaml.safe_load(workflow.read_text())
    assert list(definition[True]) == ["workflow_call"]
    assert definition["permissions"] == {}
    (job,) = definition["jobs"].values()
    assert job["permissions"] == {"contents": "read"}
    for step in job["steps"]:
        # What others typed reaches the shell as environment only.
        assert "${{" not in step.get("run", "")
        revision = step.get("uses", "@" + 40 * "0").partition("@")[2]
        assert len(revision) == 40


def test_the_cache_of_an_earlier_state_of_the_app_serves_as_well():
    (job,) = yaml.safe_load(GITHUB.read_text())["jobs"].values()
    (restore,) = (s["with"] for s in job["steps"] if s.get("id") == "cache")
    parts = ("runner.os", "inputs.name", "steps.itests.outputs.commit", "setup.cfg")
    assert all(part in restore["key"] for part in parts)
    exact, *prefixes = [restore["key"], *restore["restore-keys"].splitlines()]
    assert len(prefixes) == 2
    assert all(exact.startswith(prefix) for prefix in prefixes)


def test_a_job_of_github(github, record):
    job = github()
    done = job.run(
        templates="debian-12 tiny", arguments="-k 'a and b' -x \"$(id) *\"", name="n"
    )
    assert not done.failed, done.output
    assert done.ran == STEPS
    here = job.workspace
    assert record.read_text().splitlines() == [
        *("--app", "app/.", "--artifacts", f"{here}/itests-artifacts"),
        f"--junitxml={here}/itests-junit.xml",
        *("--summary", f"{here}/itests-summary.md"),
        *("--template", "debian-12", "--template", "tiny"),
        *("-k", "a and b", "-x", "$(id) *"),
    ]
    assert (here / "itests-artifacts/console.log").read_text() == f"{here}\n"
    assert (here / "itests-junit.xml").exists()
    assert "doctor ran as /" in done.output
    assert "### Integration tests: n\n" in done.summary
    assert "::group::plugin" in done.output
    assert done.summary.endswith(" n\n\n    <b>`a guest`</b>\n")


def test_a_job_of_github_for_a_core(github, record):
    job = github()
    done = job.run(qrexec="QubesOS/qubes-core-qrexec", arguments="core::unit")
    assert not done.failed, done.output
    assert done.ran == [STEPS[0], "Get core-qrexec", *STEPS[1:]]
    words = record.read_text().splitlines()
    assert words[:2] == ["--core", "app/."]
    assert words[-3:] == ["--qrexec", "core-qrexec", "core::unit"]


def test_the_archive_has_what_lasts_and_no_zeroes(github):
    job = github()
    job.run()
    archive = job.workspace / "itests-cache.tar"
    kinds = {name.split("/")[0] for name in contents(archive)} - {"."}
    assert kinds == {".locks", "debian", "tiny"}
    assert archive.stat().st_size < 1 << 20


def test_the_exact_cache_is_used_and_not_made_again(github):
    first = github()
    first.run()
    kept = first.workspace / "itests-cache.tar"
    before = kept.stat()
    second = github(archive=kept, cache_hit=True)
    done = second.run()
    assert done.ran == STEPS[:-2]
    image = second.workspace / "itests-cache/debian/one/root.img"
    assert image.stat().st_size == 64 << 20
    assert image.stat().st_blocks == 0
    assert (second.workspace / "itests-cache.tar").stat().st_mtime == before.st_mtime


def test_what_is_made_anew_takes_the_place_of_what_was(github):
    first = github()
    first.run()
    archive = first.workspace / "itests-cache.tar"
    newer = str(archive.stat().st_mtime + 10)
    second = github(archive=archive, STATE="two", NOW=newer)
    done = second.run()
    assert done.ran == STEPS
    found = contents(second.workspace / "itests-cache.tar")
    assert {"debian/two/root.img", "tiny/always/root.img"} <= found
    assert "debian/one" not in found


@pytest.mark.parametrize(("status", "cached"), [("1", True), ("15", False)])
def test_a_failed_run_fails_the_job_and_leaves_its_results(github, status, cached):
    """A machine that was not ready may have left a cache without what it is for."""
    job = github(STATUS=status)
    done = job.run()
    assert done.failed
    assert (done.ran == STEPS) == cached
    assert "Keep the results" in done.ran
    assert "a guest" in done.summary
    assert (job.workspace / "itests-junit.xml").exists()


def test_a_machine_that_is_not_set_up_runs_no_tests(github, record):
    job = github()
    (job.workspace / "qubes_itests/itests").write_text(
        "#!/bin/sh\necho missing\nexit 12\n"
    )
    done = job.run()
    assert done.failed
    assert "Run the tests" not in done.ran
    assert not record.exists()
    assert "\n    missing\n" in done.summary


def test_arguments_that_make_no_words_fail(github, record):
    assert github().run(arguments="-k 'a").failed
    assert not record.exists()


def test_an_interpreter_is_named_by_its_path(github, tmp_path):
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.symlink_to("/bin/true")
    job = github(PATH=f"{python.parent}:{os.environ['PATH']}")
    assert f"doctor ran as {python}\n" in job.run().output


def test_a_job_of_gitlab(gitlab, record, app):
    (app / "sub").mkdir()
    job = gitlab()
    done = job.run(ITESTS_APP="sub", ITESTS_TEMPLATES="tiny", ITESTS_ARGUMENTS="-x")
    assert not done.failed, done.output
    words = record.read_text().splitlines()
    assert words[:2] == ["--app", f"{app}/sub"]
    assert words[-3:] == ["--template", "tiny", "-x"]
    kept = {"itests-artifacts", "itests-cache.tar", "itests-junit.xml"}
    assert {path.name for path in app.iterdir()} == {"setup.cfg", "sub", *kept}
    assert done.output.count("section_start:") == done.output.count("section_end:") == 1


def test_a_job_of_gitlab_for_a_core(app, variables, record, tmp_path):
    qrexec, directory = tmp_path / "qrexec", tmp_path / "gitlab"
    directory.mkdir()
    subprocess.run(["git", "init", "--quiet", qrexec], check=True)
    author = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
    commit = ["git", *author, "commit", "--quiet", "--allow-empty", "--message=x"]
    subprocess.run(commit, cwd=qrexec, check=True)
    template = {"template": ".qubes-itests-core", "environment": variables}
    job = GitLabJob(app, RECORDER, directory, **template)
    assert "core-qrexec" in job.definition["variables"]["ITESTS_QREXEC"]
    done = job.run(ITESTS_QREXEC=f"file://{qrexec}", ITESTS_ARGUMENTS="core::unit")
    assert not done.failed, done.output
    assert (directory / "work/core-qrexec/.git").is_dir()
    words = record.read_text().splitlines()
    assert words[:2] == ["--core", f"{app}/."]
    assert words[-3:] == ["--qrexec", "core-qrexec", "core::unit"]


def test_the_project_has_nothing_but_the_app_while_tests_run(gitlab, app, record):
    """For the app may copy all of it into a guest."""
    gitlab().run()
    gitlab().run()
    assert (app / "itests-cache.tar").exists()
    assert record.with_name("record.app").read_text() == "setup.cfg\n"


def test_each_job_of_gitlab_works_in_the_same_place():
    """Else nothing that was installed into an environment is found in its cache."""
    variables = yaml.safe_load(GITLAB.read_text())[".qubes-itests"]["variables"]
    assert variables["ITESTS_WORK"] == "/tmp/qubes_itests"  # noqa: S108


def test_gitlab_keeps_the_archive_that_nothing_was_added_to(gitlab, app):
    gitlab().run()
    archive = app / "itests-cache.tar"
    before = archive.stat()
    gitlab().run()
    after = archive.stat()
    assert (after.st_ino, after.st_mtime) == (before.st_ino, before.st_mtime)


def test_a_failed_run_fails_the_job_of_gitlab(gitlab, app):
    done = gitlab(STATUS="1").run()
    assert done.failed
    assert (app / "itests-junit.xml").exists()


#: Leaves what `merge` leaves of the parts that it was given.
MERGER = """#!/bin/bash
[ "$1" = merge ] || exit 9
printf '%s\n' "$@" >"$RECORD"
mkdir -p itests-artifacts
for part in "${@:2:$#-5}"; do
    cat "$part/itests-junit.xml" >>itests-artifacts/itests-junit.xml
done
echo "# both" >itests-summary.md
exit "$STATUS"
"""


def fill_parts(directory):
    """Leave what two machines have come to."""
    for number in "12":
        place = directory / "itests-parts" / f"itests-{number}"
        place.mkdir(parents=True)
        (place / "itests-junit.xml").write_text(f"{number}\n")


@pytest.mark.parametrize("status", ["0", "1"])
def test_the_results_of_several_machines_are_merged_on_github(
    tmp_path, app, variables, record, status
):
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    environment = variables | {"STATUS": status}
    job = GitHubJob(
        workspace, MERGER, app, workflow=GITHUB_MERGE, environment=environment
    )
    fill_parts(workspace)
    done = job.run()
    assert done.failed == (status == "1"), done.output
    assert done.ran == [
        *("Get qubes_itests", "Get the results of the machines", "Merge them"),
        *("Sum up", "Keep the results"),
    ]
    assert record.read_text().split() == [
        *("merge", "itests-parts/itests-1", "itests-parts/itests-2"),
        *("--artifacts", f"{workspace}/itests-artifacts"),
        *("--summary", f"{workspace}/itests-summary.md"),
    ]
    assert (workspace / "itests-junit.xml").read_text() == "1\n2\n"
    assert done.summary == "# both\n"


def test_each_machine_of_gitlab_has_its_place_and_a_job_merges_them(
    gitlab, tmp_path, app, variables, record
):
    for number in ("1", "2"):
        done = gitlab(CI_NODE_INDEX=number, CI_NODE_TOTAL="2").run()
        assert not done.failed, done.output
    assert {path.name for path in (app / "itests-parts").iterdir()} == {"1", "2"}
    assert (app / "itests-parts/2/itests-artifacts/console.log").is_file()
    assert (app / "itests-cache.tar").is_file()
    directory = tmp_path / "merging"
    directory.mkdir()
    merging = {"template": ".qubes-itests-merge", "environment": variables}
    job = GitLabJob(app, MERGER, directory, **merging)
    # a merge request would show each test once more
    assert "reports" not in job.definition["artifacts"]
    done = job.run()
    assert not done.failed, done.output
    parts = [f"{app}/itests-parts/{number}" for number in "12"]
    assert record.read_text().splitlines()[:3] == ["merge", *parts]
    assert (app / "itests-junit.xml").read_text() == 2 * "<testsuites/>\n"
    assert (app / "itests-summary.md").read_text() == "# both\n"


def examples():
    """Return the files that the guides have maintainers write.

    They are GitHub's, GitLab's, those of both for several machines, and for a core.
    """
    github, gitlab, several, parallel = blocks("docs/ci.md", "yaml")
    included = gitlab[: gitlab.index("itests:")]
    core = blocks("docs/core-admin.md", "yaml")
    return github, gitlab, f"on: push\n{several}", f"{included}{parallel}", *core


@pytest.mark.parametrize(
    ("text", "schema"),
    list(zip(examples(), 3 * ["github-workflows", "gitlab-ci"], strict=True)),
)
def test_the_examples_of_the_guide_are_of_their_formats(text, schema, tmp_path):
    file = tmp_path / "example.yml"
    file.write_text(text)
    command = [Path(sys.executable).with_name("check-jsonschema"), file]
    subprocess.run([*command, "--builtin-schema", f"vendor.{schema}"], check=True)


def git(*words):
    done = subprocess.run(
        ["git", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()


def test_the_examples_of_the_guide_call_what_there_is():
    parsed = map(yaml.safe_load, examples())
    github, gitlab, several, parallel, core, gitlab_core = parsed
    templates = yaml.safe_load(GITLAB.read_text())
    ref = templates[".qubes-itests"]["variables"]["ITESTS_REF"]
    assert ref == "main" or git("tag", "--list", ref) == ref
    called = [
        *(*github["jobs"].values(), *several["jobs"].values()),
        *core["jobs"].values(),
    ]
    for job in called:
        repository, _, path = job["uses"].partition("/.github/")
        assert (repository, path.partition("@")[2]) == ("OWNER/qubes_itests", ref)
        workflow = ROOT / ".github" / path.partition("@")[0]
        inputs = yaml.safe_load(workflow.read_text())[True]["workflow_call"]["inputs"]
        assert job["with"].keys() <= inputs.keys()
    # whose names are those that the last job looks for
    names = [job["with"].get("name") for job in called[1:-1]]
    assert names == ["itests-${{ matrix.part }}", "itests"]
    for pipeline in (gitlab, parallel, gitlab_core):
        (included,) = pipeline.pop("include")
        assert (included["ref"], ROOT / included["file"]) == (ref, GITLAB)
        for job in pipeline.values():
            assert job["extends"] in templates
            known = templates[".qubes-itests"]["variables"]
            assert job.get("variables", {}).keys() <= known.keys()


def test_the_guide_tells_of_every_input():
    inputs = yaml.safe_load(GITHUB.read_text())[True]["workflow_call"]["inputs"]
    job = yaml.safe_load(GITLAB.read_text())[".qubes-itests"]
    own = {"ITESTS_WORK"}  # nobody needs to change it
    told = set(re.findall(r"`([\w-]+)`", page("docs/ci.md")))
    assert {*inputs, *job["variables"]} - own <= told
