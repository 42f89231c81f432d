"""Export and import: lossless round trips through every published layout, and every way in which one can be wrong."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gorgon.artifacts import write_json
from gorgon.cli import main
from gorgon.config import ExportConfig, ImportConfig
from gorgon.core.heads import MedusaHeads
from gorgon.errors import GorgonError, ModelError, StorageError
from gorgon.models.directory import HEADS_FILE, base_model, load_heads, write_model_directory
from gorgon.models.export import export_model
from gorgon.models.imports import import_heads
from gorgon.models.inspect import inspect_model
from gorgon.models.output_layer import find_output_layer
from tests.train_support import tiny_llama

H, K, L = 32, 3, 2


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("backbone") / "base")


@pytest.fixture(scope="module")
def vocab(backbone):
    return find_output_layer(backbone).vocab_size


@pytest.fixture(scope="module")
def model(tmp_path_factory, backbone, vocab):
    """A model directory whose biases are far from zero, in bfloat16, so that a detour through float32 would show."""
    torch.manual_seed(0)
    heads = MedusaHeads(K, L, H, vocab)
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    out = tmp_path_factory.mktemp("model") / "trained"
    out.mkdir()
    write_model_directory(out, heads=heads.to(torch.bfloat16), backbone_dir=backbone, provenance={"note": "test"})
    write_json(out / "tree.json", {"trees": []})
    return out


def _export(model, form, out, **options):
    return export_model(ExportConfig(model=str(model), format=form, **options), out)


def _import(source, backbone, out):
    return import_heads(ImportConfig(source=str(source), backbone=str(backbone)), out)


def _same(left, right):
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


@pytest.mark.parametrize("form", ["tgi", "vllm", "medusa"])
def test_round_trips_are_exact(tmp_path, model, backbone, vocab, form):
    done = _export(model, form, tmp_path / "out")
    back = _import(tmp_path / "out", backbone, tmp_path / "back")
    assert _same(load_file(back.directory / HEADS_FILE), load_file(model / HEADS_FILE))
    assert back.manifest["warnings"] == []
    assert len(load_heads(back.directory, hidden_size=H, vocab_size=vocab)) == K
    facts = inspect_model(str(back.directory))
    assert facts["heads"]["count"] == K and facts["provenance"]["layout"] == ("vllm" if form == "vllm" else "medusa v1")
    assert str(tmp_path / "out") in done.manifest["metrics"]["serve"]
    assert not (tmp_path / "out" / "tree.json").exists() and not (tmp_path / "out" / "gorgon.json").exists()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / "base-model" / name).read_bytes() == (backbone / name).read_bytes()


class _VllmHeads(nn.Module):
    """What vLLM builds from config.json, with its own default for the bias; names it does not know are skipped."""

    def __init__(self, config):
        super().__init__()
        bias, sizes = config.get("medusa_fc_bias", False), (config["hidden_size"], config["hidden_size"])
        self.blocks = nn.ModuleList()
        for _ in range(config["num_heads"]):
            block = nn.Module()
            block.layers = nn.ModuleList(nn.Linear(*sizes, bias=bias) for _ in range(config["num_hidden_layers"]))
            self.blocks.append(block)
        self.lm_heads = nn.ModuleList(
            nn.Linear(config["hidden_size"], config["vocab_size"], bias=False) for _ in range(config["num_heads"])
        )

    def forward(self, x):
        logits = []
        for block, projection in zip(self.blocks, self.lm_heads, strict=True):
            y = x
            for layer in block.layers:
                y = y + nn.functional.silu(layer(y))
            logits.append(projection(y))
        return torch.stack(logits)


@torch.inference_mode()
def test_biases_survive_in_vllm(tmp_path, model, vocab):
    out = _export(model, "vllm", tmp_path / "out").directory
    config = json.loads((out / "config.json").read_text())
    tensors = load_file(out / "model.safetensors")
    ours = load_heads(model, hidden_size=H, vocab_size=vocab).float()
    hidden = torch.randn(16, H)

    def drafts(config):
        heads = _VllmHeads(config)
        heads.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
        return heads(hidden).argmax(-1)

    assert torch.equal(drafts(config), ours(hidden).argmax(-1))
    assert not torch.equal(drafts({**config, "medusa_fc_bias": False}), ours(hidden).argmax(-1))


def test_the_reference_reads_its_layout(tmp_path, model, vocab):
    out = _export(model, "medusa", tmp_path / "out").directory
    loaded = torch.load(out / "medusa_lm_head.pt", weights_only=True)
    MedusaHeads(K, L, H, vocab).load_state_dict(loaded)
    config = json.loads((out / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (K, L)
    assert base_model(out) == str(out / "base-model")


def test_where_tgi_looks_for_the_backbone(tmp_path, model):
    """TGI takes a relative path from its own working directory, so the default is absolute."""
    out = _export(model, "tgi", tmp_path / "out").directory
    assert json.loads((out / "config.json").read_text())["base_model_name_or_path"] == "/opt/ml/model/base-model"
    out = _export(model, "tgi", tmp_path / "out", backbone_path="/data/base").directory
    assert json.loads((out / "config.json").read_text())["base_model_name_or_path"] == "/data/base"


@pytest.fixture
def published(tmp_path, model):
    """What a test turns into published heads: tensors in FasterDecoding's names and their config.json."""
    folder = tmp_path / "published"
    folder.mkdir()

    def write(tensors, name=HEADS_FILE, **config):
        torch.save(tensors, folder / name) if name.endswith(".pt") else save_file(tensors, folder / name)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    write.tensors = load_file(model / HEADS_FILE)
    write.vllm = lambda: {
        **{f"blocks.{k}.layers.{j}.{p}": write.tensors[f"{k}.{j}.linear.{p}"].clone()
           for k in range(K) for j in range(L) for p in ("weight", "bias")},
        **{f"lm_heads.{k}.weight": write.tensors[f"{k}.{L}.weight"].clone() for k in range(K)},
    }  # fmt: skip
    return write


def test_version_2_gets_the_output_layer(tmp_path, backbone, published):
    tensors = {k: v for k, v in published.tensors.items() if "linear" in k}
    done = _import(published(tensors, medusa_num_heads=K, medusa_num_layers=L, version="2"), backbone, tmp_path / "out")
    written = load_file(done.directory / HEADS_FILE)
    own = load_file(backbone / "model.safetensors")["lm_head.weight"]
    assert all(torch.equal(written[f"{k}.{L}.weight"], own) for k in range(K))
    assert _same({k: v for k, v in written.items() if "linear" in k}, tensors)
    assert json.loads((done.directory / "config.json").read_text())["version"] == "1"
    assert any("output layer" in note for note in done.manifest["warnings"])


def test_tied_embeddings_are_the_output_layer(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(small)
    model.save_pretrained(tmp_path)
    assert torch.equal(find_output_layer(tmp_path).read(), model.model.embed_tokens.weight)


def test_configurations_that_lie(tmp_path, backbone, published):
    """The reference's published configs announce 2 heads for 5; the tensors count."""
    folder = published(published.tensors, "medusa_lm_head.pt", medusa_num_heads=2, medusa_num_layers=1, version="2")
    done = _import(folder, backbone, tmp_path / "out")
    assert done.manifest["metrics"]["heads"] == K
    text = " ".join(done.manifest["warnings"])
    assert "medusa_num_heads = 2" in text and "medusa_num_layers = 1" in text and "version 2" in text


def test_prefixes_and_a_file_without_configuration(tmp_path, backbone, published):
    folder = published({f"medusa_heads.{k}": v for k, v in published.tensors.items()})
    (folder / "config.json").unlink()
    done = _import(folder / HEADS_FILE, backbone, tmp_path / "out")
    assert _same(load_file(done.directory / HEADS_FILE), published.tensors)


def test_vllm_biases_that_vllm_would_drop(tmp_path, backbone, published):
    done = _import(published(published.vllm(), "model.safetensors", num_heads=K), backbone, tmp_path / "out")
    assert _same(load_file(done.directory / HEADS_FILE), published.tensors)
    assert "medusa_fc_bias" in done.manifest["warnings"][0]


def test_vllm_without_biases(tmp_path, backbone, published):
    tensors = {k: v for k, v in published.vllm().items() if not k.endswith("bias")}
    done = _import(published(tensors, "model.safetensors"), backbone, tmp_path / "out")
    written = load_file(done.directory / HEADS_FILE)
    assert all(not v.any() for k, v in written.items() if k.endswith("bias")) and done.manifest["warnings"] == []


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight"])
def test_vllm_with_one_projection(tmp_path, backbone, published, name):
    tensors = published.vllm()
    shared = tensors["lm_heads.0.weight"]
    tensors = {k: v for k, v in tensors.items() if not k.startswith("lm_heads")} | {name: shared}
    folder = published(tensors, "model.safetensors", original_lm_head=True, medusa_fc_bias=True)
    written = load_file(_import(folder, backbone, tmp_path / "out").directory / HEADS_FILE)
    assert all(torch.equal(written[f"{k}.{L}.weight"], shared) for k in range(K))


def test_vllm_with_a_truncated_vocabulary(tmp_path, backbone, vocab, published):
    tensors, kept = published.vllm(), torch.tensor([7, 3, 11])
    for k in range(K):
        tensors[f"lm_heads.{k}.weight"] = tensors[f"lm_heads.{k}.weight"][kept].clone()
    folder = published({**tensors, "token_map": kept}, "model.safetensors", medusa_fc_bias=True)
    done = _import(folder, backbone, tmp_path / "out")
    written, own = load_file(done.directory / HEADS_FILE), load_file(backbone / "model.safetensors")["lm_head.weight"]
    others = [t for t in range(vocab) if t not in kept]
    for k in range(K):
        assert torch.equal(written[f"{k}.{L}.weight"][kept], published.tensors[f"{k}.{L}.weight"][kept])
        assert torch.equal(written[f"{k}.{L}.weight"][others], own[others].to(torch.bfloat16))
    assert json.loads((done.directory / "gorgon.json").read_text())["draft_vocabulary"] == [3, 7, 11]
    assert f"3 of {vocab} tokens" in done.manifest["warnings"][-1]


def _drop(name):
    return lambda t: t.pop(name)


def _put(name, value):
    return lambda t: t.update({name: value})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_drop("1.0.linear.bias"), r"lack the tensor '1\.0\.linear\.bias'"),
        (_drop("1.2.weight"), r"lack the tensor '1\.2\.weight'"),
        (_drop("2.1.linear.weight"), r"lack the tensor '2\.1\.linear\.weight'"),
        (_put("1.1.weight", torch.zeros(2)), r"surplus tensor '1\.1\.weight'"),
        (_put("3.2.weight", torch.zeros(2)), r"surplus tensor '3\.2\.weight'"),
        (_put("optimizer", torch.zeros(2)), r"surplus tensor 'optimizer'"),
        (_put("0.0.linear.bias", torch.zeros(H + 1)), r"'0\.0\.linear\.bias' does not fit"),
        (_put("0.2.weight", torch.zeros(9, H)), r"'0\.2\.weight' does not fit"),
        (_put("0.0.linear.bias", torch.full((H,), torch.nan)), "not finite"),
        (_put("0.0.linear.bias", torch.zeros(H, dtype=torch.long)), "not floating point"),
        (_put("medusa_head.0.2.weight", torch.zeros(2)), "same name"),
        (lambda t: t.clear(), "no Medusa heads"),
    ],
)
def test_tensors_that_are_wrong(tmp_path, backbone, published, change, word):
    change(published.tensors)
    with pytest.raises(ModelError, match=word):
        _import(published(published.tensors), backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("change", "config", "word"),
    [
        (_drop("blocks.0.layers.1.bias"), {}, "lack"),
        (_drop("lm_heads.2.weight"), {}, "lack"),
        (_put("lm_head.weight", torch.zeros(2)), {}, "surplus"),
        (_put("lm_heads.3.weight", torch.zeros(2)), {}, "surplus"),
        (_put("0.0.linear.weight", torch.zeros(2)), {}, "surplus"),
        (lambda t: None, {"original_lm_head": True}, "surplus"),
        (lambda t: [t.pop(k) for k in list(t) if k.endswith("bias")], {"medusa_fc_bias": True}, "promises biases"),
        (lambda t: None, {"logit_scale": -1.0}, "not positive"),
        (_put("token_map", torch.tensor([1, 1])), {}, "different tokens"),
        (_put("token_map", torch.tensor([1, 10**6])), {}, "leaves the vocabulary"),
        (lambda t: t.update({"token_map": torch.tensor([1, 2]), "lm_heads.0.weight": torch.zeros(3, H)}), {}, "map"),
    ],
)
def test_vllm_heads_that_are_wrong(tmp_path, backbone, published, change, config, word):
    tensors = published.vllm()
    change(tensors)
    with pytest.raises(ModelError, match=word):
        _import(published(tensors, "model.safetensors", **config), backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


class _Harmful:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps(_Harmful(), 2), pickle.dumps([1, 2], 2)],
    ids=["empty", "text", "code", "list"],
)
def test_pickles_are_never_run(tmp_path, backbone, content, capsys):
    (tmp_path / "medusa_lm_head.pt").write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot read|not a table"):
        _import(tmp_path / "medusa_lm_head.pt", backbone, tmp_path / "out")
    assert "code ran" not in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_sources_that_are_not_there(tmp_path, backbone):
    for name in ("/nowhere/heads", "./heads", "a/b/c", "heads"):
        with pytest.raises(ModelError, match="no such file or directory"):
            _import(name, backbone, tmp_path / "out")
    with pytest.raises(ModelError, match="no heads here"):
        _import(tmp_path, backbone, tmp_path / "out")
    with pytest.raises(ModelError, match="cannot fetch"):
        _import("nobody/nothing-at-all", backbone, tmp_path / "out")


def test_exports_that_cannot_be(tmp_path, model, backbone):
    with pytest.raises(ModelError, match="does not describe Medusa heads"):
        _export(backbone, "tgi", tmp_path / "out")
    with pytest.raises(GorgonError, match="do not name their backbone"):
        _export(model, "vllm", tmp_path / "out", backbone_path="/x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="no step of ours wrote"):
        _export(model, "vllm", tmp_path / "full")
    assert not (tmp_path / "out").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_other_kinds_of_heads_are_refused(tmp_path, model):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", HEADS_FILE):
        (copy / name).write_bytes((model / name).read_bytes())
    (copy / "gorgon.json").write_text('{"format": 1, "head_kind": "hydra"}')
    with pytest.raises(ModelError, match="cannot run heads of this kind"):
        _export(copy, "vllm", tmp_path / "out")


def _command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["gorgon", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0), capsys.readouterr()
    return 0, capsys.readouterr()


def test_the_commands(tmp_path, monkeypatch, capsys, model, backbone):
    code, shown = _command(monkeypatch, capsys, "export", model, "--format", "vllm", "--out", tmp_path / "v")
    assert code == 0 and f'"model": "{tmp_path / "v"}", "num_speculative_tokens": {K}' in shown.out
    code, shown = _command(
        monkeypatch, capsys, "import", tmp_path / "v", "--backbone", backbone, "--out", tmp_path / "i", "--json"
    )
    assert code == 0 and json.loads(shown.out)["metrics"]["heads"] == K
    code, shown = _command(monkeypatch, capsys, "export", model, "--format", "gguf", "--out", tmp_path / "g")
    assert code == 2 and "'tgi', 'vllm' or 'medusa'" in shown.err and not (tmp_path / "g").exists()
    code, shown = _command(monkeypatch, capsys, "import", tmp_path, "--backbone", backbone, "--out", tmp_path / "g")
    assert code == 2 and "no heads here" in shown.err and not (tmp_path / "g").exists()


def test_gpt_neox_files_name_it_otherwise(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    small = GPTNeoXConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = GPTNeoXForCausalLM(small)
    model.save_pretrained(tmp_path)
    assert torch.equal(find_output_layer(tmp_path).read(), model.get_output_embeddings().weight)
