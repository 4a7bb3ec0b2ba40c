"""Labels: the colours that tell VMs apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qubes_itests.core.exc import QubesLabelNotFoundError

__all__ = ["LABELS", "Label", "find_label"]


@dataclass(frozen=True, slots=True)
class Label:
    """A label.

    :param index: 1 to 8 for the standard ones.
    :param color: as ``0xRRGGBB``.
    :param name: what users call it.
    """

    index: int
    color: str
    name: str

    @property
    def icon(self) -> str:
        """Name of the icon of an AppVM with this label."""
        return f"appvm-{self.name}"

    def __str__(self) -> str:
        return self.name


#: The standard labels, by index.
LABELS: Final = {
    index: Label(index, color, name)
    for index, (name, color) in enumerate(
        (
            ("red", "0xcc0000"),
            ("orange", "0xf57900"),
            ("yellow", "0xedd400"),
            ("green", "0x73d216"),
            ("gray", "0x555753"),
            ("blue", "0x3465a4"),
            ("purple", "0x75507b"),
            ("black", "0x000000"),
        ),
        start=1,
    )
}


def find_label(label: Label | str | int) -> Label:
    """Return the label of a name, an index, or the label itself.

    :raise QubesLabelNotFoundError: when there is none.
    """
    if isinstance(label, Label):
        return label
    for known in LABELS.values():
        if label in (known.name, known.index, str(known.index)):
            return known
    raise QubesLabelNotFoundError(label, (known.name for known in LABELS.values()))
