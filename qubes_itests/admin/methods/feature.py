"""Methods on features and tags."""

from __future__ import annotations

from typing import Final

from qubes_itests.admin.dispatch import Call, method
from qubes_itests.admin.validation import ascii_text, feature_name, tag_name
from qubes_itests.core.exc import (
    QubesFeatureNotFoundError,
    QubesTagNotFoundError,
    QubesValueError,
)
from qubes_itests.core.vm.features import Features

__all__: list[str] = []

#: Whose feature counts if the VM has it not, by the end of the method's name.
_FALLBACKS: Final = {
    "Template": Features.check_with_template,
    "Netvm": Features.check_with_netvm,
    "AdminVM": Features.check_with_adminvm,
    "TemplateAndAdminVM": Features.check_with_template_and_adminvm,
}


def _value(call: Call, data: bytes) -> str:
    text = ascii_text(data)
    if not text.isprintable():
        raise QubesValueError(
            f"the value of feature {call.argument!r} has control characters"
        )
    return text


@method("admin.vm.feature.List")
def list_features(call: Call) -> str:
    """Return the names, one a line."""
    return "".join(f"{name}\n" for name in call.permitted(call.destination.features))


@method("admin.vm.feature.Get", argument=feature_name)
def get_feature(call: Call) -> str:
    """Return the value."""
    call.permit()
    return str(call.destination.features[call.argument])


@method(
    *(f"admin.vm.feature.CheckWith{name}" for name in _FALLBACKS),
    argument=feature_name,
)
def check_feature(call: Call) -> str:
    """Return the value, or else the one that others have."""
    call.permit()
    check = _FALLBACKS[call.method.removeprefix("admin.vm.feature.CheckWith")]
    value: str | None = check(call.destination.features, call.argument, None)
    if value is None:
        raise QubesFeatureNotFoundError(call.destination, call.argument)
    return str(value)


@method("admin.vm.feature.Set", argument=feature_name, payload=_value, saves=True)
def set_feature(call: Call) -> None:
    """Set it."""
    call.permit(value=call.payload)
    call.destination.features[call.argument] = call.payload


@method("admin.vm.feature.Remove", argument=feature_name, saves=True)
def remove_feature(call: Call) -> None:
    """Remove it."""
    call.permit()
    if call.argument not in call.destination.features:
        raise QubesFeatureNotFoundError(call.destination, call.argument)
    del call.destination.features[call.argument]


@method("admin.vm.tag.List")
def list_tags(call: Call) -> str:
    """Return the tags, one a line."""
    return "".join(f"{tag}\n" for tag in call.permitted(sorted(call.destination.tags)))


@method("admin.vm.tag.Get", argument=tag_name)
def get_tag(call: Call) -> str:
    """Return 1 if the VM has it, else 0."""
    call.permit()
    return str(int(call.argument in call.destination.tags))


@method("admin.vm.tag.Set", argument=tag_name, saves=True)
def set_tag(call: Call) -> None:
    """Add it."""
    call.permit()
    call.destination.tags.add(call.argument)


@method("admin.vm.tag.Remove", argument=tag_name, saves=True)
def remove_tag(call: Call) -> None:
    """Remove it."""
    call.permit()
    if call.argument not in call.destination.tags:
        raise QubesTagNotFoundError(call.destination, call.argument)
    call.destination.tags.remove(call.argument)
