"""What happens between two steps of a fine-tuning run: held-out loss, best weights, curves, progress, stop requests.

Shapes: B texts in a batch, T positions, P positions whose logits are kept, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import TrainerCallback

from gorgon import interrupts
from gorgon.artifacts import write_json
from gorgon.core.loss import IGNORE
from gorgon.progress import Bar, say
from gorgon.train.features import Text, length_batches
from gorgon.train.processes import ALONE, Processes

EVALUATION_TOKENS = 4096
"""Padded tokens per forward while evaluating."""


@torch.no_grad()
def answer_loss(model: Any, texts: Sequence[Text], device: torch.device, processes: Processes = ALONE) -> float:
    """Mean cross-entropy, in nats per answer token (end token included), of all texts together.

    Every token counts the same, unlike a mean over batches' means. Leaves the model's mode as it was.
    Args: processes: share the texts out; all of them get the same result.
    """
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    batches = length_batches([len(text.ids) for text in texts], EVALUATION_TOKENS)
    for batch in batches[processes.rank :: processes.count]:
        chosen = [texts[i] for i in batch]
        longest = max(len(text.ids) for text in chosen)
        start = min(text.prompt_length for text in chosen) - 1  # logits before every answer are not needed
        ids_BT = torch.zeros(len(chosen), longest, dtype=torch.int64)
        labels_BT = torch.full((len(chosen), longest), IGNORE)
        for row, text in enumerate(chosen):
            ids_BT[row, : len(text.ids)] = torch.tensor(text.ids)
            labels_BT[row, text.prompt_length : len(text.ids)] = ids_BT[row, text.prompt_length : len(text.ids)]
        # Right padding needs no mask: attention is causal, so padding never reaches a real token.
        logits_BPV = model(ids_BT.to(device), logits_to_keep=longest - start, use_cache=False).logits
        logits_BPV, labels_BP = logits_BPV[:, :-1].float(), labels_BT[:, start + 1 :].to(device)
        loss = functional.cross_entropy(
            logits_BPV.flatten(0, 1), labels_BP.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        nats += float(loss)
        tokens += int((labels_BP != IGNORE).sum())
    model.train(was_training)
    sums = processes.sum(torch.tensor([nats, tokens], dtype=torch.float64))
    return float(sums[0] / sums[1].clamp(min=1))


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Evaluates, keeps the best adapters, draws curves and progress, and stops the trainer on SIGTERM.

    Several processes evaluate together and stop at the same step; only the first one writes.
    Args:
        folder: holds the best adapters (`best/`) and the evaluations so far; survives a kill.
        step: optimizer steps already done by an earlier run; evaluations after it are forgotten and done again.
    """

    def __init__(
        self,
        folder: Path,
        held_out: Sequence[Text],
        *,
        every: int,
        total: int,
        step: int,
        curves: Any,
        shown: Bar,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.best_folder, self.notes = folder / "best", folder / "evaluations.json"
        self.held_out, self.every, self.total, self.curves, self.shown = held_out, every, total, curves, shown
        self.evaluations: list[dict[str, float]] = []
        self.stopped = False
        if self.notes.is_file():
            noted = json.loads(self.notes.read_text(encoding="utf-8"))
            self.evaluations = [entry for entry in noted if entry["step"] <= step]
        self.started = time.perf_counter() - (self.evaluations[-1]["seconds"] if self.evaluations else 0.0)

    @property
    def best(self) -> dict[str, float]:
        """The evaluation with the lowest held-out loss, the earliest of equals."""
        return min(self.evaluations, key=lambda entry: entry["loss"])

    def look(self, model: Any, step: int) -> None:
        """Evaluates on the held-out rows, shows and notes the result, and keeps the adapters if they are the best."""
        loss = answer_loss(model, self.held_out, next(model.parameters()).device, self.processes)
        seconds = round(time.perf_counter() - self.started, 3)
        entry = {"step": step, "seconds": seconds, "loss": loss}
        self.evaluations.append(entry)
        if not self.processes.first:
            return
        if self.best is entry:
            partial = self.best_folder.with_name("best.tmp")
            model.save_pretrained(partial)
            shutil.rmtree(self.best_folder, ignore_errors=True)
            partial.rename(self.best_folder)
        write_json(self.notes, self.evaluations)
        say(f"step {step:>{len(str(self.total))}}/{self.total}  held-out loss {loss:.4f}  {seconds:.1f} s")
        self.curves.add_scalar("held-out/loss", loss, step)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Puts the bar where an earlier run stopped."""
        self.shown.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        """After an optimizer step: evaluate if it is time; save and stop if a signal came."""
        self.shown.advance()
        if state.global_step % self.every == 0 or state.global_step >= self.total:
            self.look(named["model"], state.global_step)
        if self.processes.any(interrupts.requested()):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Draws the trainer's numbers."""
        for name, value in (logs or {}).items():
            if isinstance(value, (int, float)):
                self.curves.add_scalar(f"train/{name}", value, state.global_step)
        if logs and "loss" in logs:
            self.shown.note(f"loss {float(logs['loss']):.3f}")
