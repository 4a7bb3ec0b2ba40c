"""Templates of apps, offered beside the others."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qubes_itests.exc import HarnessError
from qubes_itests.guest.exc import ImageError
from qubes_itests.guest.image.layer import build_layers, fetch_packages
from qubes_itests.hookspec import hookimpl
from qubes_itests.host.exc import NoKernelError
from qubes_itests.host.kernel import GENERIC, fetch, find_kernel
from qubes_itests.repository import SpecError, derive, read_spec_file, read_specs
from qubes_itests.repository.core import CORE_TEMPLATES
from qubes_itests.run.hooks import offers, registry
from qubes_itests.run.result import Prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import pluggy

    from qubes_itests.core.policy.files import PolicyFile
    from qubes_itests.guest.image.template import Template
    from qubes_itests.host.cache import Cache
    from qubes_itests.host.kernel import Kernel
    from qubes_itests.repository import Derived, TemplateSpec
    from qubes_itests.run.settings import Settings

__all__ = [
    "AppTemplates",
    "TemplateProblemError",
    "Wishes",
    "named_directories",
    "plugins_for",
    "policy_of",
    "wishes_of",
]

_PLUGIN: Final = "apps"
_T = TypeVar("_T")


class TemplateProblemError(HarnessError):
    """A template could not be made ready before the run; the text says why."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the apps of a run say of templates.

    :param specs: in the order of the apps, after those of files.
    :param problems: for each app whose description of templates is not valid, why.
    :param of_apps: for each other app what it says: its own specs, else those of files.
    """

    specs: tuple[TemplateSpec, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)
    of_apps: Mapping[str, tuple[TemplateSpec, ...]] = field(default_factory=dict)

    def templates(self, app: str) -> tuple[str, ...]:
        """Return the names of the templates that an app's tests run on; () for any."""
        return _names(self.of_apps[app])

    def plugin(self, app: str) -> tuple[str, ...]:
        """Return where an app says that its tests are; () for where they are found."""
        return _each_once(spec.plugin for spec in self.of_apps[app])

    def requires(self, app: str) -> tuple[str, ...]:
        """Return what an app says that its tests need on this machine."""
        return _each_once(spec.requires for spec in self.of_apps[app])

    @property
    def policy(self) -> tuple[PolicyFile, ...]:
        """The files of policy, each once."""
        return _each_once(spec.policy for spec in self.specs)

    @property
    def artifacts(self) -> tuple[str, ...]:
        """The paths in guests of which failed tests leave what is there."""
        return _each_once(spec.artifacts for spec in self.specs)

    @property
    def derived(self) -> tuple[str, ...]:
        """Names of the templates that are derived, each once."""
        return _names(self.specs)

    def run_on(self, default: Sequence[str]) -> tuple[str, ...]:
        """Return the names of all templates that tests run on.

        :param default: for apps that want none in particular.
        """
        names = (self.templates(app) or default for app in self.of_apps)
        return _each_once(names) or self.derived or tuple(default)


def _each_once(lists: Iterable[Iterable[_T]]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys(word for words in lists for word in words))


def _names(specs: Iterable[TemplateSpec]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(spec.name for spec in specs))


def wishes_of(settings: Settings) -> Wishes:
    """Read the templates of the apps and files of a run.

    :raise SpecError: a file is not valid; an invalid app is among the `problems`.
    """
    named = named_directories(settings)
    files = [
        spec for path in settings.template_spec for spec in read_spec_file(path, named)
    ]
    specs, problems, of_apps = list(files), {}, {}
    for app in settings.app:
        try:
            own = read_specs(app, named)
            _check_policy(own, specs)
        except SpecError as error:
            problems[app.name] = str(error)
        else:
            specs += own
            of_apps[app.name] = tuple(own or files)
    return Wishes(tuple(specs), problems, of_apps)


def named_directories(settings: Settings) -> dict[str, Path]:
    """Return the directories that the words of an app may name, by their names."""
    return {path.name: path for path in (*settings.app, *settings.repository)}


def _check_policy(
    specs: Iterable[TemplateSpec], others: Iterable[TemplateSpec]
) -> None:
    """Raise SpecError if two apps bring different files of policy by one name.

    On a system with both they would be in each other's way, too.
    """
    taken = {
        name: (path, spec)
        for spec in others
        for file in spec.policy
        for name, path in file.parts()
    }
    for spec in specs:
        for file in spec.policy:
            for name, path in file.parts():
                before, other = taken.get(name, (path, spec))
                if before.read_bytes() != path.read_bytes():
                    raise SpecError(
                        spec.source,
                        f"policy: {path.name} differs from the file of that name in"
                        f" {other.source}, and a run takes one file of each name",
                    )


def policy_of(settings: Settings) -> tuple[PolicyFile, ...]:
    """Return the files of policy that hold for all tests of a run, the default aside.

    Those of the settings come last, and so replace those of apps.
    """
    from qubes_itests.core.policy.files import PolicyFile

    of_apps: tuple[PolicyFile, ...] = ()
    if settings.app or settings.template_spec:
        of_apps = wishes_of(settings).policy
    return (*of_apps, *map(PolicyFile, settings.policy))


def plugins_for(
    settings: Settings, say: Callable[[str], None] = lambda _text: None
) -> pluggy.PluginManager:
    """Return all that offers templates and the like: bundled, installed, apps.

    :param say: called with what is going on while a template is built.
    """
    plugins = registry()
    core = settings.core or settings.core_suites
    if settings.app or settings.template_spec or core:
        specs = [*wishes_of(settings).specs]
        if core is not None:
            # the lowest: what a template of Qubes OS has is there for apps, too
            specs = [*read_spec_file(CORE_TEMPLATES), *specs]
        own = AppTemplates(derive(specs), plugins, settings.artifacts, say)
        plugins.register(own, _PLUGIN)
    return plugins


class AppTemplates:
    """Derives templates from those that other plugins offer.

    :param wanted: what is derived, by name.
    :param plugins: the others, as they are now.
    :param logs: a directory for what the building of a template said when it failed.
    :param say: called with what is going on.
    """

    def __init__(
        self,
        wanted: Mapping[str, Derived | SpecError],
        plugins: pluggy.PluginManager,
        logs: Path,
        say: Callable[[str], None],
    ) -> None:
        self._wanted = wanted
        self._bases: Mapping[str, Any] = offers(plugins, "templates")
        self._downloads: Mapping[str, Any] = offers(plugins, "downloads")
        self._logs = logs
        self._say = say

    @hookimpl
    def qubes_itests_templates(
        self,
    ) -> Mapping[str, Callable[[Cache, Kernel], Template]]:
        """Return what builds them; without a network, if they were fetched."""
        return {name: functools.partial(self._build, name) for name in self._wanted}

    @hookimpl
    def qubes_itests_downloads(
        self,
    ) -> Mapping[str, Callable[[Cache, Callable[[str], None]], object]]:
        """Return what fetches their packages, and their bases'."""
        return {name: functools.partial(self._fetch, name) for name in self._wanted}

    def _derived(self, name: str) -> Derived:
        wanted = self._wanted[name]
        if isinstance(wanted, SpecError):
            raise ImageError(f"template {name}", str(wanted))
        if wanted.base not in self._bases:
            known = ", ".join(self._bases)
            raise ImageError(
                f"template {name}",
                f"base: expected one of {known}, got {wanted.base!r}",
            )
        return wanted

    def _fetch(self, name: str, cache: Cache, say: Callable[[str], None]) -> None:
        derived = self._derived(name)
        if derived.base in self._downloads:
            self._downloads[derived.base](cache, say)
        if derived.kernel == GENERIC:
            # Unless there is one: a run does not ask for a newer one.
            try:
                find_kernel(cache, GENERIC)
            except NoKernelError:
                say("fetching the generic kernel")
                fetch(cache, GENERIC)
        base = self._bases[derived.base](cache, find_kernel(cache))
        self._archives(derived, base, cache, say)

    def _archives(
        self,
        derived: Derived,
        base: Template,
        cache: Cache,
        say: Callable[[str], None],
    ) -> Path | None:
        if not derived.packages:
            return None
        names = derived.packages
        return fetch_packages(cache, derived.name, base.root_image, names, say)

    def _build(self, name: str, cache: Cache, kernel: Kernel) -> Template:
        if problem := Prepared.told().templates.get(name):
            raise TemplateProblemError(problem)
        derived = self._derived(name)
        if derived.kernel == GENERIC:
            kernel = find_kernel(cache, GENERIC)
        base: Template = self._bases[derived.base](cache, kernel)
        archives = self._archives(derived, base, cache, self._say)
        layers = derived.layers(base.root_image, archives, kernel)
        log = self._logs / f"template-{name}.log"
        return dataclasses.replace(
            base,
            name=name,
            root_image=build_layers(cache, layers, log, self._say),
            init=derived.init or base.init,
        )
