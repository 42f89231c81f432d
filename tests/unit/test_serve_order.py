"""Who gets the machine when: order of arrival, what a turn may cost the others, and drafts for the rows there are."""

import asyncio
import time
from collections import defaultdict

import pytest

from gorgon.core.tree import DraftTree
from gorgon.decode import slots as slots_module
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.engine import PLAIN
from gorgon.decode.request import Request
from gorgon.serve.jobs import End, Job
from tests.serve_support import chat_ids, make_engine, scheduler


@pytest.fixture(scope="module")
def engine():
    return make_engine()


async def ends(submission):
    return [event async for _, event in submission.events() if isinstance(event, End)]


@pytest.mark.parametrize("slots", [1, 3])
def test_slots_are_given_in_the_order_of_arrival(engine, slots):
    """Long prompts are not overtaken by short ones, nor long answers by short ones."""
    kinds = [(chat_ids(engine, "x", "a, b " * words), tokens) for words in (90, 1, 30) for tokens in (20, 1, 6)]
    jobs = [Job(Request(prompt, tokens, ignore_end=True), time.monotonic() + 60) for prompt, tokens in kinds]
    with scheduler(engine, slots=slots, reuse_prefixes=False) as (made, run):
        seated = []
        made.meter.seated = seated.append

        async def all_of_them():
            submissions = [made.submit([job]) for job in jobs]
            return [await ends(one) for one in submissions]

        assert all(end.error is None for (end,) in run(all_of_them()))
    assert seated == jobs


@pytest.mark.parametrize("reuse", [True, False])
def test_what_enters_between_two_steps_is_bounded(engine, monkeypatch, reuse):
    """At most a chunk of tokens, and as many prompts as there are slots, also where rows are reused and answers end at
    once: whoever decodes waits for no more than that, however much arrives."""
    chunk, slots = 32, 2
    turns, passes = [], [0, 0]  # (tokens, prompts) read before each step
    read_prompt, step = slots_module.Slots.read_prompt, slots_module.Slots.step

    def reading(self, most=None):
        before = self.entering.read
        running = self.entering
        whole = read_prompt(self, most)
        passes[0] += running.read - before
        passes[1] += whole
        return whole

    def stepping(self):
        turns.append(tuple(passes))
        passes[:] = 0, 0
        return step(self)

    decoding = Request(chat_ids(engine, "How many?"), 60, ignore_end=True)
    short = Request(chat_ids(engine, "x"), 1)
    long = Request(chat_ids(engine, "x", "a, b " * 90), 1)
    with scheduler(engine, slots=slots, prefill_chunk=chunk, reuse_prefixes=reuse, queue=100) as (made, run):
        monkeypatch.setattr(slots_module.Slots, "read_prompt", reading)
        monkeypatch.setattr(slots_module.Slots, "step", stepping)

        async def crowd():
            requests = [decoding, *[short] * 20, long, *[short] * 20]
            submissions = [made.submit([Job(r, time.monotonic() + 60)]) for r in requests]
            return [(await ends(one))[0].error for one in submissions]

        assert run(crowd()) == [None] * 42
    assert max(tokens for tokens, _ in turns) == chunk
    assert max(prompts for _, prompts in turns) <= slots
    if reuse:
        assert max(prompts for _, prompts in turns) == slots, "reuse made no prompt cheap: nothing was tested"


def test_every_step_drafts_what_was_tuned_for_its_number_of_rows(engine, monkeypatch):
    """Down to nothing at all for the most rows."""
    trees = {1: [(0,), (1,), (0, 0), (0, 1)], 2: [(0,), (0, 0)], 3: [(0,)]}
    tuned = {rows: StaticDrafter(DraftTree.of(paths)) for rows, paths in trees.items()} | {4: PLAIN}
    nodes, step = defaultdict(set), slots_module.Slots.step

    def stepping(self):
        batch = step(self)
        nodes[len(batch)] |= {running.draft.nodes for running in batch}
        return batch

    requests = [Request(chat_ids(engine, "How many?"), 6 + 8 * i, ignore_end=True) for i in range(4)]
    with scheduler(engine.with_drafter(tuned), playground=False) as (made, run):
        monkeypatch.setattr(slots_module.Slots, "step", stepping)

        async def together():
            submissions = [made.submit([Job(r, time.monotonic() + 60)]) for r in requests]
            return await asyncio.gather(*(ends(one) for one in submissions))

        run(together())
    nodes.pop(0, None)
    # a step after one that read no heads has nothing to draft from yet
    assert {rows: found - {1} for rows, found in nodes.items()} == {1: {5}, 2: {3}, 3: {2}, 4: set()}
