"""Documents of the past, brought to the present form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qubes_itests.core.store.document import Element

__all__ = ["ELSEWHERE", "modernise"]

#: Names that properties of VMs once had.
_RENAMED: Final = {"dispvm_allowed": "template_for_dispvms"}

#: Properties that VMs of Qubes OS have and ours may not: nothing here depends on them.
ELSEWHERE: Final = frozenset(
    {
        "gateway",
        "gateway6",
        "mac",
        "stubdom_mem",
        "stubdom_uuid",
    }
)


def modernise(root: Element) -> None:
    """Change a document to what would be written today.

    Labels that are referred to by their ids, renamed properties, services that are not
    features yet, VMs whose number is only in their id.
    """
    ids = {
        label.attributes.get("id", ""): label.text
        for label in root.grandchildren("labels", "label")
    }
    for domain in root.grandchildren("domains", "domain"):
        for element in domain.grandchildren("properties", "property"):
            _modernise_property(element, ids)
        _services_to_features(domain)
        _number_from_id(domain)


def _modernise_property(element: Element, labels: dict[str, str]) -> None:
    attributes = element.attributes
    name = attributes.get("name", "")
    attributes["name"] = _RENAMED.get(name, name)
    if (reference := attributes.pop("ref", None)) is not None:
        element.text = labels.get(reference, reference)
    elif name == "label":
        element.text = labels.get(element.text, element.text)


def _services_to_features(domain: Element) -> None:
    for service in list(domain.grandchildren("services", "service")):
        on = service.attributes.get("enabled", "True").lower() == "true"
        features = next(domain.find_all("features"), None) or domain.add("features")
        feature = features.add(
            "feature", "1" if on else "", name=f"service.{service.text}"
        )
        feature.line, feature.column = service.line, service.column


def _number_from_id(domain: Element) -> None:
    known = {
        element.attributes["name"]
        for element in domain.grandchildren("properties", "property")
    }
    word, _, number = domain.attributes.get("id", "").partition("-")
    if "qid" in known or word != "domain":
        return
    properties = next(domain.find_all("properties"), None) or domain.add("properties")
    qid = properties.add("property", number, name="qid")
    qid.line, qid.column = domain.line, domain.column
