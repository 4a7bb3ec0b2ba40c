"""Wrong requests, by the thousand: answered or closed, and nothing else happens."""

import logging
import threading

import pytest
from admin_mutations import VALID, complaint, exchange, is_framed, mutated, state_of

COUNT = 1500


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_requests_are_answered_or_closed_and_change_nothing(
    app, server, run, caplog, seed
):
    del run
    caplog.set_level(logging.ERROR)
    before = state_of(app)
    for data in mutated(COUNT, seed):
        answer = exchange(server.path, data)
        assert not (said := complaint(data, answer)), (said, data, answer)
        after = state_of(app)
        if not answer.startswith((b"0\0", b"1\0")):
            assert after == before, (data, answer)
        before = after
    assert [record.getMessage() for record in caplog.records] == []


def test_the_judge_knows_right_from_wrong():
    assert all(map(is_framed, VALID))
    assert complaint(VALID[0], b"")
    assert complaint(VALID[0], b"2\0X\0\0100%\0")
    assert complaint(VALID[0], b"x")
    assert complaint(b"x", b"0\0")
    assert not complaint(b"x", b"")
    assert sum(map(is_framed, mutated(1000, 1))) > 500


def test_mutated_requests_from_many_clients_at_once_fail_none_unexpectedly(
    app, server, caplog
):
    """What one creates another removes meanwhile; all are answered nevertheless."""
    caplog.set_level(logging.ERROR)
    wrong = []

    def send(seed):
        answered = ((data, exchange(server.path, data)) for data in mutated(300, seed))
        wrong.extend(each for each in answered if complaint(*each))

    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [record.getMessage() for record in caplog.records] == []
    assert set(app.pools) == {"default"}
