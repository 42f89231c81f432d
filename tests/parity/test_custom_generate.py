"""`model.generate(custom_generate=...)` gives what `model.generate` gives, through our engine; the rest is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.stopping_criteria import MaxTimeCriteria

from gorgon.core.heads import MedusaHeads
from gorgon.core.sampling import Sampling
from gorgon.core.tree import DraftTree
from gorgon.data.chat import encode_prompt
from gorgon.data.sample import generate_rows
from gorgon.decode.custom_generate import CustomGenerate
from gorgon.decode.drafts import StaticDrafter
from gorgon.errors import GorgonError, ModelError, SamplingError
from gorgon.models.backbone import EMBEDDED_DIRECTORY, load_backbone
from gorgon.models.directory import write_model_directory

TREE = StaticDrafter(DraftTree.of([(0,), (1,), (0, 0)], ngram=5))


@pytest.fixture(scope="module")
def model():
    """The user's own, loaded with transformers."""
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_DIRECTORY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def directory(tmp_path_factory, model):
    torch.manual_seed(1)
    heads = MedusaHeads(2, 1, model.config.hidden_size, model.config.vocab_size)
    heads.start_from(model.lm_head.weight)
    out = tmp_path_factory.mktemp("model")
    write_model_directory(out, heads=heads, backbone_dir=EMBEDDED_DIRECTORY, provenance={})
    return out


@pytest.fixture(scope="module")
def door(directory):
    return CustomGenerate(directory, drafters=TREE, together=3)


@pytest.fixture(scope="module")
def inputs():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_DIRECTORY, padding_side="left")
    rows = [
        [{"role": "system", "content": row["context"]}, {"role": "user", "content": row["question"]}]
        for row in generate_rows(9, 5)
    ]
    ids = [encode_prompt(tokenizer, row) for row in rows]
    return tokenizer.pad({"input_ids": ids}, return_tensors="pt")


def one(inputs, row=0):
    keep = inputs["attention_mask"][row].bool()
    return {key: value[row : row + 1, keep] for key, value in inputs.items()}


GREEDY = {
    "defaults": {},
    "a penalty": {"repetition_penalty": 1.2},
    "other ends": {"eos_token_id": [1, 300, 301, 302, 303, 304], "pad_token_id": 7},
    "no end": {"eos_token_id": None},
    "a short limit": {"max_new_tokens": 2},
    "several answers": {"num_return_sequences": 1, "use_cache": True},
}


@pytest.mark.parametrize("options", GREEDY.values(), ids=GREEDY)
def test_greedy_is_what_generate_writes(model, door, inputs, options):
    options = {"max_new_tokens": 24, "do_sample": False, **options}
    for given in (one(inputs), one(inputs, 3)) if "repetition_penalty" in options else (inputs, one(inputs, 2)):
        assert torch.equal(
            model.generate(**given, **options, custom_generate=door), model.generate(**given, **options)
        )  # fmt: skip
    assert door._engine is not None and door._engine.drafter(1) is TREE


def test_max_length_and_the_output_object(model, door, inputs):
    given = one(inputs)
    options = {"max_length": given["input_ids"].shape[1] + 9, "return_dict_in_generate": True, "do_sample": False}
    ours = model.generate(**given, **options, custom_generate=door)
    assert isinstance(ours, GenerateDecoderOnlyOutput)
    assert torch.equal(ours.sequences, model.generate(**given, **options).sequences)


def test_sampling_follows_the_options_and_the_seed(model, door, inputs):
    given, size = one(inputs), one(inputs)["input_ids"].shape[1]
    options = {
        "max_new_tokens": 24, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01,
        "repetition_penalty": 1.1,
    }  # fmt: skip
    sampling = Sampling(0.8, 0.9, 40, 0.01, 1.1, seed=3)
    expected = door._engine_for(model).plain().generate(
        given["input_ids"].tolist(), max_new_tokens=24, sampling=sampling, together=1
    )[0].token_ids  # fmt: skip
    ours = model.generate(**given, **options, seed=3, custom_generate=door)
    assert ours[0, size:].tolist() == expected

    def drawn(seed, **more):
        torch.manual_seed(seed)
        return model.generate(**given, **{**options, "temperature": 1.5, **more}, custom_generate=door).tolist()

    assert drawn(1) == drawn(1) != drawn(2)
    several = drawn(1, num_return_sequences=3)
    assert len(several) == 3 and len({tuple(row) for row in several}) > 1
    assert (
        drawn(5, top_k=1, top_p=1.0, min_p=None, repetition_penalty=1.0)
        == model.generate(**given, max_new_tokens=24, do_sample=False).tolist()
    )


def test_a_model_of_another_class_needs_its_own_heads(door, inputs):
    from tests.parity.support import backbone_of

    other = backbone_of("qwen2").model
    with pytest.raises(ModelError, match="does not fit the backbone"):
        other.generate(torch.tensor([[3, 4]]), max_new_tokens=3, custom_generate=door)


REFUSED = {
    "beams": ({"num_beams": 2}, "num_beams"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    "a static cache": ({"cache_implementation": "static"}, "cache_implementation"),
    "n-grams": ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
    "suppressed tokens": ({"suppress_tokens": [5]}, "SuppressTokensLogitsProcessor"),
    "a least length": ({"min_new_tokens": 5}, "MinLengthLogitsProcessor"),
    "typical": ({"do_sample": True, "typical_p": 0.5}, "TypicalLogitsWarper"),
    "time": ({"max_time": 3.0}, "MaxTimeCriteria"),
    "a criterion": ({"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(3.0)])}, "MaxTimeCriteria"),
    "a processor": ({"logits_processor": LogitsProcessorList([lambda ids, scores: scores])}, "function"),
}


@pytest.mark.parametrize(("options", "name"), REFUSED.values(), ids=REFUSED)
def test_what_the_engine_does_not_have_is_refused_by_name(model, door, inputs, options, name, monkeypatch):
    door._engine_for(model)
    monkeypatch.setattr(model.model, "forward", None)  # no work is done
    with pytest.raises(GorgonError, match=name) as error:
        model.generate(**one(inputs), max_new_tokens=5, custom_generate=door, **options)
    assert error.value.hint


def test_values_out_of_range_and_greedy_with_filters(model, door, inputs):
    from transformers import TopKLogitsWarper

    with pytest.raises(SamplingError, match="temperature"):
        model.generate(**one(inputs), max_new_tokens=5, do_sample=True, temperature=1e-7, custom_generate=door)
    with pytest.raises(SamplingError, match="ignore the logits processors"):
        model.generate(
            **one(inputs), max_new_tokens=5, logits_processor=LogitsProcessorList([TopKLogitsWarper(3)]),
            custom_generate=door,
        )  # fmt: skip


def test_padding_and_positions_that_are_not_understood(model, door, inputs):
    right = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    holes = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([[1, 0, 1, 1]])}
    for given in (right, holes):
        with pytest.raises(GorgonError, match="padded on the left") as error:
            model.generate(**given, max_new_tokens=5, custom_generate=door)
        assert "padding_side" in error.value.hint
    for more in ({"position_ids": torch.tensor([[4, 5, 6]])}, {"inputs_embeds": torch.zeros(1, 3, 256)}):
        with pytest.raises(GorgonError, match=next(iter(more))):
            model.generate(torch.tensor([[5, 6, 7]]), **more, max_new_tokens=5, custom_generate=door)


def test_it_also_serves_the_backbone_that_gorgon_loads(door, inputs):
    backbone = load_backbone("embedded", dtype="float32")
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(
        backbone.model.generate(**inputs, **options, custom_generate=door), backbone.model.generate(**inputs, **options)
    )  # fmt: skip
