"""``report``: the failures of the last run in this directory, or its page, again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.cache import Cache
from qubes_itests.html_report.page import write_report
from qubes_itests.program import COMMAND
from qubes_itests.report import failures
from qubes_itests.report.failures import last_run
from qubes_itests.run.settings import ConfigurationError
from qubes_itests.timeline import trace_events as trace
from qubes_itests.timeline.document import NAME, load
from qubes_itests.timeline.trace_events import trace_events
from qubes_itests.untrusted_text import safe_text
from qubes_itests.whole_file import whole_file

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]


def execute(command: Command, settings: Settings) -> int:
    """Print them, or write the page; the exit status is that of a run with them."""
    match command.words:
        case ():
            return _show()
        case ("html",):
            directory = settings.artifacts
        case ("html", name):
            directory = Path(name)
        case ("trace",):
            return _export(settings.artifacts)
        case ("trace", name):
            return _export(Path(name))
        case _:
            words = " ".join(command.words)
            problem = f"expected nothing, `html [DIR]` or `trace [DIR]`, got `{words}`"
            raise ConfigurationError("report", problem)
    print(f"Wrote {write_report(directory)}.")
    return ExitCode.OK


def _export(directory: Path) -> int:
    """Write trace events beside the timelines of a run, of each attempt, or of one."""
    root = directory.resolve()
    found = sorted(
        path
        for pattern in (NAME, f"*/{NAME}", f"*/attempt-*/{NAME}")
        for path in directory.glob(pattern)
        # artefacts may be anybody's, and a folder a link to elsewhere
        if path.resolve().is_relative_to(root)
    )
    if not found:
        raise ConfigurationError("report", f"there is no {NAME} in {directory}")
    for path in found:
        target = path.with_name(trace.NAME)
        try:
            exported = trace_events(*load(path.read_bytes()))
            with whole_file(target) as file:  # a link of that name is not followed
                file.write(exported)
        except (ValueError, KeyError, TypeError) as error:
            problem = f"expected a timeline: {safe_text(str(error), limit=80)}"
            raise ConfigurationError(str(path), problem) from error
        except OSError as error:
            raise HarnessError(f"{error.filename}: {error.strerror}") from error
        print(f"Wrote {target}.")
    return ExitCode.OK


def _show() -> int:
    run = failures.load(last_run(Cache().root))
    if run is None:
        print("No run in this directory has ended yet.")
        return ExitCode.NO_TESTS_COLLECTED
    found = run.failures
    if ending := run.ending():
        print(ending)
    elif not found:
        print("The last run in this directory had no failures.")
        return ExitCode.OK
    failures.show(found, COMMAND, print, limit=len(found))
    return ExitCode.TESTS_FAILED
