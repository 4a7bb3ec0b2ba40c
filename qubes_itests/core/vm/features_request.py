"""Features that guests ask for: what a template says that it can, and boot modes.

A guest notes what it asks for in its database, below ``/features-request/``, and calls
``qubes.FeaturesRequest`` of dom0.  The VM's event ``features-request`` follows, with
`untrusted_features`: texts by names, all of them the guest's word.  Extensions do with
it what they want; what the one of the core does is as in Qubes OS.
"""

from __future__ import annotations

import datetime as dt
import re
import subprocess
from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import QubesValueError
from qubes_itests.core.ext import Extension, handler

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.guest.link.calls import ServiceCall

__all__ = ["CoreFeatures", "request_features"]

_TIMEOUT: Final = 60.0
#: A line of what the guest has in its database; it is asked for a prefix.
_ENTRY: Final = re.compile(r"([A-Za-z0-9_.-]+) = ([A-Za-z0-9_.,= -]*)", re.ASCII)

#: What is taken from the guest as it is, if it has this form.
_TEXTS: Final = {
    "os": r"[A-Za-z0-9]+",
    "os-distribution": ".+",
    "os-distribution-like": ".+",
    "os-version": r"[0-9][0-9.-]*",
    "qubes-agent-version": r"[0-9]{1,3}\.[0-9]{1,3}",
    "anon-timezone": "1",
}
#: Of these a guest has the first word only, of those the last, too.
_ONCE: Final = ("qrexec", "gui", "gui-emulated")
_FREELY: Final = ("qubes-firewall", "vmexec")
#: How names begin of what a VM can; what it does not list any more it cannot any more.
_ABILITIES: Final = ("supported-feature.", "supported-service.")
_SERVICES: Final = "supported-rpc."
_OPTIONS: Final = "boot-mode.kernelopts."
_MODES: Final = (_OPTIONS, "boot-mode.name.", "boot-mode.default-user.")
_MOST_MODES: Final = 64


async def request_features(source: QubesVM, call: ServiceCall) -> int:
    """Serve ``qubes.FeaturesRequest``: read what the guest asks for, and tell of it.

    :param source: the VM that calls.
    :param call: its call.
    :return: 0.
    :raise QubesValueError: when there are names or values that no feature may have.
    """
    del call
    try:
        output, _ = await source.commands.ask(
            "qubesdb-multiread /features-request/",
            "say which features it asks for",
            timeout=_TIMEOUT,
        )
    except subprocess.CalledProcessError as error:
        reason = f"the guest of {source} does not say what it asks for: {error}"
        raise QubesValueError(reason) from None
    features = {}
    for line in output.decode(errors="replace").splitlines():
        if (entry := _ENTRY.fullmatch(line)) is None:
            raise QubesValueError(f"{source} asks for {line!r}, which is no feature")
        features[entry[1]] = entry[2]
    await source.fire_event_async("features-request", untrusted_features=features)
    await source.app.save_async()
    return 0


class CoreFeatures(Extension):
    """Gives templates and standalone VMs the features that they ask for."""

    @handler("features-request")
    async def on_features_request(
        self, vm: QubesVM, _event: str, untrusted_features: Mapping[str, str]
    ) -> None:
        """Set the features; ``template-postinstall`` follows the first word of qrexec.

        Of a VM that starts from a template no more than its services are set: what it
        can is for its template to say.
        """
        _advertise(vm, _SERVICES, untrusted_features)
        if vm.template_or_none is not None:
            vm.log.warning("features that %s asks for are for its template to say", vm)
            return
        for prefix in _ABILITIES:
            _advertise(vm, prefix, untrusted_features)
        for name, form in _TEXTS.items():
            if re.fullmatch(form, value := untrusted_features.get(name, "")):
                vm.features[name] = value
        if _is_date(end := untrusted_features.get("os-eol", "")):
            vm.features["os-eol"] = end
        _offer_modes(vm, untrusted_features)
        had_qrexec = vm.features.get("qrexec")
        for name in (*_ONCE, *_FREELY):
            value = untrusted_features.get(name, "")
            if value in ("0", "1") and (name in _FREELY or name not in vm.features):
                vm.features[name] = value == "1"
        if vm.features.get("qrexec") and not had_qrexec:
            await vm.fire_event_async("template-postinstall")


def _is_date(text: str) -> bool:
    try:
        return dt.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _advertise(vm: QubesVM, prefix: str, asked: Mapping[str, str]) -> None:
    able = {n for n, value in asked.items() if n.startswith(prefix) and value == "1"}
    if not able:
        return  # it is about something else
    before = {n for n, value in vm.features.items() if n.startswith(prefix) and value}
    vm.features.update(dict.fromkeys(able - before, "1"))
    for name in before - able:
        del vm.features[name]


def _offer_modes(vm: QubesVM, asked: Mapping[str, str]) -> None:
    """Replace the boot modes by those that a guest offers, and say which are used."""
    offered = {n: value for n, value in asked.items() if _is_mode(n, asked)}
    shown = [value for n, value in offered.items() if not n.startswith(_OPTIONS)]
    if offered and len(offered) <= _MOST_MODES and len(shown) == len(set(shown)):
        for name in [n for n in vm.features if n.startswith(_MODES)]:
            if name not in offered:
                del vm.features[name]
        vm.features.update(offered)
    for use in ("active", "appvm-default", "standalone-default"):
        mode = asked.get(f"boot-mode.{use}")
        known = mode == "default" or f"{_OPTIONS}{mode}" in vm.features
        has = use != "appvm-default" or vm.offered_bootmode is not None
        if mode is not None and known and has:
            vm.features[f"boot-mode.{use}"] = mode


def _is_mode(name: str, asked: Mapping[str, str]) -> bool:
    """Tell whether it is of a mode that has options, or the name of the default one."""
    if not name.startswith(_MODES) or name.count(".") != 2:  # noqa: PLR2004
        return False
    mode = name.rpartition(".")[2]
    if mode == "default":
        return name == "boot-mode.name.default"
    return bool(mode) and f"{_OPTIONS}{mode}" in asked
