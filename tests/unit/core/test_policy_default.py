"""The policy that apps begin with: what Qubes OS allows, denies and asks by default."""

import pytest

from qubes_itests.core.policy import Policy, PolicyFileError
from qubes_itests.core.policy.files import PolicyFile, fill, find_error

#: For calls of `work`: what becomes of one to a new disposable VM, to another VM, to
#: dom0, and to none in particular; a name is who answers.
ORDINARY = {
    "qubes.VMShell": ("dvm", "deny", "deny", "deny"),
    "qubes.VMExec": ("dvm", "deny", "deny", "deny"),
    "qubes.VMExecGUI": ("dvm", "deny", "deny", "deny"),
    "qubes.VMRootShell": ("deny", "deny", "deny", "deny"),
    "qubes.OpenInVM": ("dvm", "ask", "deny", "ask"),
    "qubes.OpenURL": ("dvm", "ask", "deny", "ask"),
    "qubes.StartApp": ("dvm", "ask", "deny", "ask"),
    "qubes.GetImageRGBA": ("dvm", "ask", "deny", "ask"),
    "qubes.Filecopy": ("ask", "ask", "deny", "ask"),
    "qubes.FeaturesRequest": ("deny", "deny", "dom0", "deny"),
    "qubes.NotifyTools": ("deny", "deny", "dom0", "deny"),
    "qubes.NotifyUpdates": ("deny", "deny", "dom0", "deny"),
    "qubes.SyncAppMenus": ("deny", "deny", "dom0", "deny"),
    "qubes.Notifications": ("deny", "deny", "deny", "dom0"),
    "qubes.GetRandomizedTime": ("deny", "deny", "dom0", "deny"),
    "qubes.GetDate": ("dom0", "dom0", "deny", "dom0"),
    "qubes.UpdatesProxy": ("deny", "deny", "deny", "deny"),
    "qubes.ConnectTCP": ("deny", "deny", "deny", "deny"),
    "policy.RegisterArgument": ("deny", "deny", "deny", "deny"),
    "admin.vm.List": ("deny", "deny", "deny", "deny"),
    "qubes.PdfConvert": ("deny", "deny", "deny", "deny"),
}
#: Other callers, by service: source, target, and what becomes of it.
SPECIAL = [
    ("qubes.GetDate", "anon", "@default", "deny"),
    ("qubes.UpdatesProxy", "tiny", "@default", "sys-net"),
    ("qubes.UpdatesProxy", "tiny", "sys-net", "deny"),
    ("qubes.UpdatesProxy", "whonix", "@default", "sys-whonix"),
    ("qubes.UpdatesProxy", "whonix", "sys-net", "deny"),
    ("admin.vm.Create.AppVM", "restore", "dom0", "dom0"),
    ("admin.vm.Create.DispVM", "restore", "dom0", "deny"),
    ("admin.vm.List", "restore", "work", "dom0"),
    ("admin.vm.property.Get+provides_network", "restore", "work", "dom0"),
    ("admin.vm.property.Get+netvm", "restore", "work", "deny"),
    ("admin.vm.property.Set+netvm", "restore", "work", "deny"),
    ("admin.vm.property.Set+netvm", "restore", "restored", "dom0"),
    ("admin.vm.volume.ImportWithSize+root", "restore", "restored", "dom0"),
    ("admin.vm.Remove", "restore", "restored", "deny"),
    ("qubes.RestoreById+1", "restore", "backups", "backups"),
    ("qubes.RestoreById+1", "work", "backups", "deny"),
]
TAGS = {
    "anon": "anon-vm",
    "whonix": "whonix-updatevm",
    "restore": "backup-restore-mgmt",
    "restored": "backup-restore-in-progress",
    "backups": "backup-restore-storage",
}


@pytest.fixture
def vms(app, template):
    for name in ("work", "vault", "sys-net", "sys-whonix", "dvm", *TAGS):
        vm = app.add_new_vm("AppVM", name=name, label="red", template=template)
        if name in TAGS:
            vm.tags.add(TAGS[name])
    app.domains["dvm"].template_for_dispvms = True
    app.default_dispvm = app.domains["dvm"]
    return app.domains


@pytest.fixture
def decide(vms, tmp_path):
    """Return who answers a call by the default policy and these files."""

    def decide(service, source, target, *files):
        fill(tmp_path, files)
        policy = Policy(directory=tmp_path / "policy.d")
        policy.refresh()
        asked = []
        policy.ask_handler = asked.append
        decision = policy.evaluate(vms._app, service, vms[source], target)
        if asked:
            return "ask"
        if not decision.allowed:
            return "deny"
        return decision.target.removeprefix("@dispvm:").replace("@adminvm", "dom0")

    return decide


@pytest.mark.parametrize("service", ORDINARY)
def test_calls_of_an_ordinary_vm(decide, service):
    targets = ("@dispvm", "vault", "dom0", "@default")
    assert tuple(decide(service, "work", t) for t in targets) == ORDINARY[service]


@pytest.mark.parametrize(("service", "source", "target", "answer"), SPECIAL)
def test_calls_of_others(decide, service, source, target, answer):
    assert decide(service, source, target) == answer


def test_what_is_added_stands_before_or_in_place_of_it(decide, tmp_path):
    files = tmp_path / "files"
    (files / "include").mkdir(parents=True)
    (files / "30-user.policy").write_text("!include include/mine\n")
    (files / "include/mine").write_text("qubes.VMShell * work vault allow\n")
    assert decide("qubes.VMShell", "work", "vault", PolicyFile(files)) == "vault"
    assert decide("qubes.VMExec", "work", "@dispvm", PolicyFile(files)) == "dvm"
    (files / "90-default.policy").write_text("")
    assert decide("qubes.VMExec", "work", "@dispvm", PolicyFile(files)) == "deny"


def test_a_file_in_the_format_of_qubes_os_4_0(decide, tmp_path):
    file = tmp_path / "my.Service.policy"
    file.write_text("$anyvm\t$default\tallow,target=vault\n")
    added = PolicyFile(file, "my.Service")
    assert decide("my.Service", "work", "@default", added) == "vault"


def test_an_error_is_named_with_the_file_and_the_line_and_denies_all(decide, tmp_path):
    file = tmp_path / "10-mine.policy"
    file.write_text("# mine\n\nmy.Service * work allow\n")
    error = find_error([PolicyFile(file)])
    assert error.startswith(f"{file}:3: ")
    assert "SERVICE ARGUMENT SOURCE TARGET ACTION" in error
    assert decide("qubes.VMShell", "work", "@dispvm", PolicyFile(file)) == "deny"
    file.write_text("my.Service * work vault allow\n")
    assert find_error([PolicyFile(file)]) == ""
    assert find_error([]) == ""


def test_a_file_that_is_not_there(tmp_path):
    gone = PolicyFile(tmp_path / "gone.policy")
    assert "gone.policy: there is no such file" in find_error([gone])
    with pytest.raises(PolicyFileError, match="no such file"):
        fill(tmp_path, [gone])
