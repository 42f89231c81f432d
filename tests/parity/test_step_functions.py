"""Weight layouts, recorded and compiled steps: how the numbers are computed changes no token."""

import copy
from random import Random

import pytest
import torch

from gorgon.core.draft import Draft
from gorgon.decode import functions
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.engine import Engine
from gorgon.decode.inputs import Inputs
from gorgon.decode.step import Stepper
from gorgon.errors import ModelError
from gorgon.models import backbone as backbone_module
from gorgon.models import compiler, linear
from gorgon.models.backbone import load_backbone
from gorgon.models.cache import TreeCache
from gorgon.models.panels import PanelLinear
from gorgon.models.toolchain import cpp_compiler
from tests.parity.support import TREES, VOCAB, backbone_of, oracle_engine, prompts, reference

NEEDS_COMPILER = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")


def without_compiler(monkeypatch):
    monkeypatch.setattr(linear, "kernels_work", lambda: False)
    monkeypatch.setattr(linear, "cpp_compiler", lambda: None)


@pytest.mark.parametrize("layout", ["as stored", "transposed", "packed", pytest.param("panels", marks=NEEDS_COMPILER)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "llama, tied, one group"])
def test_weight_layouts_change_no_token(family, layout, monkeypatch):
    if layout != "panels":
        without_compiler(monkeypatch)
        monkeypatch.setattr(linear, "_fastest_layout", lambda layers: layout)
    backbone, asked = backbone_of(family, own=True), prompts()
    ids, embedding = torch.tensor([asked[3]]), backbone.model.get_input_embeddings().weight
    before = backbone.model(ids).logits
    expected = reference(backbone, asked[2], 30)
    chosen = linear.lay_out_linear_weights(backbone.model)
    assert set(chosen.values()) == {layout} and backbone.vocab_size == VOCAB
    assert backbone.model.get_input_embeddings().weight is embedding and embedding.is_contiguous()
    torch.testing.assert_close(backbone.model(ids).logits, before)
    for name in ("plain", "bushy"):
        engine = oracle_engine(backbone, TREES[name], [asked[2]], 30)
        assert engine.answer(asked[2], max_new_tokens=30).token_ids == expected


def test_the_layout_is_chosen_by_measurement_where_there_is_no_compiler(monkeypatch):
    without_compiler(monkeypatch)
    backbone = backbone_of("llama", own=True)
    chosen = linear.lay_out_linear_weights(backbone.model)
    assert set(chosen) == {"32x32", "16x32", "48x32", "32x48", "61x32"}
    packed = sum(isinstance(m, linear.PackedLinear) for m in backbone.model.modules())
    assert (packed > 0) == ("packed" in chosen.values())


@NEEDS_COMPILER
def test_all_weights_lie_in_panels_where_there_is_a_compiler():
    backbone = backbone_of("llama", own=True)
    linear.lay_out_linear_weights(backbone.model)
    kinds = [type(m) for m in backbone.model.modules() if isinstance(m, torch.nn.Linear | PanelLinear)]
    assert kinds == [PanelLinear] * 22


@NEEDS_COMPILER
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma3"])
@pytest.mark.parametrize("fits", [True, False])
def test_nodes_look_at_spans_unless_the_model_needs_more(family, fits, monkeypatch):
    def refuses(backbone):
        raise ModelError("gives other results")

    if not fits:
        monkeypatch.setattr(backbone_module, "refuse_other_results", refuses)
    backbone, asked = backbone_of(family, own=True), prompts()[2]
    expected = reference(backbone, asked, 30)
    backbone.run_steps("eager")
    assert backbone.kernels and backbone.spans == fits
    assert backbone.model.config._attn_implementation == ("gorgon" if fits else "sdpa")
    for name in ("plain", "bushy"):
        engine = oracle_engine(backbone, TREES[name], [asked], 30)
        assert engine.answer(asked, max_new_tokens=30).token_ids == expected


@NEEDS_COMPILER
@pytest.mark.parametrize(("mode", "packed"), [("eager", False), ("eager", True), ("recorded", True)])
def test_a_node_of_a_tree_has_the_bits_of_plain_decoding(mode, packed):
    """Trained weights, wrong branches between the nodes of the path, and another sequence beside it."""
    backbone, random = load_backbone("embedded", dtype="float32"), Random(0)
    backbone.run_steps(mode)
    stepper, inputs = Stepper(backbone, None, 0, None), Inputs(backbone.device)
    prompt, path = ([random.randrange(5, backbone.vocab_size) for _ in range(n)] for n in (60, 6))

    def hidden(drafts, lengths, cache):
        batch = inputs.drafts(drafts, packed=packed)
        given = batch.flat_4BN, batch.rows_Q, inputs.lengths(lengths), cache.capacity
        with torch.inference_mode():
            return stepper.functions(cache).forward(*given)[0].clone()

    alone = TreeCache(4, 1, 100)
    stepper.prompt(alone, prompt, 0)
    plain = [hidden([Draft(token)], [60 + at], alone)[0, 0] for at, token in enumerate(path)]

    together = TreeCache(4, 2, 100)
    stepper.prompt(together, prompt, 0)
    draft, places = Draft(path[0]), [0]
    for token in path[1:]:
        for _ in range(random.randrange(4)):
            draft.add(random.randrange(5, backbone.vocab_size), random.randrange(draft.nodes))
        places.append(draft.add(token, places[-1]))
    assert draft.nodes > len(path)
    in_a_tree = hidden([draft, Draft(path[0])], [60, 7], together)[0]
    assert all(torch.equal(in_a_tree[place], wanted) for place, wanted in zip(places, plain, strict=True))


@NEEDS_COMPILER
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_fillers_that_are_left_out_change_no_bit_and_write_no_row(family):
    """Three sequences in a cache for four; windows of some layers are shorter than the drafts reach."""
    backbone, random, lengths = backbone_of(family, own=True), Random(1), [30, 7, 12]
    backbone.run_steps("eager")
    assert backbone.packs
    caches = [TreeCache(backbone.text_config.num_hidden_layers, 4, 50) for _ in range(2)]
    for b, length in enumerate(lengths):
        entry = TreeCache(backbone.text_config.num_hidden_layers, 1, 50)
        Stepper(backbone, None, 0, None).prompt(entry, [random.randrange(2, VOCAB) for _ in range(length)], 0)
        for cache in caches:
            cache.copy_sequence(entry, 0, b, length)
    drafts = [Draft(7) for _ in lengths]
    for draft, nodes in zip(drafts, (5, 1, 9), strict=True):
        for _ in range(nodes - 1):
            draft.add(random.randrange(2, VOCAB), random.randrange(draft.nodes))
    batch = Inputs(backbone.device).drafts(drafts, packed=True)
    assert batch.rows_Q.tolist() == [*range(5), 9, *range(18, 27)]
    given = batch.flat_4BN, torch.tensor(lengths), 50
    with torch.inference_mode():
        filled = functions.verify(backbone, caches[0], *given).flatten(0, 1)
        packed = functions.verify(backbone, caches[1], *given, batch.rows_Q).flatten(0, 1)
    assert torch.equal(packed[batch.rows_Q], filled[batch.rows_Q])
    left_out = [row for row in range(27) if row not in batch.rows_Q.tolist()]
    assert not packed[left_out].any() and filled[left_out].any()
    for theirs, mine in zip(sum(caches[0].buffers, ()), sum(caches[1].buffers, ()), strict=True):
        for b, draft in enumerate(drafts):
            end = lengths[b] + draft.nodes
            assert torch.equal(mine[b, :, :end], theirs[b, :, :end]) and not mine[b, :, end:].any()
        assert not mine[3].any()


@pytest.mark.parametrize("mode", ["eager", "recorded"])
def test_the_number_of_parameters_is_that_of_the_model_as_loaded(mode):
    backbone = backbone_of("llama", own=True)
    loaded = sum(p.numel() for p in backbone.model.parameters())
    backbone.run_steps(mode)
    assert backbone.parameters == loaded


def test_recorded_steps_write_the_same_tokens():
    backbone, asked = backbone_of("gemma2, one layer", own=True), prompts((9, 30))
    backbone.run_steps("recorded")
    engine = oracle_engine(backbone, TREES["bushy + ngram"], asked, 30)
    for together in (1, 2):
        found = engine.generate(asked, max_new_tokens=30, together=together)
        assert [a.token_ids for a in found] == [reference(backbone, p, 30) for p in asked]


@NEEDS_COMPILER
def test_compiled_steps_write_the_same_tokens():
    """One tree and one batch size: each shape that is special to the compiler costs seconds."""
    backbone, asked = backbone_of("llama, one layer", own=True), prompts((9, 30))
    backbone.run_steps("compiled")
    engine = oracle_engine(backbone, TREES["chain"], asked, 30)
    found = engine.generate(asked, max_new_tokens=30, together=1)
    assert [a.token_ids for a in found] == [reference(backbone, p, 30) for p in asked]


def test_nothing_is_compiled_again_for_other_sizes(monkeypatch):
    made = []

    def counted(guards, about=compiler._about_the_arguments):
        made.append(len(guards))
        return about(guards)

    monkeypatch.setattr(compiler, "_about_the_arguments", counted)
    backbone = backbone_of("llama, one layer", own=True)
    backbone.run_steps("recorded")

    def answer(tree, asked, together):
        found = oracle_engine(backbone, tree, asked, 30).generate(asked, max_new_tokens=30, together=together)
        assert [a.token_ids for a in found] == [reference(backbone, p, 30) for p in asked]

    answer(TREES["bushy"], prompts((9, 30)), 1)
    assert 0 < len(made) <= 2, "a prompt, and a step of one sequence and several nodes"
    answer(TREES["bushy"], prompts((9, 30, 5)), 3)
    first = len(made)
    for name in ("bushy", "chain", "wide"):
        for together in (1, 2, 3):
            answer(TREES[name], prompts((7, 12, 31, 44), seed=3), together)
    assert len(made) - first <= 1, "one sequence in buffers for several, at most: the drop from two to one"


def test_what_is_compiled_for_one_backbone_serves_no_other():
    first = backbone_of("llama, one layer", own=True)
    other = backbone_of("llama, one layer", own=True)
    other.model = copy.deepcopy(other.model)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(-0.7)
    asked = prompts((9, 30))
    expected = [e.generate(asked, max_new_tokens=20) for e in (engine_of(first), engine_of(other))]
    assert expected[0][0].token_ids != expected[1][0].token_ids
    for backbone in (first, other):
        backbone.run_steps("recorded")
    for backbone, answers in zip((first, other), expected, strict=True):
        found = engine_of(backbone).generate(asked, max_new_tokens=20, together=1)
        assert [a.token_ids for a in found] == [a.token_ids for a in answers]


def engine_of(backbone):
    return Engine(backbone, None, StaticDrafter(TREES["ngram"]))
