"""``shell``: a shell in a fresh VM, or in one whose disks were kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.exc import HarnessError
from qubes_itests.shell import WAY_OUT, open_shell, require_terminal

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings
    from qubes_itests.run.testbed import Testbed

__all__ = ["check", "execute"]


def check(_command: Command, _settings: Settings) -> None:
    """Refuse to start without a terminal."""
    require_terminal("shell")


def execute(command: Command, settings: Settings) -> int:
    """Start the VM, open the shell; the exit status is the shell's."""
    # not before: the command line begins without what the sandbox needs
    from qubes_itests.run.app_templates import plugins_for
    from qubes_itests.run.context import RunContext

    context = RunContext(settings, plugins_for(settings))
    try:
        return _open(context.testbed, command.target, settings.templates[0])
    finally:
        context.close()


def _open(testbed: Testbed, target: str, template: str) -> int:
    from qubes_itests.core.volume_content import import_image

    disks = _kept_disks(target)
    if disks is None:
        template = target
        if target not in testbed.template_names:
            known = ", ".join(testbed.template_names)
            raise HarnessError(
                f"{target!r} is neither a template ({known}) nor the directory of a"
                " kept VM (itests-artifacts/TEST/disks/VM, made by --keep=failed)"
            )
    run = testbed.portal.run
    app = run(testbed.make_app(template))
    cls = "StandaloneVM" if disks else "AppVM"
    vm = run(app.create_vm(cls, name="shell", label="red"))
    if disks:
        vm.kernel = template
    for name, image in (disks or {}).items():
        run(import_image(vm.volumes[name], image, image.stat().st_size))
    run(vm.start())
    print(f"A root shell in a VM made from {target}; exit ends the VM. {WAY_OUT}.")
    return open_shell(testbed.portal, vm.running_agent())


def _kept_disks(target: str) -> dict[str, Path] | None:
    directory = Path(target)
    images = {name: directory / f"{name}.img" for name in ("root", "private")}
    found = {name: image for name, image in images.items() if image.is_file()}
    return found if "root" in found else None
