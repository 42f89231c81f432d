"""Quantised backbones: drafts change no token there either, and what cannot be quantised is refused by name."""

import copy

import pytest
import torch
from typer.testing import CliRunner

from gorgon.cli import app
from gorgon.core.acceptance import AcceptanceCounts
from gorgon.core.heads import MedusaHeads
from gorgon.core.phrasebook import Phrasebook
from gorgon.data.chat import encode_prompt
from gorgon.data.sample import generate_rows
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.dynamic import DynamicDrafter
from gorgon.decode.engine import PLAIN, Engine
from gorgon.decode.load import engine_on, load_engine
from gorgon.errors import MissingDependencyError, ModelError
from gorgon.models.backbone import load_backbone
from gorgon.models.directory import write_model_directory
from gorgon.models.quantize import quantizer
from gorgon.models.toolchain import cpp_compiler
from tests.parity.support import TREES, backbone_of

pytest.importorskip("torchao", reason="the extra 'quantization' is not installed")
CPU = torch.device("cpu")
WEIGHTS = {"int8": "Int8Tensor", "int4": "Int4OpaqueTensor"}


@pytest.fixture(scope="module", params=WEIGHTS)
def backbone(request):
    return load_backbone("embedded", dtype="float32", quantization=request.param)


@pytest.fixture(scope="module")
def asked(backbone):
    chats = [
        [{"role": "system", "content": r["context"]}, {"role": "user", "content": r["question"]}]
        for r in generate_rows(3, 3)
    ]
    prompts = [encode_prompt(backbone.tokenizer, chat) for chat in chats]
    return prompts[: 1 if backbone.quantization == "int4" else None]  # its products in float32 are slow


@pytest.fixture(scope="module")
def expected(backbone, asked):
    """What transformers writes with the same quantised weights."""
    answers = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        output = backbone.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False,
            eos_token_id=sorted(backbone.end_ids), pad_token_id=0,
        )  # fmt: skip
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module")
def heads(backbone):
    """Heads that are right now and then."""
    heads = MedusaHeads(3, 1, backbone.hidden_size, backbone.vocab_size)
    heads.start_from(backbone.lm_head.weight)
    torch.manual_seed(0)
    for head in heads:
        torch.nn.init.normal_(head[0].linear.weight, std=0.02)
    return heads.requires_grad_(False)


@pytest.mark.parametrize(("mode", "together"), [("eager", 1), ("eager", 3), ("recorded", 1)])
def test_the_tokens_of_transformers_on_the_same_weights(backbone, heads, asked, expected, mode, together):
    before = {name: type(m) for name, m in backbone.decoder.named_modules()}
    backbone.run_steps(mode)
    engine = Engine(backbone, heads, PLAIN)
    accepted = 0
    acceptance = AcceptanceCounts(len(heads)).fit()  # of nothing: every candidate is as likely
    dynamic = DynamicDrafter(acceptance, Phrasebook(), nodes=10, threshold=1e-4, width=4)
    for drafter in (PLAIN, StaticDrafter(TREES["bushy + ngram"]), dynamic):
        found = engine.with_drafter(drafter).generate(asked, max_new_tokens=16, together=together)
        assert [g.token_ids for g in found] == expected
        accepted += sum(node > 0 for g in found for node in g.step_nodes)
    assert accepted > 5, "some drafts must be accepted, or this test shows nothing"
    assert {name: type(m) for name, m in backbone.decoder.named_modules()} == before, "layouts leave them alone"


@pytest.mark.parametrize("quantization", WEIGHTS)
def test_every_layer_is_quantised_and_nothing_else(quantization):
    backbone = load_backbone("embedded", dtype="float32", quantization=quantization)
    kinds = {type(m.weight).__name__ for m in backbone.decoder.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {WEIGHTS[backbone.quantization]}
    assert type(backbone.lm_head.weight) is torch.nn.Parameter
    full = load_backbone("embedded", dtype="float32")
    assert torch.equal(full.lm_head.weight, backbone.lm_head.weight)
    assert full.parameters == backbone.parameters
    ids = torch.arange(20, 60)[None]
    difference = (full.hidden(ids) - backbone.hidden(ids)).norm() / full.hidden(ids).norm()
    assert 1e-4 < difference < {"int8": 0.05, "int4": 0.5}[backbone.quantization], "other weights, but close"


@pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")
def test_compiled_steps_write_the_same_tokens():
    """A single layer: each costs the compiler seconds."""
    model = _small("int8")
    engine = Engine(model, None, PLAIN)
    prompts = [[3, 4, 5, 3, 4, 5, 3], [9, 8, 9, 8]]
    expected = [g.token_ids for g in engine.generate(prompts, max_new_tokens=12, together=1)]
    model.run_steps("compiled")
    found = engine.with_tree(TREES["ngram"]).generate(prompts, max_new_tokens=12, together=1)
    assert [g.token_ids for g in found] == expected


def _small(quantization):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = backbone_of("llama, one layer")
    shape = model.model.config.to_dict() | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    torch.manual_seed(0)
    model.model = LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
    model.model.generation_config.eos_token_id = 1
    quantizer(quantization, torch.float32, CPU)(model.model)
    return model


def test_a_size_that_does_not_fit_is_named_and_nothing_is_changed():
    model = backbone_of("llama", own=True).model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"'layers\.0\.mlp\.down_proj' does not fit") as error:
        quantizer("int4", torch.float32, CPU)(model)
    assert error.value.value == "int4, 32 outputs, 48 inputs" and "int8" in str(error.value.hint)
    after = model.state_dict()
    assert all(type(after[k]) is torch.Tensor and torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    ("family", "where"), [("gpt2", "h.0.attn.c_attn.weight"), ("qwen3-moe", "layers.0.mlp.experts")]
)
def test_weights_that_are_no_linear_layers_are_refused_not_left(family, where):
    with pytest.raises(ModelError, match="would stay as it is") as error:
        quantizer("int8", torch.float32, CPU)(backbone_of(family, own=True).model)
    assert where in error.value.problem and error.value.field == "quantization"


@pytest.mark.parametrize("quantization", WEIGHTS)
def test_without_torchao_the_error_says_how_to_get_it(quantization, monkeypatch):
    for name in ("torchao.quantization", "torchao.prototype.quantization.int4"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingDependencyError) as error:
        load_backbone("embedded", quantization=quantization)
    assert error.value.hint == "pip install 'gorgon-llm[quantization]'" and error.value.value == quantization
    assert load_backbone("embedded").quantization == "none", "nothing is asked of it otherwise"


def test_the_command_line_knows_the_choices():
    result = CliRunner().invoke(app, ["generate", "nowhere", "hello", "--quantization", "int3"])
    assert result.exit_code == 2 and "int3" in result.output


def test_a_directory_tuned_with_other_weights_says_so(backbone, heads, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    write_model_directory(model, heads=heads, backbone_dir=backbone.name, provenance={})
    entry = '{"batch_size": 1, "kind": "static", "ngram": 0, "paths": [[0]]}'
    tree = '{"format": 5, "dtype": "float32", %s"trees": [' + entry + "]}"
    (model / "tree.json").write_text(tree % "")
    engine_on(backbone, model)
    assert f"quantization none, here {backbone.quantization}" in capsys.readouterr().err
    (model / "tree.json").write_text(tree % f'"quantization": "{backbone.quantization}", ')
    engine = load_engine(model, dtype="float32", quantization=backbone.quantization)
    assert "quantization" not in capsys.readouterr().err
    assert engine.backbone.quantization == backbone.quantization and engine.heads is not None
