"""A small qmemman, in the shape of core-admin's: what it calls, waits for and shows."""

import socketserver
import threading
import time

import xen.lowlevel.xc
import xen.lowlevel.xs

import qubes.config
import qubes.qmemman.algo

SOCK_PATH = "/var/run/qubes/qmemman.sock"
GLOBAL_LOCK = threading.Lock()
KEPT = 50 << 20


class Domain:
    def __init__(self):
        self.mem_used = self.mem_max = None
        self.last_target = 0
        self.no_progress = self.slow_memset_react = False


class State:
    def __init__(self):
        self.dom_dict = {}

    def init(self):
        self.xc, self.xs = xen.lowlevel.xc.xc(), xen.lowlevel.xs.xs()

    def free(self):
        return self.xc.physinfo()["free_memory"] << 10

    def set(self, domid, target):
        self.dom_dict[domid].last_target = target
        self.xc.domain_setmaxmem(int(domid), (target >> 10) + 1024)
        self.xc.domain_set_target_mem(int(domid), target >> 10)
        path = f"/local/domain/{domid}/memory/target"
        self.xs.write("", path, str((target >> 10) - 16 * 1024))

    def balance(self):
        held = {str(row["domid"]): row for row in self.xc.domain_getinfo()}
        for domid, domain in self.dom_dict.items():
            if domain.mem_used is not None and domid in held:
                self.set(domid, qubes.qmemman.algo.pref_mem(domain))
        with open(qubes.config.qmemman_avail_mem_file, "w") as file:
            file.write(str(self.free()))

    def balloon(self, amount):
        self.balance()
        for _ in range(30):
            if self.free() >= amount + KEPT:
                return True
            time.sleep(0.1)
        return False


system_state = State()


class Watcher:
    def __init__(self):
        self.handle = xen.lowlevel.xs.xs()
        for path in ("@introduceDomain", "@releaseDomain"):
            self.handle.watch(path, self.changed)
        self.tokens = {}

    def changed(self):
        with GLOBAL_LOCK:
            now = self.handle.ls("", "/local/domain")
            for domid in set(now) - set(self.tokens):
                place = f"/local/domain/{domid}"
                if self.handle.read("", f"{place}/domid") is None:
                    continue
                domain = system_state.dom_dict[domid] = Domain()
                most = self.handle.read("", f"{place}/memory/static-max")
                domain.mem_max = int(most) << 10
                token = self.tokens[domid] = lambda domid=domid: self.reported(domid)
                self.handle.watch(f"{place}/memory/meminfo", token)
            for domid in set(self.tokens) - set(now):
                path = f"/local/domain/{domid}/memory/meminfo"
                self.handle.unwatch(path, self.tokens.pop(domid))
                del system_state.dom_dict[domid]

    def reported(self, domid):
        said = self.handle.read("", f"/local/domain/{domid}/memory/meminfo")
        if said and domid in system_state.dom_dict:
            with GLOBAL_LOCK:
                system_state.dom_dict[domid].mem_used = int(said) << 10
                system_state.balance()

    def loop(self):
        while True:
            self.handle.read_watch()[1]()


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        amount = int(self.request.recv(1024))
        with GLOBAL_LOCK:
            got = system_state.balloon(amount)
            self.request.send(b"OK\n" if got else b"FAIL\n")
            self.request.recv(1024)


def main():
    system_state.init()
    server = socketserver.UnixStreamServer(SOCK_PATH, Handler)
    threading.Thread(target=server.serve_forever).start()
    Watcher().loop()
