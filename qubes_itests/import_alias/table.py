"""The table of modules of Qubes OS, and what stands for each of them here."""

from __future__ import annotations

from typing import Final

__all__ = ["ALIASES"]

#: For each module, where its names come from: ``module`` for all in its ``__all__``, or
#: ``module:name=their_name`` for one.  Every parent of a module must be listed too.
ALIASES: Final[dict[str, tuple[str, ...]]] = {
    "qubes": (
        "qubes_itests.core.app:Qubes",
        "qubes_itests.core.labels:Label",
        "qubes_itests.core.properties:Property=property",
        "qubes_itests.core.properties:PropertyHolder",
        "qubes_itests.core.properties:VMProperty",
        "qubes_itests.core.properties:stateless_property",
    ),
    "qubes.app": (
        "qubes_itests.core.app:Qubes",
        "qubes_itests.core.host:QubesHost",
        "qubes_itests.core.host:VMMConnection",
    ),
    "qubes.config": ("qubes_itests.core.config",),
    "qubes.device_protocol": (
        "qubes_itests.core.device.assignment",
        "qubes_itests.core.device.info",
        "qubes_itests.core.device.info",
        "qubes_itests.core.device.port:Port",
        "qubes_itests.core.device.port:VirtualDevice",
        "qubes_itests.core.exc:ProtocolError",
        "qubes_itests.core.exc:UnexpectedDeviceProperty",
    ),
    "qubes.devices": (
        "qubes_itests.core.device.collections",
        "qubes_itests.core.device.assignment",
        "qubes_itests.core.device.info:DeviceInfo",
        "qubes_itests.core.device.info:UnknownDevice",
        "qubes_itests.core.device.port:Port",
        "qubes_itests.core.device.port:VirtualDevice",
        "qubes_itests.core.exc:DeviceAlreadyAssigned",
        "qubes_itests.core.exc:DeviceAlreadyAttached",
        "qubes_itests.core.exc:DeviceNotAssigned",
        "qubes_itests.core.exc:UnrecognizedDevice",
    ),
    "qubes.events": (
        "qubes_itests.core.events:Emitter",
        "qubes_itests.core.events:handler",
    ),
    "qubes.exc": ("qubes_itests.core.exc",),
    "qubes.ext": (
        "qubes_itests.core.ext:Extension",
        "qubes_itests.core.ext:handler",
    ),
    "qubes.ext.utils": ("qubes_itests.core.device.changes",),
    "qubes.features": ("qubes_itests.core.vm.features:Features",),
    "qubes.firewall": ("qubes_itests.core.network.firewall",),
    "qubes.log": ("qubes_itests.core.log",),
    "qubes.policy": ("qubes_itests.core.policy",),
    "qubes.qmemman": (),
    "qubes.qmemman.algo": tuple(
        f"qubes_itests.import_alias.qmemman:{name}"
        for name in (
            "CACHE_FACTOR",
            "DOM0_MEM_BOOST",
            "MIN_PREFMEM",
            "REQ_SAFETY_NET_FACTOR",
            "balance",
            "balance_when_enough_mem",
            "balance_when_low_on_mem",
            "balloon",
            "mem_info",
            "needed_mem",
            "pref_mem",
            "refresh_meminfo_for_domain",
            "sanitize_and_parse_meminfo",
        )
    ),
    "qubes.qmemman.domainstate": ("qubes_itests.import_alias.qmemman:DomainState",),
    "qubes.storage": (
        "qubes_itests.core.storage",
        "qubes_storage.pool:Pool",
        "qubes_storage.volume:Volume",
        "qubes_storage.drivers:driver_names=pool_drivers",
        "qubes_storage.drivers:driver_parameters",
        "qubes_storage.exc:StoragePoolException",
        "qubes_storage.volume:BlockDevice",
    ),
    "qubes.storage.reflink": ("qubes_storage.reflink",),
    "qubes.tests": ("qubes_itests.testcase",),
    "qubes.tests.extra": ("qubes_itests.testcase",),
    "qubes.utils": (
        "qubes_itests.import_alias.coroutines",
        "qubes_itests.import_alias.stderr_text",
    ),
    "qubes.vm": (
        "qubes_itests.core.vm.base:BaseVM",
        "qubes_itests.core.vm.features:Features",
        "qubes_itests.core.vm.features:Tags",
    ),
    "qubes.vm.adminvm": ("qubes_itests.core.vm.adminvm",),
    "qubes.vm.appvm": ("qubes_itests.core.vm.appvm",),
    "qubes.vm.dispvm": ("qubes_itests.core.vm.dispvm",),
    "qubes.vm.qubesvm": ("qubes_itests.core.vm.qubesvm",),
    "qubes.vm.remotevm": ("qubes_itests.core.vm.remotevm",),
    "qubes.vm.standalonevm": ("qubes_itests.core.vm.standalonevm",),
    "qubes.vm.templatevm": ("qubes_itests.core.vm.templatevm",),
}
