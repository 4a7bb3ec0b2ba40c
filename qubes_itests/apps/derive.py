"""Templates that apps derive: the wishes of all apps for one name, put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qubes_itests.apps.exc import SpecError
from qubes_itests.guest.layer import Layers, Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from qubes_itests.apps.spec import TemplateSpec

__all__ = ["Derived", "derive"]


@dataclass(frozen=True, slots=True)
class Derived:
    """A template that apps add something to.

    :param name: of the template; the base may have the same.
    :param base: name of the template below, which no app derives.
    :param packages: of all apps, each once.
    :param steps: of the apps, in their order.
    :param init: ``agent``, ``systemd``, or None for the base's.
    """

    name: str
    base: str
    packages: tuple[str, ...]
    steps: tuple[Step, ...]
    init: str | None

    def layers(self, root_image: Path, archives: Path | None) -> Layers:
        """Return what is to be built.

        :param root_image: of the base.
        :param archives: directory with the files of the packages; None without any.
        """
        return Layers(self.name, root_image, self.packages, archives, self.steps)


def derive(specs: Sequence[TemplateSpec]) -> dict[str, Derived | SpecError]:
    """Return the templates that apps want, by name; an error for one that cannot be.

    :param specs: of all apps, in their order: layers of the first are the lowest.
    """
    groups: dict[str, list[TemplateSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.name, []).append(spec)
    return {name: _derived(name, groups) for name in groups}


def _derived(
    name: str, groups: Mapping[str, Sequence[TemplateSpec]]
) -> Derived | SpecError:
    try:
        chain = _chain(name, groups, ())
        return Derived(
            name=name,
            base=chain[0].base,
            packages=tuple(dict.fromkeys(p for spec in chain for p in spec.packages)),
            steps=tuple(_steps(chain)),
            init=_init(chain),
        )
    except SpecError as error:
        return error


def _chain(
    name: str, groups: Mapping[str, Sequence[TemplateSpec]], above: tuple[str, ...]
) -> list[TemplateSpec]:
    """Return what makes a template, the lowest first."""
    own = groups[name]
    for spec in own[1:]:
        if spec.base != own[0].base:
            raise SpecError(
                spec.source,
                f"base is {spec.base}, but {own[0].base} in {own[0].source}: layers of"
                " one template lie over one base",
            )
    base = own[0].base
    if base == name or base not in groups:
        return list(own)
    if base in above:
        names = " -> ".join((*above[above.index(base) :], name, base))
        raise SpecError(own[0].source, f"it is a base of itself: {names}")
    return [*_chain(base, groups, (*above, name)), *own]


def _steps(chain: Iterable[TemplateSpec]) -> Iterable[Step]:
    for spec in chain:
        if spec.copies or spec.script:
            yield Step(spec.app, spec.copies, spec.script, spec.timeout)


def _init(chain: Sequence[TemplateSpec]) -> str | None:
    """Return the highest wish; apps that share a template must not differ."""
    wishes = {spec.name: spec for spec in chain if spec.init is not None}
    for spec in chain:
        other = wishes.get(spec.name)
        if other is not None and spec.init not in (None, other.init):
            raise SpecError(
                spec.source, f"init is {spec.init}, but {other.init} in {other.source}"
            )
    return next((s.init for s in reversed(chain) if s.init is not None), None)
