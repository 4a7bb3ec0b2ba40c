"""Waiting for a guest's journal."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from qubes_itests.guest.link import journal


@pytest.mark.asyncio
async def test_who_is_cancelled_while_it_settles_leaves_no_task(monkeypatch):
    async def done(*_words, **_named):
        """Stand for a guest that answers, and never logs the mark."""

    monkeypatch.setattr(journal, "answer_of", done)
    followed = journal.GuestJournal(SimpleNamespace(spawn=done), "systemd", 0)
    followed._following = asyncio.create_task(asyncio.Event().wait())
    before = asyncio.all_tasks()
    settling = asyncio.create_task(followed.settle(60))
    await asyncio.sleep(0)  # it begins, and waits for the mark
    assert len(asyncio.all_tasks() - before) == 2
    settling.cancel()
    await asyncio.wait([settling])
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    followed._following.cancel()
