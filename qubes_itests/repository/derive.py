"""Derived templates: what all apps add to a template of one name, put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qubes_itests.guest.image.layer import Copy, Layers, Step
from qubes_itests.host.kernel import GENERIC, KERNELS
from qubes_itests.repository.spec import SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from qubes_itests.host.kernel import Kernel
    from qubes_itests.repository.spec import TemplateSpec

__all__ = ["Derived", "derive"]

#: What loads modules in a guest, and finds out which others each of them needs.
_MODULES_PACKAGE = "kmod"


@dataclass(frozen=True, slots=True)
class Derived:
    """A template that apps add something to.

    :param name: of the template; the base may have the same.
    :param base: name of the template below, which no app derives.
    :param packages: of all apps, each once.
    :param steps: of the apps, in their order.
    :param init: ``agent``, ``systemd``, or None for the base's.
    :param kernel: one of `KERNELS`, or None for the base's.
    """

    name: str
    base: str
    packages: tuple[str, ...]
    steps: tuple[Step, ...]
    init: str | None
    kernel: str | None = None

    def layers(self, root_image: Path, archives: Path | None, kernel: Kernel) -> Layers:
        """Return what is to be built.

        :param root_image: of the base.
        :param archives: directory with the files of the packages; None without any.
        :param kernel: that it boots; its modules are there for what loads them.
        """
        steps = self.steps
        if _MODULES_PACKAGE in self.packages:
            steps = (_modules(kernel), *steps)
        return Layers(self.name, root_image, self.packages, archives, steps)


def derive(specs: Sequence[TemplateSpec]) -> dict[str, Derived | SpecError]:
    """Return the templates that apps want, by name; an error for an invalid one.

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
        kernel = _wish("kernel", [(spec, spec.kernel) for spec in chain])
        packages = [package for spec in chain for package in spec.packages]
        if kernel == GENERIC:
            packages.append(_MODULES_PACKAGE)
        return Derived(
            name=name,
            base=chain[0].base,
            packages=tuple(dict.fromkeys(packages)),
            steps=tuple(
                Step(spec.app, spec.copies, spec.script, spec.timeout)
                for spec in chain
                if spec.copies or spec.script
            ),
            init=_wish("init", [(spec, spec.init) for spec in chain]),
            kernel=kernel,
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
                " one template take the same base",
            )
    base = own[0].base
    if base == name or base not in groups:
        return list(own)
    if base in above:
        names = " -> ".join((*above[above.index(base) :], name, base))
        raise SpecError(own[0].source, f"it is a base of itself: {names}")
    return [*_chain(base, groups, (*above, name)), *own]


def _modules(kernel: Kernel) -> Step:
    target = f"/usr/lib/modules/{kernel.version}"
    # of an entry of the cache, and thousands of files: its name says what is in it
    entry = kernel.modules.parts[-5:]
    key = "/".join(entry) if entry[0] in KERNELS.values() else ""
    copies = (Copy(kernel.modules, target, key),)
    return Step("the modules of the kernel", copies, f"depmod {kernel.version}")


def _wish(key: str, wishes: Sequence[tuple[TemplateSpec, str | None]]) -> str | None:
    """Return the highest wish; apps that share a template must not differ.

    :param key: what is wished for.
    :param wishes: of each that makes the template, the lowest first; None for any.
    """
    of_name: dict[str, tuple[TemplateSpec, str]] = {}
    highest = None
    for spec, wish in wishes:
        if wish is None:
            continue
        other, before = of_name.setdefault(spec.name, (spec, wish))
        if wish != before:
            raise SpecError(
                spec.source, f"{key} is {wish}, but {before} in {other.source}"
            )
        highest = wish
    return highest
