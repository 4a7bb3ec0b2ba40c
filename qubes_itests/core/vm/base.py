"""What all VM classes share: name, number, label, features, tags."""

from __future__ import annotations

import contextlib
import re
import uuid as uuid_module
from typing import TYPE_CHECKING, Any, ClassVar, Final

from qubes_itests.core import config
from qubes_itests.core.device.collections import DeviceManager
from qubes_itests.core.events import Emitter, handler
from qubes_itests.core.exc import QubesValueError, QubesVMError, QubesVMInUseError
from qubes_itests.core.labels import Label, find_label
from qubes_itests.core.log import get_vm_logger
from qubes_itests.core.network.firewall import Firewall
from qubes_itests.core.properties import Property, PropertyHolder, stateless_property
from qubes_itests.core.vm.commands import PIPES, communicate
from qubes_itests.core.vm.features import Features, Tags

if TYPE_CHECKING:
    import asyncio
    import logging
    from collections.abc import Iterator, Mapping

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.appvm import AppVM
    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.guest.link.process import GuestProcess
    from qubes_storage.volume import Volume

__all__ = ["BaseVM", "validate_name"]

_NAME: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9_-]*")
_RESERVED: Final = {"none", "default", "dom0", "domain-0"}
#: The names that disposable VMs get.
DISPOSABLE: Final = re.compile(config.dispvm_prefix + "[0-9]+")


def validate_name(holder: BaseVM | None, _prop: object, value: object) -> str:
    """Return a VM's name if it is one.

    It becomes a part of paths, of commands and of policy, so nothing is mended.

    :param holder: the VM; None for one of which it is not known what it will be.
    :raise QubesValueError: when it is not; the message says why.
    """
    if not isinstance(value, str):
        raise QubesValueError(f"VM name {value!r} is no string")
    if len(value) > config.vm_name_length:
        raise QubesValueError(
            f"VM name {value!r} has {len(value)} characters;"
            f" {config.vm_name_length} are the most"
        )
    if not _NAME.fullmatch(value):
        raise QubesValueError(
            f"VM name {value!r} has characters that a name cannot have: it begins with"
            " a letter and goes on with letters, digits, _ and -"
        )
    if holder is not None and holder.own_names.fullmatch(value):
        return value
    if value.lower() in _RESERVED or value.endswith("-dm"):
        raise QubesValueError(f"VM name {value!r} is reserved")
    if holder is not None and DISPOSABLE.fullmatch(value):
        raise QubesValueError(f"VM name {value!r} is reserved for disposable VMs")
    return value


def _set_qid(_holder: object, _prop: object, value: str | int) -> int:
    if not 0 <= int(value) <= config.max_qid:
        raise ValueError(f"expected a number from 0 to {config.max_qid}")
    return int(value)


class BaseVM(PropertyHolder):
    """A VM as the app knows it.

    :param app: the app that it belongs to.
    :param properties: first values of its properties.
    """

    #: Names that only VMs of its class may have; by default there are none.
    own_names: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")

    uuid: Property[uuid_module.UUID] = Property(
        "uuid",
        type=lambda value: uuid_module.UUID(str(value)),
        clone=False,
        write_once=True,
        doc="Names the VM for ever.",
    )
    name: Property[str] = Property(
        "name",
        setter=validate_name,
        clone=False,
        write_once=True,
        doc="Names the VM among the others.",
    )
    qid: Property[int] = Property(
        "qid",
        type=int,
        setter=_set_qid,
        clone=False,
        write_once=True,
        doc="A small number of the VM.",
    )
    label = Property[Label]("label", type=find_label, doc="Its colour.")

    def __init__(self, app: Qubes, **properties: Any) -> None:
        self.app = app
        self._watched_paths: set[str] = set()
        self.features = Features(self)
        self.tags = Tags(self)
        #: Its devices, by class; see `qubes_itests.core.device.collections`.
        self.devices = DeviceManager(self, BaseVM.check_whole)
        self.firewall = Firewall(self)
        #: What its user wrote about it.
        self.notes = ""
        #: What is done to it as a whole, its volumes included: ``made``, ``removed``;
        #: empty when it is whole.
        self.under_way = ""
        properties.setdefault("uuid", uuid_module.uuid4())
        Emitter.__init__(self)
        self.share_handlers(app.extensions.handlers)
        super().__init__(**properties)

    def recorded_as(self) -> str | None:
        """Return its name."""
        return self.name

    @stateless_property
    def klass(self) -> str:
        """Name of its class, as in `qvm-ls`."""
        return type(self).__name__

    # What a VM without a domain here is; classes that have more say otherwise.

    @property
    def template_or_none(self) -> QubesVM | None:
        """Its template; None of a VM of a class that has none."""
        return None

    @property
    def netvm(self) -> QubesVM | None:
        """The VM that connects this one to the network: none that is known here."""
        return None

    @property
    def keyboard_layout(self) -> str:
        """LAYOUT+VARIANT+OPTIONS of its keyboard."""
        return "us++"

    @property
    def is_net_vm(self) -> bool:
        """Whether it may be others' netvm: it has `provides_network`, and set."""
        return False

    @property
    def makes_disposables(self) -> bool:
        """Whether it may be a DispVM's template: it has `template_for_dispvms` set."""
        return False

    @property
    def default_dispvm_or_none(self) -> AppVM | None:
        """Its `default_dispvm`; None of a VM of a class that has none."""
        return None

    @property
    def volumes(self) -> Mapping[str, Volume]:
        """Its volumes, by name."""
        return {}

    def get_power_state(self) -> str:
        """Return the state as `qvm-ls` shows it."""
        return "Halted"

    def is_running(self) -> bool:
        """Tell whether there is a domain."""
        return not self.is_halted()

    def is_halted(self) -> bool:
        """Tell whether there is none."""
        return self.get_power_state() == "Halted"

    def is_paused(self) -> bool:
        """Tell whether its virtual CPUs stand still."""
        return False

    def is_starting(self) -> bool:
        """Tell whether a start is under way, other than the one that asks."""
        return False

    async def remove_from_disk(self) -> None:
        """Remove its volumes."""

    async def run_service(
        self,
        service: str,
        source: BaseVM | str | None = None,
        user: str | None = None,
        **options: Any,
    ) -> GuestProcess | asyncio.subprocess.Process:
        """Start a qrexec service in it: NotImplementedError here."""
        raise NotImplementedError

    async def run_service_for_stdio(
        self,
        service: str,
        *,
        input: bytes | None = None,
        **options: Any,
    ) -> tuple[bytes, bytes]:
        """Run a service to its end and return its output and its error output.

        :param input: what it reads.
        :raise subprocess.CalledProcessError: when it ends with another status than 0.
        """
        process = await self.run_service(service, **(PIPES | options))
        return await communicate(process, service, input)

    @property
    def log(self) -> logging.Logger:
        """The logger for what is said of it."""
        return get_vm_logger(self.name)

    def watch_qdb_path(self, path: str) -> None:
        """Have ``domain-qdb-change:PATH`` (`path`) fired when that entry changes.

        What a guest changes by itself is what it tells of its devices.

        :param path: with a ``/`` at its end, all entries below it.
        """
        self._watched_paths.add(path)

    def note_qdb_change(self, path: str) -> None:
        """Tell those who watch an entry of its database that it has changed."""
        for watched in sorted(self._watched_paths):
            below = watched.endswith("/") and path.startswith(watched)
            if path == watched or below:
                self.fire_event(f"domain-qdb-change:{watched}", path=path)

    @stateless_property
    def icon(self) -> str:
        """Name of its icon: by its class and its label."""
        kind = "dispvm" if self.makes_disposables else self.klass.lower()
        if self.features.get("servicevm"):
            kind = "servicevm"
        return f"{kind}-{self.label}"

    @handler(
        *(
            f"property-{change}:{name}"
            for change in ("set", "reset")
            for name in ("label", "template_for_dispvms")
        ),
        "domain-feature-set:servicevm",
        "domain-feature-delete:servicevm",
    )
    def on_icon_changed(self, _event: str, **_kwargs: Any) -> None:
        """Tell those who keep the icon."""
        self.fire_event("property-reset:icon", name="icon")

    @property
    def dir_path_prefix(self) -> str:
        """The folder of a pool in which VMs of its kind have theirs."""
        return "appvms"

    @handler("property-pre-reset:label", "property-pre-reset:template")
    def on_pre_reset_needed(self, _event: str, name: str, **_kwargs: Any) -> None:
        """Refuse to leave it without what it cannot do without."""
        try:
            self.property_get_default(name)
        except AttributeError:
            raise QubesValueError(
                f"property {name!r} of {self} has no default: set it to another value"
            ) from None

    @contextlib.contextmanager
    def being(self, action: str) -> Iterator[None]:
        """Say in `under_way` what is done to it for as long as the context lasts."""
        before, self.under_way = self.under_way, action
        try:
            yield
        finally:
            self.under_way = before

    def check_whole(self) -> None:
        """Raise QubesVMError when it is being made or removed.

        Nothing may come to rely on it then, for it may be gone in a moment.
        """
        if self.under_way:
            raise QubesVMError(self, f"VM {self} is being {self.under_way}")

    def check_unused(self) -> None:
        """Raise QubesVMInUseError, naming who, when others use this VM."""
        users = [
            f"{holder} ({name})"
            for holder in (*self.app.domains, self.app)
            for name in holder.property_uses(self)
            if holder is not self
        ]
        users += [
            f"{vm} ({devclass} device {assignment})"
            for vm in self.app.domains
            for devclass, devices in vm.devices.items()
            for assignment in devices.get_dedicated_devices()
            if assignment.backend_domain is self and vm is not self
        ]
        if users:
            raise QubesVMInUseError(
                self, f"VM {self} is used by {', '.join(users)}; change these first"
            )

    def __str__(self) -> str:
        return self._values.get("name", "a VM without a name")  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"<{self.klass} {self}>"

    def __hash__(self) -> int:
        return hash(self._values["uuid"])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BaseVM):
            return NotImplemented
        return self._values["uuid"] == other._values["uuid"]  # type: ignore[no-any-return]

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, BaseVM):
            return NotImplemented
        return self.name < other.name
