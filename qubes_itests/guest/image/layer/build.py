"""The images of layers, one over the other, in the cache: only made in a sandbox."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.exc import LayerError
from qubes_itests.guest.image.layer.chroot import MountedRoot
from qubes_itests.guest.image.layer.packages import image_key
from qubes_itests.guest.image.rootfs import AGENT_LINKS
from qubes_itests.guest.image.settling import SETTLE
from qubes_itests.host.cache import Cache, digest
from qubes_itests.host.command import run
from qubes_itests.host.tree import tree_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from qubes_itests.guest.image.layer.request import Layers, Step

__all__ = ["Builder", "find_layers"]

_KIND: Final = "layer"
_IMAGE: Final = "root.img"
#: Whose text shapes the images.
_BUILDERS: Final = ("build", "chroot", "confine")
_COPY_TIMEOUT: Final = 300.0
_INSTALL_TIMEOUT: Final = 900.0
_SETTLE_TIMEOUT: Final = 120.0
#: No service starts while its package is configured.
_INSTALL: Final = """\
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
set -- {directory}/*.deb
[ ! -e "$1" ] || apt-get -q -y -o APT::Sandbox::User=root \\
    --no-install-recommends install "$@"
rm /usr/sbin/policy-rc.d
"""


def find_layers(cache: Cache, layers: Layers) -> Path | None:
    """Return the image of layers that were built before, None if one was not."""
    image: Path | None = layers.base
    for _, key, _ in _stages(cache, layers):
        found = cache.lookup(_KIND, key)
        image = None if found is None else found / _IMAGE
    return image


class Builder:
    """Makes those images of some layers that are not in the cache.

    :param cache: where they are kept.
    :param layers: what they are made of.
    :param log: a new file for what programs say.
    :param say: is told what is going on.
    """

    def __init__(
        self, cache: Cache, layers: Layers, log: Path, say: Callable[[str], None]
    ) -> None:
        self._cache = cache
        self._layers = layers
        self._log = log
        self._say = say

    def build(self) -> Path:
        """Return the image of the highest layer. Blocking.

        :raise LayerError: one does not build; the others stay in the cache.
        """
        image = self._layers.base
        for what, key, step in _stages(self._cache, self._layers):
            below = image

            def make(place: Path, what: str = what, step: Step | None = step) -> None:
                self._say(what)
                self._make(place, below, step)  # noqa: B023 - it is called at once

            image = self._cache.entry(_KIND, key, make) / _IMAGE
        return image

    def _make(self, place: Path, below: Path, step: Step | None) -> None:
        image, mounted = place / _IMAGE, place / "mounted"
        copy = ("cp", "--reflink=auto", "--sparse=always", below, image)
        run(copy, timeout=_COPY_TIMEOUT)
        image.chmod(0o600)
        mounted.mkdir()
        with MountedRoot(image, mounted, self._layers.template, self._log) as root:
            if step is None:
                self._install(root)
            else:
                _apply(root, step)
            self._check(root)
        mounted.rmdir()
        shutil.copyfile(self._log, place / "log")

    def _install(self, root: MountedRoot) -> None:
        what = f"install {' '.join(self._layers.packages)}"
        if self._layers.archives is not None:
            with root.bound(self._layers.archives, "archives") as directory:
                script = _INSTALL.format(directory=directory)
                root.run(what, script, _INSTALL_TIMEOUT)

    def _check(self, root: MountedRoot) -> None:
        """See that guests will work, and that none has the identity of another."""
        missing = [
            name for name in AGENT_LINKS if not os.path.lexists(root.root / name)
        ]
        if missing:
            raise LayerError(
                self._layers.template,
                "check the agent",
                f"/{missing[0]} is not there any more: without it no VM can be used",
            )
        root.run("do what systemd would at boot", SETTLE, _SETTLE_TIMEOUT)
        root.run("check", "[ ! -e /etc/machine-id ] || : >/etc/machine-id", 60)


def _apply(root: MountedRoot, step: Step) -> None:
    for copy in step.copies:
        root.copy(copy)
    if step.script:
        root.run(f"run the commands of {step.name}", step.script, step.timeout)


def _stages(cache: Cache, layers: Layers) -> list[tuple[str, str, Step | None]]:
    """Return for each image what it is, its key, and its step; packages have none."""
    code = tuple(
        Path(__file__).with_name(f"{name}.py")
        for name in ("build", "chroot", "confine")
    )
    key = digest(image_key(cache, layers.base), SETTLE, *code)
    stages: list[tuple[str, str, Step | None]] = []
    if layers.packages:
        archives = layers.archives
        key = digest(key, *layers.packages, "" if archives is None else archives.name)
        stages.append(("installing packages", key, None))
    for step in layers.steps:
        copied = (
            part
            for copy in step.copies
            for part in (copy.target, copy.key or tree_digest(copy.source))
        )
        key = digest(key, step.script, *copied)
        stages.append((f"adding {step.name}", key, step))
    return stages
