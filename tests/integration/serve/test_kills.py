"""A server that is killed at any instant leaves whole VMs, and nothing without one."""

from __future__ import annotations

from server_kills import kill_again_and_again

KILLS = 2


def test_kills_leave_whole_vms_or_none(site, tmp_path):
    """What was acknowledged is there; what was interrupted is whole, or absent.

    `tests/benchmarks/kills.py` does it as often as one likes.
    """
    findings = kill_again_and_again(
        site.environment, tmp_path / "state", seed=1, kills=KILLS
    )
    assert findings.wrong == [], findings
    assert findings.kills == KILLS
    assert findings.acknowledged > 0
