"""The scheduler over the real engine: every mix of requests, cancels and faults leaves each answer what it is alone."""

import asyncio
import random
import time

import pytest

from gorgon.core.draft import Draft
from gorgon.core.sampling import Sampling
from gorgon.decode import slots as slots_module
from gorgon.decode.request import Request
from gorgon.errors import LimitError, ModelError
from gorgon.models.graphs import Graphs
from gorgon.serve.errors import BusyError, CancelledError, DeadlineError, InternalError, UnavailableError
from gorgon.serve.jobs import End, Job
from gorgon.serve.memory import plan_kv
from tests.parity.support import Recorder
from tests.serve_support import alone, chat_ids, config, make_engine, scheduler, varied_requests, wait_for
from tests.train_support import tiny_llama


@pytest.fixture(scope="module")
def engine():
    return make_engine()


async def collect(made, requests, *, deadline=60.0, streams=None):
    """(tokens as they were sent, last event) per request."""
    streams = streams or range(len(requests))
    end = time.monotonic() + deadline
    submission = made.submit([Job(r, end, stream=s) for r, s in zip(requests, streams, strict=True)])
    sent, ends = [[] for _ in requests], [None] * len(requests)
    async for index, event in submission.events():
        if isinstance(event, End):
            ends[index] = event
        else:
            sent[index] += event.ids
    return list(zip(sent, ends, strict=True))


@pytest.mark.parametrize(("slots", "clients", "seed"), [(1, 3, 0), (2, 6, 1), (4, 12, 2), (8, 32, 3)])
def test_answers_are_those_of_each_request_alone(engine, slots, clients, seed):
    chance = random.Random(seed)
    requests = varied_requests(engine, clients, seed)
    expected = [alone(engine, r) for r in requests]

    async def client(made, request, delay, leaves):
        await asyncio.sleep(delay)
        submission = made.submit([Job(request, time.monotonic() + 60)])
        tokens = []
        async for _, event in submission.events():
            if isinstance(event, End):
                return tokens, event
            tokens += event.ids
            if leaves:
                submission.cancel()
        raise AssertionError("a submission ended without an end")

    with scheduler(engine, slots=slots) as (made, run):
        plans = [(r, chance.random() * 0.3, chance.random() < 0.25) for r in requests]

        async def all_of_them():
            return await asyncio.gather(*(client(made, *plan) for plan in plans))

        for (tokens, end), whole, (_, _, leaves) in zip(run(all_of_them()), expected, plans, strict=True):
            if end.error is None:
                assert tokens == whole.token_ids
                assert (end.generation.text, end.generation.finish) == (whole.text, whole.finish)
            else:
                assert leaves and isinstance(end.error, CancelledError)
                assert tokens == whole.token_ids[: len(tokens)]
        assert (made.active, made.queued) == (0, 0)


def test_answers_of_one_request_have_streams_of_their_own(engine):
    request = Request(chat_ids(engine, "How many?"), 20, sampling=Sampling(temperature=1.5, seed=7), ignore_end=True)
    with scheduler(engine) as (made, run):
        together = [end.generation.token_ids for _, end in run(collect(made, [request] * 4))]
        one_by_one = [run(collect(made, [request], streams=[i]))[0][1].generation.token_ids for i in range(4)]
    assert together == one_by_one
    assert len({tuple(ids) for ids in together}) == 4


def test_rows_of_earlier_prompts_are_used_again_and_change_nothing(engine):
    long = [
        Request(chat_ids(engine, q, "CREATE TABLE t (a, b, c)" * 8), 16) for q in ("How many?", "List a.", "List c.")
    ]
    expected = [alone(engine, r).token_ids for r in long]
    for reuse in (True, False):
        with scheduler(engine, slots=2, reuse_prefixes=reuse) as (made, run):
            ends = [run(collect(made, [r]))[0][1] for r in [*long, *long]]
            together = [end for _, end in run(collect(made, [*long, *long]))]
        assert [e.generation.token_ids for e in ends] == expected * 2
        assert [e.generation.token_ids for e in together] == expected * 2
        reused = [e.generation.reused_tokens for e in ends]
        if reuse:
            assert min(reused[1:]) > 40 and reused[0] < 20
            assert all(
                e.generation.reused_tokens < len(r.prompt_ids) for e, r in zip(ends, [*long, *long], strict=True)
            )
        else:
            assert reused == [0] * 6


def test_a_thread_that_ends_leaves_nobody_waiting(engine):
    """Whatever ends it: the server says so, and whoever waits is told."""
    request = Request(chat_ids(engine, "How many?"), 100, ignore_end=True)
    with scheduler(engine, slots=1) as (made, run):

        def broken(*_):
            raise RuntimeError("injected")

        made.meter.load = broken
        errors = [end.error for _, end in run(collect(made, [request, request]))]
        assert [type(error) for error in errors] == [UnavailableError] * 2
        assert made.state == "failed"
        with pytest.raises(UnavailableError, match="the engine has failed"):
            made.check_alive()


def test_a_full_queue_refuses_and_says_when_to_come_back(engine):
    request = Request(chat_ids(engine, "How many?"), 60, ignore_end=True)
    with scheduler(engine, slots=1, queue=2) as (made, run):

        async def overload():
            submission = made.submit([Job(request, time.monotonic() + 60) for _ in range(3)])
            while made.active == 0:
                await asyncio.sleep(0)
            for recent, wait in ((0.01, 1), (7.0, 21), (500.0, 60)):  # two wait before it, and its own time
                made.meter.recent_answer_s = recent
                with pytest.raises(BusyError) as refused:
                    made.submit([Job(request, time.monotonic() + 60)])
                assert refused.value.retry_after_s == wait
            ends = [e async for _, e in submission.events() if isinstance(e, End)]
            assert [e.error for e in ends] == [None] * 3

        run(overload())
        run(collect(made, [request]))


def test_deadlines_free_slots_and_queue_places(engine):
    endless = Request(chat_ids(engine, "How many?"), 480, ignore_end=True)
    with scheduler(engine, slots=1) as (made, run):
        results = run(collect(made, [endless, endless], deadline=0.1))
        assert [type(end.error) for _, end in results] == [DeadlineError] * 2
        assert (made.active, made.queued) == (0, 0)
        assert run(collect(made, [Request(endless.prompt_ids, 5)]))[0][1].error is None


@pytest.mark.parametrize(
    ("change", "error"), [({"cancelled": True}, CancelledError), ({"deadline": 0.0}, DeadlineError)]
)
def test_who_leaves_or_is_late_is_gone_within_one_step(engine, change, error):
    endless = Request(chat_ids(engine, "How many?"), 480, ignore_end=True)
    with scheduler(engine, slots=1) as (made, run):

        def steps():
            return made.meter.registry.get_sample_value("gorgon_steps_total")

        async def leave():
            submission, before = made.submit([Job(endless, time.monotonic() + 60)]), None
            async for _, event in submission.events():
                if isinstance(event, End):
                    return before, event
                if before is None:
                    for field, value in change.items():
                        setattr(submission.jobs[0], field, value)
                    before = steps()
            raise AssertionError("a submission ended without an end")

        before, end = run(leave())
        assert isinstance(end.error, error)
        assert steps() - before <= 1  # the step that was under way


def test_a_long_prompt_does_not_hold_up_the_others(engine):
    short = Request(chat_ids(engine, "How many?"), 60, ignore_end=True)
    long = Request(chat_ids(engine, "How many?", "a, b " * 180), 4)
    assert len(long.prompt_ids) > 300
    with scheduler(engine, slots=2, reuse_prefixes=False) as (made, run):

        async def both():
            first = made.submit([Job(short, time.monotonic() + 60)])
            second, seen, done = None, 0, asyncio.Event()

            async def reader(submission):
                async for _, event in submission.events():
                    if not isinstance(event, End):
                        done.set()

            task = None
            async for _, event in first.events():
                if second is None:
                    second = made.submit([Job(long, time.monotonic() + 60)])
                    task = asyncio.ensure_future(reader(second))
                elif not done.is_set() and not isinstance(event, End):
                    seen += 1
            await task
            return seen

        # 300 tokens in chunks of 32: at least nine steps of the short answer happen meanwhile
        assert run(both()) >= 8


def test_a_fault_in_one_requests_sampling_ends_that_request_alone(engine, monkeypatch):
    original = slots_module.accept_sampled

    def faulty(tokens, parents, logits, sampling, *rest):
        if sampling.seed == 666:
            raise ZeroDivisionError("injected")
        return original(tokens, parents, logits, sampling, *rest)

    monkeypatch.setattr(slots_module, "accept_sampled", faulty)
    prompt = chat_ids(engine, "How many heads are older than 56?")
    good = [Request(prompt, 12), Request(prompt, 12, sampling=Sampling(temperature=1.0, seed=5), ignore_end=True)]
    expected = [alone(engine, r).token_ids for r in good]
    bad = Request(prompt, 12, sampling=Sampling(temperature=1.0, seed=666), ignore_end=True)
    with scheduler(engine, slots=3) as (made, run):
        results = run(collect(made, [good[0], bad, good[1]], streams=[0, 0, 0]))
        assert [results[0][1].generation.token_ids, results[2][1].generation.token_ids] == expected
        assert isinstance(results[1][1].error, ModelError) and "injected" in str(results[1][1].error)
        assert made.active == 0


def test_a_failed_step_ends_its_requests_and_three_in_a_row_end_the_service(engine, monkeypatch):
    request = Request(chat_ids(engine, "How many?"), 12)
    original = slots_module.Slots.step
    broken = {"left": 1}

    def step(self):
        if broken["left"] and self.running:
            broken["left"] -= 1
            raise RuntimeError("injected")
        return original(self)

    with scheduler(engine, slots=2) as (made, run):
        monkeypatch.setattr(slots_module.Slots, "step", step)
        assert isinstance(run(collect(made, [request]))[0][1].error, InternalError)
        assert run(collect(made, [request]))[0][1].generation.token_ids == alone_tokens(engine, request)
        broken["left"] = 3
        for _ in range(3):
            assert isinstance(run(collect(made, [request]))[0][1].error, InternalError)
        wait_for(lambda: made.state == "failed")
        with pytest.raises(UnavailableError):
            made.submit([Job(request, time.monotonic() + 1)])
        with pytest.raises(UnavailableError):
            made.check_alive()


def alone_tokens(engine, request):
    return alone(engine, request).token_ids


def test_draining_refuses_new_requests_and_finishes_old_ones(engine):
    request = Request(chat_ids(engine, "How many?"), 30, ignore_end=True)
    with scheduler(engine, slots=1) as (made, run):

        async def drain():
            submission = made.submit([Job(request, time.monotonic() + 60) for _ in range(2)])
            made.drain()
            with pytest.raises(UnavailableError):
                made.submit([Job(request, time.monotonic() + 60)])
            made.check_alive()
            return [e.error async for _, e in submission.events() if isinstance(e, End)]

        assert run(drain()) == [None, None]


def test_the_plan_is_what_is_allocated(engine):
    for slots, playground in ((1, False), (3, True)):
        with scheduler(engine, slots=slots, playground=playground) as (made, run):
            run(collect(made, varied_requests(engine, 4, 9)))
            caches = {id(c): c for lane in made.lanes.values() for c in (lane.slots._cache, lane.slots._entry)}
            # the race's slots hold no draft, so they have fewer rows than the plan counts
            allocated = sum(c.bytes for c in caches.values())
            assert 0.95 * made.plan.total_bytes <= allocated <= made.plan.total_bytes


def test_a_cache_that_does_not_fit_is_refused_with_what_would(engine):
    plan = plan_kv(engine, config(slots=4))
    with pytest.raises(LimitError) as refused:
        plan_kv(engine, config(slots=4), free_bytes=plan.total_bytes - 1)
    assert refused.value.hint == "--slots 3 fits"
    with pytest.raises(LimitError, match="context is shorter"):
        plan_kv(engine, config(context=engine.backbone.max_length + 1))


class Moody:
    """Drafts nothing until it is told to, then chains, pairs, trees and roots in turn, as dynamic drafters may."""

    nodes, heads, width, copies = 5, 2, 2, True

    def __init__(self):
        self.awake, self._turn = False, 0

    def draft(self, root, _choices, _context):
        draft = Draft(root)
        self._turn += self.awake
        for parent in ((), (0,), (0, 1), (0, 0), (0, 0, 1), (0, 1, 2, 3), (0, 0, 0, 1))[self._turn % 7]:
            draft.add(root, parent)
        return draft


def test_nothing_is_compiled_after_the_warm_up(tmp_path):
    """Otherwise the first request of some kind would stall everybody for seconds. A small model is traced sooner."""
    from torch._dynamo.utils import counters

    engine = make_engine(tiny_llama(tmp_path, max_length=512, layers=1))
    engine.backbone.run_steps("recorded")
    moody = Moody()
    engine = engine.with_drafter(moody)
    requests = [r for seed in range(3) for r in varied_requests(engine, 8, seed)]
    with scheduler(engine, slots=3, playground=False) as (made, run):
        before = counters["stats"]["unique_graphs"]
        assert before > 0
        moody.awake = True
        for request in requests[:6]:
            run(collect(made, [request]))
            run(collect(made, [request]))
        run(collect(made, requests))
        assert counters["stats"]["unique_graphs"] == before


class Growing(Moody):
    """Drafts stars, each larger than the one before, up to its most nodes."""

    nodes = 20

    def draft(self, root, _choices, _context):
        draft = Draft(root)
        self._turn += self.awake
        for _ in range(self._turn % self.nodes):
            draft.add(root, 0)
        return draft


def test_no_step_is_captured_after_the_warm_up(tmp_path):
    """A capture takes tenths of a second, in which everybody waits. Prompts are captured by size, when they come."""
    engine = make_engine(tiny_llama(tmp_path, max_length=512, layers=1))
    recorder, growing = Recorder(), Growing()
    engine.backbone.graphs = Graphs(recorder)
    engine = engine.with_drafter(growing)
    requests = [Request([*range(3, 23)], 60, ignore_end=True) for _ in range(3)]
    with scheduler(engine, slots=3, playground=False) as (made, run):
        before = recorder.captured
        assert before >= 3 * 4, "three batch sizes, and drafts of 2, 8, 16 and 20 nodes"
        growing.awake = True
        for together in (requests[:1], requests[:2], requests):
            run(collect(made, together))
        assert growing._turn > 60 and recorder.captured == before
