"""Times every decoder on every prompt, in turn, several times over, and compares what they answered."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from gorgon import interrupts
from gorgon.bench.decoders import PLAIN, Answer, Decoder
from gorgon.bench.workload import Prompt
from gorgon.errors import Interrupted
from gorgon.progress import bar


@dataclass(frozen=True)
class Difference:
    """An answer whose tokens are not those of plain decoding; `position` counts answer tokens from 0.

    A token is None where the answer had already ended.
    """

    prompt: int
    id: str
    trial: int
    position: int
    plain_token: int | None
    token: int | None


@dataclass
class Series:
    """What one decoder did: seconds[trial][prompt], and likewise the other measures; answers of the first trial."""

    name: str
    seconds: list[list[float]] = field(default_factory=list)
    first_token_s: list[list[float]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def exact_match(self) -> float:
        """Share of prompts whose every answer, in all trials, has the tokens of plain decoding."""
        return 1.0 - len({d.prompt for d in self.differences}) / len(self.answers)


def measure(
    decoders: Sequence[Decoder],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    trials: int,
    warmup_prompts: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Series]:
    """Every decoder answers every prompt once per trial, one request at a time.

    All decoders answer a prompt before the next prompt is taken, and the order among them rotates, so that a busy
    minute of the machine, or being first with a prompt, weighs on all alike. Garbage is collected between trials only.
    Args: decoders: one of them named 'plain', the reference; trials >= 1; clock: seconds.
    Returns: decoder name -> its series, in the decoders' order.
    Raises: Interrupted when a stop was asked for; a comparison cut short is not kept.
    """
    series = {d.name: Series(d.name) for d in decoders}
    assert PLAIN in series and len(series) == len(decoders), "one plain decoder, distinct names"
    warm = prompts[:warmup_prompts]
    with bar("comparing", (len(warm) + trials * len(prompts)) * len(decoders)) as progress:
        for prompt in warm:
            for decoder in decoders:
                _poll()
                decoder.answer(prompt.token_ids, max_new_tokens, stop)
                progress.advance()
        for trial in range(trials):
            for one in series.values():
                one.seconds.append([])
                one.first_token_s.append([])
                one.tokens.append([])
            with _no_garbage_collection():
                for index, prompt in enumerate(prompts):
                    answers: dict[str, Answer] = {}
                    for decoder in _rotated(decoders, trial + index):
                        _poll()
                        start = clock()
                        answer = decoder.answer(prompt.token_ids, max_new_tokens, stop)
                        seconds = clock() - start
                        answers[decoder.name] = answer
                        one = series[decoder.name]
                        one.seconds[-1].append(seconds)
                        one.first_token_s[-1].append(answer.first_token_s)
                        one.tokens[-1].append(len(answer.token_ids))
                        progress.advance()
                    _compare(series, answers, trial, index, prompt.id)
    return series


def _compare(series: dict[str, Series], answers: dict[str, Answer], trial: int, index: int, prompt_id: str) -> None:
    """Files the first trial's answers, and every answer that differs from plain decoding's first one."""
    if trial == 0:
        for name, answer in answers.items():
            series[name].answers.append(answer)
    expected = series[PLAIN].answers[index].token_ids
    for name, answer in answers.items():
        place = first_difference(expected, answer.token_ids)
        if place is not None:
            series[name].differences.append(
                Difference(id=prompt_id, trial=trial, prompt=index, position=place,
                           plain_token=_at(expected, place), token=_at(answer.token_ids, place))
            )  # fmt: skip


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first place where two token lists differ, one being longer included; None when they are equal."""
    for index in range(max(len(a), len(b))):
        if _at(a, index) != _at(b, index):
            return index
    return None


def _at(tokens: Sequence[int], index: int) -> int | None:
    return tokens[index] if index < len(tokens) else None


def _rotated(decoders: Sequence[Decoder], by: int) -> list[Decoder]:
    first = by % len(decoders)
    return [*decoders[first:], *decoders[:first]]


def _poll() -> None:
    if interrupts.requested():
        raise Interrupted(
            "stopped before the comparison was complete; nothing is kept",
            hint="the same command starts it anew: a timing that was cut in two would not be one",
        )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
