"""A guest with the generic kernel, and with what systemd would make at boot."""

from pathlib import Path

import pytest

from qubes_itests.host.cache import Cache
from qubes_itests.host.kernel import find_kernel
from qubes_itests.run.app_templates import plugins_for
from qubes_itests.run.hooks import offers
from qubes_itests.run.settings import Settings

_SPEC = Path(__file__).parents[2] / "support/generic-kernel/setup.cfg"
_NAME = "debian-12-generic"


@pytest.fixture(scope="module")
def vm(testbed):
    """Return a running VM on a template that `template build` has made before."""
    run, cache = testbed.portal.run, Cache()
    build = offers(plugins_for(Settings(template_spec=(_SPEC,))), "templates")[_NAME]
    template = build(cache, find_kernel(cache))
    app = run(testbed.make_app("tiny"))
    app.kernels[_NAME] = template
    size = template.root_image.stat().st_size
    below = app.add_new_vm(
        "TemplateVM",
        name=_NAME,
        label="black",
        kernel=_NAME,
        volume_config={"root": {"size": size}},
    )
    run(below.create_on_disk(images={"root": template.root_image}))
    vm = app.add_new_vm("AppVM", name="work", label="red", template=below)
    run(vm.create_on_disk())
    run(vm.start())
    yield vm
    assert run(testbed.close_app(app)) == []


@pytest.fixture
def sh(testbed, vm):
    """Run a command as root, which must succeed; return its output."""

    def sh(command):
        output, _ = testbed.portal.run(vm.run_for_stdio(command, user="root"))
        return output.decode().rstrip("\n")

    return sh


def test_the_kernel_has_its_modules(sh):
    assert "cloud" not in sh("uname -r")
    assert sh("ls /lib/modules") == sh("uname -r")
    sh("modprobe dummy_hcd")
    assert sh("ls /sys/class/udc") == "dummy_udc.0"
    assert sh("modinfo -F license snd_dummy") == "GPL"


def test_interfaces_of_the_kernel_are_mounted(sh):
    places = "/dev/mqueue /sys/kernel/config /sys/kernel/debug /sys/kernel/tracing"
    assert sh(f"stat -f -c %T {places}") == "mqueue\nconfigfs\ndebugfs\ntracefs"
    sh("modprobe libcomposite && mkdir /sys/kernel/config/usb_gadget/g1")


def test_modules_of_modules_load_d_are_loaded(sh):
    assert sh("cat /sys/module/dummy/initstate") == "live"


def test_users_of_sysusers_d_are_there(sh):
    assert sh("getent passwd app-user | cut -d: -f5,6") == "User of an app:/var/lib/app"
    assert sh("stat -c '%a %U' /var/lib/app") == "700 app-user"


def test_files_of_tmpfiles_d_are_in_run_and_nothing_that_a_build_left(sh):
    assert sh("cd /run/app && stat -c '%n %F %a %U:%G' . link pipe told") == (
        ". directory 2750 app-user:root\n"
        "link symbolic link 777 root:root\n"
        "pipe fifo 600 app-user:app-user\n"
        "told regular file 640 app-user:root"
    )
    assert sh("cat /run/app/link") == "once"
    assert sh("ls -d /run/lock /run/by-a-command /run/nologin 2>/dev/null || true") == (
        "/run/lock"
    )


def test_settings_of_an_app_for_the_session_stay(sh):
    assert sh("ls /etc/systemd/system/user@1000.service.d") == "app.conf\nwaiting.conf"
