"""The model directory: round trip, and every way in which it can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gorgon.core.heads import MedusaHeads
from gorgon.core.phrasebook import Phrasebook
from gorgon.decode.load import read_drafters
from gorgon.errors import ModelError, ShapeError
from gorgon.models.backbone import load_backbone, load_tokenizer, resolve_model
from gorgon.models.directory import HEADS_FILE, base_model, load_heads, read_tree_file, write_model_directory
from gorgon.models.inspect import inspect_model


@pytest.fixture(scope="module")
def embedded():
    return load_backbone("embedded", dtype="float32")


@pytest.fixture
def model(tmp_path, embedded):
    torch.manual_seed(0)
    heads = MedusaHeads(3, 1, embedded.hidden_size, embedded.vocab_size)
    heads.start_from(embedded.lm_head.weight)
    out = tmp_path / "model"
    out.mkdir()
    write_model_directory(out, heads=heads, backbone_dir=embedded.name, provenance={"note": "test"})
    return out


def _load(model, embedded):
    return load_heads(model, hidden_size=embedded.hidden_size, vocab_size=embedded.vocab_size)


def _edit(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_written_is_read_again(model, embedded):
    heads = _load(model, embedded)
    assert torch.equal(heads[2][1].weight, embedded.lm_head.weight)
    assert base_model(model) == str(model / "base-model")
    again = load_backbone(model)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again.hidden(ids), embedded.hidden(ids))
    facts = inspect_model(str(model))
    assert facts["heads"]["count"] == 3 and facts["tree"] is None
    assert facts["backbone"]["parameters"] == embedded.parameters


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop("1.0.linear.bias"), r"lacks the tensor '1\.0\.linear\.bias'"),
        (lambda t: t.update({"3.1.weight": torch.zeros(2, 2)}), r"surplus tensor '3\.1\.weight'"),
        (lambda t: t.update({"0.1.weight": torch.zeros(9, 256)}), r"'0\.1\.weight' does not fit"),
    ],
)
def test_tensors_must_agree(model, embedded, change, word):
    tensors = load_file(model / HEADS_FILE)
    change(tensors)
    save_file(tensors, model / HEADS_FILE)
    with pytest.raises(ModelError, match=word):
        _load(model, embedded)


def test_a_file_cut_short_is_named(model, embedded):
    path = model / HEADS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot read"):
        _load(model, embedded)


def test_heads_of_another_backbone_are_refused(model, embedded):
    with pytest.raises(ModelError, match="does not fit the backbone"):
        load_heads(model, hidden_size=128, vocab_size=embedded.vocab_size)


@pytest.mark.parametrize("key", ["medusa_num_heads", "medusa_num_layers", "base_model_name_or_path"])
def test_config_keys_are_required(model, embedded, key):
    document = json.loads((model / "config.json").read_text())
    del document[key]
    (model / "config.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=key):
        _load(model, embedded)


def test_more_heads_announced_than_held(model, embedded):
    _edit(model, medusa_num_heads=4)
    with pytest.raises(ModelError, match="lacks"):
        _load(model, embedded)
    with pytest.raises(ModelError, match=r"config\.json says otherwise"):
        inspect_model(str(model))


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_a_backbone_with_a_missing_or_surplus_tensor(model, change):
    path = model / "base-model" / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    else:
        tensors["model.layers.9.extra.weight"] = torch.zeros(2)
    path.unlink()  # a hard link: the embedded file itself must not change
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=change):
        load_backbone(model)


def test_a_tokenizer_without_chat_template(model):
    base = model / "base-model"
    (base / "chat_template.jinja").unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").unlink()
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(model)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nothing", "a/b/c"])
def test_missing_paths_are_not_taken_for_hub_ids(name):
    with pytest.raises(ModelError, match="no such model directory"):
        resolve_model(name)


def test_a_hub_id_that_cannot_be_reached():
    with pytest.raises(ModelError, match="cannot load"):
        load_tokenizer("nobody/nothing-at-all")


def test_an_empty_directory_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        resolve_model(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, ModelError),
        ("{", ModelError),
        ('{"trees": []}', ModelError),
        ('{"format": 1, "trees": []}', ModelError),
        ('{"format": 5}', ModelError),
        ('{"format": 5, "trees": [{"batch_size": 1, "kind": "static", "paths": [[0, 0]], "ngram": 0}]}', ShapeError),
        ('{"format": 5, "trees": [{"batch_size": 1, "kind": "static", "paths": 3, "ngram": 0}]}', ModelError),
        ('{"format": 5, "trees": [{"batch_size": 1, "kind": "magic"}]}', ModelError),
        (
            '{"format": 5, "trees": [{"batch_size": 1, "kind": "dynamic", "nodes": 4, "threshold": 0.1, "width": 2}]}',
            ModelError,
        ),
        (
            '{"format": 5, "trees": [{"batch_size": 1, "kind": "dynamic", "nodes": 4, "threshold": 0.1, "width": 2, '
            '"acceptance": {"bins": [[2.0]], "levels": [[0.1]], "evidence": [], "tokens": {}}}]}',
            ModelError,
        ),
    ],
)
def test_tree_files(tmp_path, content, error):
    if content is not None:
        (tmp_path / "tree.json").write_text(content)
    with pytest.raises(error):
        read_drafters(read_tree_file(tmp_path), Phrasebook())


@pytest.mark.parametrize(
    ("kind", "word"), [("t5", "encoder-decoder"), ("mamba", "mamba"), ("qwen3_next", "linear_attention")]
)
def test_architectures_that_cannot_hold_a_tree(tmp_path, model, kind, word):
    for file in (model / "base-model").glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes((model / "chat_template.jinja").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match=word):
        load_backbone(tmp_path)
