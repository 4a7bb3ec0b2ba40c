"""The preparation of a run, all that needs the network.

Templates are fetched and built, apps installed. A failure of one app or one
derived template does not end the run: its tests fail, and say why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from typing import TYPE_CHECKING, Final

from qubes_itests.run.options import PYTEST
from qubes_itests.run.result import Prepared
from qubes_itests.run.settings import (
    OPTIONS,
    ConfigurationError,
    own_settings,
)
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from qubes_itests.host.cache import Cache
    from qubes_itests.repository import Environment
    from qubes_itests.repository.core import Core
    from qubes_itests.run.app_templates import Wishes
    from qubes_itests.run.settings import Settings

__all__ = [
    "build_templates",
    "prepare",
    "prepare_apps",
    "prepare_listing",
    "told_again",
]

#: Seconds between two lines where there is no terminal.
_PLAIN_INTERVAL: Final = 10.0
_WIDTH: Final = 78
#: Of the settings those that decide which tests there are and how they go.
_TOLD_AGAIN: Final = (
    *(
        "core",
        "qrexec",
        "core_suites",
        "app",
        "template",
        "template_spec",
        "plugin",
        "requires",
        "repository",
        "policy",
    ),
    *("timeout", "start_timeout", "hypervisor", "filesystem", "memory_budget"),
    *("host_memory", "warm", "clones_ahead", "fail_on", "allow_line"),
)


def prepare(settings: Settings, names: Sequence[str] = ()) -> None:
    """Make ready what the run needs, and note the result in the environment.

    Blocking; progress is shown on standard error. What is there already takes a
    few milliseconds.

    :param names: of templates; by default those of the settings, or of the apps.
    :raise EnvironmentNotReadyError: a template that no app derives cannot be fetched.
    :raise ImageError: such a template does not build.
    """
    words = tuple(word for pair in told_again(settings) for word in pair)
    # first what takes seconds: it may be that nothing comes of it
    core = _install_core(settings)
    client = _install_client_of_suites(settings)
    prepared = Prepared()
    if settings.app or settings.template_spec:
        from qubes_itests.run.app_templates import wishes_of

        wishes = wishes_of(settings)
        run_on = wishes.run_on(settings.templates)
        if not settings.template:
            os.environ["QUBES_ITESTS_TEMPLATE"] = " ".join(run_on)
        names = names or settings.template or run_on
        problems = build_templates(settings, names, derived=set(wishes.derived))
        prepared = prepare_apps(settings, wishes)
        prepared = dataclasses.replace(prepared, templates=problems)
    else:
        build_templates(settings, names or settings.templates)
    prepared = dataclasses.replace(_with_core(prepared, core), words=words)
    prepared = _with_suites(prepared, settings.core_suites, client)
    if prepared != Prepared():
        prepared.tell()


def told_again(settings: Settings, prefix: str = "--") -> Iterable[tuple[str, ...]]:
    """Yield the options without which a test is not found again, or is another.

    :param prefix: of their spellings; with that of pytest those that pytest takes.
    """
    for option in map(OPTIONS.__getitem__, _TOLD_AGAIN):
        value = getattr(settings, option.name)
        taken = prefix == "--" or PYTEST in option.commands
        if value == option.default or not taken:
            continue
        if isinstance(value, bool):
            yield (option.spellings(prefix)[0 if value else 1],)
        else:
            for one in value if isinstance(value, tuple) else (value,):
                yield option.spellings(prefix)[0], str(one)


def prepare_listing(settings: Settings) -> Settings:
    """Install a core and the tests of apps.

    :return: the settings with which they are to be seen.
    """
    from qubes_itests.run.app_templates import wishes_of

    core = _install_core(settings)
    client = _install_client_of_suites(settings)
    wishes = wishes_of(settings)
    prepared = _with_core(prepare_apps(settings, wishes), core)
    _with_suites(prepared, settings.core_suites, client).tell()
    template = settings.template or wishes.run_on(settings.templates)
    return dataclasses.replace(settings, template=template)


def prepare_apps(settings: Settings, wishes: Wishes) -> Prepared:
    """Install the tests of the apps, and have this process and its children find them.

    :param wishes: what the apps say.
    :return: what is still to be told.
    """
    if not settings.app:
        return Prepared()
    from qubes_itests.host.cache import Cache
    from qubes_itests.host.sandbox import interruptible
    from qubes_itests.repository import InstallError

    cache, found, wrong = Cache(), [], dict(wishes.problems)
    timeouts: dict[str, float] = {}
    complaints: dict[str, dict[str, tuple[str, ...]]] = {}
    issues: list[str] = []
    for app in settings.app:
        if not app.is_dir():
            raise ConfigurationError("--app", f"there is no directory {app}")
        if app.name not in wrong:
            try:
                # Without this SIGTERM would end the process at once, and leave pip
                # running and a half-made entry in the cache.
                with interruptible():
                    installed = _install(cache, app, settings, wishes)
                own = own_settings(app, settings.template_spec)
                if own.timeout is not None:
                    timeouts |= dict.fromkeys(installed.entries, own.timeout)
                theirs = {"fail_on": own.fail_on, "allow_line": own.allow_line}
                complaints |= dict.fromkeys(installed.entries, theirs)
                issues += [str(path.absolute()) for path in own.known_issues]
                found.append(installed)
            except (InstallError, ConfigurationError, ValueError, OSError) as error:
                wrong[app.name] = str(error)
        if app.name in wrong:
            # Said here as well: the test that fails because of it may be left out.
            first = safe_text(wrong[app.name].partition("\n")[0])
            sys.stderr.write(f"app {safe_text(app.name)}: {first}\n")
    _use(environment.packages for environment in found)
    entries: dict[str, tuple[str, ...]] = {}
    for environment in found:
        names = () if settings.template else wishes.templates(environment.app.name)
        for name in environment.entries:
            entries[name] = (*entries.get(name, ()), *(names or settings.templates))
    return Prepared(
        entries,
        wrong,
        timeouts=timeouts,
        known_issues=tuple(issues),
        complaints=complaints,
        copies={str(each.packages): str(each.app.absolute()) for each in found},
    )


def _install_core(settings: Settings) -> Core | None:
    """Install the core under test, if there is one."""
    checkout = settings.core
    if checkout is None:
        return None
    from qubes_itests.host.cache import Cache
    from qubes_itests.host.sandbox import interruptible
    from qubes_itests.repository.core import install_core

    if not checkout.is_dir():
        raise ConfigurationError("--core", f"there is no directory {checkout}")
    if settings.qrexec is not None and not settings.qrexec.is_dir():
        raise ConfigurationError("--qrexec", f"there is no directory {settings.qrexec}")
    with _shown(f"core {checkout.name}") as progress, interruptible():
        return install_core(Cache(), checkout, settings.qrexec, progress.say)


def _with_core(prepared: Prepared, core: Core | None) -> Prepared:
    """Have this process and its children find the core, before what apps bring."""
    if core is None:
        return prepared
    _use([core.source, *core.packages])
    copies = {**prepared.copies, str(core.source): str(core.checkout)}
    return dataclasses.replace(prepared, core=str(core.source), copies=copies)


def _install_client_of_suites(settings: Settings) -> Path | None:
    """Install the client beside a checkout whose suites run on our own core.

    :return: the directory with its packages; None without a client, or a checkout.
    """
    checkout = settings.core_suites
    if checkout is None:
        return None
    if not (checkout / "qubes/tests/integ").is_dir():
        reason = f"expected a checkout of core-admin, got {checkout}"
        raise ConfigurationError("--core-suites", reason)
    from qubes_itests.host.cache import Cache
    from qubes_itests.host.sandbox import interruptible
    from qubes_itests.repository.core import install_client

    with _shown(f"core {checkout.name}") as progress, interruptible():
        return install_client(Cache(), checkout, progress.say)


def _with_suites(
    prepared: Prepared, checkout: Path | None, client: Path | None
) -> Prepared:
    """Have this process and its children find suites for our own core."""
    if checkout is None:
        return prepared
    _use([client] if client is not None else [])
    return dataclasses.replace(prepared, core_suites=str(checkout))


def _install(
    cache: Cache, app: Path, settings: Settings, wishes: Wishes
) -> Environment:
    from qubes_itests.repository import find_projects, install
    from qubes_itests.repository.requirements import (
        Repositories,
        Requirements,
    )
    from qubes_itests.run.app_templates import named_directories

    with _shown(f"app {app.name}") as progress:
        projects = find_projects(app, settings.plugin or wishes.plugin(app.name))
        words = (*wishes.requires(app.name), *settings.requires)
        requires = Requirements.sort(
            words, Repositories(app, named_directories(settings))
        )
        return install(cache, app, projects, progress.say, requires)


def _use(paths: Iterable[Path]) -> None:
    """Add directories to the path of imports, here and in what we start."""
    # Both: this process has read PYTHONPATH already, and workers read nothing else.
    new = [str(path) for path in paths]
    sys.path[:0] = new
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([*new, *([before] if before else [])])


def build_templates(
    settings: Settings, names: Sequence[str], derived: Iterable[str] = ()
) -> dict[str, str]:
    """Fetch and build those templates that need a network or another template.

    :param names: unknown ones are an error where they are used.
    :param derived: names of those whose failure is no end of the run.
    :return: why those could not be built, by name.
    """
    if set(names) <= {"tiny"} - set(derived):
        return {}  # the usual case need not load what follows
    from qubes_itests.guest.exc import ImageError
    from qubes_itests.host.cache import Cache
    from qubes_itests.host.kernel import find_kernel
    from qubes_itests.host.sandbox import interruptible
    from qubes_itests.run.app_templates import plugins_for
    from qubes_itests.run.hooks import offers

    cache, problems, progress = Cache(), {}, _Progress()
    plugins = plugins_for(settings, progress.say)
    downloads, builds = offers(plugins, "downloads"), offers(plugins, "templates")
    for name in names:
        if name not in downloads:
            continue
        progress.begin(f"template {name}")
        try:
            with interruptible():
                downloads[name](cache, progress.say)
                progress.say("making its image", quiet=True)
                builds[name](cache, find_kernel(cache))
        except ImageError as error:
            if name not in derived:
                raise
            problems[name] = str(error)
        else:
            progress.good = True
        finally:
            progress.end()
    return problems


@contextlib.contextmanager
def _shown(what: str) -> Iterator[_Progress]:
    """Show what goes on within, and at its end how long it took.

    :param what: as for `_Progress.begin`.
    """
    progress = _Progress()
    progress.begin(what)
    try:
        yield progress
        progress.good = True
    finally:
        progress.end()


class _Progress:
    """One line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self.begin("")

    def begin(self, what: str) -> None:
        """Begin with something else.

        :param what: a noun phrase.
        """
        self._what = what
        self._begin = time.monotonic()
        self._last = float("-inf")
        self._drawn = False
        #: Whether it has come to a good end.
        self.good = False

    def say(self, phrase: str, *, quiet: bool = False) -> None:
        """Show what goes on.

        :param quiet: show it only if something was shown before.
        """
        now = time.monotonic()
        if quiet and not self._drawn:
            return
        if not self._terminal and now - self._last < _PLAIN_INTERVAL:
            return
        self._last, self._drawn = now, True
        seconds = now - self._begin
        line = f"{self._what}: {phrase} ({seconds:.0f} s)"
        if self._terminal:
            sys.stderr.write(f"\r{line[:_WIDTH]}\033[K")
        else:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave a line that says how long it took, if there was something to see."""
        if self._drawn:
            start = "\r\033[K" if self._terminal else ""
            seconds = time.monotonic() - self._begin
            how = "ready in" if self.good else "failed after"
            sys.stderr.write(f"{start}{self._what}: {how} {seconds:.0f} s\n")
