"""A step's functions can be captured: no wait for the device, no size that a value decides, no copy from the host.

They run on tensors without values (device 'meta'), where reading one raises, under modes that look at every operation.
"""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gorgon.core.draft import Draft
from gorgon.core.heads import MedusaHeads, PackedHeads
from gorgon.decode.functions import settle, verify
from gorgon.decode.inputs import Inputs
from gorgon.decode.step import Stepper
from gorgon.models.cache import TreeCache
from tests.parity.support import FAMILIES, VOCAB, backbone_of

META = torch.device("meta")
WAITS = (
    "_local_scalar_dense", "item", "nonzero", "masked_select", "_unique", "unique_dim", "unique_consecutive",
    "bincount", "repeat_interleave.Tensor", "is_nonzero", "equal.default",
)  # fmt: skip
"""Operations whose result's size, or next instruction, is a value on the device."""


class NoHostValues(TorchFunctionMode):
    """Fails on a tensor made from Python values, which `Capturable` cannot see: on a GPU they are copied there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor), f"{function.__name__}: a copy from the host"
        return function(*args, **(kwargs or {}))


class Capturable(TorchDispatchMode):
    """Fails on an operation that a CUDA graph cannot hold."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(wait in name for wait in WAITS), f"{name} waits for the device"
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in (*given, *made)}
        assert devices <= {"meta"}, f"{name} works on {sorted(devices)}: a copy between host and device"
        for index in given[1:] if name.startswith("aten.index") else ():
            assert index.dtype != torch.bool, f"{name} with a boolean index waits for its count"
        self.seen += 1
        return result


@pytest.fixture
def drafts():
    draft = Draft(5)
    for parent in (0, 0, 1, 3):
        draft.add(7, parent)
    return [draft, Draft(9), draft]


def run(backbone, drafts, *, heads=0, sampled=False):
    """A whole step of a batch on the device 'meta'."""
    model = copy.deepcopy(backbone.model).to(META, torch.bfloat16)
    backbone.model, backbone.device, backbone.dtype = model, META, torch.bfloat16
    cache = TreeCache(int(backbone.text_config.num_hidden_layers), 4, 40)
    batch = Inputs(META).drafts(drafts, nodes=6)
    lengths_B = torch.zeros(len(drafts), dtype=torch.int64, device=META)
    packed = None
    if heads:
        packed = PackedHeads.of(MedusaHeads(heads, 1, backbone.hidden_size, VOCAB).to(META, torch.bfloat16), heads)
    choices = torch.zeros(len(drafts), 6, dtype=torch.int64, device=META) if sampled else None
    reads = Stepper(backbone, packed, 3, None)._reads
    with torch.inference_mode(), NoHostValues(), Capturable() as mode:
        hidden = verify(backbone, cache, batch.flat_4BN, lengths_B, 24)
        table = settle(backbone, cache, batch.flat_4BN, lengths_B, batch.longest, hidden, choices, reads)
    assert batch.longest == 6, "fixed, not the depth of today's drafts"
    assert table.shape == (len(drafts), 3 + 2 * 6 + 2 * heads * 3) and table.dtype == torch.float64
    return mode.seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_step_of_every_family_can_be_captured(family, drafts):
    assert run(backbone_of(family), drafts) > 50


@pytest.mark.parametrize("sampled", [False, True])
def test_heads_and_given_choices_too(drafts, sampled):
    assert run(backbone_of("llama"), drafts, heads=2, sampled=sampled) > 50


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="cpu").to(x.device),
        lambda x: torch.tensor(3.0, device=x.device) + x,
    ],
)
def test_the_mode_sees_what_cannot_be(wrong):
    x = torch.zeros(3, device=META)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoHostValues(), Capturable():
        wrong(x)
