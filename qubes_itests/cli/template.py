"""``template``: build templates before the first run that needs them, list them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.cache import Cache
from qubes_itests.host.kernel import find_kernel
from qubes_itests.run.app_templates import plugins_for
from qubes_itests.run.hooks import offers
from qubes_itests.run.preparation import build_templates
from qubes_itests.run.settings import ConfigurationError

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]

_MIB = 1 << 20


def execute(command: Command, settings: Settings) -> int:
    """Build those that are named, or list all.

    :raise ConfigurationError: for an unknown act or name.
    """
    act, *names = command.words
    known = offers(plugins_for(settings), "templates")
    if act == "list" and not names:
        print("\n".join(known))
        return ExitCode.OK
    if act != "build" or not names:
        raise ConfigurationError("template", "say `list`, or `build` and names")
    for name in names:
        if name not in known:
            found = ", ".join(known)
            problem = f"there is no template {name!r}; there are: {found}"
            raise ConfigurationError("template build", problem)
    build_templates(settings, names)
    cache = Cache()
    for name in names:
        built = known[name](cache, find_kernel(cache))
        size = built.root_image.stat().st_blocks * 512 // _MIB
        print(f"{name}: {built.root_image} ({size} MiB)")
    return ExitCode.OK
