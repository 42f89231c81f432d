"""One step: propose drafts, verify the whole tree in one forward, accept, commit.

Source: Medusa, arXiv:2401.10774, section 2.1.2 (tree attention). The same code does plain decoding: its tree has the
root alone. Shapes: N nodes, M cache capacity, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon.core.accept import accept_greedy
from gorgon.core.tree import DraftTree
from gorgon.errors import ModelError
from gorgon.models.backbone import Backbone
from gorgon.models.cache import TreeCache


class TreeLayout:
    """A tree's constant tensors on the backbone's device: attention mask, depths, where its tokens come from."""

    def __init__(self, tree: DraftTree, backbone: Backbone, capacity: int) -> None:
        self.tree = tree
        self.depths_N = torch.tensor(tree.depths, device=backbone.device)
        self.choices = tree.choices.to(backbone.device)
        # Columns: M rows of context, all visible, then the N nodes. A context of t rows uses the last t + N columns,
        # so every step's mask is a view and none is built while decoding.
        blocked = torch.finfo(backbone.dtype).min
        self._mask_11NM = torch.zeros(1, 1, tree.nodes, capacity + tree.nodes, dtype=backbone.dtype)
        self._mask_11NM[0, 0, :, capacity:].masked_fill_(~tree.ancestors_NN, blocked)
        self._mask_11NM = self._mask_11NM.to(backbone.device)
        self._capacity = capacity

    def mask(self, length: int) -> Tensor:
        """Additive mask [1, 1, N, length + N]: the committed context, and each node's own path."""
        return self._mask_11NM[..., self._capacity - length :]


@dataclass(frozen=True)
class StepResult:
    """What a step decided.

    Attributes:
        tokens: newly decided tokens, at least one; the last is the next step's root.
        node: index of the deepest accepted node, 0 when no draft was right.
        hidden_1H: the hidden state that the heads read next.
    """

    tokens: list[int]
    node: int
    hidden_1H: Tensor


@torch.inference_mode()
def prefill(backbone: Backbone, cache: TreeCache, prompt_ids: list[int]) -> StepResult:
    """Runs the prompt through the backbone, fills the cache, and decides the first token.

    Raises: ModelError when the backbone's logits are not finite.
    """
    ids_1T = torch.tensor([prompt_ids], device=backbone.device)
    positions_1T = torch.arange(len(prompt_ids), device=backbone.device)[None]
    hidden_1TH = backbone.decoder(
        input_ids=ids_1T, position_ids=positions_1T, past_key_values=cache, use_cache=True
    )[0]  # fmt: skip
    cache.commit(range(len(prompt_ids)))
    hidden_1H = hidden_1TH[0, -1:]
    logits_1V = backbone.lm_head(hidden_1H)
    if not bool(torch.isfinite(logits_1V).all()):
        raise ModelError(
            "the backbone's logits are not finite", field="dtype", value=str(backbone.dtype),
            hint="try another --set dtype=..., and check that the checkpoint is complete",
        )  # fmt: skip
    return StepResult([int(logits_1V.argmax())], 0, hidden_1H)


@torch.inference_mode()
def verify(
    backbone: Backbone,
    cache: TreeCache,
    layout: TreeLayout,
    root: int,
    choices: Tensor | None,
    copied: list[int],
    last_position: int,
) -> StepResult:
    """Verifies one tree and commits its accepted rows.

    Args:
        root: the token decided last, not yet in the cache.
        choices: the heads' choices as `HeadDrafts` gives them; None when the tree has no head nodes.
        copied: tokens of the n-gram branch, as many as the tree has.
        last_position: largest position the model knows; deeper nodes are moved there, and the caller's length limit
            makes sure that none of them becomes output.
    """
    parts = [torch.tensor([root], device=backbone.device)]
    if choices is not None:
        parts.append(choices[layout.choices])
    if copied:
        parts.append(torch.tensor(copied, device=backbone.device))
    tokens_N = torch.cat(parts) if len(parts) > 1 else parts[0]
    positions_N = layout.depths_N + cache.length
    if cache.length + len(layout.tree.parents) > last_position:
        positions_N = positions_N.clamp(max=last_position)
    hidden_NH = backbone.step_decoder(
        input_ids=tokens_N[None],
        attention_mask=layout.mask(cache.length),
        position_ids=positions_N[None],
        past_key_values=cache,
        use_cache=True,
    )[0][0]
    greedy_N = backbone.lm_head(hidden_NH).max(dim=-1).indices
    tokens, greedy = torch.stack((tokens_N, greedy_N)).tolist()  # the step's one wait for the device
    accepted = accept_greedy(tokens, greedy, layout.tree.parents)
    cache.commit(accepted.nodes)
    node = accepted.nodes[-1]
    decided = [tokens[i] for i in accepted.nodes[1:]] + [accepted.next_token]
    return StepResult(decided, node, hidden_NH[node : node + 1])
