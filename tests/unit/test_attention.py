"""Attention over spans: that of a mask which says the same, and the same bits for a node in any company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from gorgon.core.accept import ancestors
from gorgon.core.draft import Draft
from gorgon.decode.inputs import Inputs
from gorgon.models import attention
from gorgon.models.kernels import load_kernels
from gorgon.models.masks import (
    additive,
    prompt_spans,
    prompt_visibility,
    tree_spans,
    tree_visibility,
    within,
)
from gorgon.models.toolchain import cpp_compiler
from tests.unit.test_panels import generated

pytestmark = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")
SIZE = 16
"""A multiple of every processor's vector."""


def run(queries, keys, values, spans, scale=0.25):
    load_kernels()
    return torch.ops.gorgon.tree_attention(queries, keys, values, spans, scale)


def by_mask(queries, keys, values, mask, scale=0.25):
    shared = queries.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(shared, 1) for t in (keys, values))
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale).transpose(1, 2)


@st.composite
def trees(draw):
    """Bits and depths of a batch of drafts with as many nodes each, and their lengths."""
    batch, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 64))
    drafts = [Draft(0) for _ in range(batch)]
    for draft in drafts:
        for node in range(1, nodes):
            draft.add(0, draw(st.integers(max(0, node - 4), node - 1)))
    _, _, depths_BN, bits_BN = Inputs(torch.device("cpu")).drafts(drafts).flat_4BN.unbind(0)
    return bits_BN, depths_BN, torch.tensor(draw(st.lists(st.integers(0, 70), min_size=batch, max_size=batch)))


def tensors(batch, heads, groups, nodes, rows, sizes=(SIZE, SIZE)):
    torch.manual_seed(rows + nodes)
    queries = torch.randn(batch, nodes, heads, sizes[0]).transpose(1, 2)
    keys, values = torch.randn(batch, groups, rows + 5, sizes[0]), torch.randn(batch, groups, rows + 5, sizes[1])
    return queries, keys[:, :, :rows], values[:, :, :rows]


@given(
    trees(), st.sampled_from([(1, 1), (4, 4), (6, 2), (7, 1)]), st.sampled_from([None, 1, 3, 20, 64, 100]),
    st.sampled_from([(16, 16), (64, 80), (96, 32)]),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_a_trees_nodes_see_what_the_mask_says(tree, heads, window, sizes):
    bits_BN, depths_BN, lengths_B = tree
    positions_BN, rows = lengths_B[:, None] + depths_BN, int(lengths_B.max()) + bits_BN.shape[1]
    seen, keys_at = tree_visibility(ancestors(bits_BN), positions_BN, lengths_B, rows)
    mask = additive(within(seen, positions_BN, keys_at, window), torch.float32)
    given_ = tensors(*bits_BN.shape[:1], *heads, bits_BN.shape[1], rows, sizes)
    found = run(*given_, tree_spans(bits_BN, positions_BN, lengths_B, window))
    torch.testing.assert_close(found, by_mask(*given_, mask), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 90), st.integers(0, 40), st.sampled_from([None, 1, 5, 64, 200]))
@settings(max_examples=60, deadline=None)
def test_a_prompts_tokens_see_what_stands_before_them(tokens, start, window):
    positions, rows = torch.arange(start, start + tokens)[None], start + tokens
    seen, keys_at = prompt_visibility(positions, rows)
    given_ = tensors(1, 4, 2, tokens, rows)
    found = run(*given_, prompt_spans(positions, window))
    mask = additive(within(seen, positions, keys_at, window), torch.float32)
    torch.testing.assert_close(found, by_mask(*given_, mask), rtol=1e-4, atol=1e-5)


@given(trees(), st.sampled_from([(1, 1), (6, 2)]), st.sampled_from([None, 3, 64]))
@settings(max_examples=60, deadline=None)
def test_a_node_gets_the_bits_that_it_gets_alone_behind_its_own_path(tree, heads, window):
    bits_BN, depths_BN, lengths_B = tree
    positions_BN, rows = lengths_B[:, None] + depths_BN, int(lengths_B.max()) + bits_BN.shape[1]
    queries, keys, values = tensors(*bits_BN.shape[:1], *heads, bits_BN.shape[1], rows)
    spans = tree_spans(bits_BN, positions_BN, lengths_B, window)
    found = run(queries, keys, values, spans)
    for b in range(len(lengths_B)):
        for node in {0, bits_BN.shape[1] // 2, bits_BN.shape[1] - 1}:
            first, end, bits = spans[b, 0, node].tolist()
            seen = [*range(first, end), *(end + j for j in range(64) if bits >> j & 1)]
            own = (queries[b : b + 1, :, node : node + 1], keys[b : b + 1, :, seen], values[b : b + 1, :, seen])
            alone = run(*own, torch.tensor([[[[0, len(seen), 0]]]]))
            assert torch.equal(alone[0, 0], found[b, node])


@given(trees(), st.sampled_from([(4, 4), (6, 2)]), st.sampled_from([None, 3, 64]), st.data())
@settings(max_examples=80, deadline=None)
def test_nodes_of_several_sequences_in_one_row_get_the_bits_that_they_get_in_a_batch(tree, heads, window, data):
    bits_BN, depths_BN, lengths_B = tree
    batch, nodes = bits_BN.shape
    positions_BN, rows = lengths_B[:, None] + depths_BN, int(lengths_B.max()) + nodes
    queries, keys, values = tensors(batch, *heads, nodes, rows)
    spans_B1N3 = tree_spans(bits_BN, positions_BN, lengths_B, window)
    in_batch = run(queries, keys, values, spans_B1N3)
    kept = [(b, n) for b in range(batch) for n in range(data.draw(st.integers(1, nodes)))]
    others = keys.new_full((2, *keys.shape[1:]), float("nan"))  # sequences that take no part
    b_Q, n_Q = torch.tensor(kept).T
    spans_11Q3 = (spans_B1N3[b_Q, 0, n_Q] + rows * b_Q[:, None] * torch.tensor([1, 1, 0]))[None, None]
    found = run(
        queries[b_Q, :, n_Q].transpose(0, 1)[None], torch.cat((keys, others)), torch.cat((values, others)), spans_11Q3
    )
    assert torch.equal(found[0], in_batch[b_Q, n_Q])


@pytest.mark.parametrize(
    "span", [(0, 8, 4), (7, 8, 1), (0, 9, 0), (9, 12, 16), (16, 16, 1), (-8, -8, 1), (-16, -15, 0)]
)
def test_rows_beyond_a_sequences_own_are_refused(span):
    queries, keys, values = tensors(2, 1, 1, 1, 8)
    with pytest.raises(RuntimeError, match="rows that are there"):
        run(queries[:1], keys, values, torch.tensor([[[span]]]))


@pytest.mark.parametrize("scores", [0.0, 30.0, -3000.0, 1e37])
def test_scores_of_any_size_are_weighed(scores):
    given_ = tensors(1, 2, 2, 3, 40)
    keys = given_[1] + scores
    spans = torch.tensor([[[[0, 40, 0], [3, 20, 0], [39, 40, 0]]]])
    mask = torch.full((1, 1, 3, 40), float("-inf"))
    for node, (first, end, _) in enumerate(spans[0, 0].tolist()):
        mask[0, 0, node, first:end] = 0
    found, wanted = run(given_[0], keys, given_[2], spans), by_mask(given_[0], keys, given_[2], mask)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_what_is_no_number_stays_none():
    queries, keys, values = tensors(1, 1, 1, 2, 20)
    spans = torch.tensor([[[[0, 20, 0], [0, 5, 0]]]])
    keys[0, 0, 7, 3] = float("nan")
    found = run(queries, keys, values, spans)
    assert found[0, 0].isnan().all() and found[0, 1].isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(count):
    given_, threads = tensors(2, 4, 2, 7, 60), torch.get_num_threads()
    spans = tree_spans(
        torch.tensor([[1 | 1 << i for i in range(7)]] * 2), torch.full((2, 7), 50), torch.tensor([50, 9]), None
    )
    expected = run(*given_, spans)
    torch.set_num_threads(count)
    try:
        assert torch.equal(run(*given_, spans), expected)
    finally:
        torch.set_num_threads(threads)


def test_numbers_that_do_not_lie_side_by_side_are_copied():
    queries, keys, values = tensors(1, 2, 2, 3, 8)
    spans = torch.tensor([[[[0, 8, 0]] * 3]])
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (queries, keys, values)]
    assert all(t.stride(3) != 1 for t in turned)
    assert torch.equal(run(*turned, spans), run(queries, keys, values, spans))


def change(place, value):
    def changed(given_):
        given_[place] = value(given_[place])

    return changed


@pytest.mark.parametrize(
    "wrong",
    [
        change(0, lambda t: t.double()),
        change(0, lambda t: t[0]),
        change(0, lambda t: t[:, :1]),
        change(0, lambda t: t[..., :15]),
        change(1, lambda t: t[..., :15]),
        change(1, lambda t: t[:, :, :7]),
        change(2, lambda t: t[..., :5]),
        change(2, lambda t: t[:, :1]),
        change(3, lambda t: t.int()),
        change(3, lambda t: t[:, :, :2]),
        change(3, lambda t: t[..., :2]),
        change(3, lambda t: t + torch.tensor([0, 1, 0])),
        change(3, lambda t: t - torch.tensor([1, 0, 0])),
        change(3, lambda t: t + torch.tensor([9, 0, 0])),
        change(3, lambda t: t + torch.tensor([0, 0, 1])),
    ],
)
def test_what_does_not_fit_is_refused(wrong):
    given_ = [*tensors(1, 4, 2, 3, 8), torch.tensor([[[[0, 8, 0]] * 3]])]
    assert run(*given_).shape == (1, 3, 4, SIZE)
    wrong(given_)
    with pytest.raises(RuntimeError):
        run(*given_)


def test_generated_code_calls_the_kernel():
    load_kernels()

    def function(*arguments):
        queries, keys, values, lengths = arguments
        nodes = queries.shape[2]
        spans = prompt_spans(lengths[:, None] + torch.arange(nodes), None)
        return (torch.ops.gorgon.tree_attention(queries * 2, keys, values, spans, 0.125).relu(),)

    direct = generated(function)
    with torch.inference_mode():
        for nodes in (5, 9, 5):
            given_ = (*tensors(1, 2, 2, nodes, 40), torch.tensor([30]))
            torch.testing.assert_close(direct(*given_)[0], function(*given_)[0])
    assert len(direct._versions) == 1


def test_given_a_mask_it_is_torchs_and_what_it_does_not_know_is_refused():
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    queries, keys, values = tensors(1, 4, 2, 3, 8)
    mask = torch.zeros(1, 1, 3, 8)
    found, weights = attention.attend(module, queries, keys, values, mask, scaling=0.25)
    torch.testing.assert_close(found, by_mask(queries, keys, values, mask))
    spans = torch.tensor([[[[0, 8, 0]] * 3]])
    own, weights = attention.attend(module, queries, keys, values, spans, scaling=0.25)
    torch.testing.assert_close(own, found)
    assert weights is None
    torch.testing.assert_close(attention.attend(module, queries, keys, values, spans)[0], found)  # 16 ** -0.5
    for name in attention.UNKNOWN:
        with pytest.raises(ValueError, match=name):
            attention.attend(module, queries, keys, values, spans, **{name: 30.0})
