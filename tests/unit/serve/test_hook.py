"""The hook that points the client tools to a server, with a package in their place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from qubes_itests.serve.environment import HOOK, exports, variables
from qubes_itests.serve.place import Place

SHOW = (
    "import qubesadmin, grp; c = qubesadmin.config;"
    " print(c.QUBESD_SOCKET, c.QREXEC_CLIENT, c.QREXEC_SERVICES_DIR);"
    " print(qubesadmin.Qubes.__name__); print(grp.getgrnam('qubes').gr_name)"
)


@pytest.fixture
def client(tmp_path):
    """Make a package that has what the hook touches, and nothing else."""
    package = tmp_path / "site" / "qubesadmin"
    package.mkdir(parents=True)
    (package / "config.py").write_text("QUBESD_SOCKET = '/var/run/qubesd.sock'\n")
    (package / "app.py").write_text("class QubesLocal: pass\nclass QubesRemote: pass\n")
    (package / "__init__.py").write_text(
        "import qubesadmin.config, qubesadmin.app\nQubes = qubesadmin.app.QubesRemote\n"
    )
    return package.parent


def run(place, code, *paths):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables(place, environment),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_client_calls_the_server(client, tmp_path):
    place = Place(tmp_path / "serve")
    paths, name, group = run(place, SHOW, str(client))
    assert paths.split() == [
        f"{place.directory}/qubesd.sock",
        f"{place.directory}/bin/qrexec-client",
        f"{place.directory}/qubes-rpc",
    ]
    assert (name, group) == ("QubesLocal", "qubes")


def test_a_socket_deep_down_is_reached(client, tmp_path):
    """Through the path that the hook makes of one longer than sockets may have."""
    place = Place(tmp_path / ("x" * 120) / "serve")
    place.directory.mkdir(parents=True)
    short = f"/proc/self/fd/{os.open(place.directory, os.O_PATH)}/qubesd.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(short)
        listening.listen()
        code = (
            "import qubesadmin, socket;"
            " socket.socket(socket.AF_UNIX).connect(qubesadmin.config.QUBESD_SOCKET)"
        )
        run(place, code, str(client))
        listening.settimeout(300)
        listening.accept()[0].close()


def test_somebody_elses_sitecustomize_runs_too(client, tmp_path):
    (client / "sitecustomize.py").write_text("print('theirs')\n")
    lines = run(Place(tmp_path), SHOW, str(client))
    assert lines[0] == "theirs"
    assert lines[2] == "QubesLocal"


def test_without_a_server_it_changes_nothing(client):
    environment = {"PYTHONPATH": f"{HOOK}:{client}"}
    code = "import qubesadmin; print(qubesadmin.Qubes.__name__)"
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment) == b"QubesRemote\n"


def test_the_environment_is_for_a_shell(tmp_path):
    """Whatever the path; and what was there before stays behind it."""
    place = Place(tmp_path / "it's a place")
    script = exports(place) + 'printf "%s\\n" "$QUBES_ITESTS_SERVE" "$PATH"'
    done = subprocess.check_output(["/bin/sh", "-c", script], text=True)
    named, path = done.splitlines()
    assert named == str(place.directory)
    assert path == f"{place.programs}:{os.environ['PATH']}"


def test_the_environment_does_not_grow(tmp_path):
    place = Place(tmp_path)
    once = variables(place, {"PATH": "/bin", "PYTHONPATH": "/x"})
    assert variables(place, once) == once
    former = variables(Place(tmp_path / "former"), {"PATH": "/bin", "PYTHONPATH": "/x"})
    assert variables(place, former) == once
