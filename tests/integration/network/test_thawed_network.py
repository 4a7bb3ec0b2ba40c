"""The network of thawed VMs is the core's again, and not the guests' alone."""

import asyncio
import dataclasses

from network_devices import links

from qubes_itests.core.vm.life import Life
from qubes_itests.frozen.folder import Folder
from qubes_itests.frozen.freezing import freeze
from qubes_itests.frozen.thawing import thaw


def test_a_chain_of_net_vms_goes_on_and_can_be_changed(testbed, tmp_path, monkeypatch):
    run, before = testbed.portal.run, links()
    app = run(testbed.make_app("tiny"))

    async def make(name, **properties):
        vm = await app.create_vm("AppVM", name=name, label="red", **properties)
        await vm.start()
        return vm

    net = run(make("net", netvm=None, provides_network=True))
    firewall = run(make("firewall", netvm=net, provides_network=True))
    run(make("far", netvm=firewall))
    # ends as soon as it is thawed, which stops no other
    run(make("gone", netvm=None))
    place, scratch = tmp_path / "frozen", testbed.parts.pool_directory
    run(freeze(app, place, scratch, "test"))
    run(testbed.close_app(app))
    assert not list(scratch.glob("frozen-*"))

    parts = dataclasses.replace(testbed.parts, start_timeout=1234)
    monkeypatch.setattr(testbed, "parts", parts)
    go_on = Life.go_on

    async def go_on_or_not(life):
        if life.domain.spec.name == "gone":
            await life.domain.destroy()
            await life.wait_ended(30)
        await go_on(life)

    monkeypatch.setattr(Life, "go_on", go_on_or_not)
    app = run(thaw(testbed, Folder.read(place)))
    assert app.domains["gone"].is_halted()
    assert app.domains["far"].qrexec_timeout == 1234
    net, firewall, far = (app.domains[n] for n in ("net", "firewall", "far"))

    def reaches(one, other):
        command = f"ping -c1 -W10 {other.ip} >/dev/null && echo reached; true"
        output, _ = run(one.run_for_stdio(command, user="root"))
        return output == b"reached\n"

    # also what is behind another: the filters of the taps know of it
    assert reaches(far, firewall)
    assert reaches(far, net)
    assert reaches(net, far)
    run(far.detach_network())
    assert far.net.uplink is None
    run(far.attach_network())
    assert reaches(far, net)
    # one that is started now is a client like the others
    new = run(app.create_vm("AppVM", name="new", label="red", netvm=net))
    run(asyncio.wait_for(new.start(), 600))
    assert reaches(new, net)
    assert run(testbed.close_app(app)) == []
    assert links() == before
