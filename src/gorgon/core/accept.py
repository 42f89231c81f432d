"""Acceptance: which drafts of a verified tree become output.

At each node the backbone's own next token is chosen first, without looking at the drafts: the argmax, or a sample from
its distribution (`core.sampling`). Then the tree is walked from the root as long as a child holds the chosen token. So
the output is what plain decoding would have written, whatever was drafted.
Shapes: B sequences, N nodes, P nodes of the longest path, root included, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gorgon.core.constraint import Constraint
from gorgon.core.sampling import History, Randomness, Sampling, choose, probabilities, process


def ancestors(bits_BN: Tensor) -> Tensor:
    """Boolean [B, N, N] from one int64 per node: bit j of node i is set when j is i or on its way to the root."""
    places_N = torch.arange(bits_BN.shape[1], device=bits_BN.device)
    return (bits_BN[:, :, None] >> places_N).bitwise_and(1).bool()


def accept(
    tokens_BN: Tensor, choices_BN: Tensor, parents_BN: Tensor, depths_BN: Tensor, bits_BN: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """The deepest node whose every token on the way is the backbone's choice at its parent, and the path to it.

    Source: arXiv:2401.10774, section 2.3.1 with temperature 0 when the choices are the argmax; with sampled choices the
    draft is right exactly when plain sampling would have drawn it. Tensor operations alone: a CUDA graph can hold it.
    Args:
        tokens_BN: int64, drafted tokens; a negative one matches nothing.
        choices_BN: int64, the backbone's choice after each node.
        parents_BN: int64, index of each node's parent; the root's is 0.
        bits_BN: int64, bit j of node i is set when j is i or on its way to the root.
        longest: P, at least the deepest node's depth + 1.
    Returns: best_B int64, the deepest accepted node, the longer branch winning where two hold the same tokens, the
        earlier one in a tie; path_BP int64, the nodes from the root to it by depth, 0 behind it.
    Invariant: root, accepted tokens and the choice at the deepest node are what plain decoding would have written.
    """
    nodes = tokens_BN.shape[1]
    right_BN = tokens_BN == choices_BN.gather(1, parents_BN)
    right_BN = right_BN | (depths_BN == 0) & (tokens_BN >= 0)
    order_N = torch.arange(nodes, device=tokens_BN.device)
    wrong_B1 = ((~right_BN).long() << order_N).sum(1, keepdim=True)
    score_BN = torch.where(bits_BN & wrong_B1 == 0, depths_BN * nodes + (nodes - 1 - order_N), -1)
    best_B = score_BN.argmax(1)
    on_path_BN = (bits_BN.gather(1, best_B[:, None]) >> order_N) & 1
    place_BN = torch.where(on_path_BN == 1, depths_BN, longest)  # the others' is dropped
    path_BP = tokens_BN.new_zeros(len(best_B), longest + 1).scatter(1, place_BN, order_N.expand_as(place_BN))
    return best_B, path_BP[:, :longest]


@dataclass(frozen=True)
class Accepted:
    """The accepted part of a tree.

    Attributes:
        nodes: indices from the root to the deepest accepted node; the root is always accepted.
        next_token: the backbone's own token after that node, free of charge in every step.
    """

    nodes: list[int]
    next_token: int


def accept_sampled(
    tokens: Sequence[int],
    parents: Sequence[int],
    logits_NV: Tensor,
    sampling: Sampling,
    randomness: Randomness | None = None,
    position: int = 0,
    history: History | None = None,
    constraint: Constraint | None = None,
) -> Accepted:
    """The path along which plain sampling, with this seed, would have walked.

    At each node the next token is chosen from the backbone's processed distribution, as plain decoding chooses it;
    the walk descends when a child holds that token, and stops with it otherwise.
    Args:
        tokens, parents: per node, in an order where parents precede children; -1 is the root's parent.
        logits_NV: the backbone's logits after each node; only rows on the walked path are read.
        randomness, history: may be None where `sampling` needs none. `history` holds prompt and output, the root
            included, and is not changed.
        position: output position of the token after the root.
        constraint: has followed the answer up to the root; afterwards up to `next_token`.
    Raises: ModelError when the logits on the path are not finite; what the constraint raises.
    Invariant: accepted tokens and `next_token` are what `choose` gives one position at a time, whatever the drafts.
        Nodes with equal tokens are followed together, so that the longest branch wins, the earliest in a tie.
    """
    level = [0]
    while True:
        token = choose(logits_NV[level[0]], sampling, randomness, position, history, constraint)
        right = [n for n in range(level[0] + 1, len(tokens)) if tokens[n] == token and parents[n] in level]
        if not right:
            return Accepted(_path_to(level[0], parents), token)
        level = right
        position += 1
        if history is not None and sampling.needs_history:
            history = history.then(token)


def accept_typical(
    tokens: Sequence[int],
    parents: Sequence[int],
    logits_NV: Tensor,
    sampling: Sampling,
    randomness: Randomness,
    position: int = 0,
    history: History | None = None,
) -> Accepted:
    """The longest path of drafts that are likely enough. Lossy: the output does not follow the backbone's distribution.

    Source: arXiv:2401.10774, section 2.3.1: a draft x is accepted when p(x) > min(epsilon, delta * exp(-H(p))), with
    p the processed distribution at its parent and H its entropy in nats. Of equally long paths the likelier wins, the
    earlier in a tie. The token after the deepest accepted node is sampled from the distribution there.
    Args, raises: as `accept_sampled`; rows of accepted nodes are read.
    """
    histories = {0: history}
    distributions: dict[int, tuple[Tensor, float]] = {}
    reached = {0: (0, 0.0)}  # depth and log-likelihood of every accepted node
    best = 0
    for node in range(1, len(tokens)):
        parent = parents[node]
        if parent not in reached:
            continue
        if parent not in distributions:
            p_V = probabilities(process(logits_NV[parent], sampling, histories[parent]))
            entropy = float(torch.special.entr(p_V).sum())
            distributions[parent] = p_V, min(sampling.epsilon, sampling.delta * math.exp(-entropy))
        p_V, threshold = distributions[parent]
        p = float(p_V[tokens[node]])
        if p > threshold:
            before = histories[parent]
            histories[node] = before.then(tokens[node]) if before is not None and sampling.needs_history else before
            depth, likelihood = reached[parent]
            reached[node] = depth + 1, likelihood + math.log(p)
            best = max(best, node, key=reached.__getitem__)  # max keeps the first of equals
    depth = reached[best][0]
    return Accepted(
        _path_to(best, parents), choose(logits_NV[best], sampling, randomness, position + depth, histories[best])
    )


def _path_to(node: int, parents: Sequence[int]) -> list[int]:
    nodes = [node]
    while parents[nodes[-1]] >= 0:
        nodes.append(parents[nodes[-1]])
    nodes.reverse()
    return nodes
