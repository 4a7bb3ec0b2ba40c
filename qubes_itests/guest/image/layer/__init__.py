"""Layers: what an app adds to a template, as a separate image over the template's.

Packages are fetched outside of any sandbox (`fetch_packages`), as that takes a network.
The rest happens without one, in its own sandbox (`build_layers`): the image is a
reflink of the one below it, where the filesystem has those.
"""

from __future__ import annotations

from qubes_itests.guest.image.layer.packages import fetch_packages
from qubes_itests.guest.image.layer.request import Copy, Layers, Step
from qubes_itests.guest.image.layer.sandboxed import build_layers

__all__ = ["Copy", "Layers", "Step", "build_layers", "fetch_packages"]
