"""Methods on a VM's firewall rules and notes."""

from __future__ import annotations

from typing import Final

from qubes_itests.admin.dispatch import Call, Destination, method
from qubes_itests.admin.validation import lines
from qubes_itests.core.exc import ProtocolError
from qubes_itests.core.network.firewall import parse_rule

__all__: list[str] = []

_BLANK: Final = "\t\n"


@method("admin.vm.firewall.Get", destination=Destination.VM)
def get_rules(call: Call) -> str:
    """Return the rules, one a line."""
    call.permit()
    return "".join(f"{rule}\n" for rule in call.destination.firewall.rules)


def _rules(call: Call, data: bytes) -> list[str]:
    return [parse_rule(line) for line in lines(call, data)]


@method("admin.vm.firewall.Set", destination=Destination.VM, payload=_rules, saves=True)
def set_rules(call: Call) -> None:
    """Replace the rules by those of the payload, one a line."""
    call.permit(rules=call.payload)
    call.destination.firewall.rules = call.payload
    call.destination.fire_event("firewall-changed")


@method("admin.vm.firewall.Reload", destination=Destination.VM)
def reload_rules(call: Call) -> None:
    """Have the rules read again by what enforces them."""
    call.permit()
    call.destination.fire_event("firewall-changed")


@method("admin.vm.notes.Get", destination=Destination.VM)
def get_notes(call: Call) -> str:
    """Return the notes."""
    call.permit()
    return str(call.destination.notes)


def _notes(call: Call, data: bytes) -> str:
    del call
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ProtocolError("expected text in UTF-8") from None
    # they are shown to people, who must not be fooled by what does not show
    return "".join(c if c.isprintable() or c in _BLANK else "_" for c in text)


@method("admin.vm.notes.Set", destination=Destination.VM, payload=_notes, saves=True)
def set_notes(call: Call) -> None:
    """Replace the notes; what cannot be shown becomes an underscore."""
    call.permit()
    call.destination.notes = call.payload
