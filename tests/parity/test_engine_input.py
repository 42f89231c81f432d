"""Bad input to the engine: a typed error that names it, before any work, and nothing is left taken."""

import pytest
import torch

from gorgon.core.heads import MedusaHeads
from gorgon.core.sampling import Sampling
from gorgon.core.tree import DraftTree
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.engine import PLAIN, Engine
from gorgon.decode.request import Request
from gorgon.errors import GorgonError, LimitError, ModelError, SamplingError, ShapeError
from gorgon.models.cache import TreeCache
from tests.parity.support import CONTEXT, VOCAB, backbone_of, prompts, reference


@pytest.fixture
def backbone():
    return backbone_of("llama")


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return MedusaHeads(2, 1, 32, VOCAB).requires_grad_(False)


def test_trees_that_are_none():
    for paths in ([(0, 0)], [(0,), (1, 0)], [(0,), (0, 1, 2)]):
        with pytest.raises(ShapeError, match="prefix-closed"):
            DraftTree.of(paths)
    with pytest.raises(ShapeError, match="start at 0"):
        DraftTree.of([(-1,)])


def test_trees_that_the_heads_cannot_fill(backbone, heads):
    with pytest.raises(ModelError, match="deeper than there are heads") as error:
        Engine(backbone, heads, StaticDrafter(DraftTree.chain(3)))
    assert error.value.allowed == "at most 2"
    with pytest.raises(ModelError, match="deeper"):
        Engine(backbone, None, StaticDrafter(DraftTree.chain(1)))
    with pytest.raises(ModelError, match="rank of the tree exceeds") as error:
        Engine(backbone, heads, StaticDrafter(DraftTree.of([(VOCAB,)])))
    assert error.value.value == VOCAB and error.value.allowed == f"0 to {VOCAB - 1}"
    with pytest.raises(ModelError, match="rank of the tree exceeds"):
        Engine(backbone, heads, StaticDrafter(DraftTree.of([(5,)])), vocabulary_U=torch.arange(5))
    with pytest.raises(ModelError, match="deeper"):
        Engine(backbone, heads, {1: PLAIN, 8: StaticDrafter(DraftTree.chain(3))})
    last = Engine(backbone, heads, StaticDrafter(DraftTree.of([(VOCAB - 1,), (VOCAB - 1, 0)])))
    prompt = prompts()[2]
    assert last.answer(prompt, max_new_tokens=10).token_ids == reference(backbone, prompt, 10)


REQUESTS = {
    "an empty prompt": (Request([], 5), GorgonError, "empty"),
    "no new tokens": (Request([3], 0), GorgonError, "token limit"),
    "fewer than none": (Request([3], -4), GorgonError, "token limit"),
    "a token beyond the vocabulary": (Request([3, VOCAB], 5), GorgonError, "vocabulary"),
    "a negative token": (Request([3, -1], 5), GorgonError, "vocabulary"),
    "a prompt that fills the context": (Request([3] * CONTEXT, 5), LimitError, "does not fit"),
    "a prompt that is longer": (Request([3] * 1000, 5), LimitError, "does not fit"),
    "a bias beyond V": (Request([3], 5, sampling=Sampling(logit_bias={VOCAB: 1})), SamplingError, "biased"),
}  # fmt: skip
every_request = pytest.mark.parametrize(("request_", "error", "words"), REQUESTS.values(), ids=REQUESTS)


@every_request
def test_a_bad_request_takes_no_slot_and_costs_no_forward(backbone, request_, error, words, monkeypatch):
    monkeypatch.setattr(backbone, "_run", forbidden)
    for count in (1, 3):
        slots = Engine(backbone, None, PLAIN).slots(count, CONTEXT)
        with pytest.raises(error, match=words):
            slots.admit(request_)
        assert slots.free == slots.count == count and slots.running == [] and slots.entering is None
        assert slots._cache.bytes == 0, "nothing is allocated"


@every_request
def test_one_bad_prompt_refuses_the_call_before_any_prompt_is_read(backbone, request_, error, words, monkeypatch):
    engine = Engine(backbone, None, PLAIN)
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "_run", forbidden)
        for together in (1, 2):
            with pytest.raises(error, match=words):
                engine.generate(
                    [[3, 4], request_.prompt_ids], max_new_tokens=request_.max_new_tokens, sampling=request_.sampling,
                    together=together,
                )  # fmt: skip
        with pytest.raises(error, match=words):
            next(engine.stream(request_))
    prompt = prompts()[2]  # and the engine goes on as if nothing had been
    assert engine.answer(prompt, max_new_tokens=5).token_ids == reference(backbone, prompt, 5)


def test_a_prompt_that_does_not_fit_the_slots_is_refused_though_the_model_could_hold_it(backbone):
    slots = Engine(backbone, None, PLAIN).slots(2, 10)
    with pytest.raises(LimitError, match="does not fit") as error:
        slots.admit(Request([3] * 10, 5))
    assert error.value.allowed == "at most 9" and slots.free == 2
    running = slots.admit(Request([3] * 9, 5))
    slots.read_prompt()
    assert running.done and running.generation.finish == "length" and len(running.generation.token_ids) == 1
    assert slots.free == 2


@pytest.mark.parametrize("size", [(0, 10), (1, 0), (-1, 10), (2, -5)])
def test_slots_of_no_size(backbone, size):
    with pytest.raises(GorgonError, match="at least 1"):
        Engine(backbone, None, PLAIN).slots(*size)


@pytest.mark.parametrize("together", [0, -1])
def test_nothing_together(backbone, together):
    with pytest.raises(GorgonError, match="at least 1"):
        Engine(backbone, None, PLAIN).generate([[3, 4]], max_new_tokens=5, together=together)


def test_a_cache_that_is_too_small_is_refused_before_the_forward():
    cache = TreeCache(2, 1, 8)
    with pytest.raises(LimitError, match="cache is full") as error:
        cache.place(torch.arange(4)[None], 9)
    assert error.value.allowed == "at most 8" and cache.bytes == 0


CONTRADICTIONS = {
    "filters without temperature": {"top_p": 0.9},
    "top-k without temperature": {"top_k": 5},
    "typical without temperature": {"acceptance": "typical"},
    "thresholds of a rule that is off": {"temperature": 1.0, "epsilon": 0.2},
    "no nucleus": {"temperature": 1.0, "top_p": 0.0},
    "negative temperature": {"temperature": -1.0},
    "not a number": {"temperature": float("nan")},
    "a rule that is none": {"temperature": 1.0, "acceptance": "rejection"},
}


@pytest.mark.parametrize("options", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_sampling_options_that_contradict_each_other_make_no_request(options):
    with pytest.raises(SamplingError) as error:
        Sampling(**options)
    assert error.value.field in options and error.value.allowed


@pytest.mark.parametrize("seed", [None, 4])
def test_weights_that_are_not_numbers_fail_at_the_first_token(seed):
    backbone = backbone_of("llama", own=True)
    backbone.lm_head.weight[7, 7] = float("nan")
    sampling = Sampling() if seed is None else Sampling(temperature=1.0, seed=seed)
    engine = Engine(backbone, None, PLAIN)
    slots = engine.slots(2, 40)
    for prompt in prompts((3, 5, 9)):
        running = slots.admit(Request(prompt, 5, sampling=sampling))
        slots.read_prompt()
        assert isinstance(running.error, ModelError) and running.generation.token_ids == []
        assert slots.free == 2
    with pytest.raises(ModelError, match="not finite"):
        engine.generate([[3, 4]], max_new_tokens=5, sampling=sampling)
    with pytest.raises(ModelError, match="not finite"):
        next(engine.stream(Request([3, 4], 5, sampling=sampling)))


def forbidden(*_):
    raise AssertionError("a forward was run")
