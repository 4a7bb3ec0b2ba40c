r"""Whole exchanges, byte by byte, as clients of Qubes OS and qubesd have them.

The client's side is what its tools send, in the order in which they send it; in the
server's, ``<...>`` stands for what differs from run to run.
"""

import re

import pytest
from admin_client import Client
from admin_mutations import exchange

UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
WILD = {
    b"<uuid>": UUID.encode(),
    b"<n>": rb"\d+",
    b"<token>": rb"[A-Za-z0-9]{32}",
    b"<text>": rb"[^\0]+",
    b"<line>": rb"[^\n]*",
    b"<lines>": rb"(?:[^\n\0]+\n)+",
}

#: What a tool sends and gets, by the tool.
TRANSCRIPTS = {
    "qvm-ls": [
        (
            b"admin.vm.List+ dom0 name dom0\0",
            (
                b"0\0dom0 class=AdminVM state=Running uuid=<uuid>\n"
                b"tiny class=TemplateVM state=Halted uuid=<uuid>\n"
                b"work class=AppVM state=Halted uuid=<uuid>\n"
            ),
        ),
        (b"admin.vm.property.GetAll+ dom0 name work\0", b"0\0<lines>"),
    ],
    "qvm-create -l green -t tiny new": [
        (
            b"admin.label.List+ dom0 name dom0\0",
            b"0\0red\norange\nyellow\ngreen\ngray\nblue\npurple\nblack\n",
        ),
        (
            b"admin.vm.Create.AppVM+tiny dom0 name dom0\0name=new label=green",
            b"0\0",
        ),
    ],
    "qvm-create of a name that is taken": [
        (
            b"admin.vm.Create.AppVM+tiny dom0 name dom0\0name=work label=green",
            b"2\0QubesValueError\0\0<text>\0",
        ),
    ],
    "qvm-shutdown --wait of a halted VM": [
        (
            b"admin.vm.Shutdown+wait dom0 name work\0",
            b"2\0QubesVMNotStartedError\0\0<text>\0",
        ),
    ],
    "qvm-start before it starts": [
        (
            b"admin.vm.CurrentState+ dom0 name work\0",
            b"0\0mem=0 mem_static_max=<n> cputime=0 power_state=Halted",
        ),
    ],
    "qvm-prefs work memory 600; qvm-prefs -D work memory": [
        (b"admin.vm.property.List+ dom0 name work\0", b"0\0<lines>"),
        (
            b"admin.vm.property.Get+memory dom0 name work\0",
            b"0\0default=True type=int <n>",
        ),
        (b"admin.vm.property.Set+memory dom0 name work\x00600", b"0\0"),
        (
            b"admin.vm.property.Get+memory dom0 name work\0",
            b"0\0default=False type=int 600",
        ),
        (b"admin.vm.property.Reset+memory dom0 name work\0", b"0\0"),
        (b"admin.vm.property.Help+memory dom0 name work\0", b"0\0<text>"),
    ],
    "qvm-prefs work netvm ''": [
        (b"admin.vm.property.Set+netvm dom0 name work\0", b"0\0"),
        (
            b"admin.vm.property.Get+netvm dom0 name work\0",
            b"0\0default=False type=vm ",
        ),
    ],
    "qvm-prefs of a property that is not there": [
        (
            b"admin.vm.property.Get+nonsense dom0 name work\0",
            b"2\0QubesNoSuchPropertyError\0\0<text>\0",
        ),
    ],
    "qvm-features": [
        (b"admin.vm.feature.Set+os dom0 name work\0Linux", b"0\0"),
        (b"admin.vm.feature.List+ dom0 name work\0", b"0\0os\n"),
        (b"admin.vm.feature.Get+os dom0 name work\0", b"0\0Linux"),
        (b"admin.vm.feature.Remove+os dom0 name work\0", b"0\0"),
        (
            b"admin.vm.feature.CheckWithTemplate+os dom0 name work\0",
            b"2\0QubesFeatureNotFoundError\0\0<text>\0",
        ),
    ],
    "qvm-tags": [
        (b"admin.vm.tag.Set+mine dom0 name work\0", b"0\0"),
        (b"admin.vm.tag.Get+mine dom0 name work\0", b"0\x001"),
        (b"admin.vm.tag.List+ dom0 name work\0", b"0\0mine\n"),
        (b"admin.vm.tag.Remove+mine dom0 name work\0", b"0\0"),
        (b"admin.vm.tag.List+ dom0 name work\0", b"0\0"),
    ],
    "qvm-volume info, resize, config": [
        (
            b"admin.vm.volume.List+ dom0 name work\0",
            b"0\0root\nprivate\nvolatile\n",
        ),
        (
            b"admin.vm.volume.Info+private dom0 name work\0",
            (
                b"0\0pool=default\nvid=appvms/work/private\nsize=4194304\nusage=<n>\n"
                b"rw=True\nsource=\npath=<line>\nsave_on_stop=True\nsnap_on_start=False\n"
                b"revisions_to_keep=<n>\nephemeral=False\nis_outdated=False\n"
            ),
        ),
        (b"admin.vm.volume.ListSnapshots+private dom0 name work\0", b"0\0"),
        (b"admin.vm.volume.Resize+private dom0 name work\x004000000000", b"0\0"),
        (
            b"admin.vm.volume.Set.revisions_to_keep+private dom0 name work\x005",
            b"0\0",
        ),
        (b"admin.vm.volume.Set.rw+private dom0 name work\0False", b"0\0"),
    ],
    "qvm-pool": [
        (b"admin.pool.List+ dom0 name dom0\0", b"0\0default\n"),
        (b"admin.pool.ListDrivers+ dom0 name dom0\0", b"0\0<lines>"),
        (
            b"admin.pool.Info+default dom0 name dom0\0",
            (
                b"0\0dir_path=<line>\ndriver=file-reflink\nephemeral_volatile=False\n"
                b"name=default\nrevisions_to_keep=1\nsetup_check=False\n"
                b"size=<n>\nusage=<n>\n"
            ),
        ),
        (
            b"admin.pool.UsageDetails+default dom0 name dom0\0",
            b"0\0data_size=<n>\ndata_usage=<n>\n",
        ),
        (
            b"admin.pool.Remove+default dom0 name dom0\0",
            b"2\0QubesPoolInUseError\0\0<text>\0",
        ),
    ],
    "qvm-firewall": [
        (b"admin.vm.firewall.Get+ dom0 name work\0", b"0\0action=accept\n"),
        (
            (
                b"admin.vm.firewall.Set+ dom0 name work\0"
                b"action=accept dst4=10.0.0.1/32 proto=tcp dstports=80-80\naction=drop"
            ),
            b"0\0",
        ),
        (
            b"admin.vm.firewall.Get+ dom0 name work\0",
            (
                b"0\0action=accept proto=tcp dst4=10.0.0.1/32 dstports=80-80\n"
                b"action=drop\n"
            ),
        ),
    ],
    "keyword adminvm": [
        (b"admin.pool.List+ dom0 keyword adminvm\0", b"0\0default\n"),
    ],
    "a client from before 2020": [(b"dom0\0admin.vm.List\0dom0\0\0", b"")],
}


def pattern(answer):
    expression = re.escape(answer)
    for mark, meaning in WILD.items():
        expression = expression.replace(re.escape(mark), meaning)
    return re.compile(expression, re.DOTALL)


@pytest.mark.parametrize("tool", TRANSCRIPTS)
def test_a_tool_gets_what_it_expects(tool, server, app):
    del app
    for request, answer in TRANSCRIPTS[tool]:
        got = exchange(server.path, request)
        assert pattern(answer).fullmatch(got), (request, got)


def test_a_clone_is_what_qvm_clone_makes_of_it(server):
    """Properties, tags, firewall and the content come over, each by its own call."""
    client = Client(server.path)
    client.call("admin.vm.tag.Set", "work", "mine")
    client.call("admin.vm.property.Set", "work", "memory", b"600")
    client.call("admin.vm.Create.AppVM", "dom0", "tiny", b"name=copy label=red")
    for name in client.call("admin.vm.property.List", "work").decode().split():
        got = client.call("admin.vm.property.Get", "work", name).decode()
        default, kind, value = got.split(" ", 2)
        if default == "default=True" or name in {"name", "qid", "template", "label"}:
            continue
        if name != "uuid":
            client.call("admin.vm.property.Set", "copy", name, value.encode())
        assert kind.startswith("type=")
    for tag in client.call("admin.vm.tag.List", "work").decode().split():
        client.call("admin.vm.tag.Set", "copy", tag)
    rules = client.call("admin.vm.firewall.Get", "work")
    client.call("admin.vm.firewall.Set", "copy", payload=rules)
    token = client.call("admin.vm.volume.CloneFrom", "work", "private")
    client.call("admin.vm.volume.CloneTo", "copy", "private", token)
    assert client.call("admin.vm.property.Get", "copy", "memory").endswith(b" 600")
