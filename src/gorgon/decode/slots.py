"""Slots: several requests decoded together, each with its own length, tree and acceptance, joining and leaving at will.

One request is a batch of one, so `Engine.generate` and a server run the same loop. In a step decoding sequences fill
the cache's first places without gaps; a prompt is read into a cache of its own, part by part, and joins when it is
complete.
Shapes: B decoding sequences, N nodes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from gorgon.core.accept import accept_sampled, accept_typical
from gorgon.core.draft import FILLER, Draft
from gorgon.core.sampling import History, Randomness, choose
from gorgon.decode.inputs import Inputs
from gorgon.decode.logprobs import Logprob, output_logprobs
from gorgon.decode.ngrams import NgramIndex
from gorgon.decode.prefixes import Prefixes
from gorgon.decode.request import Generation, Request
from gorgon.decode.step import Decided, HeadChoices
from gorgon.decode.text import TextStream, cut_at_stop
from gorgon.errors import GorgonError, ModelError
from gorgon.models.cache import TreeCache

if TYPE_CHECKING:
    from gorgon.decode.engine import Engine

NOT_CHOSEN = -2
"""Choice after a node that the sampled walk did not reach: equal to no token and to no filler."""


class Running:
    """A request in progress. `generation` grows with every step; `error` is set when this request alone failed."""

    def __init__(self, request: Request, engine: Engine, limit: int, randomness: Randomness) -> None:
        self.request, self.generation, self.error = request, Generation(), None
        self.limit, self.randomness = limit, randomness
        self.read = 0  # prompt tokens that are in the cache
        self.length = 0  # committed cache rows; the root's row comes with the next step
        self.choices: HeadChoices | None = None
        self.draft: Draft | None = None  # what the last step verified
        self.again = False  # the last step failed, perhaps for its drafts: it is made again without any
        self.context = NgramIndex(request.prompt_ids) if engine.copies else None
        self.history = History(request.prompt_ids) if request.sampling.needs_history else None
        self.grammar = None if request.grammar is None else request.grammar.copy()
        self._tokenizer, self._end_ids = engine.backbone.tokenizer, engine.backbone.end_ids
        self._watch = TextStream(engine.backbone.tokenizer, request.stop) if request.stop else None
        self._start = time.perf_counter()

    error: GorgonError | None

    def read_context(self) -> None:
        """Begins to follow the context, for drafters that copy from it."""
        if self.context is None:
            self.context = NgramIndex([*self.request.prompt_ids, *self.generation.token_ids])

    @property
    def root(self) -> int:
        """The token decided last, which has no cache row yet."""
        return self.generation.token_ids[-1]

    @property
    def takes_argmax(self) -> bool:
        """The argmax of the backbone's own logits decides every token."""
        return self.grammar is None and self.request.sampling.plain_greedy

    @property
    def done(self) -> bool:
        """Whether the answer is complete, or failed."""
        return self.generation.done or self.error is not None

    def take(self, decided: Decided, logprobs: Sequence[Logprob] = (), *, first: bool = False) -> None:
        """Appends a step's tokens up to an end token, a stop string or the limit."""
        generation = self.generation
        before = len(generation.token_ids)
        for token in decided.tokens:
            if self._append(token):
                generation.done = True
                break
        new = generation.token_ids[before:]
        generation.logprobs += logprobs[: len(new)]
        generation.seconds = time.perf_counter() - self._start
        if first:
            generation.first_token_s = generation.seconds
        else:
            generation.step_tokens.append(len(new))
            generation.step_nodes.append(decided.node)
            self.length += len(decided.tokens)
        self.choices, self.again = decided.heads, False
        if self.context is not None:
            self.context.extend(new)
        if self.history is not None:
            self.history.extend(new)
        if generation.done:
            ids = generation.token_ids[: -1 if generation.finish == "end" else None]
            generation.text = cut_at_stop(str(self._tokenizer.decode(ids, skip_special_tokens=True)), self.request.stop)

    def _append(self, token: int) -> bool:
        generation = self.generation
        generation.token_ids.append(token)
        if token in self._end_ids and not self.request.ignore_end:
            generation.finish = "end"
            return True
        if self._watch is not None and self._watch.push(token):
            generation.finish = "stop"
            return True
        generation.finish = "length"
        return len(generation.token_ids) >= self.limit


class Slots:
    """Room for `count` requests of at most `context` tokens each, prompt and answer together.

    Invariant: a request's tokens do not depend on which others run beside it (lower precisions than float32 round by
    shape).
    """

    def __init__(self, engine: Engine, count: int, context: int, *, reuse: bool = False) -> None:
        """Args: reuse: whether a prompt's beginning is taken from the rows that earlier requests left, where it fits.
        Raises: GorgonError for sizes below 1.
        """
        if count < 1 or context < 1:
            raise GorgonError("slots and context must be at least 1", field="slots", value=(count, context))
        self.engine, self.count, self.context = engine, count, context
        layers = int(engine.backbone.text_config.num_hidden_layers)
        capacity = context + engine.most_nodes
        self._cache = TreeCache(layers, count, capacity)
        self._entry = self._cache if count == 1 else TreeCache(layers, 1, capacity)
        self._prefixes = Prefixes(count + 1) if reuse else None
        self._inputs = Inputs(engine.backbone.device)
        self._places: list[Running | None] = [None] * count  # who decodes, by place in the cache
        self._entering: Running | None = None

    @property
    def _decoding(self) -> list[Running]:
        return [running for running in self._places if running is not None]

    @property
    def running(self) -> list[Running]:
        """Requests that have a slot, the one whose prompt is being read last."""
        return [*self._decoding, *([self._entering] if self._entering else [])]

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return self.count - len(self.running)

    @property
    def entering(self) -> Running | None:
        """The request whose prompt is being read."""
        return self._entering

    def fits(self, engine: Engine) -> bool:
        """Whether this engine's drafts are no larger than the cache was made for."""
        return self.context + engine.most_nodes <= self._cache.capacity

    def use(self, engine: Engine) -> None:
        """From now on steps draft as this engine does, which has the same weights and `fits`."""
        assert engine.backbone is self.engine.backbone and self.fits(engine)
        for running in self.running:
            running.choices = None  # they may be too few for the new drafters
            if engine.copies:
                running.read_context()
        self.engine = engine

    def admit(self, request: Request, *, stream: int = 0) -> Running:
        """Gives a request a slot; its prompt is read by `read_prompt`. One prompt is read at a time.

        Args: stream: tells requests apart that share a seed.
        Raises: what `Request.limit` and `Sampling.check_vocabulary` raise. Nothing is allocated then.
        """
        assert self.free and self._entering is None
        backbone = self.engine.backbone
        limit = request.limit(min(self.context, backbone.max_length), backbone.vocab_size)
        request.sampling.check_vocabulary(backbone.vocab_size)
        running = Running(request, self.engine, limit, Randomness(request.sampling.seed, stream=stream))
        self._entering = running
        if self._prefixes is not None:
            place, length = self._prefixes.find(request.prompt_ids[:-1])  # the last token decides the first new one
            if place != self._entry_place and length:
                self._entry.copy_sequence(self._cache, place, 0, length)
            running.read = running.generation.reused_tokens = length
            self._prefixes.hold(self._entry_place, request.prompt_ids[:length])
        return running

    @property
    def _entry_place(self) -> int:
        return 0 if self._entry is self._cache else self.count

    def read_prompt(self, most: int | None = None) -> bool:
        """Reads the next `most` tokens of the entering prompt; at its end the first token is decided.

        Returns: whether the prompt is complete, or has failed.
        """
        running = self._entering
        assert running is not None
        prompt = running.request.prompt_ids
        end = len(prompt) if most is None else min(len(prompt), running.read + most)
        root = Draft(0)
        choose = None if end < len(prompt) or running.takes_argmax else partial(self._choices, [running], [root])
        stepper = self.engine.stepper(len(self._decoding) + 1)  # the next step's, if nobody else comes or goes
        hidden_11H, decided = stepper.prompt(self._entry, prompt[running.read : end], running.read, choose)
        running.read = end
        self._hold(self._entry_place, prompt[:end])
        if end < len(prompt) and decided.finite:
            return False
        self._entering = None
        running.length = end
        if running.error is None:
            self._take(running, decided, root, hidden_11H[0], first=True)
        if running.error is not None:
            self._clear(self._entry, 0, self._entry_place)
        elif not running.done:
            place = self._places.index(None)
            if self._entry is not self._cache:
                self._cache.copy_sequence(self._entry, 0, place, running.length)
                self._hold(place, prompt)
            self._places[place] = running
        return True

    def step(self) -> list[Running]:
        """One step for every decoding request; finished and failed ones leave. Returns those that took part."""
        self._close_gaps()
        batch = self._decoding
        if not batch:
            return []
        engine = self.engine
        drafter, stepper = engine.drafter(len(batch)), engine.stepper(len(batch))
        drafts = [Draft(r.root) if r.again else drafter.draft(r.root, r.choices, r.context) for r in batch]
        for running, draft in zip(batch, drafts, strict=True):
            running.draft = draft
        filled = engine.filled(max(d.nodes for d in drafts), drafter.nodes)
        least, packed = min(drafter.nodes, 2), engine.backbone.packs
        tensors = self._inputs.drafts(drafts, filled, least=least, packed=packed)
        lengths = [r.length for r in batch]
        lengths_B = self._inputs.lengths(lengths)
        visible = engine.backbone.visible(max(lengths) + tensors.nodes, self._cache.capacity)
        choose = None if self._all_greedy(batch) else partial(self._choices, batch, drafts)
        hidden_BNH, settled = stepper.step(self._cache, tensors, lengths_B, visible, choose)
        for b, (running, decided) in enumerate(zip(batch, settled, strict=True)):
            if drafts[b].nodes > 1 and not decided.finite:
                self._repeat(running, b)
            elif running.error is None:
                self._take(running, decided, drafts[b], hidden_BNH[b])
        for running in batch:
            if running.done:
                self.drop(running)
        return batch

    def _repeat(self, running: Running, place: int) -> None:
        """Has the step made again without drafts: one whose keys or values are not finite spoils all of its tree where
        attention is masked, and no draft may make an answer fail."""
        running.error, running.again = None, True
        self._cache.clear_sequence(place, running.length)
        if running.request.grammar is not None:  # the walk may have led it on
            running.grammar = running.request.grammar.copy()
            for token in running.generation.token_ids:
                running.grammar.advance(token)

    def _take(
        self, running: Running, decided: Decided, draft: Draft, hidden_NH: torch.Tensor, *, first: bool = False
    ) -> None:
        if decided.finite:
            asked = running.request.logprobs
            backbone = self.engine.backbone
            found = [] if asked is None else output_logprobs(backbone, hidden_NH, draft, decided, asked)
            running.take(decided, found, first=first)
            return
        dtype = str(self.engine.backbone.dtype)
        running.error = ModelError(
            "the backbone's logits are not finite", field="dtype", value=dtype,
            hint="try another --set dtype=..., and check that the checkpoint is complete",
        )  # fmt: skip

    @staticmethod
    def _all_greedy(batch: Sequence[Running]) -> bool:
        return all(r.takes_argmax for r in batch)

    def _choices(
        self, batch: Sequence[Running], drafts: Sequence[Draft], hidden_BNH: torch.Tensor
    ) -> torch.Tensor | None:
        """The token after each node where some request does not take the argmax; None where all do.

        An error, such as a distribution with nothing left in it, belongs to its own request.
        """
        if self._all_greedy(batch):
            return None
        with torch.inference_mode():
            backbone = self.engine.backbone
            logits_BNV = backbone.logits(hidden_BNH)
            chosen = backbone.likeliest(logits_BNV).tolist()
            for b, (running, draft) in enumerate(zip(batch, drafts, strict=True)):
                if running.takes_argmax:
                    continue
                try:
                    chosen[b] = self._walk(running, draft, logits_BNV[b], len(chosen[b]))
                except GorgonError as error:
                    running.error = error
                except Exception as error:  # noqa: BLE001 - whatever it was, it must not end the others' answers
                    running.error = ModelError(f"sampling failed: {type(error).__name__}: {error}")
        return torch.tensor(chosen, device=hidden_BNH.device)

    @staticmethod
    def _walk(running: Running, draft: Draft, logits_NV: torch.Tensor, nodes: int) -> list[int]:
        """The chosen token after each node on the path that the walk takes, `NOT_CHOSEN` elsewhere."""
        sampling, grammar = running.request.sampling, running.grammar
        state = running.randomness, len(running.generation.token_ids), running.history
        chosen = [NOT_CHOSEN] * nodes
        if draft.nodes == 1:
            chosen[0] = choose(logits_NV[0], sampling, *state, grammar)
            return chosen
        tokens, parents = draft.tokens, [-1, *draft.parents[1:]]
        if sampling.acceptance == "typical":  # `Request.limit` lets it have no grammar
            walked = accept_typical(tokens, parents, logits_NV, sampling, *state)
        else:
            walked = accept_sampled(tokens, parents, logits_NV, sampling, *state, grammar)
        for node, child in zip(walked.nodes, walked.nodes[1:], strict=False):
            chosen[node] = tokens[child]
        chosen[walked.nodes[-1]] = walked.next_token
        return chosen

    def drop(self, running: Running) -> None:
        """Frees a request's slot, whatever its state. Its place is a gap until a prompt or the next step fills it."""
        if running is self._entering:
            self._entering = None
        if running not in self._places:
            return
        place = self._places.index(running)
        self._places[place] = None
        if running.error is not None:
            self._clear(self._cache, place, place)
        else:
            self._hold(place, [*running.request.prompt_ids, *running.generation.token_ids][: running.length])

    def _hold(self, place: int, tokens: Sequence[int]) -> None:
        if self._prefixes is not None:
            self._prefixes.hold(place, tokens)

    def _clear(self, cache: TreeCache, sequence: int, place: int) -> None:
        """What a failed request leaves may be no numbers, which no mask keeps from whoever is given those rows."""
        cache.clear_sequence(sequence)
        self._hold(place, ())

    def _close_gaps(self) -> None:
        """Sequences behind the first places move into those that others have left."""
        for place in range(len(self._decoding), self.count):
            moved = self._places[place]
            if moved is None:
                continue
            gap = self._places.index(None)
            self._cache.copy_sequence(self._cache, place, gap, moved.length)
            self._places[gap], self._places[place] = moved, None
            if self._prefixes is not None:
                self._prefixes.move(place, gap)


assert FILLER != NOT_CHOSEN
