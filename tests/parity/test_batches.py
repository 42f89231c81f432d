"""Many requests in one step: each row is what transformers writes and what it is alone, whoever runs beside it."""

import pytest
import torch

from gorgon.core.heads import MedusaHeads
from gorgon.core.sampling import Sampling
from gorgon.core.tree import DraftTree
from gorgon.decode import engine as engine_module
from gorgon.decode import slots as slots_module
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.engine import PLAIN, Engine
from gorgon.decode.request import Request
from gorgon.errors import ModelError
from gorgon.models.cache import TreeCache
from gorgon.models.toolchain import cpp_compiler
from tests.parity.support import (
    CONTEXT,
    TREES,
    VOCAB,
    Oracle,
    backbone_of,
    no_numbers_of,
    oracle_engine,
    prompts,
    reference,
)

SIZES = (30, 1, 9, 60, 2, 17, 88)
LIMITS = (40, 3, 40, 25, 1, 40, 40)


def llama(kernels, *, own=False, **options):
    """As it was loaded, or as our kernels run it: then fillers are left out of the steps."""
    backbone = backbone_of("llama", own=own or kernels, **options)
    if kernels:
        backbone.run_steps("eager")
        assert backbone.packs
    return backbone


KERNELS = [False, pytest.param(True, marks=pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler"))]


@pytest.fixture(params=KERNELS, ids=["as loaded", "kernels"])
def backbone(request):
    return llama(request.param)


@pytest.fixture(params=KERNELS, ids=["as loaded", "kernels"])
def endless(request):
    """Its end token is none of its vocabulary."""
    return llama(request.param, eos=VOCAB)


def answers_of(slots, requests, *, most=None, between=1):
    """Runs requests through slots; each joins as soon as there is room, its prompt read part by part between steps."""
    waiting, runs, sizes = list(requests), [], set()
    while waiting or slots.running:
        if waiting and slots.free and slots.entering is None:
            runs.append(slots.admit(waiting.pop(0), stream=len(runs)))
        if slots.entering is not None:
            slots.read_prompt(most)
        for _ in range(between):
            sizes.add(len(slots.step()))
    assert slots.free == slots.count
    return runs, sizes


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("together", [2, 3, 7])
def test_rows_of_different_length_acceptance_and_limit(backbone, tree, together):
    asked = prompts(SIZES)
    engine = oracle_engine(backbone, tree, asked)
    slots = engine.slots(together, CONTEXT)
    runs, sizes = answers_of(slots, [Request(p, limit) for p, limit in zip(asked, LIMITS, strict=True)])
    for run, prompt, limit in zip(runs, asked, LIMITS, strict=True):
        limit = min(limit, CONTEXT - len(prompt))
        alone = engine.answer(prompt, max_new_tokens=limit)
        assert run.generation.token_ids == alone.token_ids == reference(backbone, prompt, limit)
        assert run.generation.step_nodes == alone.step_nodes, "the same drafts are accepted, too"
        assert run.generation.finish == alone.finish and run.error is None
    assert max(sizes) > 1, "they must have run together, or this test shows nothing"


def test_calls_keep_a_cache_for_those_that_follow(backbone, monkeypatch):
    made = []

    class Counted(TreeCache):
        def __init__(self, *arguments):
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(slots_module, "TreeCache", Counted)
    asked = prompts((2, 9, 30, 1, 17))
    expected = [reference(backbone, p, 20) for p in asked]
    engine = oracle_engine(backbone, TREES["bushy"], asked, 20)
    steps = [
        (engine, asked, 20, 2, 2),  # the sequences' and that of the prompt being read
        (engine.plain(), asked, 20, 2, 0),
        (engine.with_tree(TREES["plain"]), asked[::-1], 5, 2, 0),
        (engine, asked, 20, 2, 0),
        (engine, asked, 20, 3, 2),  # another number of sequences
        (engine, asked, 20, 1, 1),
        (engine, asked[:1], 20, 4, 0),  # one prompt is one sequence
    ]
    for one, given, limit, together, caches in steps:
        made.clear()
        answers = one.generate(given, max_new_tokens=limit, together=together)
        assert {tuple(p): a.token_ids for p, a in zip(given, answers, strict=True)} == {
            tuple(p): e[:limit] for p, e in zip(asked, expected, strict=True) if p in given
        }
        assert len(made) == caches, (one, together)
    made.clear()
    growing = engine.stream(Request(asked[0], 20))
    next(growing)
    assert [a.token_ids for a in engine.generate(asked[1:2], max_new_tokens=20)] == expected[1:2]
    assert list(growing)[-1].token_ids == expected[0]
    assert len(made) == 1, "what a stream uses is nobody else's meanwhile"


def test_a_kept_cache_that_is_too_small_is_made_anew(monkeypatch):
    monkeypatch.setattr(engine_module, "ROUNDING", 8)
    backbone, asked = backbone_of("llama"), prompts((2, 9))
    engine = oracle_engine(backbone, TREES["bushy"], asked)
    engine.plain().generate(asked, max_new_tokens=20)  # no room for drafts
    for limit in (20, 40, 20):
        answers = engine.generate(asked, max_new_tokens=limit)
        assert [a.token_ids for a in answers] == [reference(backbone, p, limit) for p in asked]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3-moe"])
def test_more_prompts_than_places_come_back_in_order(family):
    backbone, asked = backbone_of(family), prompts(range(2, 14), seed=3)
    expected = [reference(backbone, p, 20) for p in asked]
    engine = oracle_engine(backbone, TREES["bushy"], asked, 20)
    for together in (1, 2, 5, 100):
        answers = engine.generate(asked, max_new_tokens=20, together=together)
        assert [a.token_ids for a in answers] == expected
    assert engine.generate([], max_new_tokens=20) == []


@pytest.mark.parametrize("most", [1, 2, 7, 29, 30, 64])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_requests_join_while_others_decode_and_their_prompts_are_read_in_parts(family, most):
    backbone, asked = backbone_of(family), prompts((30, 5, 1, 13))
    engine = oracle_engine(backbone, TREES["bushy + ngram"], asked)
    runs, _ = answers_of(engine.slots(3, 80), [Request(p, 40) for p in asked], most=most)
    assert [r.generation.token_ids for r in runs] == [reference(backbone, p, 40) for p in asked]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_request_dropped_in_the_middle_disturbs_no_other(endless, place):
    asked = prompts((9, 30, 2))
    slots = oracle_engine(endless, TREES["bushy"], asked).slots(3, 80)
    runs = []
    for prompt in asked:
        runs.append(slots.admit(Request(prompt, 40)))
        slots.read_prompt()
    slots.step()
    slots.step()
    slots.drop(runs[place])
    slots.drop(runs[place])  # a second time does nothing
    written = list(runs[place].generation.token_ids)
    assert slots.free == 1 and runs[place] not in slots.running
    late = slots.admit(Request(asked[place], 40))
    slots.read_prompt(4)
    slots.drop(late)  # in the middle of its prompt
    assert slots.free == 1 and slots.entering is None
    again = slots.admit(Request(asked[place], 40))
    slots.read_prompt()
    while slots.running:
        slots.step()
    for at, (run, prompt) in enumerate(zip(runs, asked, strict=True)):
        expected = reference(endless, prompt, 40)
        assert run.generation.token_ids == (written if at == place else expected)
    assert again.generation.token_ids == reference(endless, asked[place], 40)
    assert written == reference(endless, asked[place], 40)[: len(written)]


def test_a_stream_that_is_left_frees_its_slot_and_the_next_one_starts_afresh(backbone):
    asked = prompts((9, 30))
    engine = oracle_engine(backbone, TREES["bushy"], asked)
    for prompt in (*asked, *asked):
        for generation in engine.stream(Request(prompt, 40)):
            if len(generation.token_ids) > 3:
                break
        assert engine.answer(prompt, max_new_tokens=40).token_ids == reference(backbone, prompt, 40)


def test_two_streams_at_once_do_not_share_a_cache(backbone):
    asked = prompts((9, 30))
    engine = oracle_engine(backbone, TREES["bushy"], asked)
    streams, last = [engine.stream(Request(p, 40)) for p in asked], [None, None]
    while any(streams):
        for at, stream in enumerate(streams):
            found = next(stream, None) if stream else None
            last[at], streams[at] = (found, stream) if found else (last[at], None)
    assert [g.token_ids for g in last] == [reference(backbone, p, 40) for p in asked]


def test_the_drafter_is_chosen_by_how_many_decode_together(backbone):
    asked = prompts((9, 30, 2, 5))
    known = [(p, reference(backbone, p, 40)) for p in asked]
    engine = Engine(backbone, None, {1: Oracle(TREES["bushy"], known), 2: Oracle(TREES["chain"], known), 8: PLAIN})
    answers = engine.generate(asked, max_new_tokens=40, together=4)
    assert [a.token_ids for a in answers] == [a for _, a in known]
    assert max(answers, key=lambda a: len(a.step_nodes)).step_nodes[0] == 0, "four together decode plainly"
    assert max(n for a in answers for n in a.step_nodes) > 0, "the last one to run has a tree"


def test_a_step_reads_the_heads_that_its_drafter_asks_for(backbone):
    """Neither those of another batch size, nor fewer than are asked for to time them; the text stays the same."""
    asked, read = prompts((9, 30, 2, 5)), []
    torch.manual_seed(0)
    heads = MedusaHeads(4, 1, backbone.hidden_size, VOCAB).requires_grad_(False)
    heads.start_from(backbone_of("llama").lm_head.weight)

    class Watched(StaticDrafter):
        def draft(self, root, choices, context):
            read.append((self.heads, 0 if choices is None else choices.heads))
            return super().draft(root, choices, context)

    one = DraftTree.of([(0,)])
    engine = Engine(backbone, heads, {1: Watched(one), 2: Watched(TREES["bushy"]), 3: PLAIN, 4: Watched(one, 3)})
    answers = engine.generate(asked, max_new_tokens=20, together=4)
    assert [a.token_ids for a in answers] == [reference(backbone, p, 20) for p in asked]
    engine.generate(asked[:1], max_new_tokens=20, together=1)
    assert {(1, 1), (3, 3), (4, 4)} <= set(read), "of one sequence, of four, of two"
    for drafters in ({1: StaticDrafter(one)}, {1: StaticDrafter(TREES["ngram"], 2)}):
        alone = Engine(backbone, heads, drafters).generate(asked, max_new_tokens=20, together=1)
        assert [a.token_ids for a in alone] == [a.token_ids for a in answers]


# sampling

SAMPLING = {
    "temperature": Sampling(temperature=0.9, seed=5),
    "filters": Sampling(temperature=1.3, top_p=0.9, top_k=20, min_p=0.02, seed=5),
    "penalties": Sampling(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2,
                          logit_bias={7: 2.0, 1: -1e9}, seed=5),
    "greedy with penalties": Sampling(repetition_penalty=1.3, frequency_penalty=0.3),
}  # fmt: skip


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_a_seed_gives_the_same_text_plain_with_trees_in_batches_and_alone(backbone, options):
    asked = prompts((9, 30, 2, 17))
    plain = Engine(backbone, None, PLAIN)

    def alone(engine, stream):
        slots = engine.slots(1, 80)
        runs = [slots.admit(Request(asked[stream], 30, sampling=options), stream=stream)]
        slots.read_prompt()
        while slots.running:
            slots.step()
        return runs[0].generation

    expected = [alone(plain, stream).token_ids for stream in range(4)]
    trees = Engine(backbone, None, Oracle(TREES["bushy + ngram"], list(zip(asked, expected, strict=True))))
    drafted = [alone(trees, stream) for stream in range(4)]
    assert [g.token_ids for g in drafted] == expected
    assert sum(node > 0 for g in drafted for node in g.step_nodes) > 4
    for engine in (plain, trees):
        for together in (1, 2, 4):
            found = engine.generate(asked, max_new_tokens=30, sampling=options, together=together)
            assert [g.token_ids for g in found] == expected
    if not options.greedy:
        other = Sampling(**{**{f: getattr(options, f) for f in ("temperature", "top_p", "logit_bias")}, "seed": 6})
        assert plain.generate(asked, max_new_tokens=30, sampling=other)[0].token_ids != expected[0]


def test_greedy_sampled_and_typical_requests_share_steps(endless):
    asked = prompts((9, 30, 2))
    options = [Sampling(), Sampling(temperature=1.0, seed=3), Sampling(temperature=0.7, acceptance="typical", seed=3)]
    engine = oracle_engine(endless, TREES["bushy"], asked)
    requests = [Request(p, 30, sampling=s) for p, s in zip(asked, options, strict=True)]
    runs, sizes = answers_of(engine.slots(3, 80), requests)
    assert runs[0].generation.token_ids == reference(endless, asked[0], 30) and 3 in sizes
    beside, _ = answers_of(Engine(endless, None, PLAIN).slots(3, 80), requests[:2])
    assert runs[1].generation.token_ids == beside[1].generation.token_ids
    assert 0 < len(runs[2].generation.token_ids) <= 30 and runs[2].error is None


# one request's error is its own


def test_logits_that_are_not_numbers_fail_their_own_request_alone(backbone, monkeypatch):
    """Token `bad` makes the hidden state NaN wherever it stands in a text, so one prompt of three fails."""
    bad, asked = 60, [[p % 59 for p in prompt] for prompt in prompts((9, 30, 2))]
    asked[1][-1] = bad
    engine = poisoned(backbone, bad, oracle_engine(backbone, TREES["bushy"], [asked[0], asked[2]]), monkeypatch)
    for options in (Sampling(), Sampling(temperature=0.01, seed=1)):
        slots = engine.slots(3, 80)
        runs = []
        for prompt in asked:
            runs.append(slots.admit(Request(prompt, 10, sampling=options)))
            slots.read_prompt()
        while slots.running:
            slots.step()
        assert isinstance(runs[1].error, ModelError) and "not finite" in str(runs[1].error)
        assert [r.error is None for r in runs] == [True, False, True]
        for at in (0, 2):
            assert runs[at].generation.token_ids == reference(backbone, asked[at], 10)
        assert slots.free == slots.count
        with pytest.raises(ModelError, match="not finite"):
            engine.generate(asked, max_new_tokens=10, sampling=options)


@pytest.mark.parametrize("kernels", KERNELS, ids=["as loaded", "kernels"])
def test_rows_that_are_not_numbers_do_not_reach_who_has_their_place_next(kernels):
    """Of a short text beside a long one, attention is given rows that an earlier request has left."""
    backbone, asked = llama(kernels, own=True), prompts((9, 2, 30))
    expected = [reference(backbone_of("llama"), p, 20) for p in asked]
    others = {t for text in (*asked, *expected[1:]) for t in text}
    bad = next(t for t in expected[0][3:] if t not in others)
    engine = Engine(backbone, None, Oracle(TREES["bushy"], list(zip(asked, expected, strict=True))))
    slots = engine.slots(2, 90)
    with no_numbers_of(backbone, bad):
        runs, _ = answers_of(slots, [Request(p, 20) for p in (asked[0], asked[0])])
    assert all("not finite" in str(run.error) for run in runs)
    runs, sizes = answers_of(slots, [Request(p, 20) for p in asked[1:]])
    assert [r.generation.token_ids for r in runs] == expected[1:] and 2 in sizes


class Spoiling(Oracle):
    """Every draft has a token more, of which the model makes no numbers."""

    bad = VOCAB - 1

    def __init__(self, tree, answers):
        super().__init__(tree, answers)
        self.nodes = tree.nodes + 1

    def draft(self, root, choices, context):
        draft = super().draft(root, choices, context)
        draft.add(self.bad, 0)
        return draft


@pytest.mark.parametrize("kernels", KERNELS, ids=["as loaded", "kernels"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, repetition_penalty=1.2, seed=3)])
def test_no_draft_makes_an_answer_fail(kernels, sampling):
    backbone, asked = llama(kernels, own=True, eos=VOCAB), prompts((9, 2, 30))
    asked = [[p % Spoiling.bad for p in prompt] for prompt in asked]
    plain = Engine(backbone, None, PLAIN)
    expected = [g.token_ids for g in plain.generate(asked, max_new_tokens=20, sampling=sampling)]
    wrong = [at for at, answer in enumerate(expected) if Spoiling.bad in answer[:-1]]
    engine = Engine(backbone, None, Spoiling(TREES["bushy"], list(zip(asked, expected, strict=True))))
    for together in (1, 3):
        with no_numbers_of(backbone, Spoiling.bad):
            runs, _ = answers_of(engine.slots(3, 80), [Request(p, 20, sampling=sampling) for p in asked][:together])
        for at, run in enumerate(runs):
            assert ("not finite" in str(run.error)) == (at in wrong), "where plain decoding fails, too"
            written = run.generation.token_ids
            assert written == expected[at][: len(written)] and (len(written) == 20) == (at not in wrong)
        assert len(wrong) < len(expected)


def test_a_request_may_fail_in_the_middle_of_its_answer(backbone, monkeypatch):
    asked = prompts((9, 30))
    expected = reference(backbone, asked[0], 20)
    bad = next(t for t in expected[3:] if t not in expected[:3] and t not in reference(backbone, asked[1], 20))
    engine = poisoned(backbone, bad, oracle_engine(backbone, TREES["bushy"], asked), monkeypatch)
    runs, _ = answers_of(engine.slots(2, 60), [Request(p, 20) for p in asked])
    written, good = runs[0].generation.token_ids, expected.index(bad) + 1
    assert isinstance(runs[0].error, ModelError) and 1 <= len(written) <= good and written == expected[: len(written)]
    assert runs[1].error is None and runs[1].generation.token_ids == reference(backbone, asked[1], 20)


def poisoned(backbone, bad, engine, monkeypatch):
    real = backbone._run

    def run(cache, tokens_BN, positions_BN, mask):
        hidden_BNH = real(cache, tokens_BN, positions_BN, mask)
        return torch.where((tokens_BN == bad)[..., None], float("nan"), hidden_BNH)

    monkeypatch.setattr(backbone, "_run", run)
    return engine
