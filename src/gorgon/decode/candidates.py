"""The drafters that tuning chooses from: static trees of every size, and dynamic trees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gorgon.config import TuneConfig
from gorgon.core.acceptance import Acceptance
from gorgon.core.phrasebook import Phrasebook
from gorgon.core.rank_stats import Replay, best_tree, count_prefixes, replay
from gorgon.core.tree import DraftTree
from gorgon.decode.calibrate import Recording, Replayed, replay_drafter
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.dynamic import DynamicDrafter
from gorgon.decode.timing import StepCosts

THRESHOLDS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45)
"""Least acceptance rates of a dynamic tree's nodes that are tried."""
DYNAMIC_SIZES = (4, 6, 8, 12, 16, 24, 32, 48, 64)
PROBES = ((8, 0.06), (16, 0.1))
"""Sizes and thresholds at which numbers of heads are compared; the best two of them are tried at all."""
TextCounts = Counter[tuple[int, ...]]


@dataclass(frozen=True)
class Candidate:
    """A drafter with what replaying and timing say about it."""

    drafter: StaticDrafter | DynamicDrafter
    tokens_per_step: float
    mean_nodes: float
    step_ms: float

    @property
    def tokens_per_s(self) -> float:
        """Predicted decoding speed of one sequence, prefill excluded."""
        return self.tokens_per_step / self.step_ms * 1000

    @property
    def plain(self) -> bool:
        """Whether this is plain decoding."""
        return self.drafter.nodes == 1

    def settings(self) -> dict[str, Any]:
        """What tells it from other candidates of its kind."""
        drafter = self.drafter
        if isinstance(drafter, DynamicDrafter):
            return {"kind": "dynamic", "nodes": drafter.nodes, "heads": drafter.heads, "threshold": drafter.threshold,
                    "width": drafter.width}  # fmt: skip
        return {"kind": "static", "nodes": drafter.nodes, "heads": drafter.heads, "ngram": drafter.tree.ngram}

    def describe(self) -> dict[str, Any]:
        """The settings with paths or acceptance table, as tree.json holds them and `drafter_of` reads them."""
        drafter = self.drafter
        if isinstance(drafter, DynamicDrafter):
            return {**self.settings(), "acceptance": drafter.acceptance.as_json()}
        return {**self.settings(), "paths": [list(p) for p in drafter.tree.paths]}

    def as_json(self) -> dict[str, Any]:
        """A row of tree.json's `candidates`: the settings and the prediction."""
        return {
            **self.settings(),
            "tokens_per_step": round(self.tokens_per_step, 4),
            "mean_nodes": round(self.mean_nodes, 2),
            "step_ms": round(self.step_ms, 4),
            "tokens_per_s": round(self.tokens_per_s, 1),
        }


class Replays:
    """The recorded answers decoded again by drafters, each once: what is accepted does not depend on the batch size."""

    def __init__(
        self, recordings: Sequence[Recording], phrasebook: Phrasebook, sizes: Sequence[int], config: TuneConfig
    ) -> None:
        """Args: sizes: nodes of the trees whose steps are timed, ascending."""
        self.recordings, self.phrasebook, self.sizes, self.config = recordings, phrasebook, sizes, config
        self._dynamic: dict[tuple[int, int, float], tuple[DynamicDrafter, Replayed]] = {}

    @cached_property
    def static(self) -> list[tuple[DraftTree, Replay]]:
        """The best tree of every size with every length of the n-gram branch, the one-node tree among them."""
        texts = [r.positions for r in self.recordings]
        flat = [p for text in texts for p in text]
        found = []
        for ngram in sorted(set(self.config.ngram_lengths) | {0}):
            counts = count_prefixes(flat, max_rank=self.config.max_rank, ngram=ngram)
            for nodes in sorted({*self.sizes, *(n + ngram for n in self.sizes)}):
                if ngram < nodes <= self.sizes[-1]:
                    tree = best_tree(counts, nodes, ngram=ngram)
                    found.append((tree, replay(texts, tree)))
        return found

    def dynamic(self, acceptance: Acceptance, nodes: int, threshold: float) -> tuple[DynamicDrafter, Replayed]:
        """A dynamic tree; its drafting time is measured as it is replayed."""
        key = (acceptance.heads, nodes, threshold)
        if key not in self._dynamic:
            drafter = DynamicDrafter(
                acceptance, self.phrasebook, nodes=nodes, threshold=threshold, width=self.config.width
            )
            self._dynamic[key] = drafter, replay_drafter(self.recordings, drafter)
        return self._dynamic[key]


def static_candidates(replays: Replays, costs: StepCosts) -> list[Candidate]:
    """The static trees at these costs, fastest first."""
    candidates = []
    for tree, result in replays.static:
        full, short, without = result.steps_with_ngram, result.steps_without, tree.nodes - tree.ngram
        total = full * costs.ms(tree.nodes, tree.heads) + short * costs.ms(without, tree.heads)
        mean = (full * tree.nodes + short * without) / result.steps
        candidates.append(Candidate(StaticDrafter(tree), result.tokens_per_step, mean, total / result.steps))
    return sorted(candidates, key=_fastest_first)


def dynamic_candidates(replays: Replays, costs: StepCosts, acceptances: Sequence[Acceptance]) -> list[Candidate]:
    """Dynamic trees of several sizes and thresholds at these costs and their own drafting time, fastest first.

    Args: acceptances: one for each number of heads that may be read.
    """

    def candidate(acceptance: Acceptance, nodes: int, threshold: float) -> Candidate:
        drafter, result = replays.dynamic(acceptance, nodes, threshold)
        total = sum(count * costs.ms(n, drafter.heads) for n, count in result.nodes.items()) + 1000 * result.draft_s
        return Candidate(drafter, result.tokens_per_step, result.mean_nodes, total / result.steps)

    most = replays.sizes[-1]
    probed = {
        a.heads: max(candidate(a, min(n, most), threshold).tokens_per_s for n, threshold in PROBES) for a in acceptances
    }
    found = [
        candidate(acceptance, nodes, threshold)
        for acceptance in sorted(acceptances, key=lambda a: -probed[a.heads])[:2]
        for nodes in DYNAMIC_SIZES
        if nodes <= most
        for threshold in THRESHOLDS
        if threshold >= 0.4 / nodes  # a low threshold does not matter to a small tree
    ]
    return sorted(found, key=_fastest_first)


def heads_only(recordings: Sequence[Recording], counts: TextCounts, nodes: int) -> dict[str, Any]:
    """Tokens per step of the best tree of this size without n-gram branch: the figure that no machine changes."""
    tree = best_tree(counts, nodes)
    result = replay([r.positions for r in recordings], tree)
    return {"nodes": nodes, "paths": len(tree.paths), "tokens_per_step": round(result.tokens_per_step, 4)}


def drafter_of(entry: Mapping[str, Any], phrasebook: Phrasebook) -> StaticDrafter | DynamicDrafter:
    """The drafter that an entry of tree.json describes.

    Raises: KeyError, TypeError or ValueError for an entry that is not one; ShapeError for paths that are no tree;
        ModelError for an acceptance table that is none.
    """
    if entry["kind"] == "static":
        return StaticDrafter(DraftTree.of(entry["paths"], ngram=int(entry["ngram"])))
    if entry["kind"] != "dynamic":
        raise ValueError(f"no drafter of kind {entry['kind']!r}")
    return DynamicDrafter(
        Acceptance.of_json(entry["acceptance"]), phrasebook,
        nodes=int(entry["nodes"]), threshold=float(entry["threshold"]), width=int(entry["width"]),
    )  # fmt: skip


def _fastest_first(candidate: Candidate) -> tuple[float, int]:
    return (-candidate.tokens_per_s, candidate.drafter.nodes)
