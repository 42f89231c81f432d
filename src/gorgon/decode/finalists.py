"""Finalists: the candidates that look fastest decode whole answers, and the one that is fastest in fact is kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gorgon.config import TuneConfig
from gorgon.decode.calibrate import Recording
from gorgon.decode.candidates import Candidate
from gorgon.decode.engine import Engine
from gorgon.errors import Interrupted
from gorgon.interrupts import requested

STATIC, DYNAMIC = 2, 3
"""Candidates of each kind that become finalists; predictions err by a few percent."""
GROUP = 8
"""Answers that one finalist decodes before the next takes its turn: a slow moment hits all of them alike."""
GROUPS = 4
"""Turns of a pass at least, however many sequences are decoded together: a quarter of two or three says little."""
WORTH = 1.05
"""Drafting must be this much faster than plain decoding to be taken, and not slower in three turns of four: what is
less may be the noise of a busy machine, of which the best of several finalists has the most."""


@dataclass(frozen=True)
class Finalist:
    """A candidate, and how fast it decoded whole answers, prefill included.

    Attributes:
        tokens_per_s: of the medians of its turns.
        over_plain: in each turn, how many times as fast as plain decoding's turn beside it.
    """

    candidate: Candidate
    tokens_per_s: float
    over_plain: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """The median turn's."""
        return statistics.median(self.over_plain)

    @property
    def surely_faster(self) -> bool:
        """Whether it is worth drafting."""
        turns = sorted(self.over_plain)
        return self.speedup >= WORTH and turns[len(turns) // 4] >= 1.0


def pick_finalists(static: Sequence[Candidate], dynamic: Sequence[Candidate]) -> list[Candidate]:
    """The best of each kind, and plain decoding: what speculation must beat. Both lists are fastest first.

    Of dynamic trees that differ in nothing but their largest size only the first is taken: they draft nearly alike.
    """
    chosen, kinds = list(static[:STATIC]), set[tuple[int, float]]()
    for candidate in dynamic:
        settings = candidate.settings()
        kind = (settings["heads"], settings["threshold"])
        if kind not in kinds and len(kinds) < DYNAMIC:
            kinds.add(kind)
            chosen.append(candidate)
    return chosen if any(c.plain for c in chosen) else [*chosen, next(c for c in static if c.plain)]


def decode_finalists(
    engine: Engine, candidates: Sequence[Candidate], recordings: Sequence[Recording], batch: int, config: TuneConfig
) -> list[Finalist]:
    """Decodes the same answers with each candidate, plain decoding among them, in turns of a few answers.

    Raises: Interrupted between two turns.
    """
    engines = [engine.with_drafter(c.drafter) for c in candidates]
    size = max(GROUP, 2 * batch)
    chosen = recordings[: max(config.finalist_answers, GROUPS * 2 * batch)]
    groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    seconds = [[list[float]() for _ in groups] for _ in candidates]
    tokens = sum(len(r.answer_ids) for r in chosen)
    for trial in range(config.trials + 1):
        for g, group in enumerate(groups if trial else groups[:1]):  # the first pass warms up
            prompts, longest = [r.prompt_ids for r in group], max(len(r.answer_ids) for r in group)
            for index, one in enumerate(engines):
                if requested():
                    raise Interrupted("stopped while timing", hint="the same command starts this step again")
                start = time.perf_counter()
                one.generate(prompts, max_new_tokens=longest, together=batch)
                if trial:
                    seconds[index][g].append(time.perf_counter() - start)
    plain = seconds[next(i for i, c in enumerate(candidates) if c.plain)]
    return [
        Finalist(
            candidate,
            tokens / sum(statistics.median(group) for group in mine),
            tuple(p / m for ps, ms in zip(plain, mine, strict=True) for p, m in zip(ps, ms, strict=True)),
        )
        for candidate, mine in zip(candidates, seconds, strict=True)
    ]


def choose_finalist(finalists: Sequence[Finalist]) -> Finalist:
    """The one with the greatest gain over plain decoding, or plain decoding where drafting is not `WORTH` it."""
    plain = next(f for f in finalists if f.candidate.plain)
    return max((f for f in finalists if f.surely_faster), key=lambda f: f.speedup, default=plain)
