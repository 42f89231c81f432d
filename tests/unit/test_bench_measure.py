"""Interleaving, timing and comparing, with scripted decoders and a clock that only they move."""

import gc

import pytest

from gorgon import interrupts
from gorgon.bench.decoders import Answer, cut_at_stop
from gorgon.bench.measure import first_difference, measure
from gorgon.bench.quality import judge, same_text, summarize_quality
from gorgon.bench.summary import (
    accepted_histogram,
    accepted_nodes,
    distribution_ms,
    percentile,
    speedup,
    timing_summary,
    tokens_per_second,
    tokens_per_step,
)
from gorgon.bench.workload import Prompt
from gorgon.errors import Interrupted


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """Takes `seconds(call)` for each answer and returns `tokens(prompt)`."""

    def __init__(self, name, clock, log, seconds, tokens=lambda prompt: [prompt, 7, 1], steps=(2,)):
        self.name, self._clock, self._log, self._seconds, self._tokens = name, clock, log, seconds, tokens
        self._steps = list(steps)
        self.calls = 0

    def answer(self, prompt_ids, max_new_tokens, stop):
        self._log.append((self.name, prompt_ids[0], gc.isenabled()))
        self._clock.now += self._seconds(self.calls)
        self.calls += 1
        return Answer(self._tokens(prompt_ids[0]), "text", 0.25, self._steps, [1])


def prompts(count):
    return [Prompt(f"row-{i}", "q", None, "text", [i]) for i in range(count)]


def run(decoders, clock, count=3, trials=2, warmup=0):
    return measure(
        decoders, prompts(count), max_new_tokens=8, stop=(), trials=trials, warmup_prompts=warmup, clock=clock
    )


def test_interleaved_rotating_and_without_garbage_collection():
    clock, log = Clock(), []
    names = ("plain", "medusa", "transformers")
    run([Scripted(n, clock, log, lambda _: 1.0) for n in names], clock, count=3, trials=2, warmup=1)
    warm, timed = log[:3], log[3:]
    assert all(enabled for *_, enabled in warm)
    assert not any(enabled for *_, enabled in timed)
    assert gc.isenabled()
    groups = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert [g[0][1] for g in groups] == [0, 1, 2, 0, 1, 2]
    assert [g[0][0] for g in groups] == ["plain", "medusa", "transformers", "medusa", "transformers", "plain"]
    assert all(sorted(n for n, *_ in g) == sorted(names) for g in groups)


def test_times_and_speedup_are_of_the_same_trial():
    clock, log = Clock(), []
    # the machine is twice as slow in the second trial: the ratio must not notice
    plain = Scripted("plain", clock, log, lambda call: 4.0 if call < 3 else 8.0)
    medusa = Scripted("medusa", clock, log, lambda call: 2.0 if call < 3 else 4.0)
    series = run([plain, medusa], clock)
    assert series["plain"].seconds == [[4.0] * 3, [8.0] * 3]
    assert series["medusa"].seconds == [[2.0] * 3, [4.0] * 3]
    assert speedup(series["medusa"], series["plain"]) == (2.0, [2.0, 2.0])
    assert tokens_per_second(series["plain"]) == (0.6, [0.4, 0.8])
    assert series["medusa"].exact_match == 1.0
    summary = timing_summary(series)
    assert summary["latency_ms"]["plain"]["p50"] == 6000.0
    assert summary["first_token_ms"]["medusa"]["mean"] == 250.0
    assert summary["tokens_per_s"]["medusa_range"] == [0.8, 1.5]


def test_differing_outputs_are_reported_wherever_they_happen():
    clock, log = Clock(), []
    plain = Scripted("plain", clock, log, lambda _: 1.0)
    wrong = Scripted("medusa", clock, log, lambda _: 1.0, tokens=lambda p: [p, 9, 1] if p == 1 else [p, 7, 1])
    short = Scripted("transformers", clock, log, lambda _: 1.0, tokens=lambda p: [p, 7])
    series = run([plain, wrong, short], clock)
    assert series["medusa"].exact_match == pytest.approx(2 / 3)
    assert [(d.id, d.trial, d.position, d.plain_token, d.token) for d in series["medusa"].differences] == [
        ("row-1", 0, 1, 7, 9), ("row-1", 1, 1, 7, 9),
    ]  # fmt: skip
    assert series["transformers"].exact_match == 0.0
    assert series["transformers"].differences[0].token is None
    assert series["plain"].exact_match == 1.0


def test_an_answer_that_changes_between_trials_is_a_difference():
    clock, log = Clock(), []
    plain = Scripted("plain", clock, log, lambda _: 1.0)
    calls = iter(range(100))
    fickle = Scripted("medusa", clock, log, lambda _: 1.0, tokens=lambda p: [p, 7, 1] if next(calls) < 4 else [p, 8, 1])
    series = run([plain, fickle], clock)
    assert series["medusa"].exact_match == pytest.approx(1 / 3)
    assert {d.trial for d in series["medusa"].differences} == {1}


def test_a_stop_request_ends_it_and_turns_garbage_collection_on_again(monkeypatch):
    clock, log = Clock(), []
    monkeypatch.setattr(interrupts, "requested", lambda: len(log) >= 2)
    with pytest.raises(Interrupted):
        run([Scripted("plain", clock, log, lambda _: 1.0)], clock)
    assert len(log) == 2
    assert gc.isenabled()


def test_first_difference():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1]) == 1
    assert first_difference([], [4]) == 0


def test_percentiles_interpolate():
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([1, 2, 3, 4, 5], 90) == pytest.approx(4.6)
    assert percentile([7], 99) == 7


def test_distribution_is_over_medians_of_the_trials():
    # prompt 0: 1, 1, 100 s -> 1 s; prompt 1: 3 s
    assert distribution_ms([[1, 3], [100, 3], [1, 3]]) == {
        "mean": 2000.0, "p50": 2000.0, "p90": 2800.0, "p99": 2980.0,
    }  # fmt: skip


def test_step_statistics():
    answers = [Answer([1] * 7, "", 0, [3, 1, 2], [2, 0, 1]), Answer([1] * 2, "", 0, [1], [3])]
    assert tokens_per_step(answers) == 1.75
    assert tokens_per_step([Answer([1], "", 0)]) == 1.0
    assert accepted_histogram(answers) == {"1": 2, "2": 1, "3": 1}
    # tree: 0 root, 1 under 0, 2 under 1, 3 under 0; deepest nodes 2, 0, 1, 3
    assert accepted_nodes(answers, [-1, 0, 1, 0]) == [4, 2, 1, 1]


def test_stop_strings_cut_the_text():
    assert cut_at_stop("ab;cd\nef", ("\n", ";")) == "ab"
    assert cut_at_stop("abc", ("x",)) == "abc"


def test_quality():
    schema = "CREATE TABLE t (a INTEGER)"
    rows = [
        Prompt("0", "q", schema, "SELECT a FROM t", []),
        Prompt("1", "q", schema, "SELECT a FROM t", []),
        Prompt("2", "q", None, "Paris", []),
    ]
    texts = ["SELECT  a\nFROM t ", "SELECT b FROM t", "Paris"]
    judged = [judge(p, t, sql=True) for p, t in zip(rows, texts, strict=True)]
    summary = summarize_quality(rows, judged, {"plain": ["x", "x", "Paris"]})
    assert summary["exact_match"] == pytest.approx(2 / 3)
    assert summary["exact_match_of"]["plain"] == pytest.approx(1 / 3)
    assert (summary["sql_rows"], summary["sql_runs"], summary["reference_runs"]) == (2, 0.5, 1.0)
    without = summarize_quality(rows, [judge(p, t, sql=False) for p, t in zip(rows, texts, strict=True)], {})
    assert (without["sql_rows"], without["sql_runs"]) == (0, None)
    assert not same_text("a b", "ab")
