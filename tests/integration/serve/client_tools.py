"""The client tools of Qubes OS themselves.

They are not on the package index, so this is not among the tests that are run without
being named: install them as docs/serve.md says, and give pytest this file.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conditions import wait_until

from qubes_itests.serve.environment import variables
from qubes_itests.serve.place import Place


@pytest.fixture
def qvm(server):
    """Return a function that runs a tool, and what it is to end with."""

    def run(tool, *words, data="", status=0):
        command = [sys.executable, "-m", "qubes_itests", "qvm"]
        done = subprocess.run(
            [*command, "--socket", server.socket, tool, *words],
            input=data,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    return run


def table(text):
    """Return the lines of a table as lists of words."""
    return [line.split() for line in text.splitlines()]


def test_the_first_visit_of_the_guide(qvm, server):
    qvm("qvm-create", "--label", "red", "--template", "tiny", "first")
    for word in ("one", "two"):
        qvm("qvm-start", "first")
        qvm("qvm-run", "-p", "-u", "root", "first", f"echo {word} > /rw/note")
        qvm("qvm-shutdown", "--wait", "first")
    (revision,) = qvm("qvm-volume", "info", "first:private", "revisions").split()
    qvm("qvm-volume", "revert", "first:private")
    assert revision not in qvm("qvm-volume", "info", "first:private", "revisions")
    qvm("qvm-volume", "resize", "first:private", "3G")
    place = f"dir_path={server.state}/xfs/slow"
    qvm("qvm-pool", "add", "slow", "file-reflink", "-o", place)
    assert ["slow", "file-reflink"] in table(qvm("qvm-pool", "list"))
    qvm("qvm-clone", "-P", "slow", "first", "copy")
    volumes = table(qvm("qvm-volume", "list", "copy"))
    assert ["slow:appvms/copy/private", "copy", "private", "Yes"] in volumes
    assert qvm("qvm-run", "-p", "copy", "cat /rw/note") == "one\n"
    assert ["copy", "Running", "AppVM", "red", "tiny", "-"] in table(qvm("qvm-ls"))
    qvm("qvm-shutdown", "--wait", "copy")
    qvm("qvm-remove", "--force", "copy", "first")
    qvm("qvm-pool", "remove", "slow")
    assert qvm("qvm-ls", "--raw-list").split() == ["dom0", "tiny", "work"]


def test_a_command_has_input_output_and_a_status(qvm):
    assert qvm("qvm-run", "--pass-io", "work", "cat", data="hello\n") == "hello\n"
    assert qvm("qvm-run", "-p", "work", "--", "echo", "a  b", "$x") == "a  b $x\n"
    assert qvm("qvm-run", "-p", "work", "echo no >&2; exit 3", status=3) == "no\n"


def test_a_clone_has_the_settings_of_its_source(qvm):
    qvm("qvm-create", "--label", "blue", "--template", "tiny", "source")
    qvm("qvm-prefs", "source", "memory", "300")
    qvm("qvm-features", "source", "gui", "1")
    qvm("qvm-service", "source", "cups", "on")
    qvm("qvm-tags", "source", "add", "demo")
    qvm("qvm-firewall", "source", "add", "drop", "10.0.0.0/8", "tcp", "80-81")
    qvm("qvm-clone", "source", "clone")
    assert qvm("qvm-prefs", "clone", "memory") == "300\n"
    assert table(qvm("qvm-features", "clone")) == [["gui", "1"], ["service.cups", "1"]]
    assert table(qvm("qvm-service", "clone")) == [["cups", "on"]]
    assert qvm("qvm-tags", "clone").split() == ["created-by-dom0", "demo"]
    assert qvm("qvm-firewall", "--raw", "clone").splitlines() == [
        "action=accept",
        "action=drop proto=tcp dst4=10.0.0.0/8 dstports=80-81",
    ]
    qvm("qvm-remove", "--force", "source", "clone")


def test_a_disposable_vm_is_gone_after_its_command(qvm):
    words = ("--class", "DispVM", "--label", "red", "nowhere")
    assert "default_dispvm of the app is None" in qvm("qvm-create", *words, status=1)
    qvm("qvm-create", "--label", "red", "--template", "tiny", "dvm")
    qvm("qvm-prefs", "dvm", "template_for_dispvms", "True")
    assert qvm("qvm-run", "-p", "--dispvm=dvm", "hostname").startswith("disp")
    qvm("qvm-remove", "--force", "dvm")


def test_a_block_device_comes_and_goes(qvm, server, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"data".ljust(1 << 20, b"\0"))
    link = server.state / "block" / "data"
    link.symlink_to(image)
    qvm("qvm-block", "attach", "--ro", "work", "dom0:data")
    assert "work (attached: " in qvm("qvm-block", "list")
    read = ("-d", "work", "root:head -c 4 /dev/xvdi")
    wait_until(lambda: server.run(*read).stdout == b"data", "the disk in the guest")
    qvm("qvm-block", "detach", "work", "dom0:data")
    qvm("qvm-block", "assign", "work", "dom0:data")
    assert "*work (auto-attach)" in qvm("qvm-block", "list", "--assignments")
    qvm("qvm-block", "unassign", "work", "dom0:data")
    assert "work" not in qvm("qvm-block", "list", "--assignments")
    link.unlink()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("qvm-pool", "remove", "none"), 1, "there is no pool 'none'"),
        (("qvm-volume", "revert", "tiny:private", "none"), 1, "has no revision 'none'"),
        (("qvm-volume", "resize", "tiny:private", "1M"), 1, "shrinking"),
        (("qvm-volume", "import", "tiny:private", "-"), 1, "bytes"),
        (("qvm-device", "teapot", "list"), 1, "Failed to list 'teapot' devices"),
        (("qvm-prefs", "work", "none", "1"), 2, "no such property"),
        (("qvm-prefs", "work", "vcpus", "0"), 1, "a whole number above 0"),
        (("qvm-start", "work"), 1, "is already running"),
        (("qvm-remove", "--force", "tiny"), 1, "template for work"),
    ],
)
def test_what_cannot_be_is_a_line_of_the_tool(qvm, words, status, said):
    size = ("--size", "9") if "import" in words else ()
    assert said in qvm(*words, *size, data="no nine bytes", status=status)


def test_the_tools_run_by_themselves(server):
    """With the variables that ``serve --print-env`` prints."""
    environment = os.environ | variables(Place(server.socket.parent))
    command = [sys.executable, "-m", "qubesadmin.tools.qvm_ls", "--raw-list"]
    listed = subprocess.check_output(command, env=environment, text=True)
    assert "work" in listed.split()
