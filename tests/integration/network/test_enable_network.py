"""A plugin's test asks for network, and has it."""

import unittest

import pytest

from qubes_itests.testcase import ExtraTestCase


def use_network(case):
    case.enable_network()
    case.enable_network()
    (vm,) = case.create_vms(["net"])
    vm.start()
    net = case.app.domains["sys-net"]

    def ping(address):
        return vm.run(f"ping -c 1 -W 2 {address}", wait=True, user="root")

    case.assertEqual(ping(net.ip), 0)
    case.assertEqual(ping("10.137.0.200"), 1)
    vm.netvm = None
    case.assertEqual(vm.run("ls /sys/class/net/eth0", wait=True), 1)


@pytest.mark.usefixtures("testbed")
def test_enable_network():
    """Whatever it leaves is a failure of the test, too."""
    result = unittest.TestResult()
    connected = type("Connected", (ExtraTestCase,), {"runTest": use_network})
    connected().run(result)
    assert [text for _, text in result.failures + result.errors] == []
    assert result.testsRun == 1
