"""Templates: the files from which guests are started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Template"]


@dataclass(frozen=True, slots=True)
class Template:
    """The files of one template, all of them only ever read.

    :param name: as in "tiny".
    :param kernel: kernel image.
    :param initramfs: initramfs with the agent as init.
    :param root_image: ext4 image of the root filesystem.
    :param kernel_options: added to the back end's kernel command line.
    :param init: the feature ``init`` of its TemplateVM: ``agent`` or ``systemd``.
    """

    name: str
    kernel: Path
    initramfs: Path
    root_image: Path
    kernel_options: str = ""
    init: str = "agent"
