"""The configuration file, as ``/etc/qubes/qmemman.conf``: section ``[global]``."""

from __future__ import annotations

import configparser
import logging
import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qubes_itests.qmemman.exc import ConfigurationFileError
from qubes_itests.qmemman.policy import DEFAULT_POLICY, Policy
from qubes_itests.qmemman.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["read_policy"]

_LARGEST_FACTOR = 10.0


def _factor(text: str) -> float:
    factor = float(text)
    if not (math.isfinite(factor) and 1 <= factor <= _LARGEST_FACTOR):
        raise ValueError(f"{text!r} is no factor from 1 to {_LARGEST_FACTOR:g}")
    return factor


def _log_level(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,2}", text, re.ASCII) or int(text) > logging.CRITICAL:
        raise ValueError(f"{text!r} is no level from 0 (all) to {logging.CRITICAL}")
    return int(text)


_KEYS: dict[str, Callable[[str], float]] = {
    "vm-min-mem": parse_size,
    "dom0-mem-boost": parse_size,
    "cache-margin-factor": _factor,
    "log-level": _log_level,
}


def read_policy(path: Path, default: Policy = DEFAULT_POLICY) -> Policy:
    """Return the policy that a configuration file asks for.

    :param path: the file; when it does not exist everything stays as it is.
    :param default: gives what the file does not say.
    :raise ConfigurationFileError: for unknown sections and keys, and wrong values.
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError, OSError) as error:
        raise ConfigurationFileError(path, str(error)) from error
    unknown = [name for name in parser.sections() if name != "global"]
    if unknown or parser.defaults():
        raise ConfigurationFileError(
            path, f"unknown section {[*unknown, 'DEFAULT'][0]!r}: only [global] is read"
        )
    values = parser["global"] if parser.has_section("global") else {}
    changes: dict[str, Any] = {
        key.replace("-", "_"): _convert(path, key, values[key]) for key in values
    }
    return replace(default, **changes)


def _convert(path: Path, key: str, text: str) -> float:
    if key not in _KEYS:
        known = ", ".join(_KEYS)
        raise ConfigurationFileError(path, f"unknown key {key!r}; there are {known}")
    try:
        return _KEYS[key](text)
    except ValueError as error:
        raise ConfigurationFileError(path, f"{key}: {error}") from error
