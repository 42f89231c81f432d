"""Measured step times: what a draft of each size costs on this machine, at each number of sequences."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from gorgon.decode.engine import Engine
from gorgon.decode.request import Request
from gorgon.errors import Interrupted
from gorgon.interrupts import requested

STEPS = 6
"""Steps timed in a row before the next size takes its turn."""


def step_times(
    engines: Mapping[int, Engine], prompts: Sequence[Sequence[int]], batch: int, trials: int
) -> dict[int, float]:
    """Median time of one step in ms by number of nodes, with `batch` sequences decoded together.

    Timed as decoding runs it: drafting, verification, acceptance, commit, heads. Sizes take turns, so that a busy
    moment hits all alike. The sequences go on beyond their end tokens; what they write does not matter here.
    Args: engines: by nodes, on the same weights.
    Raises: Interrupted between two timings.
    """
    steps = STEPS * (trials + 1) * len(engines)
    longest = max(len(p) for p in prompts)
    some = next(iter(engines.values()))
    room = some.backbone.max_length - longest - 1
    slots = max(engines.values(), key=lambda e: e.most_nodes).slots(batch, longest + min(room, steps * 4))
    samples: dict[int, list[float]] = {n: [] for n in engines}

    def refill() -> None:
        for running in slots.running:
            slots.drop(running)
        for i in range(batch):
            slots.admit(Request(prompts[i % len(prompts)], room, ignore_end=True))
            slots.read_prompt()

    refill()
    for trial in range(trials + 1):
        for nodes, engine in engines.items():
            if requested():
                raise Interrupted("stopped while timing", hint="the same command starts this step again")
            slots.use(engine)
            for step in range(STEPS + 1):
                if slots.free:
                    refill()
                start = time.perf_counter()
                slots.step()
                if trial and step:  # the first pass warms up, and so does the first step after a change of size
                    samples[nodes].append((time.perf_counter() - start) * 1000)
    return {nodes: statistics.median(values) for nodes, values in samples.items()}


def step_ms(curve: Mapping[int, float], nodes: int) -> float:
    """Step time at a size between the measured ones, by linear interpolation; flat beyond the ends."""
    sizes = sorted(curve)
    above = next((n for n in sizes if n >= nodes), sizes[-1])
    below = max((n for n in sizes if n <= nodes), default=sizes[0])
    if above == below:
        return curve[above]
    share = (nodes - below) / (above - below)
    return curve[below] * (1 - share) + curve[above] * share
