"""The exit statuses agree wherever they are written down."""

import re
from pathlib import Path

import pytest

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host import exc, sandbox, sandbox_init
from qubes_itests.host.loop import no_loop_device

_ROOT = Path(__file__).parents[3]


def test_pytest_keeps_its_own():
    """All of pytest's are the same here; the newest pytest has more than the oldest."""
    for status in pytest.ExitCode:
        assert status not in list(ExitCode) or ExitCode(status).name == status.name
    assert {0, 1, 2, 3, 4, 5} <= set(ExitCode)


def test_the_scripts_use_the_same():
    text = (_ROOT / "setup.sh").read_text()
    found = re.findall(r"\b([A-Z_]+)=(\d+)", text.partition("readonly ")[2])
    used = {name: int(value) for name, value in found if name in ExitCode.__members__}
    assert used == {
        name: ExitCode[name]
        for name in ("NOT_ROOT", "NO_LOOP_DEVICES", "MISSING_TOOL", "NO_NETWORK")
    }


def test_the_sandbox_uses_the_same():
    assert sandbox_init.NO_SANDBOX == ExitCode.NO_SANDBOX
    assert sandbox_init.INTERNAL_ERROR == ExitCode.INTERNAL_ERROR


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (no_loop_device("x"), 11),
        (exc.MissingToolError("x"), 12),
        (exc.NoKernelError("x"), 14),
        (exc.NoNetworkError("x", "y"), 15),
    ],
)
def test_each_lack_has_its_own(error, status):
    assert error.exit_code == status
    assert error.remedy
    assert error.problem in str(error)


def test_who_is_not_root_or_in_no_sandbox_is_told_so(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(sandbox, "active", lambda: False)
    for act, status in ((sandbox.require_root, 10), (sandbox.require, 13)):
        with pytest.raises(EnvironmentNotReadyError) as caught:
            act()
        assert caught.value.exit_code == status
        assert caught.value.remedy
