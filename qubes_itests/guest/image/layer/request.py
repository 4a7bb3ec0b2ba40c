"""Descriptions of layers, and the same as JSON for the process that makes them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

__all__ = ["Copy", "Layers", "Step"]


@dataclass(frozen=True, slots=True)
class Copy:
    """Files of the host that go into the guest.

    :param source: a file or a directory of the host; see `host.tree` for what of a
        directory counts.
    :param target: an absolute path in the guest; of a directory the contents go there.
    :param key: what tells the files from others; empty to read them for that.
    """

    source: Path
    target: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One layer: files are copied, then a script runs.

    :param name: for people: the app that it belongs to.
    :param copies: in that order.
    :param script: for ``sh -e``, as root, in the guest's root filesystem without a
        network; empty for none.
    :param timeout: seconds that the script may take.
    """

    name: str
    copies: tuple[Copy, ...] = ()
    script: str = ""
    timeout: float = 600.0


@dataclass(frozen=True, slots=True)
class Layers:
    """All layers of one template.

    :param template: its name.
    :param base: root image of the template below.
    :param packages: names of packages; they make the first layer.
    :param archives: directory with their files, and with those that they need.
    :param steps: the further layers, from the lowest to the highest.
    """

    template: str
    base: Path
    packages: tuple[str, ...] = ()
    archives: Path | None = None
    steps: tuple[Step, ...] = ()

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return what `to_json` was called on."""
        values: dict[str, Any] = json.loads(text)
        archives = values["archives"]
        return cls(
            template=values["template"],
            base=Path(values["base"]),
            packages=tuple(values["packages"]),
            archives=None if archives is None else Path(archives),
            steps=tuple(_step(**step) for step in values["steps"]),
        )


def _step(*, copies: list[dict[str, str]], **values: Any) -> Step:
    made = (Copy(Path(c["source"]), c["target"], c["key"]) for c in copies)
    return Step(copies=tuple(made), **values)
