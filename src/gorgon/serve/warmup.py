"""Before the first request: decoding in every way that steps are compiled for, so that nobody waits for it later.

A compiler makes a version of its own for one row and for several, for plain decoding and for drafts, for one head and
for several, and for sampled tokens. What tuned drafters find for some prompt must not decide which of these there are,
so shapes are drafted here, whatever their tokens. Where steps are captured by shape, all of them are.
"""

from __future__ import annotations

from collections.abc import Sequence

from gorgon.core.draft import Draft
from gorgon.core.sampling import GREEDY, Sampling
from gorgon.data.chat import encode_prompt
from gorgon.decode.drafts import Drafter
from gorgon.decode.engine import CAPTURED_NODES, Engine
from gorgon.decode.ngrams import NgramIndex
from gorgon.decode.request import Request
from gorgon.decode.slots import Slots
from gorgon.decode.step import HeadChoices

TOKENS, STEPS = 16, 3
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
    if full and engine.backbone.graphs is not None:
        _capture(slots, Request(prompt, slots.context, ignore_end=True))
    slots.use(engine)


def _capture(slots: Slots, request: Request) -> None:
    """A greedy step of every batch size, with a draft of every size for which steps are captured."""
    engine = slots.engine
    for count in range(1, slots.count + 1):
        made = []
        for _ in range(count):
            made.append(slots.admit(request))
            slots.read_prompt()
        most = engine.drafter(count).nodes
        for nodes in sorted({min(size, most) for size in CAPTURED_NODES}):
            slots.use(shapes_of(engine, (0,) * (nodes - 1)))
            slots.step()
        slots.use(engine)
        for running in made:
            slots.drop(running)


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


def shapes_of(engine: Engine, *shapes: Sequence[int]) -> Engine:
    """The engine as it steps when each drafter drafts the first of these and of `SHAPES` that is not too large."""
    return engine.with_drafter({size: _Shape(d, [*shapes, *SHAPES]) for size, d in engine.drafters.items()})


class _Shape:
    """Always drafts the same shape, and reads what another drafter reads."""

    def __init__(self, drafter: Drafter, shapes: Sequence[Sequence[int]]) -> None:
        self.nodes, self.heads, self.width, self.copies = drafter.nodes, drafter.heads, drafter.width, drafter.copies
        self._parents = next(parents for parents in shapes if len(parents) < drafter.nodes)

    def draft(self, root: int, _choices: HeadChoices | None, _context: NgramIndex | None) -> Draft:
        draft = Draft(root)
        for parent in self._parents:
            draft.add(root, parent)
        return draft
