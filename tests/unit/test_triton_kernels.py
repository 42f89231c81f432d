"""Our GPU kernels against plain tensor operations: on a GPU, or anywhere under Triton's interpreter
(`TRITON_INTERPRET=1`, with triton installed)."""

import os
import random

import pytest
import torch

from gorgon.core.accept import ancestors
from gorgon.models.masks import prompt_spans, prompt_visibility, tree_spans, tree_visibility, within

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"),
        reason="no CUDA GPU, and TRITON_INTERPRET is not set: Triton kernels are not run",
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
"""Triton's interpreter multiplies bfloat16 as if it were integers."""
TOLERANCES = {torch.float32: 1e-6, HALF: 1e-2}


def attention(query, key, value, seen_BNS, scale):
    """In float64, with every key and value repeated for its heads; a node that sees nothing gets 0."""
    shared = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(shared, 1) for t in (key, value))
    scores = (query.double() @ key.transpose(-1, -2)) * scale
    weights = scores.masked_fill(~seen_BNS[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2)


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("seed", range(8))
def test_attention_of_trees(seed, dtype):
    from gorgon.models.triton_kernels import attend_over_spans

    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, groups, shared, size = rng.choice([1, 3]), rng.choice([1, 2]), rng.choice([1, 3, 4]), rng.choice([24, 64])
    nodes, rows, width = rng.choice([1, 5, 40, 64]), rng.choice([130, 700]), rng.choice([16, size])
    lengths = torch.tensor([rng.randrange(1, rows - nodes) for _ in range(batch)])
    depths, bits = [0], [1]
    for node in range(1, nodes):
        parent = rng.randrange(node)
        depths.append(depths[parent] + 1)
        both = bits[parent] | 1 << node
        bits.append(both - (both >> 63 << 64))
    window = rng.choice([None, 7])
    bits_BN, positions_BN = torch.tensor([bits] * batch), lengths[:, None] + torch.tensor(depths)
    seen_BNS, keys_BS = tree_visibility(ancestors(bits_BN), positions_BN, lengths, rows)
    seen_BNS = within(seen_BNS, positions_BN, keys_BS, window)
    spans = tree_spans(bits_BN, positions_BN, lengths, window)
    cache = torch.randn(2, batch + 1, groups, rows + 9, size, dtype=dtype)
    query = torch.randn(batch, nodes, groups * shared, size, dtype=dtype).transpose(1, 2)
    key, value = cache[0, :batch, :, :rows], cache[1, :batch, :, :rows, :width]
    found = attend_over_spans(*(t.to(DEVICE) for t in (query, key, value, spans)), 0.3).cpu()
    assert relative(found, attention(query, key, value, seen_BNS, 0.3)) < TOLERANCES[dtype]


@pytest.mark.parametrize("window", [None, 9])
def test_attention_of_a_prompt(window):
    from gorgon.models.triton_kernels import attend_over_spans

    torch.manual_seed(0)
    positions_1T = torch.arange(20, 90)[None]
    seen_1TS, keys_1S = prompt_visibility(positions_1T, 200)
    seen_1TS = within(seen_1TS, positions_1T, keys_1S, window)
    query, key, value = torch.randn(1, 4, 70, 32), torch.randn(1, 2, 200, 32), torch.randn(1, 2, 200, 32)
    given = query, key, value, prompt_spans(positions_1T, window)
    found = attend_over_spans(*(t.to(DEVICE) for t in given), 0.2).cpu()
    assert relative(found, attention(query, key, value, seen_1TS, 0.2)) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kept_rows(dtype):
    """Row 2 is read for row 1 before it is written from row 3."""
    from gorgon.models.triton_kernels import keep_rows

    torch.manual_seed(0)
    buffers = [torch.randn(4, 2, 50, 24, device=DEVICE).to(dtype) for _ in range(5)]
    lengths, path = torch.tensor([5, 9, 20]), torch.tensor([[0, 2, 3, 7, 0, 0], [0, 1, 2, 3, 4, 5], [0, 5, 0, 0, 0, 0]])
    wanted = [buffer.clone() for buffer in buffers]
    for buffer in wanted:
        for b, (length, nodes) in enumerate(zip(lengths.tolist(), path, strict=True)):
            buffer[b, :, length : length + 6] = buffer[b][:, (length + nodes).to(DEVICE)].clone()
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=DEVICE)
    keep_rows(buffers, addresses, lengths.to(DEVICE), path.to(DEVICE))
    assert all(torch.equal(mine, right) for mine, right in zip(buffers, wanted, strict=True))
