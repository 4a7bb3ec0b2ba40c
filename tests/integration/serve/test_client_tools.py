"""The tools of Qubes OS's client: themselves where they are installed, else recorded.

Each test has a recording in `recorded`: what the tools said to the server, and got.
``tests/record-client`` makes them anew.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from client_recording import MismatchError, Names, Recorder, Replay
from conditions import wait_until

from qubes_itests.serve.environment import variables
from qubes_itests.serve.place import Place
from qubes_itests.serve.tools import installed_tools

RECORDED = Path(__file__).parent / "recorded"
#: Set where the tools are to be recorded: to what tells the client's version closer.
RECORD = "QUBES_ITESTS_RECORD_CLIENT"


def run_tool(socket, words, data, *, by_itself=False):
    """Run a tool that is installed."""
    command = [sys.executable, "-m", "qubes_itests", "qvm", "--socket", socket, *words]
    environment = dict(os.environ)
    if by_itself:
        module = f"qubesadmin.tools.{words[0].replace('-', '_')}"
        command = [sys.executable, "-m", module, *words[1:]]
        environment |= variables(Place(socket.parent))
    return subprocess.run(
        command,
        input=data,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@pytest.fixture
def tools(server, request, tmp_path, tmp_path_factory):
    """Return a function that runs a tool: one that is installed, or a recorded one."""
    name = re.sub(r"[^A-Za-z0-9_]+", "-", request.node.name.removeprefix("test_"))
    path = RECORDED / f"{name.strip('-')}.json"
    fixed = {"state": server.state, "server": server.socket.parent, "tmp": tmp_path}
    names = Names(fixed)
    if not installed_tools():
        replay = Replay(server, json.loads(path.read_text())["steps"], names)
        yield lambda words, data, **_: replay.run(words, data)
    elif RECORD in os.environ:
        with Recorder(server, tmp_path_factory.mktemp("r"), names) as recorder:

            def run(words, data, **how):
                done = run_tool(recorder.socket, words, data, **how)
                recorder.step(words, data, done)
                return done

            yield run
        version = importlib.metadata.version("qubesadmin")
        recorder.write(path, f"{version} {os.environ[RECORD]}".strip())
    else:
        yield lambda words, data, **how: run_tool(server.socket, words, data, **how)


@pytest.fixture
def qvm(tools):
    """Return a function that runs a tool, and what it is to end with."""

    def run(tool, *words, data="", status=0, **how):
        done = tools([tool, *map(str, words)], data, **how)
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
        (("qvm-volume", "resize", "tiny:private", "1M"), 1, "Refusing to shrink"),
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


def test_the_tools_run_by_themselves(qvm):
    """With the variables that ``serve --print-env`` prints."""
    assert "work" in qvm("qvm-ls", "--raw-list", by_itself=True).split()


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        ({"reply": "0\0pink\n"}, "expected a line 'pink'"),
        ({"reply": "2\0QubesException\0\0no\0"}, "got '0"),
        ({"request": "admin.vm.Start+ dom0 name none\0"}, "QubesVMNotFoundError"),
        ({"request": "admin.vm.Kill+ dom0 name none\0", "reply": "0\0"}, "expected '0"),
    ],
)
def test_another_answer_than_the_recorded_one_is_told(server, recorded, said):
    call = {"request": "admin.label.List+ dom0 name dom0\0", "reply": "0\0red\n"}
    step = {"tool": ["t"], "input": "", "status": 0, "stdout": "", "stderr": ""}
    Replay(server, [step | {"calls": [call]}], Names({})).run(["t"], "")
    replay = Replay(server, [step | {"calls": [call | recorded]}], Names({}))
    with pytest.raises(MismatchError, match=said):
        replay.run(["t"], "")
