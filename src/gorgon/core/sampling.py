"""Sampling: the options of a request, the distribution they make of the backbone's logits, and the pick from it.

Order and definitions are those of transformers' logits processors: bias, repetition penalty, OpenAI's presence and
frequency penalties (as vLLM has them), then temperature, top-k, top-p, min-p.
Shapes: V vocabulary, P distinct prompt tokens, O distinct output tokens, S tokens seen, C candidates.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from gorgon.core.constraint import Constraint
from gorgon.errors import ModelError, SamplingError

Acceptance = Literal["exact", "typical"]

LARGEST_BIAS = 1e9
"""Enough to force or ban any token, and far inside float32's range at every temperature."""
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    # below 1e-5, logits divided by the temperature leave float32's range
    "temperature": (lambda x: x == 0 or x >= 1e-5, "0 (greedy) or at least 1e-5"),
    "top_p": (lambda x: 0 < x <= 1, "above 0, at most 1"),
    "min_p": (lambda x: 0 <= x < 1, "0 or more, below 1"),
    "repetition_penalty": (lambda x: 0.01 <= x <= 100, "0.01 to 100"),
    "presence_penalty": (lambda x: -2 <= x <= 2, "-2 to 2"),
    "frequency_penalty": (lambda x: -2 <= x <= 2, "-2 to 2"),
    "epsilon": (lambda x: 0 < x <= 1, "above 0, at most 1"),
    "delta": (lambda x: 0 < x <= 1, "above 0, at most 1"),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy decoding.

    Attributes:
        temperature: divides the logits; 0 is greedy, otherwise at least 1e-5.
        top_p: keep the likeliest tokens whose probabilities add up to this, in (0, 1]; 1 is off.
        top_k: keep this many tokens, and those that tie with the last of them; 0 is off.
        min_p: keep tokens at least this fraction as likely as the likeliest, in [0, 1); 0 is off.
        repetition_penalty: 0.01 to 100; divides the positive and multiplies the negative logits of tokens in prompt or
            output.
        presence_penalty: -2 to 2; taken off the logit of every token in the output.
        frequency_penalty: -2 to 2; taken off a token's logit once per occurrence in the output.
        logit_bias: added to the logits of single tokens, at most 1e9 in size.
        seed: 64-bit signed integer; None draws one. Greedy decoding repeats itself without, and ignores it.
        acceptance: 'exact' keeps the distribution; 'typical' is the lossy rule of arXiv:2401.10774, section 2.3.1.
        epsilon, delta: that rule's thresholds, in (0, 1].
    Raises: SamplingError for a value out of its range, or one that another option would leave without effect.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    acceptance: Acceptance = "exact"
    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        for name, (allowed, words) in _RANGES.items():
            value = getattr(self, name)
            if not _is_finite(value) or not allowed(value):
                raise SamplingError(f"{name} is out of range", field=name, value=value, allowed=words)
            object.__setattr__(self, name, float(value))
        if not _is_int(self.top_k) or self.top_k < 0:
            raise SamplingError("top_k is not a number of tokens", field="top_k", value=self.top_k,
                                allowed="an integer, 0 (off) or more")  # fmt: skip
        check_seed(self.seed)
        if self.acceptance not in ("exact", "typical"):
            raise SamplingError("there is no such acceptance rule", field="acceptance", value=self.acceptance,
                                allowed="exact, typical")  # fmt: skip
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        default = {f.name: f.default for f in fields(self)}
        if self.greedy:
            for name in ("top_p", "top_k", "min_p", "acceptance"):
                if getattr(self, name) != default[name]:
                    raise SamplingError(
                        f"greedy decoding would ignore {name}", field=name, value=getattr(self, name),
                        allowed=f"{default[name]!r} at temperature 0", hint="set a temperature, or leave it out",
                    )  # fmt: skip
        if self.acceptance == "exact":
            for name in ("epsilon", "delta"):
                if getattr(self, name) != default[name]:
                    raise SamplingError(
                        f"exact acceptance would ignore {name}", field=name, value=getattr(self, name),
                        allowed=f"{default[name]!r} with acceptance 'exact'", hint="set acceptance to 'typical'",
                    )  # fmt: skip

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses a bias on a token that the model does not have; to be called before any work.

        Raises: SamplingError naming the token.
        """
        for token in self.logit_bias:
            if token >= vocab_size:
                raise SamplingError("the biased token is not in the vocabulary", field="logit_bias", value=token,
                                    allowed=f"0 to {vocab_size - 1}")  # fmt: skip

    @property
    def greedy(self) -> bool:
        """The likeliest token is chosen and nothing is drawn."""
        return self.temperature == 0

    @property
    def needs_history(self) -> bool:
        """Some penalty is on, so the distribution depends on which tokens came before."""
        return self.repetition_penalty != 1 or self._counts_output

    @property
    def plain_greedy(self) -> bool:
        """The argmax of the backbone's own logits decides."""
        return self.greedy and not self.needs_history and not self.logit_bias

    @property
    def _counts_output(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def _bias(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(list(self.logit_bias)), torch.tensor(list(self.logit_bias.values()), dtype=torch.float32)


class History:
    """The tokens of one request so far, as the penalties read them.

    The repetition penalty reads prompt and output, as in transformers; presence and frequency penalties read the
    output alone, as in OpenAI's API and vLLM.
    """

    def __init__(self, prompt: Iterable[int], output: Iterable[int] = ()) -> None:
        self._prompt_P = torch.tensor(sorted(set(prompt)), dtype=torch.int64)
        self._with_logit_P: tuple[tuple[int, torch.device], Tensor] | None = None
        self._output = Counter(output)

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds output tokens."""
        self._output.update(tokens)

    def then(self, token: int) -> History:
        """The history one output token later; this one stays as it is."""
        later = copy.copy(self)
        later._output = self._output.copy()
        later._output[token] += 1
        return later

    def seen(self, vocab_size: int, device: torch.device) -> Tensor:
        """Tokens [S] of prompt and output, some perhaps twice; those without a logit are left out."""
        if self._with_logit_P is None or self._with_logit_P[0] != (vocab_size, device):
            prompt_P = self._prompt_P[self._prompt_P < vocab_size].to(device)
            self._with_logit_P = (vocab_size, device), prompt_P
        return torch.cat((self._with_logit_P[1], torch.tensor(list(self._output), dtype=torch.int64, device=device)))

    def counted(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Distinct output tokens [O] and how often each occurred [O] float32."""
        tokens_O = torch.tensor(list(self._output), dtype=torch.int64, device=device)
        return tokens_O, torch.tensor(list(self._output.values()), dtype=torch.float32, device=device)


class Randomness:
    """One uniform number per output position, a pure function of seed, stream and position.

    Counter-based: BLAKE2b of (seed, stream, position), 53 bits, so that numbers cannot shift when a step is retried,
    requests share a batch, or another tree is verified.
    """

    def __init__(self, seed: int | None = None, *, stream: int = 0) -> None:
        """Args:
        seed: None draws one from the operating system.
        stream: tells answers apart that share a seed (prompts of one batch, several answers to one prompt).
        Raises: SamplingError for a seed beyond 64 bits.
        """
        check_seed(seed)
        self.seed = int.from_bytes(os.urandom(8), "little", signed=True) if seed is None else seed
        self.stream = stream
        self._start = hashlib.blake2b(
            self.seed.to_bytes(8, "little", signed=True) + stream.to_bytes(8, "little"), digest_size=8
        )

    def uniform(self, position: int) -> float:
        """The number in [0, 1), a multiple of 2**-53, that decides output token `position` (from 0)."""
        state = self._start.copy()
        state.update(position.to_bytes(8, "little"))
        return (int.from_bytes(state.digest(), "little") >> 11) * 2.0**-53


def process(logits_V: Tensor, sampling: Sampling, history: History | None = None) -> Tensor:
    """The logits whose softmax is the distribution to sample from; at temperature 0, whose argmax is the choice.

    Source: transformers' logits processors and their order; presence and frequency penalty as OpenAI defines them.
    Args:
        logits_V: the backbone's logits at one node, any float dtype; left as they are.
        history: every token before the one to choose; needed when `sampling.needs_history`.
    Returns: float32 [V], minus infinity where a filter removed the token; `logits_V` itself when nothing applies.
    Cost: passes over V; top-p sorts only the tokens that can belong to it.
    """
    scores_V = _adjust(logits_V, sampling, history)
    if sampling.greedy:
        return scores_V
    ids_C, scores_C = _filter(scores_V, sampling)
    return scores_C if ids_C is None else torch.full_like(scores_V, float("-inf")).scatter(0, ids_C, scores_C)


def _adjust(logits_V: Tensor, sampling: Sampling, history: History | None) -> Tensor:
    """Bias and penalties: float32 [V]."""
    assert history is not None or not sampling.needs_history
    scores_V = logits_V.float()
    device = scores_V.device
    if sampling.logit_bias:
        tokens, values = sampling._bias
        scores_V = scores_V.index_add(0, tokens.to(device), values.to(device))
    if history is not None and sampling.repetition_penalty != 1:
        seen_S = history.seen(len(scores_V), device)
        scores_S = scores_V[seen_S]
        penalty = sampling.repetition_penalty
        scores_V = scores_V.scatter(0, seen_S, torch.where(scores_S < 0, scores_S * penalty, scores_S / penalty))
    if history is not None and sampling._counts_output:
        tokens_O, counts_O = history.counted(device)
        taken_O = sampling.frequency_penalty * counts_O + sampling.presence_penalty
        scores_V = scores_V.index_add(0, tokens_O, -taken_O)
    return scores_V


def _filter(scores_V: Tensor, sampling: Sampling) -> tuple[Tensor | None, Tensor]:
    """Ids [C] of the tokens that temperature and filters leave, ascending, None for all; and their logits [C].

    Comparisons are negated so that a logit that is not a number stays, and is found out where the token is picked.
    """
    if sampling.temperature != 1:
        scores_V = scores_V / sampling.temperature
    ids_C, scores_C = None, scores_V
    if 0 < sampling.top_k < len(scores_V):
        border = torch.topk(scores_V, sampling.top_k, sorted=False).values.min()
        ids_C, scores_C = _keep(ids_C, scores_C, ~(scores_C < border))
    if sampling.top_p < 1:
        ids_C, scores_C = _keep(ids_C, scores_C, _nucleus(scores_C, sampling.top_p))
    if sampling.min_p > 0:
        ids_C, scores_C = _keep(ids_C, scores_C, ~(scores_C < scores_C.max() + math.log(sampling.min_p)))
    return ids_C, scores_C


def _keep(ids_C: Tensor | None, scores_C: Tensor, kept_C: Tensor) -> tuple[Tensor, Tensor]:
    chosen = kept_C.nonzero()[:, 0]
    return chosen if ids_C is None else ids_C[chosen], scores_C[chosen]


def _nucleus(scores_C: Tensor, top_p: float) -> Tensor:
    """Boolean [C]: the likeliest tokens, until their probabilities add up to `top_p`; at least one.

    Of equal logits at the border the lower ids stay, as argmax has it (transformers leaves it to an unstable sort).
    Cost: sorts only the tokens that can belong. Those below (1 - top_p) / C of the mass do not add up to 1 - top_p, so
        the others reach `top_p` without them.
    """
    most = scores_C.max()
    weights_C = (scores_C - most).exp()
    total = float(weights_C.sum(dtype=torch.float64))
    if not math.isfinite(total):
        return torch.ones_like(scores_C, dtype=torch.bool)
    likely = weights_C >= (1 - top_p) * total / len(weights_C) / 2  # half: a margin for rounding
    order = scores_C[likely].sort(descending=True).values
    mass = (order - most).exp().cumsum(0, dtype=torch.float64)
    count = min(1 + int(torch.searchsorted(mass, top_p * total)), len(order))  # those before a token lack mass
    border = order[count - 1]
    nucleus_C = scores_C >= border
    surplus = int(nucleus_C.sum()) - count
    if surplus > 0:
        nucleus_C[(scores_C == border).nonzero()[-surplus:, 0]] = False
    return nucleus_C


def probabilities(processed_V: Tensor) -> Tensor:
    """Softmax of processed logits: float64 [V], exactly 0 where a filter removed the token.

    Raises: ModelError when the logits are not finite, or none is left.
    """
    weights_V = (processed_V - processed_V.max()).double().exp()
    total = weights_V.sum()
    if not math.isfinite(total):
        raise _no_distribution()
    return weights_V / total


def pick(processed_V: Tensor, uniform: float) -> int:
    """The token whose stretch of the cumulative distribution, in order of token id, holds `uniform`.

    One number decides one token (inverse-CDF sampling), so that which number meets which distribution depends on the
    output position alone. A token of probability 0 is never picked.
    Args: processed_V: as `process` returns them. uniform: in [0, 1).
    Raises: ModelError when the logits are not finite, or none is left.
    """
    assert 0 <= uniform < 1
    cumulative_V = (processed_V - processed_V.max()).double().exp().cumsum(0)
    total = float(cumulative_V[-1])
    if not math.isfinite(total):
        raise _no_distribution()
    target = uniform * total
    if target < total:
        return int(torch.searchsorted(cumulative_V, target, right=True))
    return int(torch.searchsorted(cumulative_V, total))  # rounded up: the last token that has weight


def choose(
    logits_V: Tensor,
    sampling: Sampling,
    randomness: Randomness | None = None,
    position: int = 0,
    history: History | None = None,
    constraint: Constraint | None = None,
) -> int:
    """The token at one output position: the whole of plain decoding, one position at a time.

    Args: logits_V: the backbone's, unprocessed. randomness, history: may be None where `sampling` needs none.
        position: of the token to choose, the first output token being 0.
        constraint: applied before everything else, and advanced by the token.
    Raises: ModelError when the logits are not finite, or none is left; what the constraint raises.
    """
    if constraint is not None:
        logits_V = constraint.mask(logits_V)
    token = _chosen(_adjust(logits_V, sampling, history), sampling, randomness, position)
    if constraint is not None:
        constraint.advance(token)
    return token


def _chosen(scores_V: Tensor, sampling: Sampling, randomness: Randomness | None, position: int) -> int:
    if sampling.greedy:
        value, index = scores_V.max(dim=0)
        if not math.isfinite(value):
            raise _no_distribution()
        return int(index)
    assert randomness is not None
    ids_C, scores_C = _filter(scores_V, sampling)
    token = pick(scores_C, randomness.uniform(position))
    return token if ids_C is None else int(ids_C[token])


def check_seed(seed: object) -> None:
    """Raises: SamplingError unless the seed is None or a 64-bit signed integer."""
    if seed is not None and not (_is_int(seed) and -(2**63) <= seed < 2**63):  # type: ignore[operator]
        raise SamplingError("the seed is not a 64-bit integer", field="seed", value=seed,
                            allowed="an integer from -2**63 to 2**63 - 1, or none")  # fmt: skip


def _checked_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise SamplingError("the bias is not a mapping of tokens", field="logit_bias", value=bias,
                            allowed="token ids and numbers")  # fmt: skip
    for token, value in bias.items():
        if not _is_int(token) or token < 0:
            raise SamplingError("a biased token is not a token id", field="logit_bias", value=token,
                                allowed="integers, 0 or more")  # fmt: skip
        if not _is_finite(value) or abs(value) > LARGEST_BIAS:
            raise SamplingError("a token's bias is out of range", field="logit_bias", value={token: value},
                                allowed="-1e9 to 1e9")  # fmt: skip
    return {int(token): float(value) for token, value in bias.items()}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _no_distribution() -> ModelError:
    return ModelError(
        "the backbone's logits are not finite, or none is left to choose from", field="logits",
        hint="try another --set dtype=..., and check that the checkpoint is complete",
    )  # fmt: skip


GREEDY = Sampling()
"""Plain greedy decoding."""
