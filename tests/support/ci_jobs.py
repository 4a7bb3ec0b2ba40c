"""The jobs in ``ci/`` as their systems run them: what GitHub and GitLab do, in small.

Steps that are actions of others (``uses:``) are only noted; everything else runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from documented import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = [
    "GITHUB",
    "GITHUB_MERGE",
    "GITLAB",
    "Done",
    "GitHubJob",
    "GitLabJob",
    "make_checkout",
]

GITHUB = ROOT / "ci/github.yml"
GITHUB_MERGE = ROOT / ".github/workflows/app-merge.yml"
GITLAB = ROOT / "ci/gitlab.yml"

_EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
_VARIABLE = re.compile(r"\$(\w+)")


def make_checkout(directory: Path, itests: str) -> None:
    """Fill a checkout of this project in which ``itests`` is another program."""
    shutil.copytree(ROOT / "ci", directory / "ci")
    (directory / "itests").write_text(itests)
    (directory / "itests").chmod(0o755)


@dataclass
class Done:
    """What a job has come to.

    :ivar failed: whether the system would call it failed.
    :ivar output: what it printed.
    :ivar ran: the names of its steps that ran, actions of others among them.
    :ivar summary: its page of GitHub's.
    """

    failed: bool = False
    output: str = ""
    ran: list[str] = field(default_factory=list)
    summary: str = ""

    def run(self, script: str, shell: list[str], **options: Any) -> bool:
        """Run a script as one step; return whether it succeeded."""
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [*shell, "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
            **options,
        )
        self.output += done.stdout
        return done.returncode == 0


class GitHubJob:
    """The job of a reusable workflow.

    :param workspace: an empty directory, which gets the checkouts.
    :param itests: the program in place of ours.
    :param app: copied as the app.
    :param workflow: its file.
    :param cache_hit: whether the cache of the very key was there.
    :param environment: of all steps.
    :param options: of `subprocess.run`, such as the user.
    """

    def __init__(
        self,
        workspace: Path,
        itests: str,
        app: Path,
        *,
        workflow: Path = GITHUB,
        cache_hit: bool = False,
        environment: Mapping[str, str] = os.environ,
        **options: object,
    ) -> None:
        self.workspace = workspace
        self.definition = yaml.safe_load(workflow.read_text())
        shutil.copytree(app, workspace / "app")
        make_checkout(workspace / "qubes_itests", itests)
        hit = "true" if cache_hit else "false"
        self._outputs = {"cache": {"cache-hit": hit}, "pack": {}}
        self._environment = dict(environment)
        self._options = options

    def run(self, **inputs: str) -> Done:
        """Run the steps, with these inputs and the defaults of the others."""
        # YAML 1.1 takes the key `on` for a truth value.
        declared = self.definition[True]["workflow_call"]["inputs"]
        assert inputs.keys() <= declared.keys()
        self._inputs = {name: item["default"] for name, item in declared.items()}
        self._inputs |= inputs
        (job,) = self.definition["jobs"].values()
        shell = job["defaults"]["run"]["shell"]
        assert shell == "bash"
        variables = {name: self._filled(v) for name, v in job["env"].items()}
        done = Done()
        for step in job["steps"]:
            if self._applies(step.get("if", "success()"), failed=done.failed):
                done.ran.append(step["name"])
                if "run" in step and not self._step(step, variables, done):
                    done.failed = True
        return done

    def _step(
        self, step: dict[str, Any], variables: dict[str, str], done: Done
    ) -> bool:
        files = {}
        for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_ENV"):
            files[name] = self.workspace / f".{name}"
            files[name].write_text("")
            files[name].chmod(0o666)
        own = {"GITHUB_ACTIONS": "true", "CI": "true", **variables}
        well = done.run(
            step["run"],
            ["bash", "--noprofile", "--norc", "-eo", "pipefail"],
            cwd=self.workspace,
            env=self._environment | own | {k: str(v) for k, v in files.items()},
            **self._options,
        )
        done.summary += files["GITHUB_STEP_SUMMARY"].read_text()
        lines = files["GITHUB_OUTPUT"].read_text().splitlines()
        if "id" in step:
            pairs = (line.partition("=") for line in lines)
            outputs = self._outputs.setdefault(step["id"], {})
            outputs.update((name, value) for name, _, value in pairs)
        return well

    def _filled(self, text: str) -> str:
        return _EXPRESSION.sub(lambda match: self._value(match[1].strip()), text)

    def _value(self, expression: str) -> str:
        if expression.startswith("inputs."):
            return str(self._inputs[expression.removeprefix("inputs.")])
        match = re.fullmatch(r"steps\.(\w+)\.outputs\.([\w-]+)", expression)
        assert match, expression
        return self._outputs[match[1]].get(match[2], "")

    def _applies(self, condition: str, *, failed: bool) -> bool:
        terms = _EXPRESSION.sub(r"\1", condition).split("&&")
        # Without a function of the status, a step wants all to have gone well so far.
        if not any(re.search(r"\w\(\)", term) for term in terms):
            terms.append("success()")
        return all(self._holds(term.strip(), failed=failed) for term in terms)

    def _holds(self, term: str, *, failed: bool) -> bool:
        functions = {"always()": True, "!cancelled()": True, "success()": not failed}
        if term in functions:
            return functions[term]
        value, quoted = term.split(" != ")
        return self._value(value) != quoted.strip("'")


class GitLabJob:
    """A job that extends a template.

    :param project: a directory with the app, which is its project.
    :param itests: the program in place of ours.
    :param directory: an empty one for everything else.
    :param template: what it extends.
    :param environment: of all scripts.
    """

    def __init__(
        self,
        project: Path,
        itests: str,
        directory: Path,
        *,
        template: str = ".qubes-itests",
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.project = project
        templates = yaml.safe_load(GITLAB.read_text())
        self.definition = _extended(templates, template)
        self._work = directory / "work"
        self._repository = directory / "group/qubes_itests.git"
        self._environment = dict(environment)
        self._publish(itests)

    def run(self, **variables: str) -> Done:
        """Run the scripts, with these variables and the defaults of the others."""
        assert variables.keys() <= self.definition["variables"].keys()
        environment = self._environment | self._variables(variables)
        self._clean()
        done = Done()
        main = [*self.definition["before_script"], *self.definition["script"]]
        for part in (main, self.definition["after_script"]):
            well = done.run(
                "\n".join(part),
                ["bash", "-eo", "pipefail"],
                cwd=self.project,
                env=environment,
            )
            # GitLab does not look at how an after_script ends.
            if part is main:
                done.failed = not well
            else:
                assert well, done.output
        return done

    def _clean(self) -> None:
        """Remove what an earlier job has left, the cache excepted."""
        shutil.rmtree(self.project / "itests-artifacts", ignore_errors=True)
        (self.project / "itests-junit.xml").unlink(missing_ok=True)

    def _variables(self, given: Mapping[str, str]) -> dict[str, str]:
        predefined = {
            "CI": "true",
            "GITLAB_CI": "true",
            "CI_PROJECT_DIR": str(self.project),
            "CI_SERVER_URL": f"file://{self._repository.parents[1]}",
            "CI_PROJECT_ROOT_NAMESPACE": "group",
            "CI_JOB_ID": "1",
        }
        own = {"ITESTS_WORK": str(self._work)}
        declared = {**self.definition["variables"], **own, **given}
        return predefined | {
            name: _VARIABLE.sub(lambda match: predefined[match[1]], value)
            for name, value in declared.items()
        }

    def _publish(self, itests: str) -> None:
        make_checkout(self._repository, itests)
        author = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        tag = self.definition["variables"]["ITESTS_REF"]
        for words in (
            ["init", "--quiet"],
            ["add", "."],
            [*author, "commit", "--quiet", "--message", "x"],
            ["tag", tag],
        ):
            subprocess.run(["git", *words], cwd=self._repository, check=True)


def _extended(jobs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a job with all that it extends, key by key, as GitLab has it."""
    job = dict(jobs[name])
    base = job.pop("extends", None)
    return _merged(_extended(jobs, base), job) if base else job


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    inner = {
        key: _merged(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | above | inner
