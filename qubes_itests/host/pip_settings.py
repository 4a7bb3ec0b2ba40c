"""The settings of pip that say how packages are reached, and no others.

pip also takes from its files and from the environment where packages go (`user`,
`target`, `prefix`) and how they are built; what is installed for a run is no matter of
those. Also a program, for setup.sh, which runs it before anything is installed::

    pip_settings.py PYTHON    writes NAME=VALUE lines, each ended by a NUL

It uses nothing but the standard library.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

__all__ = ["pip_settings"]

_TIMEOUT = 60.0
_LINE = re.compile(r"^(\S+?)\.([a-z-]+)=(.+)$", re.MULTILINE)
#: What applies to `pip install`, the stronger behind the weaker.
_SECTIONS = ("global", "install", ":env:")
_REACH = (
    *("cert", "client-cert", "constraint", "default-timeout", "extra-index-url"),
    *("find-links", "index-url", "keyring-provider", "no-index", "proxy", "retries"),
    *("timeout", "trusted-host", "cache-dir", "no-cache-dir", "use-deprecated"),
)


def pip_settings(python: str) -> dict[str, str]:
    """Return environment variables for pip, with which it reads no file of settings.

    Blocking, for a fraction of a second.

    :param python: the interpreter whose pip is asked.
    :raise OSError: there is no such program.
    :raise subprocess.SubprocessError: pip does not understand its settings; has what
        it says as `stderr`.
    """
    listed = subprocess.run(
        [python, "-P", "-m", "pip", "config", "list"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=_TIMEOUT,
    ).stdout
    found = {
        (section, name): str(ast.literal_eval(value))
        for section, name, value in _LINE.findall(listed)
        if section in _SECTIONS and name in _REACH
    }
    settings = {
        "PIP_" + name.upper().replace("-", "_"): " ".join(found[section, name].split())
        for section in _SECTIONS
        for name in _REACH
        if (section, name) in found
    }
    return {**settings, "PIP_CONFIG_FILE": os.devnull}


if __name__ == "__main__":
    try:
        for name, value in pip_settings(sys.argv[1]).items():
            sys.stdout.write(f"{name}={value}\0")
    except subprocess.CalledProcessError as error:
        sys.exit(error.stderr)
