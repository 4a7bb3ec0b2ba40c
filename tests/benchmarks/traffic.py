"""Traffic from a client to its net VM, beside raw QEMU on the same bridge.

Run: ``.venv/bin/python tests/benchmarks/traffic.py [ROUNDS [OPTION…]]``

Two guests of raw QEMU have the same kernel, modules, machine, CPU, memory and kernel
options, and run from an initramfs with the same busybox. Their taps have no filter,
they route nothing, and QEMU has nothing but what the traffic needs; an OPTION is added
to the device of their interface (``mrg_rxbuf=off``).

A program of its own sends in pieces of 64 KiB: `nc` of busybox has pieces of 1 KiB,
and is all that one measures then. CPU time is that of both QEMU processes; on a machine
that has other work it says more than the time that passes.
"""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import app_on, heading, row, testbed

from qubes_itests.guest.image.cpio import Archive
from qubes_itests.host.bridge import Tap
from qubes_itests.hypervisor.domain_xml import KERNEL_OPTIONS, Machine

MEGABYTES = 128
PINGS = 200
ASKS = 1000
PORT = 7000

PROBE = r"""
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static char buffer[65536];

static void need(long size, long wanted, const char *what)
{
    if (size != wanted) { perror(what); exit(1); }
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

/* probe serve PORT, probe send IP PORT MIB, probe ask IP PORT TIMES */
int main(int argc, char **argv)
{
    int serves = !strcmp(argv[1], "serve"), one = 1;
    struct sockaddr_in place = {AF_INET, htons(atoi(argv[serves ? 2 : 3]))};
    int s = socket(AF_INET, SOCK_STREAM, 0);
    if (serves) {
        setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        need(bind(s, (void *)&place, sizeof place), 0, "bind");
        need(listen(s, 1), 0, "listen");
        s = accept(s, NULL, NULL);
        setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        need(read(s, buffer, 1), 1, "kind");
        if (*buffer == 'a')
            while (read(s, buffer, 1) == 1)
                need(write(s, buffer, 1), 1, "answer");
        long all = 0, size;
        while ((size = read(s, buffer, sizeof buffer)) > 0)
            all += size;
        need(write(s, &all, sizeof all), sizeof all, "write");
        return 0;
    }
    inet_aton(argv[2], &place.sin_addr);
    need(connect(s, (void *)&place, sizeof place), 0, "connect");
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    need(write(s, argv[1], 1), 1, "kind");
    double start = now();
    long times = atoi(argv[4]), arrived = 0;
    if (*argv[1] == 'a') {
        for (long i = 0; i < times; i++) {
            need(write(s, "?", 1), 1, "ask");
            need(read(s, buffer, 1), 1, "answer");
        }
        printf("%.6f\n", (now() - start) / times);
        return 0;
    }
    for (long i = 0; i < times * 16; i++)
        for (long done = 0, size; done < 65536; done += size)
            if ((size = write(s, buffer + done, 65536 - done)) <= 0)
                need(size, 1, "write");
    shutdown(s, SHUT_WR);
    need(read(s, &arrived, sizeof arrived), sizeof arrived, "count");
    need(arrived, times << 20, "all");
    printf("%.6f\n", now() - start);
    return 0;
}
"""

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
while read module; do insmod $module; done < /modules
until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
ip link set lo up
ip address add $ADDRESS/24 dev eth0
ip link set eth0 up
stty -echo < /dev/ttyS0
exec < /dev/ttyS0 > /dev/ttyS0
echo ready
while read -r line; do eval "$line"; done
"""


class RawGuest:
    """A guest of raw QEMU with a shell on its console."""

    def __init__(self, number, bridge, files, memory):
        self.address = f"10.200.0.{number}"
        mac = f"52:54:00:00:00:{number:02x}"
        self.tap = Tap.create(bridge, mac)
        machine = Machine(kvm=False, emulator=Path())
        command = [
            "qemu-system-x86_64", "-accel", "tcg",
            "-machine", machine.machine, "-cpu", f"{machine.cpu},+rdrand",
            "-m", str(memory), "-nodefaults", "-display", "none", "-no-reboot",
            "-serial", "stdio", "-netdev",
            f"tap,id=n,ifname={self.tap.name},script=no,downscript=no",
            "-device",
            ",".join(("virtio-net-pci,netdev=n,romfile=", f"mac={mac}", *sys.argv[2:])),
            "-kernel", str(files.kernel), "-initrd", str(files.initramfs),
            "-append", f"{KERNEL_OPTIONS} norandmaps ADDRESS={self.address}",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # as libvirt does: the kernel shares out CPUs among sessions
            start_new_session=True,
        )
        self.pid = self._process.pid

    async def booted(self):
        """Wait for the shell; what is typed before it is lost."""
        await asyncio.to_thread(self._read_to, b"ready\r\n")

    async def sh(self, command):
        line = f"{command}; echo done\n"
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()
        return await asyncio.to_thread(self._read_to, b"done\r\n")

    def _read_to(self, end):
        found = b""
        while not found.endswith(end):
            if not (more := self._process.stdout.readline()):
                sys.exit(f"QEMU has ended: {found}")
            found += more
        return found[: -len(end)].decode()

    def end(self):
        self._process.kill()
        self._process.wait()
        self.tap.remove()


class OurGuest:
    """A VM of an app."""

    def __init__(self, vm):
        self.vm = vm
        self.address = str(vm.ip)
        name = f"guest={vm.domain.libvirt_name},".encode()
        (self.pid,) = (
            int(place.name)
            for place in Path("/proc").glob("[0-9]*")
            if name in (place / "cmdline").read_bytes()
        )

    async def sh(self, command):
        return (await self.vm.run_for_stdio(command, user="root"))[0].decode()


class Pair:
    """A client and a server."""

    def __init__(self, run, client, server):
        self.run = run
        self.client = client
        self.server = server
        self.figures = {}

    def cpu(self):
        """Return the seconds of CPU that both QEMU processes have used."""
        found = 0
        for pid in (self.client.pid, self.server.pid):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found += int(words[11]) + int(words[12])
        return found / os.sysconf("SC_CLK_TCK")

    def probe(self, what, amount):
        """Return the seconds that the program in the client has taken."""
        ask = f"/root/probe {what} {self.server.address} {PORT} {amount}"
        # until the server listens
        ask = f"until {ask} 2> /dev/null; do sleep 0.05; done"

        async def both():
            serve = self.server.sh(f"/root/probe serve {PORT}")
            serving = asyncio.ensure_future(serve)
            output = await self.client.sh(ask)
            await serving
            return float(output)

        return self.run(both())

    def send(self):
        """Return MiB a second."""
        return MEGABYTES / self.probe("send", MEGABYTES)

    def ask(self):
        """Return milliseconds for a byte there and one back."""
        return self.probe("ask", ASKS) * 1000

    def ping(self):
        """Return milliseconds, the median."""
        # to a file first: what shows it is no part of the network
        ping = f"ping -c {PINGS} -i 0.01 {self.server.address} > /root/times"
        output = self.run(self.client.sh(f"{ping}; cat /root/times"))
        times = re.findall(r"time=([\d.]+)", output)
        assert len(times) == PINGS, output
        return statistics.median(map(float, times))

    def measure(self):
        for what, unit, amount, take in (
            ("TCP", "MiB", MEGABYTES, self.send),
            ("one byte and back by TCP", "ms", ASKS, self.ask),
            ("ping", "ms", PINGS, self.ping),
        ):
            before = self.cpu()
            value = take()
            used = (self.cpu() - before) * 1000 / amount
            rate = "MiB/s" if unit == "MiB" else unit
            self.figures.setdefault((what, rate), []).append(value)
            cost = "ms/MiB" if unit == "MiB" else unit
            self.figures.setdefault((f"{what}: CPU time", cost), []).append(used)


class Files:
    """What raw QEMU boots, and the program that VMs get."""

    def __init__(self, boot_kernel, directory):
        (directory / "probe.c").write_text(PROBE)
        probe = directory / "probe"
        compiler = ["gcc", "-static", "-O2", "-o", probe, directory / "probe.c"]
        subprocess.run(compiler, check=True)
        self.probe = probe.read_bytes()
        busybox = Path("/bin/busybox")
        listed = subprocess.run(["ldd", busybox], capture_output=True, check=False)
        archive = Archive()
        for name in ("bin", "lib64", "lib/x86_64-linux-gnu"):
            archive.directory(name)
        archive.file("bin/busybox", busybox.read_bytes(), 0o755)
        for library in re.findall(r"(/lib\S+) \(", listed.stdout.decode()):
            archive.file(library[1:], Path(library).read_bytes(), 0o755)
        archive.file("root/probe", self.probe, 0o755)
        archive.file("init", INIT.encode(), 0o755)
        self.kernel = boot_kernel.kernel
        self.initramfs = directory / "initramfs"
        # the kernel unpacks one after the other; of two files with one name, the last
        self.initramfs.write_bytes(
            boot_kernel.initramfs.read_bytes() + archive.to_bytes()
        )


def show(ours, raw):
    for title, pair in (("Ours", ours), ("Raw QEMU on the same bridge, in turn", raw)):
        heading(title)
        for (name, unit), values in pair.figures.items():
            row(name, values, unit)
    heading("Ours / raw QEMU, round by round")
    for (name, unit), values in ours.figures.items():
        pairs = zip(values, raw.figures[name, unit], strict=True)
        row(name, [a / b for a, b in pairs], "")


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with (
        testbed() as bed,
        app_on(bed) as app,
        tempfile.TemporaryDirectory() as directory,
    ):
        run = bed.portal.run
        files = Files(app.kernels["tiny"], Path(directory))
        net, client = (
            app.add_new_vm("AppVM", name=name, label="red", provides_network=is_net)
            for name, is_net in (("net", True), ("client", False))
        )
        client.netvm = net
        for vm in (net, client):
            run(vm.create_on_disk())
            run(vm.start())
            save = "cat > /root/probe && chmod 755 /root/probe"
            run(vm.run_for_stdio(save, input=files.probe, user="root"))
        ours = Pair(run, OurGuest(client), OurGuest(net))
        guests = []
        try:
            for number in (1, 2):
                guest = RawGuest(number, net.net.downlink.bridge, files, net.memory)
                guests.append(guest)
            raw = Pair(run, *guests)
            for guest in guests:
                run(guest.booted())
            for _ in range(rounds):
                ours.measure()
                raw.measure()
        finally:
            for guest in guests:
                guest.end()
    show(ours, raw)


if __name__ == "__main__":
    main()
