"""A cache for runs of tests' own, with what is dear to build for guests of `tiny`."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Final

from qubes_itests.host.cache import Cache

if TYPE_CHECKING:
    from pathlib import Path

#: What of the cache a run on `tiny` uses.
_KINDS: Final = {
    *("agent", "directories", "initramfs", "kernel", "kvm"),
    *("libvirt-capabilities", "stage-one", "tiny"),
}


def fill(cache: Path) -> None:
    """Have entries of the real cache in another; what is not there, runs build as ever.

    They share the files, saved states of 100 MB among them: nothing writes to those of
    an entry. Layers of apps, and what Debian is made from, are left out.

    :param cache: an empty directory.
    """
    for entry in Cache().content():
        if entry.kind not in _KINDS:
            continue
        place = cache / entry.kind
        place.mkdir(exist_ok=True)
        what = ("--", str(entry.place), str(place))
        if subprocess.run(
            ["cp", "-al", *what], stderr=subprocess.DEVNULL, check=False
        ).returncode:
            # it is on another filesystem
            shutil.rmtree(place / entry.place.name, ignore_errors=True)
            subprocess.run(["cp", "-a", "--reflink=auto", *what], check=True)
