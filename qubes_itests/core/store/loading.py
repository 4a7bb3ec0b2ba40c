"""From a document to an app, in the stages of Qubes OS.

1. labels and pools, 2. VMs and their plain properties, 3. the app's properties,
4. properties whose values are VMs, and what else VMs have, 5. what has to fit together.

The app is new, and no event is fired before the last stage is done: an app whose
document is refused is dropped, and nothing is left of it.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final, NoReturn

from qubes_itests.core.exc import QubesException, QubesPropertyValueError
from qubes_itests.core.store.older import ELSEWHERE, modernise
from qubes_itests.core.store.store_errors import StoreFormatError
from qubes_itests.core.store.vms import load_extras
from qubes_storage.drivers import pool_class

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
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
        self._references: list[tuple[BaseVM, Element]] = []
        #: The elements that name a VM, by what they say: for duplicates.
        self._identities: dict[tuple[str, str], Element] = {}

    def run(self) -> None:
        """Load; StoreFormatError says what cannot be and where."""
        self._check_root()
        modernise(self._root)
        self._load_labels()
        self._load_pools()
        for domain in self._root.grandchildren("domains", "domain"):
            self._load_vm(domain)
        self._load_app_properties()
        self._load_references()
        self._check_networks()

    @contextlib.contextmanager
    def at(self, element: Element) -> Iterator[None]:
        """Have an error of the core or of storage say which element it is about."""
        try:
            yield
        except StoreFormatError:
            raise
        except (QubesException, ValueError, TypeError) as error:
            self.refuse(element, str(error), error)

    def refuse(
        self, element: Element, reason: str, cause: Exception | None = None
    ) -> NoReturn:
        """Raise a StoreFormatError about an element."""
        raise StoreFormatError(
            self._path, element.line, element.column, reason
        ) from cause

    def _warn(self, element: Element, reason: str) -> None:
        log.warning("%s:%d: %s; ignored", self._path, element.line, reason)

    def attribute(self, element: Element, name: str) -> str:
        """Return an attribute that has to be there and not to be empty."""
        if not element.attributes.get(name):
            self.refuse(element, f"{element.tag!r} lacks the attribute {name!r}")
        return element.attributes[name]

    def unique(self, elements: Iterable[Element], name: str) -> dict[str, Element]:
        """Return elements by an attribute that no two of them may share."""
        found: dict[str, Element] = {}
        for element in elements:
            value = self.attribute(element, name)
            if value in found:
                self.refuse(
                    element,
                    f"{element.tag} {value!r} is in line {found[value].line} already",
                )
            found[value] = element
        return found

    def _check_root(self) -> None:
        if self._root.tag != "qubes":
            self.refuse(self._root, f"this is a {self._root.tag!r}, not a 'qubes'")
        version = self._root.attributes.get("version", "3.0")
        if version.partition(".")[0] not in _VERSIONS:
            self.refuse(self._root, f"version {version!r} of the format is not known")

    # stage 1

    def _load_labels(self) -> None:
        labels = self._root.grandchildren("labels", "label")
        for element in self.unique(labels, "id").values():
            try:
                self._app.get_label(element.text)
            except QubesException as error:
                self._warn(element, str(error))

    def _load_pools(self) -> None:
        pools = self.unique(self._root.grandchildren("pools", "pool"), "name")
        for name, element in pools.items():
            options: dict[str, Any] = dict(element.attributes)
            options.pop("driver", None)
            with self.at(element):
                cls = pool_class(self.attribute(element, "driver"))
                self._app.pools[name] = cls(**options)

    # stage 2

    def _load_vm(self, domain: Element) -> None:
        properties = self.unique(domain.grandchildren("properties", "property"), "name")
        vm = self._make_vm(domain, properties)
        self._vms.append((vm, domain))
        stages = {prop.name: prop.load_stage for prop in vm.property_list()}
        plain = []
        for name, element in properties.items():
            if name not in stages:
                self._pass_over(vm, name, element)
            elif stages[name] >= _LAST_STAGE:
                self._references.append((vm, element))
            elif name not in _IDENTITY:
                plain.append((vm, element))
        self._set_all(plain)

    def _pass_over(self, vm: BaseVM, name: str, element: Element) -> None:
        if name not in ELSEWHERE:
            self.refuse(element, f"{vm.klass} has no property {name!r}")
        self._warn(element, f"property {name!r} has no meaning here")

    def _make_vm(self, domain: Element, properties: dict[str, Element]) -> BaseVM:
        klass = self.attribute(domain, "class")
        for name in ("qid", "name"):
            if name not in properties:
                self.refuse(domain, f"a VM without property {name!r}")
        identity: dict[str, Any] = {
            name: self._claim(name, properties[name])
            for name in _IDENTITY
            if name in properties
        }
        if klass == "AdminVM":
            return self._dom0(domain, identity)
        with self.at(domain):
            cls = self._app.get_vm_class(klass)
        with self._at_property(domain, properties):
            return self._app.domains.add(cls(self._app, **identity), announce=False)

    def _claim(self, name: str, element: Element) -> str:
        value = element.text.strip().lower() if name == "uuid" else element.text
        first = self._identities.setdefault((name, value), element)
        if first is not element:
            self.refuse(
                element, f"{name} {value!r} belongs to the VM in line {first.line}"
            )
        return value

    @contextlib.contextmanager
    def _at_property(
        self, domain: Element, properties: dict[str, Element]
    ) -> Iterator[None]:
        """Have an error say which property it is about, where that is known."""
        try:
            yield
        except (QubesException, ValueError, TypeError) as error:
            name = error.prop.name if isinstance(error, QubesPropertyValueError) else ""
            # a name that cannot be is no matter of one property to its checker
            default = properties["name"] if "name" in str(error) else domain
            self.refuse(properties.get(name, default), str(error), error)

    def _dom0(self, domain: Element, identity: dict[str, Any]) -> BaseVM:
        dom0: BaseVM = self._app.domains[0]
        if (identity["qid"], identity["name"]) != ("0", dom0.name):
            self.refuse(domain, f"the AdminVM has qid 0 and the name {dom0.name!r}")
        return dom0

    # stages 3 and 4

    def _load_app_properties(self) -> None:
        found = self.unique(self._root.grandchildren("properties", "property"), "name")
        known = {prop.name for prop in self._app.property_list()}
        for name in found.keys() - known:
            self._warn(found[name], f"the app has no property {name!r}")
        self._set_all((self._app, found[name]) for name in found if name in known)

    def _load_references(self) -> None:
        self._set_all(self._references)
        for vm, domain in _templates_first(self._vms):
            if _lacks_template(vm):
                self.refuse(domain, f"{vm.klass} {vm} lacks a template")
            load_extras(self, vm, domain)

    def _set_all(self, todo: Iterable[tuple[PropertyHolder, Element]]) -> None:
        """Set properties; the order in which they depend on each other is found out.

        What was set once can be set again: there is an order in which it was done.
        """
        pending = list(todo)
        while pending:
            refused = [
                (holder, element, error)
                for holder, element in pending
                if (error := _refusal(self._set, holder, element))
            ]
            if len(refused) == len(pending):
                raise refused[0][2]
            pending = [(holder, element) for holder, element, _error in refused]

    def _set(self, holder: PropertyHolder, element: Element) -> None:
        name = element.attributes["name"]
        with self.at(element):
            # nothing between the tags is None, unless the property takes strings
            is_text = holder.property_get_def(name).type is str
            setattr(holder, name, element.text if is_text else element.text or None)

    # stage 5

    def _check_networks(self) -> None:
        fine: set[Any] = {None}
        for start, domain in self._vms:
            path: list[Any] = []
            vm: Any = start
            while vm not in fine:
                if vm in path:
                    names = " -> ".join(str(item) for item in [*path, vm])
                    self.refuse(domain, f"a loop of net VMs: {names}")
                path.append(vm)
                vm = getattr(vm, "netvm", None)
            fine.update(path)


def _refusal(
    action: Callable[[PropertyHolder, Element], None],
    holder: PropertyHolder,
    element: Element,
) -> StoreFormatError | None:
    try:
        action(holder, element)
    except StoreFormatError as error:
        return error
    return None


def _lacks_template(vm: BaseVM) -> bool:
    # reading a property that has no default and is not set is an AttributeError
    return hasattr(type(vm), "template") and not hasattr(vm, "template")


def _templates_first(
    vms: Iterable[tuple[BaseVM, Element]],
) -> list[tuple[BaseVM, Element]]:
    def depth(vm: Any) -> int:
        template = getattr(vm, "template", None)
        return 0 if template is None else 1 + depth(template)

    return sorted(vms, key=lambda item: depth(item[0]))
