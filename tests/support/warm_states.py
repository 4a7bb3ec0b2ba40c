"""The saved states that starts of VMs find."""

from __future__ import annotations

from qubes_itests.guest.start.warm import WarmStarts


def found_states(monkeypatch):
    """Return a list of the states that starts find from now on, None for a cold one."""
    found = []
    state_for = WarmStarts.state_for

    async def record(*args):
        found.append(await state_for(*args))
        return found[-1]

    monkeypatch.setattr(WarmStarts, "state_for", record)
    return found
