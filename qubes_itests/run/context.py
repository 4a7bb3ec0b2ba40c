"""The context of a run: directory, event loop, testbed, made when first needed."""

from __future__ import annotations

import functools
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from qubes_itests.exc import HarnessError
from qubes_itests.host import sandbox
from qubes_itests.host.cache import Cache
from qubes_itests.run.result import Prepared

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    import pluggy

    from qubes_itests.dom0.machine import Machine
    from qubes_itests.portal import Portal
    from qubes_itests.run.settings import Settings
    from qubes_itests.run.testbed import Testbed

__all__ = ["RunContext"]


class RunContext:
    """The parts of a run.

    :param settings: its options.
    :param plugins: those that answer the hooks of `qubes_itests.hookspec`.
    :param part: the directory of the run that this one is a part of, and a name in it.
    """

    def __init__(
        self,
        settings: Settings,
        plugins: pluggy.PluginManager,
        part: tuple[Path, str] | None = None,
    ) -> None:
        self.settings = settings
        self.plugins = plugins
        self._part = part
        self._exit = ExitStack()
        self._portal: Portal | None = None
        self._testbed: Testbed | None = None

    @functools.cached_property
    def cache(self) -> Cache:
        """What outlives the run."""
        return Cache()

    @functools.cached_property
    def place(self) -> Path:
        """A directory that goes with the run, as other sandboxes see it too.

        :raise EnvironmentNotReadyError: outside a sandbox.
        """
        from qubes_itests.host import rundir

        sandbox.require()
        if self._part is not None:
            return self._exit.enter_context(rundir.part(*self._part))
        return self._exit.enter_context(rundir.RunDirectory(self.cache)).path

    @functools.cached_property
    def directory(self) -> Path:
        """The same directory by a short name.

        :raise EnvironmentNotReadyError: outside a sandbox.
        """
        from qubes_itests.host.rundir import short_name

        return self._exit.enter_context(short_name(self.place))

    @functools.cached_property
    def portal(self) -> Portal:
        """The thread with the event loop."""
        from qubes_itests.portal import Portal

        self._portal = self._exit.enter_context(Portal())
        return self._portal

    @functools.cached_property
    def testbed(self) -> Testbed:
        """Hypervisor, pool and templates.

        :raise EnvironmentNotReadyError: when the machine lacks something.
        """
        from qubes_itests.dom0 import modules
        from qubes_itests.run.app_templates import policy_of
        from qubes_itests.run.testbed import open_testbed

        policy = policy_of(self.settings)
        opened = open_testbed(
            *(self.portal, self.cache, self.directory, self.settings, self.plugins),
            policy=policy,
        )
        with modules.uncovered():
            testbed = self._exit.enter_context(opened)
        told = Prepared.told()
        if told.core_suites:
            self._have_dom0_of_suites(testbed)
        if core := told.core:
            files = {name: path for file in policy for name, path in file.parts()}
            testbed.machine = self._enter_dom0(testbed, Path(core), files)
        self._testbed = testbed
        return testbed

    def _have_dom0_of_suites(self, testbed: Testbed) -> None:
        """Have what suites of core-admin expect of dom0, around our own core."""
        from qubes_itests.dom0.place import directories_of_suites
        from qubes_itests.dom0.programs import PROGRAMS, SYSTEM

        programs = testbed.parts.run_directory / "programs"
        storage = testbed.parts.pool_directory / "dom0"
        for place in (programs, storage):
            place.mkdir()
        (programs / "sudo").symlink_to(PROGRAMS / "sudo")
        path = [str(programs), *SYSTEM, os.environ.get("PATH", os.defpath)]
        patched = mock.patch.dict(os.environ, PATH=os.pathsep.join(path))
        self._exit.enter_context(patched)
        self._exit.enter_context(directories_of_suites(storage))

    def _enter_dom0(
        self, testbed: Testbed, core: Path, policy: Mapping[str, Path]
    ) -> Machine:
        """Have what a core under test needs around it."""
        from qubes_itests.balancing.app_memory import machine
        from qubes_itests.dom0.opening import open_dom0
        from qubes_itests.run.client_tools import write_tools

        directory = testbed.parts.run_directory / "apps"
        tools = testbed.parts.run_directory / "tools"
        storage = testbed.parts.pool_directory / "dom0"
        for place in (directory, tools, storage):
            place.mkdir()
        write_tools(tools, None)
        path = os.pathsep.join([str(tools), os.environ.get("PATH", os.defpath)])
        self._exit.enter_context(mock.patch.dict(os.environ, PATH=path))
        dom0 = open_dom0(
            *(testbed.portal, testbed.hypervisor),
            {name: testbed.template(name) for name in testbed.run_templates},
            core,
            policy,
            directory=directory,
            storage=storage,
            warm=testbed.warm_starts,
            budget=testbed.parts.memory
            or machine(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20),
            balanced=testbed.parts.memory is not None,
        )
        return self._exit.enter_context(dom0)

    @property
    def opened_testbed(self) -> Testbed | None:
        """The testbed if the run has needed one so far."""
        return self._testbed

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop if the run has needed one so far."""
        return None if self._portal is None else self._portal.loop

    def close(self) -> list[str]:
        """Undo everything that was made, in reverse; a second call does nothing.

        :return: what could not be undone, or had been left: a sentence each.
        """
        left: list[str] = []
        # Before the stack below, which ends the loop that they are closed on.
        if self._testbed is not None:
            testbed, self._testbed = self._testbed, None
            for app in testbed.apps:
                left += testbed.portal.run(testbed.close_app(app))
        try:
            self._exit.close()
        except (HarnessError, OSError) as error:
            left.append(str(error))
        return left
