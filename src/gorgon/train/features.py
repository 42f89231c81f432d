"""Hidden states of the frozen backbone, computed once per text and kept on disk, memory-mapped.

Medusa-1 never changes the backbone (arXiv:2401.10774, section 2.2.1), so running it again in every epoch, as the
reference trainers do, computes the same numbers again. Only positions that some head learns from are kept.
Shapes: B texts in a batch, T tokens, N positions, K heads, H hidden size.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gorgon import interrupts
from gorgon.artifacts import StepRun, write_json
from gorgon.core.loss import head_labels
from gorgon.data.chat import encode_answer, encode_prompt
from gorgon.data.examples import Example, read_examples
from gorgon.errors import DataError, Interrupted
from gorgon.models.backbone import Backbone
from gorgon.progress import bar, say
from gorgon.train.processes import ALONE, Processes

PROGRESS_SECONDS = 2.0
"""Between two notes of how far the caching is; what a hard kill can cost at most."""


@dataclass(frozen=True)
class Text:
    """One training text: prompt and answer tokens, and where the answer starts."""

    ids: list[int]
    prompt_length: int

    @property
    def first(self) -> int:
        """First cached position: the prompt's last token, from which the first answer token is predicted."""
        return self.prompt_length - 1

    @property
    def count(self) -> int:
        """Cached positions: up to the third token from the end, the last one whose t + 2 is still in the text."""
        return max(0, len(self.ids) - 2 - self.first)


@dataclass(frozen=True)
class Features:
    """Cached hidden states and the tokens around them.

    hidden_NH: [N, H] in the backbone's dtype, memory-mapped unless moved. tokens_T: int32, all texts end to end.
    positions_N: int64, index into `tokens_T` of each row's own token. ends_N: int64, one past its text's last token.
    """

    hidden_NH: Tensor
    tokens_T: Tensor
    positions_N: Tensor
    ends_N: Tensor

    def __len__(self) -> int:
        return len(self.positions_N)

    @property
    def bytes(self) -> int:
        """Size of the hidden states."""
        return self.hidden_NH.numel() * self.hidden_NH.element_size()

    def on(self, device: torch.device) -> Features:
        """The same with tokens on `device`, and the hidden states too if they take at most half its free memory."""
        if device.type != "cuda":
            return self
        tokens_T, positions_N, ends_N = (x.to(device) for x in (self.tokens_T, self.positions_N, self.ends_N))
        fits = self.bytes <= torch.cuda.mem_get_info(device)[0] // 2
        return Features(self.hidden_NH.to(device) if fits else self.hidden_NH, tokens_T, positions_N, ends_N)

    def batch(self, index_N: Tensor, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Hidden states [N, H] and labels [K, N] of the chosen rows, on `device`.

        Args: index_N: int64 on the CPU, each from 0 to len(self) - 1.
        """
        home = self.hidden_NH.device
        hidden_NH = self.hidden_NH.index_select(0, index_N.to(home))
        if home != device:
            hidden_NH = hidden_NH.pin_memory().to(device, non_blocking=True)
        index_N = index_N.to(self.positions_N.device)
        labels_KN = head_labels(self.tokens_T, self.positions_N[index_N], self.ends_N[index_N], heads)
        return hidden_NH, labels_KN


def read_texts(run: StepRun, backbone: Backbone, file: Path, split: str) -> list[Text]:
    """A split's rows as token ids; counts rows and dropped rows in the step's metrics and warnings.

    Raises: DataError when the split is empty or malformed, or every row is longer than the backbone's context.
    """
    texts, dropped = encode_texts(backbone, read_examples(file))
    run.metrics[f"{split}_rows"], run.metrics[f"{split}_dropped"] = len(texts), dropped
    if dropped:
        run.warnings.append(f"{dropped} {split} rows are longer than the backbone's {backbone.max_length} tokens")
        say(run.warnings[-1])
    if not texts:
        raise DataError(
            f"every {split} row is too long for the backbone", file=file, field="max_length",
            allowed=f"at most {backbone.max_length} tokens, prompt and answer together",
        )  # fmt: skip
    return texts


def encode_texts(backbone: Backbone, examples: Sequence[Example]) -> tuple[list[Text], int]:
    """The examples as token ids, and how many were dropped because they exceed the backbone's context."""
    texts = []
    for example in examples:
        prompt = encode_prompt(backbone.tokenizer, example.messages)
        answer = encode_answer(backbone.tokenizer, example, backbone.end_ids)
        texts.append(Text(prompt + answer, len(prompt)))
    kept = [text for text in texts if len(text.ids) <= backbone.max_length]
    return kept, len(texts) - len(kept)


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Groups of indices whose padded size stays within `batch_tokens`; a longer text is alone in its group.

    Longest first, so that a batch too large for the memory fails at once and not at the end.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def cache_features(
    backbone: Backbone,
    texts: Sequence[Text],
    folder: Path,
    *,
    batch_tokens: int,
    title: str,
    processes: Processes = ALONE,
) -> Features:
    """Runs the backbone once over every text; after an interruption it goes on with the texts not done yet.

    Several processes take the batches in turn and write into one file, which all of them read afterwards.
    Args:
        folder: holds `hidden.bin` and `progress.json`; texts, model and `batch_tokens` must be those of earlier calls.
        batch_tokens: padded tokens per forward.
        title: text in front of the progress bar.
    Raises: DataError when no text has a position to learn from or a token is not in the backbone's vocabulary;
        Interrupted on SIGTERM; OSError when the disk cannot hold the states.
    Invariant: a text's states do not depend on the texts it was batched with, up to rounding.
    """
    _check_tokens(texts, backbone.vocab_size)
    features, starts = _layout(texts)
    count = len(features)
    if count == 0:
        raise DataError(
            "no answer is long enough for a head to learn from", field="data", value=f"{len(texts)} texts",
            allowed="answers of at least two tokens", hint="give the output of `gorgon distill` or `gorgon prepare`",
        )  # fmt: skip
    if processes.first:
        folder.mkdir(parents=True, exist_ok=True)
    processes.barrier()
    path = folder / "hidden.bin"
    progress = folder / ("progress.json" if processes.count == 1 else f"progress-{processes.rank}.json")
    shape = {"positions": count, "hidden_size": backbone.hidden_size, "dtype": str(backbone.dtype)}
    done = _read_progress(progress, shape) if path.is_file() else 0
    hidden_NH = _map_file(path, count, backbone.hidden_size, backbone.dtype)

    # The last two tokens' states are read by no head, and a token never changes the states before it.
    batches = length_batches([len(text.ids) - 2 if text.count else 0 for text in texts], batch_tokens)
    batches = [[i for i in batch if texts[i].count] for batch in batches][processes.rank :: processes.count]
    noted = time.monotonic()
    with bar(title, sum(map(len, batches))) as shown:
        for number, batch in enumerate(batches):
            if number >= done:
                _forward(backbone, [texts[i] for i in batch], [starts[i] for i in batch], hidden_NH)
                stop = interrupts.requested()
                if stop or number + 1 == len(batches) or time.monotonic() - noted > PROGRESS_SECONDS:
                    write_json(progress, {**shape, "batches": number + 1})
                    noted = time.monotonic()
                if stop:
                    raise Interrupted("stopped while caching hidden states", hint="the same command resumes")
            shown.advance(len(batch))
    processes.barrier()  # the other processes' rows are there
    return replace(features, hidden_NH=hidden_NH)


def _check_tokens(texts: Sequence[Text], vocab_size: int) -> None:
    for number, text in enumerate(texts):
        if max(text.ids) >= vocab_size or min(text.ids) < 0:
            raise DataError(
                f"text {number} has a token that the backbone does not know", field="answer_ids",
                value=max(text.ids), allowed=f"0 to {vocab_size - 1}",
                hint="distill with the same model that the heads are trained for",
            )  # fmt: skip


def _layout(texts: Sequence[Text]) -> tuple[Features, list[int]]:
    """Positions and ends of all rows (without hidden states), and each text's first row."""
    starts, rows, offset = [], 0, 0
    positions, ends = [], []
    for text in texts:
        starts.append(rows)
        first = offset + text.first
        positions.append(torch.arange(first, first + text.count))
        offset += len(text.ids)
        ends.append(torch.full((text.count,), offset))
        rows += text.count
    tokens_T = torch.tensor([token for text in texts for token in text.ids], dtype=torch.int32)
    empty = [torch.zeros(0, dtype=torch.int64)]
    return Features(torch.empty(0), tokens_T, torch.cat(positions or empty), torch.cat(ends or empty)), starts


def _map_file(path: Path, rows: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    size = rows * hidden_size * dtype.itemsize
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate"):  # writing to a mapped page that the disk has no room for kills the process
            os.posix_fallocate(file.fileno(), 0, size)
    mapped = torch.from_file(str(path), shared=True, size=rows * hidden_size, dtype=dtype)
    return mapped.view(rows, hidden_size)


def _read_progress(path: Path, shape: dict[str, Any]) -> int:
    """Finished batches; 0 when nothing is noted or it belongs to other texts or another model."""
    try:
        noted = json.loads(path.read_text())
        return int(noted.pop("batches")) if {k: noted.get(k) for k in shape} == shape else 0
    except (OSError, ValueError, KeyError):
        return 0


def _forward(backbone: Backbone, texts: Sequence[Text], starts: Sequence[int], hidden_NH: Tensor) -> None:
    """One padded forward. Right padding needs no mask: attention is causal, so padding never reaches a real token."""
    if not texts:
        return
    lengths = [len(text.ids) - 2 for text in texts]
    ids_BT = torch.zeros(len(texts), max(lengths), dtype=torch.int64)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        ids_BT[row, :length] = torch.tensor(text.ids[:length])
    states_BTH = backbone.hidden(ids_BT.to(backbone.device))
    rows = [torch.arange(text.count) + text.first + row * max(lengths) for row, text in enumerate(texts)]
    chosen_NH = states_BTH.flatten(0, 1)[torch.cat(rows).to(states_BTH.device)].cpu()
    place = 0
    for text, start in zip(texts, starts, strict=True):
        hidden_NH[start : start + text.count] = chosen_NH[place : place + text.count]
        place += text.count
