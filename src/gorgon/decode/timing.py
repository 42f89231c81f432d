"""Measured step times: what a draft of each size costs on this machine, and what reading the heads adds."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gorgon.decode.engine import Engine
from gorgon.decode.request import Request
from gorgon.errors import Interrupted
from gorgon.interrupts import requested

STEPS = 6
"""Steps timed in a row before the next size takes its turn."""
Key = TypeVar("Key")


@dataclass(frozen=True)
class StepCosts:
    """Step times in ms, drafting and commit included.

    Attributes:
        by_nodes: by nodes of the draft, with all heads read; of one node, which is plain decoding, with none.
        by_heads: by heads read, at one size of draft.
    """

    by_nodes: Mapping[int, float]
    by_heads: Mapping[int, float]

    def ms(self, nodes: int, heads: int) -> float:
        """Between the measured sizes by linear interpolation, flat beyond the ends. Never below the plain step."""
        plain = self.by_nodes[1]
        if nodes == 1 and heads == 0:
            return plain
        drafting = {n: ms for n, ms in self.by_nodes.items() if n > 1} or self.by_nodes
        most = max(self.by_heads, default=0)
        saved = self.by_heads[most] - _between(self.by_heads, heads) if most else 0.0
        return max(plain, _between(drafting, nodes) - saved)


def step_times(
    engines: Mapping[Key, Engine], prompts: Sequence[Sequence[int]], batch: int, trials: int, length: int
) -> dict[Key, float]:
    """Median time of one step of each engine in ms, with `batch` sequences decoded together.

    Timed as decoding runs it: drafting, verification, acceptance, commit, heads. Engines take turns, so that a busy
    moment hits all alike. The sequences go on beyond their end tokens; what they write does not matter here.
    Args:
        engines: on the same weights.
        length: tokens after which a sequence begins anew with another prompt: attention's cost grows with the context.
    Raises: Interrupted between two timings.
    """
    longest = max(len(p) for p in prompts)
    largest = max(engines.values(), key=lambda e: e.most_nodes)
    room = min(length, largest.backbone.max_length - longest - 1)
    slots = largest.slots(batch, longest + room)
    samples: dict[Key, list[float]] = {key: [] for key in engines}
    waiting = itertools.cycle(prompts)

    def refill() -> None:
        while slots.free:
            slots.admit(Request(next(waiting), room, ignore_end=True))
            slots.read_prompt()

    refill()
    for trial in range(trials + 1):
        for key, engine in engines.items():
            if requested():
                raise Interrupted("stopped while timing", hint="the same command starts this step again")
            slots.use(engine)
            for step in range(STEPS + 1):
                refill()
                start = time.perf_counter()
                slots.step()
                if trial and step:  # the first pass warms up, and so does the first step after a change of size
                    samples[key].append((time.perf_counter() - start) * 1000)
    return {key: statistics.median(values) for key, values in samples.items()}


def _between(curve: Mapping[int, float], at: int) -> float:
    sizes = sorted(curve)
    above = next((n for n in sizes if n >= at), sizes[-1])
    below = max((n for n in sizes if n <= at), default=sizes[0])
    if above == below:
        return curve[above]
    share = (at - below) / (above - below)
    return curve[below] * (1 - share) + curve[above] * share
