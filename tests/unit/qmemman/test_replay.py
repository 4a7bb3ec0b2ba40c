"""Traces, and the numbers that come of replaying them."""

from __future__ import annotations

import memory_traces as traces
from memory_recording import record_refusal
from memory_replay import replay
from memory_traces import Trace

from qubes_itests.qmemman import timeline

MIB = 1024**2


def test_a_seed_gives_one_trace():
    assert traces.generate(20, 600, 1) == traces.generate(20, 600, 1)
    assert traces.generate(20, 600, 1) != traces.generate(20, 600, 2)
    trace = traces.generate(20, 600, 1)
    assert trace.changes == sorted(trace.changes)
    assert {index for _, index, _ in trace.changes} == set(range(20))


def test_enough_memory_is_fair_and_little_is_not_enough():
    trace = traces.generate(20, 1800, 3)
    rich, poor = (replay(trace, 20 * size * MIB) for size in (3000, 600))
    assert rich.below < 0.01 < poor.below
    assert rich.fairness > 0.7
    assert 0 < poor.thrash < 10


def test_a_steady_trace_moves_nothing_twice():
    trace = Trace([1000 * MIB] * 4, [(0, n, 300 * MIB) for n in range(4)], 3600)
    verdict = replay(trace, 3000 * MIB)
    assert (verdict.decisions <= 1, verdict.below) == (True, 0)


def test_a_timeline_becomes_a_trace(tmp_path):
    trace = traces.recorded(timeline.read(record_refusal(tmp_path)))
    assert trace.maxima == [2000 * MIB] * 2
    assert [used // MIB for _, index, used in trace.changes if index == 0] == [250, 900]
    assert replay(trace, 3000 * MIB).below == 0
