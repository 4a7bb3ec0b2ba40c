"""Loading of an app from a document, in the stages of Qubes OS.

1. labels and pools, 2. VMs and their plain properties, 3. the app's properties,
4. properties whose values are VMs, and what else VMs have, 5. what has to fit together.

The app is new, and no event is fired before the last stage is done: an app whose
document is refused is dropped, and nothing is left of it.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final, NoReturn

from qubes_itests.core.device.assignment import AssignmentMode, DeviceAssignment
from qubes_itests.core.device.port import ANY, Port, VirtualDevice
from qubes_itests.core.exc import QubesException, QubesPropertyValueError
from qubes_itests.core.store.file import StoreFormatError
from qubes_itests.core.vm.adminvm import AdminVM
from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_storage.drivers import pool_class

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.properties import PropertyHolder
    from qubes_itests.core.store.document import Element
    from qubes_itests.core.vm.base import BaseVM

__all__ = ["Loading"]

log = logging.getLogger("qubes.store")

_VERSIONS: Final = {"3", "4"}
_IDENTITY: Final = ("qid", "name", "uuid")
_LAST_STAGE: Final = 4

#: Names that properties of VMs once had.
_RENAMED: Final = {"dispvm_allowed": "template_for_dispvms"}
#: Properties that VMs of Qubes OS have and ours may not: nothing here depends on them.
_ELSEWHERE: Final = frozenset(
    {"gateway", "gateway6", "mac", "stubdom_mem", "stubdom_uuid"}
)

#: Attributes of volumes that are not text.
_FLAGS: Final = ("rw", "save_on_stop", "snap_on_start", "ephemeral")
_NUMBERS: Final = ("size", "revisions_to_keep")


class Loading:
    """One load of an app.

    :param app: a new one, which has only its dom0.
    :param root: the document.
    :param path: the file that it is from, for errors.
    """

    def __init__(self, app: Qubes, root: Element, path: Path) -> None:
        self._app = app
        self._root = root
        self._path = path
        self._vms: list[tuple[BaseVM, Element]] = []
        #: Properties of VMs that may need other VMs.
        self._references: list[tuple[PropertyHolder, Element]] = []
        #: The elements that name a VM, by what they say: for duplicates.
        self._identities: dict[tuple[str, str], Element] = {}

    def run(self) -> None:
        """Load; StoreFormatError says what cannot be and where."""
        if self._root.tag != "qubes":
            self._refuse(
                self._root, f"expected the element 'qubes', got {self._root.tag!r}"
            )
        version = self._root.attributes.get("version", "3.0")
        if version.partition(".")[0] not in _VERSIONS:
            self._refuse(
                self._root,
                f"expected version 3 or 4 of the format, got {version!r}",
            )
        _modernise(self._root)
        self._load_labels_and_pools()
        for domain in self._root.grandchildren("domains", "domain"):
            self._load_vm(domain)
        found = self._unique(self._root.grandchildren("properties", "property"), "name")
        known = {prop.name for prop in self._app.property_list()}
        for name in found.keys() - known:
            self._warn(found[name], f"the app has no property {name!r}")
        self._set_all((self._app, found[name]) for name in found if name in known)
        self._set_all(self._references)
        # A volume of a VM is made from that of its template, which has to be known.
        for vm, domain in sorted(self._vms, key=lambda item: _depth(item[0])):
            # reading a property that has no default and is not set: AttributeError
            has_one = "template" in {prop.name for prop in vm.property_list()}
            if has_one and vm.template_or_none is None:
                self._refuse(domain, f"{vm.klass} {vm} lacks a template")
            self._load_extras(vm, domain)
        self._check_networks()

    @contextlib.contextmanager
    def _at(self, element: Element) -> Iterator[None]:
        """Have an error of the core or of storage say which element it is about."""
        try:
            yield
        except StoreFormatError:
            raise
        except (QubesException, ValueError, TypeError) as error:
            self._refuse(element, str(error), error)

    def _refuse(
        self, element: Element, reason: str, cause: Exception | None = None
    ) -> NoReturn:
        raise StoreFormatError(
            self._path, element.line, element.column, reason
        ) from cause

    def _warn(self, element: Element, reason: str) -> None:
        log.warning("%s:%d: %s; ignored", self._path, element.line, reason)

    def _attribute(self, element: Element, name: str) -> str:
        """Return an attribute that has to be there and not to be empty."""
        if not element.attributes.get(name):
            self._refuse(element, f"{element.tag!r} lacks the attribute {name!r}")
        return element.attributes[name]

    def _unique(self, elements: Iterable[Element], name: str) -> dict[str, Element]:
        """Return elements by an attribute that no two of them may share."""
        found: dict[str, Element] = {}
        for element in elements:
            value = self._attribute(element, name)
            if value in found:
                self._refuse(
                    element,
                    f"{element.tag} {value!r} is in line {found[value].line} already",
                )
            found[value] = element
        return found

    # stage 1

    def _load_labels_and_pools(self) -> None:
        labels = self._root.grandchildren("labels", "label")
        for element in self._unique(labels, "id").values():
            try:
                self._app.get_label(element.text)
            except QubesException as error:
                self._warn(element, str(error))
        pools = self._unique(self._root.grandchildren("pools", "pool"), "name")
        for name, element in pools.items():
            options: dict[str, Any] = dict(element.attributes)
            options.pop("driver", None)
            with self._at(element):
                cls = pool_class(self._attribute(element, "driver"))
                self._app.pools[name] = cls(**options)

    # stage 2

    def _load_vm(self, domain: Element) -> None:
        properties = self._unique(
            domain.grandchildren("properties", "property"), "name"
        )
        vm = self._make_vm(domain, properties)
        self._vms.append((vm, domain))
        stages = {prop.name: prop.load_stage for prop in vm.property_list()}
        plain: list[tuple[PropertyHolder, Element]] = []
        for name, element in properties.items():
            if name not in stages:
                if name not in _ELSEWHERE:
                    self._refuse(element, f"{vm.klass} has no property {name!r}")
                self._warn(element, f"property {name!r} has no meaning here")
            elif stages[name] >= _LAST_STAGE:
                self._references.append((vm, element))
            elif name not in _IDENTITY:
                plain.append((vm, element))
        self._set_all(plain)

    def _make_vm(self, domain: Element, properties: dict[str, Element]) -> BaseVM:
        klass = self._attribute(domain, "class")
        for name in ("qid", "name"):
            if name not in properties:
                self._refuse(domain, f"a VM without property {name!r}")
        identity: dict[str, Any] = {
            name: self._claim(name, properties[name])
            for name in _IDENTITY
            if name in properties
        }
        if klass == AdminVM.__name__:
            dom0 = self._app.domains[0]
            if (identity["qid"], identity["name"]) != ("0", dom0.name):
                self._refuse(
                    domain, f"the AdminVM has qid 0 and the name {dom0.name!r}"
                )
            return dom0
        with self._at(domain):
            cls: type[BaseVM] = self._app.get_vm_class(klass)
        try:
            return self._app.domains.add(cls(self._app, **identity), announce=False)
        except (QubesException, ValueError, TypeError) as error:
            name = error.prop.name if isinstance(error, QubesPropertyValueError) else ""
            # the check of names raises no error of a property
            default = properties["name"] if "name" in str(error) else domain
            self._refuse(properties.get(name, default), str(error), error)

    def _claim(self, name: str, element: Element) -> str:
        """Return a VM's name, number or UUID, which no other VM may have."""
        value = element.text.strip().lower() if name == "uuid" else element.text
        first = self._identities.setdefault((name, value), element)
        if first is not element:
            self._refuse(
                element, f"{name} {value!r} belongs to the VM in line {first.line}"
            )
        return value

    # stages 3 and 4

    def _set_all(self, todo: Iterable[tuple[PropertyHolder, Element]]) -> None:
        """Set properties; the order in which they depend on each other is found out.

        What was set once can be set again: there is an order in which it was done.
        """
        pending = list(todo)
        while pending:
            refused, errors = [], []
            for holder, element in pending:
                try:
                    self._set(holder, element)
                except StoreFormatError as error:
                    refused.append((holder, element))
                    errors.append(error)
            if len(refused) == len(pending):
                raise errors[0]
            pending = refused

    def _set(self, holder: PropertyHolder, element: Element) -> None:
        name = element.attributes["name"]
        with self._at(element):
            # nothing between the tags is None, unless the property takes strings
            is_text = holder.property_get_def(name).type is str
            setattr(holder, name, element.text if is_text else element.text or None)

    def _load_extras(self, vm: BaseVM, domain: Element) -> None:
        """Give a VM what it has besides properties: features, tags and so on."""
        features = self._unique(domain.grandchildren("features", "feature"), "name")
        for name, element in features.items():
            with self._at(element):
                vm.features[name] = element.text
        tags = self._unique(domain.grandchildren("tags", "tag"), "name")
        for name, element in tags.items():
            with self._at(element):
                vm.tags.add(name)
        for devices in domain.find_all("devices"):
            for element in devices.find_all("device"):
                self._load_device(vm, self._attribute(devices, "class"), element)
        for element in domain.find_all("firewall"):
            with self._at(element):
                vm.firewall.rules = [rule.text for rule in element.find_all("rule")]
        for element in domain.find_all("notes"):
            vm.notes = element.text
        if isinstance(vm, QubesVM):
            self._load_volumes(vm, domain)

    def _load_device(self, vm: BaseVM, devclass: str, element: Element) -> None:
        with self._at(element):
            collection = vm.devices[devclass]
            backend = self._attribute(element, "backend-domain")
            port = Port(
                None if backend == ANY else self._app.domains[backend],
                self._attribute(element, "id"),
                collection.devclass,
            )
            options = self._unique(element.find_all("option"), "name")
            # there was only "required" once, yes or no
            mode = AssignmentMode.AUTO
            if element.attributes.get("required", "no").lower() in ("yes", "true"):
                mode = AssignmentMode.REQUIRED
            assignment = DeviceAssignment(
                VirtualDevice(port, element.attributes.get("identity")),
                vm,
                {name: option.text for name, option in options.items()},
                element.attributes.get("mode", mode.value),
            )
            if assignment in list(collection.get_assigned_devices()):
                self._refuse(element, f"device {assignment} is assigned twice")
            collection.load_assignment(assignment)

    def _load_volumes(self, vm: QubesVM, domain: Element) -> None:
        elements = self._unique(domain.grandchildren("volume-config", "volume"), "name")
        if not elements.keys() >= type(vm).volume_config.keys():
            with self._at(domain):
                vm.init_storage()
        for name, element in elements.items():
            config: dict[str, Any] = dict(element.attributes)
            del config["name"]
            with self._at(element):
                for key in config.keys() & set(_NUMBERS):
                    config[key] = int(config[key])
                for key in config.keys() & set(_FLAGS):
                    if config[key] not in {"True", "False"}:
                        self._refuse(
                            element, f"{config[key]!r} is neither True nor False"
                        )
                    config[key] = config[key] == "True"
                vm.storage.init_volume(name, config)

    # stage 5

    def _check_networks(self) -> None:
        fine: set[BaseVM | None] = {None}
        for start, domain in self._vms:
            path: list[BaseVM | None] = []
            vm: BaseVM | None = start
            while vm not in fine:
                if vm in path:
                    names = " -> ".join(str(item) for item in [*path, vm])
                    self._refuse(domain, f"a loop of net VMs: {names}")
                path.append(vm)
                vm = None if vm is None else vm.netvm
            fine.update(path)


def _depth(vm: BaseVM) -> int:
    """Return how many templates a VM has above it."""
    template = vm.template_or_none
    return 0 if template is None else 1 + _depth(template)


def _modernise(root: Element) -> None:
    """Change a document to what would be written today.

    Labels that are referred to by their ids, renamed properties, services that are not
    features yet, VMs whose number is only in their id.
    """
    labels = {
        label.attributes.get("id", ""): label.text
        for label in root.grandchildren("labels", "label")
    }
    for domain in root.grandchildren("domains", "domain"):
        known = set()
        for element in domain.grandchildren("properties", "property"):
            name = element.attributes.get("name", "")
            element.attributes["name"] = _RENAMED.get(name, name)
            known.add(name)
            if (reference := element.attributes.pop("ref", None)) is not None:
                element.text = labels.get(reference, reference)
            elif name == "label":
                element.text = labels.get(element.text, element.text)
        for service in list(domain.grandchildren("services", "service")):
            on = service.attributes.get("enabled", "True").lower() == "true"
            features = next(domain.find_all("features"), None) or domain.add("features")
            feature = features.add(
                "feature", "1" if on else "", name=f"service.{service.text}"
            )
            # errors have to point to what is in the file
            feature.line, feature.column = service.line, service.column
        word, _, number = domain.attributes.get("id", "").partition("-")
        if "qid" not in known and word == "domain":
            properties = next(domain.find_all("properties"), None)
            properties = properties or domain.add("properties")
            qid = properties.add("property", number, name="qid")
            qid.line, qid.column = domain.line, domain.column
