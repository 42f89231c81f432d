"""How many threads a CPU step takes: measured, because more are not always faster for products of a few rows."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping

import torch

from gorgon.models.backbone import Backbone
from gorgon.models.cache import TreeCache
from gorgon.progress import say

ROWS = (1, 8)
CONTEXT, PASSES, SECONDS = 64, 12, 3.0
"""Measured at least so often and so long: what else a machine does comes in bursts, and a burst must not decide."""
CLEARLY = 0.8
"""Fewer threads than torch would use must take at most this share of the time: eager steps are timed, and compiled ones
gain more from threads (docs/lab-notes.md)."""


def threads_are_given() -> bool:
    """Whether the environment says how many threads to use; then neither tuning nor loading changes that."""
    return "OMP_NUM_THREADS" in os.environ


def set_threads(count: int) -> None:
    """Uses this many threads from now on, unless the environment says otherwise or the machine has fewer cores."""
    if not threads_are_given() and 1 <= count <= (os.cpu_count() or 1):
        torch.set_num_threads(count)


def pick_threads(times: Mapping[int, float]) -> int:
    """The number of threads to use, given what `measure_threads` found: as many as there are, unless fewer are clearly
    faster.

    Args: times: at least one entry.
    """
    most = max(times)
    best = min(times, key=times.__getitem__)
    return best if times[best] <= CLEARLY * times[most] else most


def use_measured(times: Mapping[int, float]) -> None:
    """Uses the number that `pick_threads` says, and tells when it is not all of them.

    Args: times: at least one entry.
    """
    chosen, most = pick_threads(times), max(times)
    set_threads(chosen)
    if chosen < most:
        say(f"threads: {chosen} ({times[chosen]:.1f} ms) instead of {most} ({times[most]:.1f} ms); "
            f"if this machine was busy with something else, tune again when it is not")  # fmt: skip


@torch.inference_mode()
def measure_threads(backbone: Backbone) -> dict[int, float]:
    """Median ms of a plain step and one of eight nodes, summed, by threads: 1, 2, 4, ... and all that torch would use.

    Empty on a GPU, and where the environment says how many. Numbers of threads take turns.
    """
    most = torch.get_num_threads()
    if backbone.device.type != "cpu" or threads_are_given() or most == 1:
        return {}
    counts = sorted({1 << i for i in range(most.bit_length()) if 1 << i < most} | {most})
    cache = TreeCache(int(backbone.text_config.num_hidden_layers), 1, CONTEXT + max(ROWS))
    length_1 = torch.tensor([CONTEXT])
    backbone.forward_prompt(cache, torch.ones(1, CONTEXT, dtype=torch.long), torch.tensor([0]), CONTEXT)
    samples: dict[tuple[int, int], list[float]] = {(c, n): [] for c in counts for n in ROWS}
    begin, trial = time.perf_counter(), 0
    while trial < PASSES or time.perf_counter() - begin < SECONDS:
        for count in counts:
            torch.set_num_threads(count)
            for nodes in ROWS:
                tokens_1N, depths_1N = torch.ones(1, nodes, dtype=torch.long), torch.arange(nodes)[None]
                bits_1N = torch.tensor([[(2 << i) - 1 for i in range(nodes)]])
                for repeat in range(3):
                    start = time.perf_counter()
                    backbone.forward_tree(cache, tokens_1N, depths_1N, bits_1N, length_1, CONTEXT + nodes)
                    if trial and repeat:
                        samples[count, nodes].append(1000 * (time.perf_counter() - start))
        trial += 1
    torch.set_num_threads(most)
    return {c: sum(statistics.median(samples[c, n]) for n in ROWS) for c in counts}
