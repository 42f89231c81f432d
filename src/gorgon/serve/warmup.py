"""Before the first request: decoding in every way that steps are compiled for, so that nobody waits for it later.

A compiler makes a version of its own for one row and for several, for plain decoding and for drafts, for one head and
for several, and for sampled tokens. What tuned drafters find for some prompt must not decide which of these there are,
so shapes are drafted here, whatever their tokens.
"""

from __future__ import annotations

from gorgon.core.draft import Draft
from gorgon.core.sampling import GREEDY, Sampling
from gorgon.data.chat import encode_prompt
from gorgon.decode.drafts import Drafter
from gorgon.decode.engine import Engine
from gorgon.decode.ngrams import NgramIndex
from gorgon.decode.request import Request
from gorgon.decode.slots import Slots
from gorgon.decode.step import HeadChoices

TOKENS, STEPS = 12, 3
SHAPES = ((0, 0, 1, 0), (0, 0), (0,), ())
"""Drafts by the parents of the nodes below the root, of five nodes and a longest path of three where the drafter lets
us. The compiler takes sizes that are equal by chance for one, and a batch of drafts is a tensor [4, B, N], so none has
four nodes."""


def warm_up(slots: Slots, *, full: bool) -> None:
    """Decodes a few tokens.

    Args: full: false decodes one request only, which allocates the buffers.
    """
    engine = slots.engine
    prompt = encode_prompt(engine.backbone.tokenizer, [{"role": "user", "content": "Hello"}])
    prompt = prompt[: max(slots.context - TOKENS, 1)]
    if full:
        slots.use(shapes_of(engine))
    for sampling in (GREEDY, Sampling(temperature=1.0, seed=0)) if full else (GREEDY,):
        _fill(slots, Request(prompt, slots.context, sampling=sampling, ignore_end=True), slots.count if full else 1)
    slots.use(engine)


def _fill(slots: Slots, request: Request, count: int) -> None:
    """Seats the request again and again, and steps at the batch sizes that matter."""
    sizes = {1, 2, slots.count, *slots.engine.drafters, *(size + 1 for size in slots.engine.drafters)}
    made = []
    for _ in range(count):
        made.append(slots.admit(request))
        slots.read_prompt()
        if len(made) in sizes:
            for _ in range(STEPS):
                slots.step()
    for running in made:
        slots.drop(running)
        if running.error is not None:
            raise running.error


def shapes_of(engine: Engine) -> Engine:
    """The engine as it steps when each drafter drafts the first of `SHAPES` that is not too large for it."""
    return engine.with_drafter({size: _Shape(drafter) for size, drafter in engine.drafters.items()})


class _Shape:
    """Always drafts the same shape, and reads what another drafter reads."""

    def __init__(self, drafter: Drafter) -> None:
        self.nodes, self.heads, self.width, self.copies = drafter.nodes, drafter.heads, drafter.width, drafter.copies
        self._parents = next(parents for parents in SHAPES if len(parents) < drafter.nodes)

    def draft(self, root: int, _choices: HeadChoices | None, _context: NgramIndex | None) -> Draft:
        draft = Draft(root)
        for parent in self._parents:
            draft.add(root, parent)
        return draft
