"""The program ``itests``, which is ``python -m qubes_itests`` as well."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line of this process, and return its exit status."""
    from qubes_itests.cli import command_line  # noqa: PLC0415 - see its docstring

    return command_line(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
