"""Methods on labels."""

from __future__ import annotations

from qubes_itests.admin.dispatch import Call, Destination, method
from qubes_itests.admin.validation import label, label_name
from qubes_itests.core.exc import QubesNotImplementedError

__all__: list[str] = []


@method("admin.label.List", destination=Destination.DOM0)
def list_labels(call: Call) -> str:
    """Return the names, one a line."""
    permitted = call.permitted(call.app.labels.values())
    return "".join(f"{each.name}\n" for each in permitted)


@method("admin.label.Get", destination=Destination.DOM0, argument=label)
def get(call: Call) -> str:
    """Return the colour, as 0xRRGGBB."""
    call.permit(label=call.argument)
    return str(call.argument.color)


@method("admin.label.Index", destination=Destination.DOM0, argument=label)
def index(call: Call) -> str:
    """Return the number."""
    call.permit(label=call.argument)
    return str(call.argument.index)


@method(
    "admin.label.Create",
    "admin.label.Remove",
    destination=Destination.DOM0,
    argument=label_name,
    payload=lambda _call, data: data,
)
def change(call: Call) -> None:
    """Refuse: the labels are the standard ones."""
    call.permit()
    raise QubesNotImplementedError(
        f"{call.method} is not available: the labels are the eight standard ones"
    )
