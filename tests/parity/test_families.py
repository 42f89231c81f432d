"""Token-exact against transformers' own generate in fp32 over model families, trees and batches; who is refused."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from gorgon.core.heads import MedusaHeads
from gorgon.core.tree import DraftTree
from gorgon.data.chat import encode_prompt
from gorgon.data.sample import generate_rows
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.engine import Engine
from gorgon.errors import ModelError
from gorgon.models.backbone import EMBEDDED_DIRECTORY, Backbone, load_backbone
from gorgon.models.families import refuse_other_results
from gorgon.models.toolchain import cpp_compiler
from tests.parity.support import FAMILIES, TREES, WINDOW, backbone_of, config_of, oracle_engine, prompts, reference


def writes_what_transformers_writes(backbone, expected, asked):
    refuse_other_results(backbone)
    for name, together in (("plain", 1), ("chain", 1), ("bushy", 1), ("plain", 3), ("bushy + ngram", 3)):
        answers = oracle_engine(backbone, TREES[name], asked).generate(asked, max_new_tokens=40, together=together)
        assert [a.token_ids for a in answers] == expected, (name, together)
        if name != "plain":
            accepted = sum(node > 0 for a in answers for node in a.step_nodes)
            assert accepted > 4, "the oracle's drafts must be accepted, or this test shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_writes_what_transformers_writes(family):
    backbone, asked = backbone_of(family), prompts((2, 9, 30))
    assert not backbone.spans
    writes_what_transformers_writes(backbone, [reference(backbone, p, 40) for p in asked], asked)


MASKED = {"gemma2", "gpt-oss", "falcon", "stablelm, small heads"}
"""Families whose attention stays transformers' or torch's: capped scores, sinks, its own code, heads below a vector."""


@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_writes_the_same_over_spans(family):
    backbone, asked = backbone_of(family, own=True), prompts((2, 9, 30))
    expected = [reference(backbone, p, 40) for p in asked]
    backbone.run_steps("eager")
    assert backbone.kernels and backbone.spans == (family not in MASKED)
    writes_what_transformers_writes(backbone, expected, asked)


WINDOWED = [family for family, (_, extra) in FAMILIES.items() if extra.get("sliding_window") == WINDOW]


@pytest.mark.parametrize("family", WINDOWED)
def test_a_short_window_decides_what_comes_out(family, monkeypatch):
    """Otherwise the test above would pass without any window in our masks."""
    backbone, asked = backbone_of(family), prompts((2, 9, 30))
    expected = [reference(backbone, p, 40) for p in asked]
    monkeypatch.setattr(Backbone, "_windows", {"every": None})
    without = Engine(backbone, None, StaticDrafter(DraftTree())).generate(asked, max_new_tokens=40)
    assert [a.token_ids for a in without] != expected
    with pytest.raises(ModelError, match="verified as a tree"):
        refuse_other_results(backbone)


# trained weights


@pytest.fixture(scope="module")
def trained():
    return load_backbone("embedded", dtype="float32")


def test_trained_weights_with_heads_and_copies_from_the_context(trained):
    """The embedded backbone on rows of its sample: a text with names to copy, ends and repetitions."""
    asked = [
        encode_prompt(
            trained.tokenizer,
            [{"role": "system", "content": row["context"]}, {"role": "user", "content": row["question"]}],
        )
        for row in generate_rows(5, 20)
    ]
    expected = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        output = trained.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        expected.append(output[0, len(prompt) :].tolist())
    torch.manual_seed(3)
    heads = MedusaHeads(3, 1, trained.hidden_size, trained.vocab_size)
    heads.start_from(trained.lm_head.weight)
    for head in heads:  # the output layer's own guess, disturbed: some ranks are right, most are not
        torch.nn.init.normal_(head[0].linear.weight, std=0.05)
    drafters = {
        1: StaticDrafter(DraftTree.of([], ngram=7)),
        4: StaticDrafter(DraftTree.of([(0,), (1,), (0, 0), (0, 1), (0, 0, 0)], ngram=5)),
    }
    engine = Engine(trained, heads.requires_grad_(False), drafters)
    for together in (1, 4):
        answers = engine.generate(asked, max_new_tokens=20, together=together)
        assert [a.token_ids for a in answers] == expected
        assert sum(len(a.token_ids) for a in answers) > 1.3 * sum(len(a.step_tokens) for a in answers)
    assert {a.finish for a in answers} >= {"end"}


# refusals


@pytest.fixture
def directory(tmp_path):
    """Saves a configuration, or a whole tiny model, beside the embedded tokenizer."""

    def save(model_type, *, weights=False, **extra):
        config = config_of(model_type, **extra)
        if weights:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
        else:
            config.save_pretrained(tmp_path)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(EMBEDDED_DIRECTORY / name, tmp_path / name)
        return tmp_path

    return save


@pytest.mark.parametrize(
    ("model_type", "extra", "reason"),
    [
        ("jamba", {}, "linear_attention"),
        ("mamba", {}, "linear_attention"),
        ("qwen3_next", {"num_hidden_layers": 4}, "linear_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "conv"),
        ("llama4_text", {}, "chunked_attention"),
        ("deepseek_v32", {"num_key_value_heads": 4}, "indexed_attention"),
        ("rwkv", {}, "recurrent state"),
        ("bloom", {}, "ALiBi"),
        ("mpt", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("bart", {}, "encoder-decoder"),
    ],
)
def test_families_that_cannot_hold_a_tree_are_refused_before_any_weight_is_read(directory, model_type, extra, reason):
    with pytest.raises(ModelError, match=reason) as error:
        load_backbone(directory(model_type, **extra), dtype="float32")
    assert model_type in str(error.value), "and the model's type is named"


@pytest.mark.parametrize(
    ("model_type", "extra", "reason"),
    [
        ("roberta", {"is_decoder": True}, "makes its logits"),
        ("trocr", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
         "verified as a tree"),
        ("moshi", {"head_dim": 8, "sliding_window": WINDOW, "ffn_dim": 48}, "verified as a tree"),
        ("xlm", {"emb_dim": 32, "n_heads": 4, "n_layers": 2}, "cannot be decoded with trees"),
    ],
)  # fmt: skip
def test_families_that_give_other_results_are_found_out_at_loading(directory, model_type, extra, reason):
    with pytest.raises(ModelError, match=reason) as error:
        load_backbone(directory(model_type, weights=True, **extra), dtype="float32")
    assert model_type in str(error.value)


def test_the_trial_leaves_the_model_as_it_was():
    backbone = backbone_of("mistral, short window")
    before = backbone.text_config.to_dict()
    refuse_other_results(backbone)
    assert backbone.text_config.to_dict() == before and backbone.text_config.sliding_window == WINDOW


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2"])
def test_logits_that_are_scaled_or_capped_otherwise_are_refused(family, monkeypatch):
    backbone = backbone_of(family)
    monkeypatch.setattr(Backbone, "logits", lambda self, hidden_NH: self.lm_head(hidden_NH))  # as if unknown to us
    with pytest.raises(ModelError, match="makes its logits"):
        refuse_other_results(backbone)
