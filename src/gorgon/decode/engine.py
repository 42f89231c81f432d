"""The engine: weights, drafters by batch size, and the loops that answer one request or many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from torch import Tensor

from gorgon.config import StepMode
from gorgon.core.heads import MedusaHeads, PackedHeads
from gorgon.core.sampling import GREEDY, Sampling
from gorgon.core.tree import DraftTree
from gorgon.decode.drafts import Drafter, StaticDrafter
from gorgon.decode.request import Generation, Request
from gorgon.decode.slots import Slots
from gorgon.decode.step import Stepper, packed_heads
from gorgon.errors import ModelError
from gorgon.models.backbone import Backbone

PLAIN = StaticDrafter(DraftTree())
"""The tree that is the root alone: plain decoding."""
ROUNDING = 256
"""Cache sizes are multiples of this, so that requests of like length share buffers."""
CAPTURED_NODES = (2, 8, 16, 24, 32, 48, 64)
"""Sizes of drafts for which steps are captured: a graph for each, where a graph's size is what a step costs."""
MOST_TOGETHER = 8
"""Prompts that `generate` decodes together unless told otherwise."""


class Engine:
    """A backbone, its heads, and what to draft at which batch size.

    Invariant: the tokens do not depend on the drafts (DESIGN.md, invariant 1); the one-node tree is plain decoding.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: MedusaHeads | None,
        drafters: Drafter | Mapping[int, Drafter],
        vocabulary_U: Tensor | None = None,
    ) -> None:
        """Args:
        drafters: by number of sequences decoded together, up to which each is meant; a single one serves all.
        vocabulary_U: int64, the tokens that the heads may draft; None is all of them.

        Raises: ModelError when a drafter needs more heads, or choices, than there are.
        """
        self.drafters = dict(drafters) if isinstance(drafters, Mapping) else {1: drafters}
        self.backbone, self.heads, self.vocabulary_U = backbone, heads, vocabulary_U
        available = 0 if heads is None else len(heads)
        size = backbone.vocab_size if vocabulary_U is None else len(vocabulary_U)
        for drafter in self.drafters.values():
            if drafter.heads > available:
                raise ModelError("the tree is deeper than there are heads", field="tree", value=drafter.heads,
                                 allowed=f"at most {available}")  # fmt: skip
            if drafter.width > size:
                raise ModelError("a rank of the tree exceeds the vocabulary", field="tree", value=drafter.width - 1,
                                 allowed=f"0 to {size - 1}")  # fmt: skip
        self._chosen: dict[int, Drafter] = {}
        self._steppers: dict[tuple[StepMode, int, int], Stepper] = {}
        self._kept: list[Slots] = []  # at most the last call's: what is compiled or captured is bound to their cache

    def with_drafter(self, drafters: Drafter | Mapping[int, Drafter]) -> Engine:
        """An engine on the same weights that drafts otherwise. Both share their steppers and the cache that is kept
        between calls, and so what was captured."""
        other = Engine(self.backbone, self.heads, drafters, self.vocabulary_U)
        other._steppers, other._kept = self._steppers, self._kept
        return other

    def with_tree(self, tree: DraftTree) -> Engine:
        """An engine on the same weights with a static tree."""
        return self.with_drafter(StaticDrafter(tree))

    def plain(self) -> Engine:
        """Plain decoding on the same weights: the tree is the root alone."""
        return self.with_drafter(PLAIN)

    @cached_property
    def copies(self) -> bool:
        """Whether any drafter looks at the context."""
        return any(d.copies for d in self.drafters.values())

    @cached_property
    def most_nodes(self) -> int:
        """Nodes of the largest draft."""
        return max(d.nodes for d in self.drafters.values())

    def filled(self, nodes: int, most: int) -> int | None:
        """Nodes up to which a draft of so many is filled where steps are captured by shape; None where they are not.

        Args: most: nodes of the drafter's largest draft, for which the cache has room.
        """
        if self.backbone.graphs is None:
            return None
        return min(next(size for size in CAPTURED_NODES if size >= nodes), max(most, CAPTURED_NODES[0]))

    def drafter(self, batch: int) -> Drafter:
        """What to draft when this many sequences are decoded together: the next larger batch's entry, or the last."""
        if batch not in self._chosen:
            sizes = sorted(self.drafters)
            self._chosen[batch] = self.drafters[next((s for s in sizes if s >= batch), sizes[-1])]
        return self._chosen[batch]

    def stepper(self, batch: int) -> Stepper:
        """The step functions for that drafter, which read the heads that it needs."""
        drafter = self.drafter(batch)
        count, width = drafter.heads, drafter.width
        key = (self.backbone.steps, count, width)
        if key not in self._steppers:
            heads = None if self._packed is None or not count else self._packed.first(count)
            self._steppers[key] = Stepper(self.backbone, heads, width, self.vocabulary_U)
        return self._steppers[key]

    @cached_property
    def _packed(self) -> PackedHeads | None:
        most = max(d.heads for d in self.drafters.values())
        return packed_heads(self.backbone, self.heads, most, self.vocabulary_U) if self.heads is not None else None

    def slots(self, count: int, context: int, *, reuse: bool = False) -> Slots:
        """Room for `count` requests of at most `context` tokens, to be stepped by the caller (a server's scheduler)."""
        return Slots(self, count, context, reuse=reuse)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        sampling: Sampling = GREEDY,
        together: int = MOST_TOGETHER,
    ) -> list[Generation]:
        """The answers to the prompts, in their order. As one answer ends the next prompt takes its place.

        Args: together: how many are decoded in one step; `stream` is the loop for a single prompt.
        Raises: what `Slots.admit` raises, before any prompt is read; ModelError for logits that are not finite.
        """
        requests = [Request(p, max_new_tokens, stop, sampling) for p in prompts]
        if not requests:
            return []
        context = max(len(r.prompt_ids) + self._checked(r) for r in requests)
        slots = self._take_kept(min(together, len(requests)), context)
        waiting = list(enumerate(requests))[::-1]
        all_of_them = {}
        while waiting or slots.running:
            while waiting and slots.free:
                index, request = waiting.pop()
                all_of_them[index] = slots.admit(request, stream=index)
                slots.read_prompt()
            slots.step()
        for running in all_of_them.values():
            if running.error is not None:
                raise running.error
        self._kept[:] = [slots]
        return [all_of_them[i].generation for i in range(len(requests))]

    def stream(self, request: Request) -> Iterator[Generation]:
        """Yields the growing generation after the prefill and after every step.

        Raises: what `Slots.admit` raises; ModelError for logits that are not finite.
        """
        slots = self._take_kept(1, len(request.prompt_ids) + self._checked(request))
        running = slots.admit(request)
        try:
            slots.read_prompt()
            while running.error is None:
                yield running.generation
                if running.done:
                    break
                slots.step()
            if running.error is not None:
                raise running.error
        finally:
            slots.drop(running)
            self._kept[:] = [slots]

    def _checked(self, request: Request) -> int:
        request.sampling.check_vocabulary(self.backbone.vocab_size)
        return request.limit(self.backbone.max_length, self.backbone.vocab_size)

    def _take_kept(self, count: int, context: int) -> Slots:
        """The kept slots if nobody uses them, they are as many and there is room enough in each; else new ones."""
        slots = self._kept.pop() if self._kept else None
        if slots is None or slots.count != count or slots.context < context or not slots.fits(self):
            most = max(self.backbone.max_length, 1)
            return self.slots(count, min(-(-context // ROUNDING) * ROUNDING, most))
        slots.use(self)
        return slots

    def answer(self, prompt_ids: Sequence[int], *, max_new_tokens: int, stop: Sequence[str] = ()) -> Generation:
        """The greedy answer to one prompt."""
        return self.generate([prompt_ids], max_new_tokens=max_new_tokens, stop=stop, together=1)[0]
