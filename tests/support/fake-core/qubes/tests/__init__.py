"""As in core-admin: whether there is a libvirt, and where git has its files."""

import subprocess

import libvirt

libvirt.openReadOnly("xen:///").close()
ha_syslog = None
working_tree = subprocess.run(
    ["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=False
).stdout.strip()
