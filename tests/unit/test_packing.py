"""Fillers that are left out of a batch of drafts."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gorgon.core.draft import FILLER, Draft
from gorgon.core.packing import pack, unpack
from gorgon.decode.inputs import Inputs

INPUTS = Inputs(torch.device("cpu"))


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5), st.integers(1, 2))
def test_the_rows_are_those_of_the_nodes_that_are_there(sizes, least):
    drafts = [Draft(1) for _ in sizes]
    for draft, size in zip(drafts, sizes, strict=True):
        for _ in range(size - 1):
            draft.add(2, 0)
    lengths_B = INPUTS.lengths([0] * len(sizes))
    batch = INPUTS.drafts(drafts, least=least, packed=True)
    tokens_BN = batch.flat_4BN[0]
    assert not lengths_B.any(), "one memory is not given out twice"
    if batch.rows_Q is None:
        assert len(sizes) == 1 or tokens_BN.shape[1] == 1
        return
    assert torch.equal(batch.rows_Q, (tokens_BN.flatten() != FILLER).nonzero()[:, 0])
    assert len(batch.rows_Q) == sum(sizes)
    packed_Q = pack(tokens_BN, batch.rows_Q)
    again_BN = unpack(packed_Q, batch.rows_Q, *tokens_BN.shape)
    assert torch.equal(again_BN, tokens_BN.where(tokens_BN != FILLER, 0))
    wide_BNH = torch.randn(*tokens_BN.shape, 3)
    found_BNH = unpack(pack(wide_BNH, batch.rows_Q), batch.rows_Q, *tokens_BN.shape)
    assert torch.equal(found_BNH, wide_BNH.where((tokens_BN != FILLER)[..., None], 0))
