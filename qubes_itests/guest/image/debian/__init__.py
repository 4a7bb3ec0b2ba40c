"""Templates of Debian: its packages, and what makes a Qubes VM of them.

The packages come from the archive, once, outside of any sandbox (`fetch_base`). The
image is made of them and of the files in ``root`` without a network (`build_debian`).
"""

from __future__ import annotations

from qubes_itests.guest.image.debian.base import fetch_base
from qubes_itests.guest.image.debian.image import build_debian, install_files
from qubes_itests.guest.image.debian.release import RELEASES, Release

__all__ = ["RELEASES", "Release", "build_debian", "fetch_base", "install_files"]
