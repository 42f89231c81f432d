"""Our own GPU kernels, in Triton, which comes with torch for CUDA: attention over spans, and keeping accepted rows.

torch's attention takes a mask only beside keys and values that were repeated for every head of their group, and reads
them with as many programs as there are heads, however long the context. Here one program reads a part of the context
for all heads of a group and all nodes at once, and a second kernel joins the parts (flash decoding, as described at
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). How much of the cache is read follows from the spans on the
device, so a captured graph holds for every length of the context.
Shapes: B sequences, A attention heads, G key-value heads, N nodes, S rows of the cache, D head size, P accepted rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264
"""Programs that fill a GPU: two for each of an H100's multiprocessors."""
MOST_ROWS = 64
"""Rows of queries, nodes times heads of a group, that one program multiplies."""
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LOG2_E = 1.4426950408889634


@triton.jit
def _attend(
    query, key, value, spans, output, partial, sums, tops,
    query_b, query_a, query_n, key_b, key_g, key_s, value_b, value_g, value_s,
    scale, batch, nodes, rows, parts,
    GROUPS: tl.constexpr, SHARED: tl.constexpr, KEY: tl.constexpr, KEY_ROOM: tl.constexpr, VALUE: tl.constexpr,
    VALUE_ROOM: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the context for a block of (node, head) rows M of one group."""
    b, g = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    row_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    node_M, head_M = row_M // SHARED, g * SHARED + row_M % SHARED
    real_M = node_M < nodes
    span_M = spans + (b * nodes + node_M) * 3
    first_M = tl.load(span_M, mask=real_M, other=rows)
    end_M = tl.load(span_M + 1, mask=real_M, other=0)
    bits_M = tl.load(span_M + 2, mask=real_M, other=0)
    low = tl.min(first_M, 0)
    high = tl.minimum(tl.max(tl.where(bits_M == 0, end_M, end_M + nodes), 0), rows)
    each = tl.cdiv(tl.cdiv(high - low, parts), BLOCK_S) * BLOCK_S
    start = low + tl.program_id(2) * each
    stop = tl.minimum(start + each, high)

    k_D, v_D = tl.arange(0, KEY_ROOM), tl.arange(0, VALUE_ROOM)
    query_MD = tl.load(
        query + b * query_b + head_M[:, None] * query_a + node_M[:, None] * query_n + k_D[None, :],
        mask=real_M[:, None] & (k_D < KEY)[None, :], other=0.0,
    )  # fmt: skip
    keys, values = key + b * key_b + g * key_g, value + b * value_b + g * value_g
    top_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    mixed_MD = tl.zeros((BLOCK_M, VALUE_ROOM), tl.float32)
    for at in range(start, stop, BLOCK_S):
        row_S = at + tl.arange(0, BLOCK_S)
        inside_S = row_S < stop
        key_DS = tl.load(
            keys + row_S[None, :] * key_s + k_D[:, None], mask=inside_S[None, :] & (k_D < KEY)[:, None], other=0.0
        )
        scores_MS = tl.dot(query_MD, key_DS, input_precision=PRECISION) * scale
        place_MS = row_S[None, :] - end_M[:, None]
        context_MS = (row_S[None, :] >= first_M[:, None]) & (place_MS < 0)
        bit_MS = (bits_M[:, None] >> tl.minimum(tl.maximum(place_MS, 0), 63)) & 1
        seen_MS = (context_MS | ((place_MS >= 0) & (place_MS < 64) & (bit_MS == 1))) & inside_S[None, :]
        scores_MS = tl.where(seen_MS, scores_MS, float("-inf"))
        new_M = tl.maximum(top_M, tl.max(scores_MS, 1))
        safe_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        weight_MS, fade_M = tl.exp2(scores_MS - safe_M[:, None]), tl.exp2(top_M - safe_M)
        value_SD = tl.load(
            values + row_S[:, None] * value_s + v_D[None, :],
            mask=inside_S[:, None] & (v_D < VALUE)[None, :], other=0.0,
        )  # fmt: skip
        mixed_MD = mixed_MD * fade_M[:, None] + tl.dot(
            weight_MS.to(value_SD.dtype), value_SD, input_precision=PRECISION
        )
        sum_M = sum_M * fade_M + tl.sum(weight_MS, 1)
        top_M = new_M
    place_M = (b * nodes + node_M) * (GROUPS * SHARED) + head_M
    kept_MD = real_M[:, None] & (v_D < VALUE)[None, :]
    if WHOLE:
        mixed_MD = mixed_MD / tl.maximum(sum_M, 1e-30)[:, None]
        tl.store(output + place_M[:, None] * VALUE + v_D[None, :], mixed_MD, mask=kept_MD)
    else:
        place_M += tl.program_id(2) * batch * nodes * (GROUPS * SHARED)
        tl.store(partial + place_M[:, None] * VALUE + v_D[None, :], mixed_MD, mask=kept_MD)
        tl.store(sums + place_M, sum_M, mask=real_M)
        tl.store(tops + place_M, top_M, mask=real_M)


@triton.jit
def _join(
    output, partial, sums, tops, total, parts, PARTS: tl.constexpr, VALUE: tl.constexpr, VALUE_ROOM: tl.constexpr
):  # fmt: skip
    """One row of the output from its parts."""
    row, part_P, v_D = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, VALUE_ROOM)
    place_P = part_P * total + row
    top_P = tl.load(tops + place_P, mask=part_P < parts, other=float("-inf"))
    top = tl.max(top_P, 0)
    weight_P = tl.where(top_P == float("-inf"), 0.0, tl.exp2(top_P - top))
    sum_P = tl.load(sums + place_P, mask=part_P < parts, other=0.0)
    mixed_PD = tl.load(
        partial + place_P[:, None] * VALUE + v_D[None, :],
        mask=(weight_P > 0)[:, None] & (v_D < VALUE)[None, :], other=0.0,
    )  # fmt: skip
    mixed_D = tl.sum(mixed_PD * weight_P[:, None], 0) / tl.maximum(tl.sum(sum_P * weight_P, 0), 1e-30)
    tl.store(output + row * VALUE + v_D, mixed_D, mask=v_D < VALUE)


def attend_over_spans(query: Tensor, key: Tensor, value: Tensor, spans: Tensor, scale: float) -> Tensor:
    """Attention [B, N, A, D] of nodes that look at spans of the cache (`models.masks`); 0 for one that sees nothing.

    Args:
        query: [B, A, N, D]. key, value: [B, G, S, D], rows of any stride.
        spans: int64 [B, 1, N, 3].
        scale: of the scores.
    """
    (batch, heads, nodes, size), groups, rows, width = query.shape, key.shape[1], key.shape[2], value.shape[3]
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    spans, shared = spans.contiguous(), heads // groups
    block_m = min(MOST_ROWS, max(16, triton.next_power_of_2(nodes * shared)))
    block_s = 64 if max(size, width) <= 128 and query.element_size() == 2 else 32
    blocks = triton.cdiv(nodes * shared, block_m)
    parts = max(1, min(triton.cdiv(rows, 2 * block_s), PROGRAMS // (batch * groups * blocks)))
    output = query.new_empty(batch, nodes, heads, width)
    total, several = batch * nodes * heads, parts if parts > 1 else 0
    partial, sums, tops = (query.new_empty(several * total * n, dtype=torch.float32) for n in (width, 1, 1))
    _attend[batch * groups, blocks, parts](
        query, key, value, spans, output, partial, sums, tops,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        scale * LOG2_E, batch, nodes, rows, parts,
        GROUPS=groups, SHARED=shared, KEY=size, KEY_ROOM=max(16, triton.next_power_of_2(size)), VALUE=width,
        VALUE_ROOM=max(16, triton.next_power_of_2(width)), WHOLE=parts == 1, BLOCK_M=block_m, BLOCK_S=block_s,
        PRECISION="ieee", num_warps=4,
    )  # fmt: skip
    if parts > 1:
        _join[total,](
            output, partial, sums, tops, total, parts,
            PARTS=triton.next_power_of_2(parts), VALUE=width, VALUE_ROOM=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
    return output


@torch.library.custom_op("gorgon::span_attention", mutates_args=(), device_types="cuda")
def span_attention(query: Tensor, key: Tensor, value: Tensor, spans: Tensor, scale: float) -> Tensor:
    """`attend_over_spans` as an operation that torch's compiler leaves as it is."""
    return attend_over_spans(query, key, value, spans, scale)


@span_attention.register_fake
def _attended(query: Tensor, _key: Tensor, value: Tensor, _spans: Tensor, _scale: float) -> Tensor:
    batch, heads, nodes, _ = query.shape
    return query.new_empty(batch, nodes, heads, value.shape[3])


@triton.jit
def _keep(
    addresses, lengths, path, stride_c, stride_g, stride_m, accepted,
    ELEMENT: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr, ACCEPTED: tl.constexpr,
):  # fmt: skip
    """The accepted rows of one sequence and group in one buffer: all are read before any is written."""
    b, g = (tl.program_id(1) // GROUPS).to(tl.int64), tl.program_id(1) % GROUPS
    place_P, size_D = tl.arange(0, ACCEPTED), tl.arange(0, ROOM)
    real_P = place_P < accepted
    from_P = tl.load(path + b * accepted + place_P, mask=real_P, other=0)
    buffer = tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(ELEMENT), bitcast=True)
    buffer += b * stride_c + g * stride_g + tl.load(lengths + b) * stride_m
    real_PD = real_P[:, None] & (size_D < SIZE)[None, :]
    rows_PD = tl.load(buffer + from_P[:, None] * stride_m + size_D[None, :], mask=real_PD)
    tl.debug_barrier()
    tl.store(buffer + place_P[:, None] * stride_m + size_D[None, :], rows_PD, mask=real_PD)


def keep_rows(buffers: Sequence[Tensor], addresses: Tensor, lengths_B: Tensor, path_BP: Tensor) -> None:
    """Row `lengths_B[b] + path_BP[b, i]` becomes row `lengths_B[b] + i`, in all buffers at once.

    Args:
        buffers: [C, G, M, D], of one shape and dtype.
        addresses: int64, where they are, on the device.
    """
    _, groups, _, size = buffers[0].shape
    batch, accepted = path_BP.shape
    _keep[len(buffers), batch * groups](
        addresses, lengths_B, path_BP.contiguous(), *buffers[0].stride()[:3], accepted,
        ELEMENT=ELEMENTS[buffers[0].dtype], GROUPS=groups, SIZE=size, ROOM=triton.next_power_of_2(size),
        ACCEPTED=triton.next_power_of_2(accepted), num_warps=4,
    )  # fmt: skip
