"""What apps may say of templates, and what they are told when it makes no sense."""

import contextlib
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qubes_itests.core.policy.files import PolicyFile
from qubes_itests.guest.image.layer import Copy
from qubes_itests.repository import SpecError, read_spec_file, read_specs
from qubes_itests.run.settings import Settings, load

FULL = """\
[metadata]
name = other

[qubes_itests:template:debian-12]
base = debian-12
packages = gnupg2 socat
    make
copy = . -> /usr/src/app
    src/tool -> /usr/bin/
run = make -C /usr/src/app install
    echo 100% done
init = systemd
timeout = 90
"""
SAME = """\
[tool.qubes_itests.template.debian-12]
base = "debian-12"
packages = ["gnupg2", "socat", "make"]
copy = [". -> /usr/src/app", "src/tool -> /usr/bin/"]
run = "make -C /usr/src/app install\\necho 100% done"
init = "systemd"
timeout = 90
"""


@pytest.fixture
def app(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/tool").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text"), [("setup.cfg", FULL), ("pyproject.toml", SAME)]
)
def test_both_files_say_the_same(app, name, text):
    (app / name).write_text(text)
    (spec,) = read_specs(app)
    assert (spec.app, spec.name, spec.base) == (app.name, "debian-12", "debian-12")
    assert spec.packages == ("gnupg2", "socat", "make")
    assert spec.copies == (
        Copy(app, "/usr/src/app"),
        Copy(app / "src/tool", "/usr/bin/tool"),
    )
    assert spec.script == "make -C /usr/src/app install\necho 100% done"
    assert (spec.init, spec.timeout) == ("systemd", 90)


def test_an_app_that_says_nothing_has_no_templates(app):
    assert read_specs(app) == []
    (app / "setup.cfg").write_text("[metadata]\nname = x\n")
    (app / "pyproject.toml").write_text('[tool.qubes_itests]\ntemplate = ["tiny"]\n')
    assert read_specs(app) == []


def test_templates_of_an_app_are_no_setting(app):
    (app / "pyproject.toml").write_text(SAME)
    assert load(app, {}) == Settings()


def test_one_template_may_not_stand_in_both_files(app):
    (app / "setup.cfg").write_text(FULL)
    (app / "pyproject.toml").write_text(SAME)
    with pytest.raises(SpecError, match="both have it"):
        read_specs(app)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("packages = x", "it needs `base`"),
        ("base = deb 12", "expected the name of a template, got 'deb 12'"),
        ("base = b\npackage = x", "unknown key 'package'; known are: base, packages,"),
        (
            "base = b\npackages = --allow-all",
            "expected the name of a package, got '--allow-all'",
        ),
        ("base = b\npackages = a;b", "expected the name of a package, got 'a;b'"),
        ("base = b\ncopy = src", "expected FILES -> /PLACE, got 'src'"),
        (
            "base = b\ncopy = src -> opt",
            "expected an absolute path in the guest, got 'opt'",
        ),
        ("base = b\ncopy = src -> /opt/../x", "expected an absolute path"),
        ("base = b\ncopy = ../x -> /opt", "'../x' is not in"),
        ("base = b\ncopy = /etc -> /opt", "'/etc' is not in"),
        ("base = b\ncopy = out -> /opt", "'out' is not in"),
        ("base = b\ncopy = nothing -> /opt", "there is no file or directory 'nothing'"),
        ("base = b\ninit = sysv", "expected agent or systemd, got 'sysv'"),
        ("base = b\nkernel = xen", "expected default or generic, got 'xen'"),
        ("base = b\ntimeout = 0", "expected a number of seconds, got '0'"),
        ("base = b\ntimeout = soon", "expected a number of seconds, got 'soon'"),
        ("base = b\nbase = c", "already exists"),
    ],
)
def test_what_makes_no_sense_is_told_with_its_place(app, lines, said):
    (app / "out").symlink_to("/etc")
    path = app / "setup.cfg"
    path.write_text(f"[qubes_itests:template:mine]\n{lines}\n")
    with pytest.raises(SpecError) as caught:
        read_specs(app)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.qubes_itests.template]\nmine = 1\n", "expected a table, got int"),
        (
            "[tool.qubes_itests.template.mine]\nbase = 1\n",
            "expected the name of a template, got 1",
        ),
        (
            '[tool.qubes_itests.template.mine]\nbase="b"\nrun = 7\n',
            "expected text or a list of texts, got 7",
        ),
        (
            '[tool.qubes_itests.template.mine]\nbase="b"\ntimeout = true\n',
            "expected a number of seconds, got True",
        ),
        (
            '[tool.qubes_itests.template."a b"]\nbase="b"\n',
            "expected the name of a template, got 'a b'",
        ),
        ("[tool", "Expected"),
    ],
)
def test_what_makes_no_sense_in_toml_is_told(tmp_path, text, said):
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(SpecError, match=said):
        read_specs(tmp_path)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(SpecError, match="No such file"):
        read_spec_file(tmp_path / "nothing.cfg")


LINES = st.sampled_from(
    [
        *("[qubes_itests:template:a]", "base = a", "packages = b c", "copy = . -> /x"),
        *("run = %s", " more", "init = agent", "timeout = 1e9", "[", "]", "=", "\0"),
        *("[tool.qubes_itests.template.a]", 'base = "a"', "copy = [1]", "\ufeff", "%"),
    ]
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(LINES, max_size=8), st.sampled_from(["setup.cfg", "pyproject.toml"]))
def test_any_file_has_specs_or_a_problem(tmp_path, lines, name):
    path = tmp_path / name
    path.write_text("\n".join(lines))
    with contextlib.suppress(SpecError):
        for spec in read_spec_file(path):
            assert spec.base
            assert all(copy.source.exists() for copy in spec.copies)


@pytest.mark.parametrize("toml", [False, True])
def test_what_tests_need_beside_a_template(tmp_path, toml):
    app, other = tmp_path / "app", tmp_path / "other"
    for directory in (app, other, app / "policy.d"):
        directory.mkdir()
    (app / "30-app.policy").touch()
    (other / "old").touch()
    values = {
        "plugin": ["setup-tests.py", "tests"],
        "requires": ["pillow numpy", "debian:libmagic1", "other:."],
        "policy": ["30-app.policy", "policy.d", "other:old -> app.Service+arg"],
        "copy": ["other:. -> /opt/other", "other:old -> /opt/"],
        "artifacts": ["/var/log/app/*.log /home/user/.app/[a-c]?", "/rw/config/app"],
    }
    if toml:
        text = "[tool.qubes_itests.template.t]\nbase = 'b'\n"
        text += "\n".join(f"{key} = {lines!r}" for key, lines in values.items())
    else:
        text = "[qubes_itests:template:t]\nbase = b\n"
        text += "\n".join(f"{k} =\n  " + "\n  ".join(v) for k, v in values.items())
    (app / ("pyproject.toml" if toml else "setup.cfg")).write_text(text)
    (spec,) = read_specs(app)
    assert spec.plugin == ("setup-tests.py", "tests")
    assert spec.requires == ("pillow", "numpy", "debian:libmagic1", "other:.")
    assert spec.policy == (
        PolicyFile(app / "30-app.policy"),
        PolicyFile(app / "policy.d"),
        PolicyFile(other / "old", "app.Service+arg"),
    )
    assert spec.artifacts == (
        *("/var/log/app/*.log", "/home/user/.app/[a-c]?", "/rw/config/app"),
    )
    assert spec.copies == (Copy(other, "/opt/other"), Copy(other / "old", "/opt/old"))


def test_a_repository_is_where_the_command_line_says(tmp_path):
    place = tmp_path / "elsewhere/name"
    place.mkdir(parents=True)
    spec = "[qubes_itests:template:t]\nbase = b\ncopy = name:. -> /opt\n"
    (tmp_path / "a.cfg").write_text(spec)
    (found,) = read_spec_file(tmp_path / "a.cfg", {"name": place})
    assert found.copies == (Copy(place, "/opt"),)
    assert found.app == "a.cfg"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("policy = gone.policy", "policy: there is no file or directory 'gone.policy'"),
        ("policy = Bad.policy", "has to end in .policy"),
        ("policy = file", "written as: FILE -> SERVICE"),
        ("policy = file -> ../x", "expected the name of a service, got '../x'"),
        ("policy = file ->", "expected the name of a service, got ''"),
        ("policy = ../x", "policy: '../x' is not in"),
        ("requires = -e.", "requires: '-e.' is neither"),
        ("artifacts = var/log/x", "expected an absolute path in the guest"),
        ("artifacts = /var/../x", "which may have wildcards, got '/var/../x'"),
        ("artifacts = /var/\a", "artifacts: expected an absolute path"),
        ("copy = gone:. -> /opt", "copy: there is no repository 'gone'"),
    ],
)
def test_what_of_that_makes_no_sense(tmp_path, line, error):
    for name in ("file", "Bad.policy"):
        (tmp_path / name).touch()
    (tmp_path / "setup.cfg").write_text(
        f"[qubes_itests:template:t]\nbase = b\n{line}\n"
    )
    with pytest.raises(SpecError, match=re.escape(error)):
        read_specs(tmp_path)
