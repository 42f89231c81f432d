"""Sampling: options, distributions (against transformers' own processors), the pick, the random numbers."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
)

from gorgon.core.sampling import History, Randomness, Sampling, choose, pick, probabilities, process
from gorgon.errors import ModelError, SamplingError

PROMPT, OUTPUT = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5]


@pytest.fixture(scope="module")
def model():
    """Any model: transformers hangs the order of its processors on the model class."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, **size))


class OutputPenalties:
    """Presence and frequency penalties in vLLM's terms, as a processor for transformers' chain."""

    def __init__(self, sampling, output):
        self.sampling, self.output = sampling, output

    def __call__(self, input_ids, scores):
        counts = torch.zeros_like(scores)
        for token in self.output:
            counts[0, token] += 1
        scores = scores - self.sampling.frequency_penalty * counts
        return scores - self.sampling.presence_penalty * (counts > 0)


def by_transformers(model, logits_V, sampling, prompt, output):
    """The processors that `generate` would run, in its own order."""
    config = GenerationConfig(
        do_sample=not sampling.greedy, temperature=sampling.temperature or 1.0, top_k=sampling.top_k,
        top_p=sampling.top_p, min_p=sampling.min_p or None, repetition_penalty=sampling.repetition_penalty,
        sequence_bias={(t,): b for t, b in sampling.logit_bias.items()} or None,
    )  # fmt: skip
    config._eos_token_tensor = None
    extra = LogitsProcessorList([OutputPenalties(sampling, output)])
    chain = model._get_logits_processor(config, input_ids_seq_length=len(prompt), logits_processor=extra)
    return chain(torch.tensor([prompt + output]), logits_V[None].clone())[0]


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 1},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 0.7, "top_k": 5000},
    {"temperature": 0.9, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "logit_bias": {3: 2.0, 11: -100.0}},
    {"temperature": 0.8, "repetition_penalty": 1.2, "top_p": 0.9},
    {"presence_penalty": 0.6, "frequency_penalty": -0.4},
    {"temperature": 0.7, "presence_penalty": -1.5, "frequency_penalty": 0.25},
    {"temperature": 0.6, "logit_bias": {0: 5.0, 9: -5.0}, "top_k": 30},
    {
        "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1,
        "presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": {5: 3.0, 17: -2.0},
    },
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [24, 3000])
def test_processed_logits_equal_transformers_chain(model, settings, size):
    sampling, history = Sampling(**settings), History(PROMPT, OUTPUT)
    generator = torch.Generator().manual_seed(size)
    for scale in (0.5, 3.0, 12.0):
        logits_V = torch.randn(size, generator=generator) * scale
        before_V = logits_V.clone()
        ours_V = process(logits_V, sampling, history)
        theirs_V = by_transformers(model, logits_V, sampling, PROMPT, OUTPUT)
        assert torch.equal(logits_V, before_V)
        assert torch.equal(ours_V == float("-inf"), theirs_V == float("-inf"))
        torch.testing.assert_close(ours_V, theirs_V, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(probabilities(ours_V), theirs_V.double().softmax(0), rtol=1e-4, atol=1e-9)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.sampled_from([0.123, 0.457, 0.731, 0.977]))
def test_ties_at_the_border_of_top_p_leave_as_many_tokens_as_in_transformers(model, logits, top_p):
    logits_V, sampling = torch.tensor(logits, dtype=torch.float32), Sampling(temperature=1.0, top_p=top_p)
    processed_V = process(logits_V, sampling)
    expected_V = by_transformers(model, logits_V, sampling, [0], [])
    assert torch.equal(processed_V.sort().values, expected_V.sort().values)
    ids = (processed_V > float("-inf")).nonzero()[:, 0].tolist()
    in_order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))  # of equal ones the lower id first
    assert ids == sorted(in_order[: len(ids)])


def test_ties_at_the_border_of_top_k_all_stay():
    kept_V = process(torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0]), Sampling(temperature=1.0, top_k=2)) > float("-inf")
    assert kept_V.tolist() == [True, True, True, False, True]


def test_the_repetition_penalty_reads_prompt_and_output_and_the_others_the_output_alone():
    ones_V = torch.ones(4)
    history = History(prompt=[0, 1], output=[1, 2, 2])
    assert process(ones_V, Sampling(repetition_penalty=2.0), history).tolist() == [0.5, 0.5, 0.5, 1.0]
    assert process(ones_V, Sampling(presence_penalty=0.5), history).tolist() == [1.0, 0.5, 0.5, 1.0]
    assert process(ones_V, Sampling(frequency_penalty=0.5), history).tolist() == [1.0, 0.5, 0.0, 1.0]


def test_prompt_tokens_without_a_logit_are_not_penalised():
    sampling = Sampling(repetition_penalty=2.0)
    assert process(torch.ones(3), sampling, History(prompt=[1, 3, 700])).tolist() == [1.0, 0.5, 1.0]


def test_a_history_continued_leaves_the_first_as_it_was():
    sampling, history = Sampling(frequency_penalty=1.0), History([0], [1])
    later = history.then(1).then(2)
    assert process(torch.zeros(3), sampling, later).tolist() == [0.0, -2.0, -1.0]
    assert process(torch.zeros(3), sampling, history).tolist() == [0.0, -1.0, 0.0]
    history.extend([1, 2])
    assert process(torch.zeros(3), sampling, history).tolist() == [0.0, -2.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_logit_dtype_is_processed_in_float32(dtype):
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    sampling = Sampling(temperature=0.7, top_k=10, top_p=0.9)
    assert torch.equal(process(logits_V, sampling), process(logits_V.float(), sampling))


class Calls(TorchDispatchMode):
    """Names and sizes of the operations that run inside it."""

    def __init__(self):
        super().__init__()
        self.sorted_sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "sort" in str(func) and "searchsorted" not in str(func):
            self.sorted_sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_a_large_vocabulary_is_sorted_only_when_top_p_needs_it():
    generator = torch.Generator().manual_seed(1)
    peaked_V = torch.randn(150_000, generator=generator) * 4
    flat_V = torch.randn(150_000, generator=generator) * 0.1
    for sampling, logits_V, most in [
        (Sampling(temperature=0.7, top_k=50), flat_V, 0),
        (Sampling(temperature=0.7, top_k=50, top_p=0.9, min_p=0.05), flat_V, 60),
        (Sampling(temperature=0.7, top_p=0.9), peaked_V, 5_000),
        (Sampling(temperature=1.0, top_p=0.9), flat_V, 150_000),
    ]:
        with Calls() as calls:
            choose(logits_V, sampling, Randomness(0))
        assert most / 2 <= sum(calls.sorted_sizes) <= most, calls.sorted_sizes


# the pick


def test_each_token_owns_its_stretch_of_the_unit_interval():
    processed_V = torch.tensor([0.125, 0.0, 0.5, 0.25, 0.0, 0.125, 0.0]).log()
    picked = Counter(pick(processed_V, (i + 0.5) / 1024) for i in range(1024))
    assert picked == {0: 128, 2: 512, 3: 256, 5: 128}
    equal_V = torch.zeros(4)  # a border belongs to the token that begins there
    assert [pick(equal_V, u) for u in (0.0, 0.25 - 2**-53, 0.25, 0.5, 0.75)] == [0, 0, 1, 2, 3]


@given(
    st.lists(st.one_of(st.just(-math.inf), st.floats(-120, 120, width=32)), min_size=1, max_size=12),
    st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53, 1 - 2**-52, 2**-53, 5e-324])),
)
def test_a_token_without_probability_is_never_picked(logits, uniform):
    processed_V = torch.tensor(logits)
    if max(logits) == -math.inf:
        with pytest.raises(ModelError, match="not finite"):
            pick(processed_V, uniform)
    else:
        assert probabilities(processed_V)[pick(processed_V, uniform)] > 0


def test_the_largest_number_picks_the_last_token_that_has_weight():
    assert pick(torch.tensor([0.0, 0.0, 0.0, -800.0, -math.inf]), 1 - 2**-53) == 2
    assert pick(torch.full((150_000,), 0.1), 1 - 2**-53) == 149_999
    assert pick(torch.full((150_000,), 0.1), 0.0) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1)],
    ids=["greedy", "plain", "filtered"],
)
def test_logits_that_are_not_finite_are_refused(bad, sampling):
    logits_V = torch.zeros(10)
    logits_V[4] = bad
    with pytest.raises(ModelError, match="not finite"):
        choose(logits_V, sampling, Randomness(0))
    with pytest.raises(ModelError, match="not finite"):
        choose(torch.full((10,), -math.inf), sampling, Randomness(0))


def test_a_lowest_temperature_chooses_the_likeliest():
    logits_V = torch.tensor([40.0, 41.0, -50.0, 1e9])
    assert choose(logits_V, Sampling(temperature=1e-5, top_p=0.9, min_p=0.1), Randomness(3)) == 3
    assert choose(logits_V[:3], Sampling(temperature=1e-5, logit_bias={2: 1e9}), Randomness(3)) == 2


# random numbers


def test_numbers_depend_on_seed_stream_and_position_alone():
    one, other = Randomness(7), Randomness(7)
    drawn = [one.uniform(t) for t in range(20)]
    assert [other.uniform(t) for t in reversed(range(20))] == drawn[::-1]
    assert one.uniform(3) == drawn[3]
    different = [Randomness(8), Randomness(-7), Randomness(7, stream=1), Randomness(None)]
    assert all(len({r.uniform(t) for t in range(20)} | set(drawn)) == 40 for r in different)


def test_numbers_stay_the_same_from_release_to_release():
    assert [Randomness(1234).uniform(t) for t in (0, 1, 10_000)] == [
        0.1651216038492921,
        0.8352707719561623,
        0.30195443521444854,
    ]


def test_a_drawn_seed_reproduces_its_numbers():
    drawn = Randomness()
    assert Randomness(drawn.seed).uniform(5) == drawn.uniform(5)
    assert Randomness().seed != drawn.seed


def test_numbers_are_uniform_and_pairs_of_them_too():
    rows = torch.tensor([[Randomness(s).uniform(t) for t in range(40)] for s in range(500)], dtype=torch.float64)
    assert float(rows.min()) >= 0 and float(rows.max()) < 1
    for pairs in (rows[:, ::2] * 8 // 1 * 8 + rows[:, 1::2] * 8 // 1, rows[::2] * 8 // 1 * 8 + rows[1::2] * 8 // 1):
        counts = torch.bincount(pairs.long().flatten(), minlength=64).double()
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert 25 < float(chi2) < 120  # 63 degrees of freedom: mean 63, deviation 11


# options


def test_the_default_is_plain_greedy():
    assert Sampling().greedy and Sampling().plain_greedy and not Sampling().needs_history
    assert choose(torch.tensor([0.0, 3.0, 3.0]), Sampling()) == 1


@pytest.mark.parametrize(
    ("settings", "greedy", "plain", "history"),
    [
        ({"temperature": 1}, False, False, False),
        ({"temperature": 0, "seed": 3}, True, True, False),
        ({"logit_bias": {1: 2}}, True, False, False),
        ({"repetition_penalty": 1.1}, True, False, True),
        ({"presence_penalty": -1}, True, False, True),
        ({"frequency_penalty": 0.1, "temperature": 0.5}, False, False, True),
    ],
)
def test_properties(settings, greedy, plain, history):
    sampling = Sampling(**settings)
    assert (sampling.greedy, sampling.plain_greedy, sampling.needs_history) == (greedy, plain, history)


def test_options_are_a_value():
    bias = {1: 2}
    sampling = Sampling(temperature=1, logit_bias=bias)
    bias[1] = 50
    assert sampling == Sampling(temperature=1.0, logit_bias={1: 2.0}) and hash(sampling) == hash(
        Sampling(temperature=1)
    )
    assert isinstance(sampling.temperature, float) and sampling.logit_bias == {1: 2.0}


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "0.7"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"temperature": 1, "top_p": 0}, "top_p"),
        ({"temperature": 1, "top_p": 1.01}, "top_p"),
        ({"temperature": 1, "top_p": math.nan}, "top_p"),
        ({"temperature": 1, "top_k": -1}, "top_k"),
        ({"temperature": 1, "top_k": 2.0}, "top_k"),
        ({"temperature": 1, "top_k": True}, "top_k"),
        ({"temperature": 1, "min_p": 1.0}, "min_p"),
        ({"temperature": 1, "min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": {1: "x"}}, "logit_bias"),
        ({"logit_bias": {1: 1e10}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {"1": 1.0}}, "logit_bias"),
        ({"logit_bias": [1, 2]}, "logit_bias"),
        ({"temperature": 1, "seed": 1.5}, "seed"),
        ({"temperature": 1, "seed": 2**63}, "seed"),
        ({"temperature": 1, "seed": True}, "seed"),
        ({"temperature": 1, "acceptance": "lossy"}, "acceptance"),
        ({"temperature": 1, "acceptance": "typical", "epsilon": 0}, "epsilon"),
        ({"temperature": 1, "acceptance": "typical", "delta": 1.5}, "delta"),
        # contradictions
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"acceptance": "typical"}, "acceptance"),
        ({"temperature": 1, "epsilon": 0.1}, "epsilon"),
        ({"temperature": 1, "delta": 0.4}, "delta"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(settings, field):
    with pytest.raises(SamplingError) as error:
        Sampling(**settings)
    assert error.value.field == field and error.value.allowed and error.value.exit_code == 2


def test_a_bias_beyond_the_vocabulary_is_refused_before_any_work():
    sampling = Sampling(logit_bias={99: 1.0, 100: 1.0})
    sampling.check_vocabulary(101)
    with pytest.raises(SamplingError, match="given: 100; allowed: 0 to 99"):
        sampling.check_vocabulary(100)


def test_a_bad_seed_is_refused_by_the_random_numbers_too():
    with pytest.raises(SamplingError, match="64-bit"):
        Randomness(2**64)
