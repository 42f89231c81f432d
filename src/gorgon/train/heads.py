"""Medusa-1: trains the heads on cached hidden states of the frozen backbone.

Source: Medusa, arXiv:2401.10774, section 2.2.1. Shapes: N positions, K heads, H hidden size, R ranks.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gorgon import interrupts
from gorgon.artifacts import StepResult, StepRun, require_step_file, write_json
from gorgon.config import TrainHeadsConfig
from gorgon.core.heads import MedusaHeads
from gorgon.core.loss import IGNORE, RANKS, backward_heads, head_statistics, loss_weights
from gorgon.errors import Interrupted
from gorgon.models.backbone import Backbone, load_backbone, resolve_model
from gorgon.models.directory import write_model_directory
from gorgon.progress import Bar, bar, say
from gorgon.train.checkpoint import curve_writer, load_checkpoint, save_checkpoint
from gorgon.train.features import Features, cache_features, read_texts
from gorgon.train.processes import Processes, run_step_together, together

CHECKPOINT = "heads.pt"
BEST = "best.safetensors"
CURVES = "tensorboard"
LOG_STEPS = 10
"""Optimizer steps between two points of the training curves."""


@dataclass
class Evaluation:
    """One look at the held-out positions: step, training seconds, weighted mean loss, losses_K, accuracy_KR."""

    step: int
    seconds: float
    loss: float
    losses: list[float]
    accuracy: list[list[float]]

    @property
    def top1(self) -> list[float]:
        """Share of held-out positions at which each head's first guess was right."""
        return [row[0] for row in self.accuracy]

    def line(self, total: int) -> str:
        """A row of the table shown while training."""
        shares = " ".join(f"{share:.3f}" for share in self.top1)
        return (
            f"step {self.step:>{len(str(total))}}/{total}  loss {self.loss:.3f}  top-1 {shares}  {self.seconds:.1f} s"
        )


@dataclass
class Training:
    """Everything that changes while the heads learn; what a checkpoint holds."""

    heads: MedusaHeads
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def best(self) -> Evaluation:
        """The evaluation with the lowest weighted held-out loss, the earliest of equals."""
        return min(self.evaluations, key=lambda e: e.loss)

    def state(self) -> dict[str, Any]:
        """For `save_checkpoint`. The order of the data follows from seed and step, so no random state is needed."""
        return {
            "heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "seconds": self.seconds, "evaluations": [vars(e) for e in self.evaluations],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` returned."""
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.evaluations = [Evaluation(**e) for e in state["evaluations"]]


def train_heads(config: TrainHeadsConfig, out: str | Path, *, force: bool = False) -> StepResult:
    """Trains K heads on a frozen backbone and writes a model directory, `heads.json` and training curves.

    Source: arXiv:2401.10774, section 2.2.1.
    Args: config.data: directory with `train.jsonl` and `validation.jsonl`.
    Raises: DataError when the data is missing, empty, too long for the backbone or made with another tokenizer;
        ModelError when the backbone cannot be used; Interrupted on SIGTERM, after writing a checkpoint; PeerError when
        another of several processes failed first.
    Invariant: stopped and resumed, a run on a CPU gives the heads that a straight run gives; W processes give, up to
        rounding, the heads that one process gives with W times the `batch_tokens`.
    """
    files = {
        name: require_step_file(config.data, f"{name}.jsonl", field="data", step="distill")
        for name in ("train", "validation")
    }
    inputs = {"model": resolve_model(config.model), "data": config.data}

    with together() as processes:

        def body(run: StepRun) -> None:
            _train(run, config, files, processes)

        return run_step_together(processes, "train-heads", config, inputs, Path(out), body, force=force)


def _train(run: StepRun, config: TrainHeadsConfig, files: dict[str, Path], processes: Processes) -> None:
    with run.timed("load"):
        backbone = load_backbone(config.model, dtype=config.dtype, quantization=config.quantization)
    features = {}
    for split, file in files.items():
        with run.timed("features"):
            features[split] = _features(run, config, backbone, file, split, processes).on(backbone.device)
    device, dtype, source = backbone.device, backbone.dtype, backbone.name
    heads = MedusaHeads(config.heads, config.layers, backbone.hidden_size, backbone.vocab_size)
    heads.start_from(backbone.lm_head.weight.float())
    heads.to(device)  # float32: small updates would be lost in bfloat16 weights
    del backbone  # its memory is now the optimizer's

    with run.timed("train"):
        training = _Loop(run, config, heads, features["train"], features["validation"], processes).finish()
    if not processes.first:
        return
    heads.load_state_dict(load_file(run.checkpoints / BEST, device=str(device)))
    best = training.best
    run.metrics.update(
        top1=best.top1, held_out_loss=best.loss, best_step=best.step, steps=training.step,
        train_positions=len(features["train"]), validation_positions=len(features["validation"]),
        positions_per_s=round(
            training.step * config.batch_tokens * processes.count / max(training.seconds, 1e-9), 1
        ),
        train_seconds=round(training.seconds, 3), parameters=sum(p.numel() for p in heads.parameters()),
        processes=processes.count,
    )  # fmt: skip
    write_json(
        run.directory / "heads.json",
        {"best_step": best.step, "ranks": RANKS, "evaluations": [vars(e) for e in training.evaluations]},
    )
    write_model_directory(
        run.directory, heads=heads.to(dtype), backbone_dir=source,
        provenance={"trained_on": str(config.data), "top1": best.top1, "best_step": best.step},
    )  # fmt: skip
    shutil.copytree(run.checkpoints / CURVES, run.directory / CURVES)


def _features(
    run: StepRun, config: TrainHeadsConfig, backbone: Backbone, file: Path, split: str, processes: Processes
) -> Features:
    texts = read_texts(run, backbone, file, split)
    folder = run.checkpoints / split
    return cache_features(
        backbone, texts, folder, batch_tokens=config.feature_batch_tokens, title=f"hidden states, {split}",
        processes=processes,
    )  # fmt: skip


class _Loop:
    """One run of the optimizer over the cached features, from a checkpoint if there is one.

    Several processes hold the same heads and the same features. Each takes its part of every batch, and the sum of
    their gradients is the batch's, so all of them take the same step.
    """

    def __init__(
        self,
        run: StepRun,
        config: TrainHeadsConfig,
        heads: MedusaHeads,
        train: Features,
        validation: Features,
        processes: Processes,
    ) -> None:
        self.run, self.config, self.heads, self.train, self.validation = run, config, heads, train, validation
        self.processes = processes
        self.device = next(heads.parameters()).device
        rate, decay = config.learning_rate, config.weight_decay
        optimizer = torch.optim.AdamW(heads.parameters(), lr=rate, weight_decay=decay, fused=True)
        self.training = Training(heads, optimizer)
        state = load_checkpoint(run.checkpoints / CHECKPOINT)
        if state is not None:
            self.training.restore(state)
            say(f"resuming at step {self.training.step}")
        self.size = min(config.batch_tokens * processes.count, len(train))
        self.total = max(1, math.ceil(config.epochs * len(train) / self.size))
        self.looks = {round(i * self.total / config.evaluations) for i in range(config.evaluations + 1)}

    def finish(self) -> Training:
        """Takes the remaining steps. Raises: Interrupted, after writing a checkpoint."""
        training = self.training
        self.saved = time.monotonic()
        folder = self.run.checkpoints / CURVES if self.processes.first else None
        with curve_writer(folder, training.step) as curves, bar("heads", self.total) as shown:
            shown.advance(training.step)
            if not training.evaluations:
                self.look(curves)
            while training.step < self.total:
                start = time.perf_counter()
                losses_K, norm = self.step()
                training.seconds += time.perf_counter() - start
                shown.advance()
                if training.step % LOG_STEPS == 0:
                    self.log(curves, shown, losses_K, norm)
                if training.step in self.looks:
                    self.look(curves)
                self.save_if_due()
        return training

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; this process's share of the unweighted losses_K, and the norm before clipping."""
        training, config, processes = self.training, self.config, self.processes
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(config, training.step, self.total)
        index_N = batch_index(config.seed, training.step, self.size, len(self.train))
        index_N = index_N.tensor_split(processes.count)[processes.rank]
        sums: list[Any] = []

        def backward(heads: MedusaHeads, hidden_NH: Tensor, labels_KN: Tensor) -> Tensor:
            counts_K = processes.sum((labels_KN != IGNORE).sum(1))
            return backward_heads(
                heads, hidden_NH, labels_KN, config.decay, counts_K,
                lambda k: sums.extend(processes.begin_sum(p.grad for p in heads[k].parameters() if p.grad is not None)),
            )  # fmt: skip

        losses_K = self.forward(backward, self.train, index_N)
        for total in sums:
            total.wait()
        norm = torch.nn.utils.clip_grad_norm_(self.heads.parameters(), config.gradient_clip)
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        training.step += 1
        return losses_K, norm

    def forward(self, function: Callable[..., Any], features: Features, index_N: Tensor) -> Any:
        """Calls `function(heads, hidden_NH, labels_KN)`: bfloat16 products on a GPU, float32 on a CPU."""
        hidden_NH, labels_KN = features.batch(index_N, self.config.heads, self.device)
        mixed = self.device.type == "cuda" and hidden_NH.dtype != torch.float32
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mixed):
            return function(self.heads, hidden_NH.float(), labels_KN)

    def look(self, curves: Any) -> None:
        """Evaluates on every held-out position, shows and keeps the result, and keeps the heads if they are the best.

        Several processes share the positions out. Its time is not counted as training.
        """
        training, config, processes = self.training, self.config, self.processes
        mine_N = torch.arange(len(self.validation)).tensor_split(processes.count)[processes.rank]
        with self.run.timed("evaluate"):
            parts = [
                self.forward(head_statistics, self.validation, index_N)
                for index_N in torch.split(mine_N, config.batch_tokens)
            ]
        sums = (torch.stack(part).sum(0).cpu() for part in zip(*parts, strict=True))
        loss_K, hits_KR, count_K = map(processes.sum, sums)
        seen_K = count_K.clamp(min=1)
        losses = (loss_K / seen_K).tolist()
        weights = loss_weights(config.heads, config.decay)
        weighted = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
        accuracy = (hits_KR / seen_K[:, None]).tolist()
        evaluation = Evaluation(training.step, training.seconds, weighted, losses, accuracy)
        training.evaluations.append(evaluation)
        if training.best is evaluation and processes.first:
            path = self.run.checkpoints / BEST
            save_file({k: v.detach().cpu() for k, v in self.heads.state_dict().items()}, f"{path}.tmp")
            Path(f"{path}.tmp").replace(path)
        say(evaluation.line(self.total))
        curves.add_scalar("held-out/loss", weighted, training.step)
        for k, share in enumerate(evaluation.top1):
            curves.add_scalar(f"held-out/top1/head_{k}", share, training.step)

    def log(self, curves: Any, shown: Bar, losses_K: Tensor, norm: Tensor) -> None:
        """A point on the training curves and the loss behind the bar."""
        step = self.training.step
        losses = self.processes.sum(losses_K).tolist()
        shown.note(f"loss {' '.join(f'{x:.2f}' for x in losses)}")
        for k, loss in enumerate(losses):
            curves.add_scalar(f"train/loss/head_{k}", loss, step)
        curves.add_scalar("train/gradient_norm", norm.item(), step)
        curves.add_scalar("train/learning_rate", learning_rate(self.config, step - 1, self.total), step)

    def save_if_due(self) -> None:
        """Writes a checkpoint when it is time or a stop was asked for. Raises: Interrupted in the second case."""
        stop = self.processes.any(interrupts.requested())
        due = stop or time.monotonic() - self.saved > self.config.checkpoint_seconds
        if due and self.processes.first:
            save_checkpoint(self.run.checkpoints / CHECKPOINT, self.training.state())
            self.saved = time.monotonic()
        if stop:
            self.processes.barrier()  # whoever leaves ends the others, and the checkpoint is not written yet
            raise Interrupted(f"stopped at step {self.training.step} of {self.total}", hint="the same command resumes")


def learning_rate(config: TrainHeadsConfig, step: int, total: int) -> float:
    """Rate of the optimizer step after `step` finished ones: linear warm-up, then half a cosine down to zero."""
    warmup = math.ceil(config.warmup_fraction * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def batch_index(seed: int, step: int, size: int, count: int) -> Tensor:
    """Rows [N = size] of optimizer step `step`: consecutive pieces of one shuffle per epoch, laid end to end.

    Invariant: within an epoch every row comes exactly once; the result depends on the arguments alone.
    """
    pieces, start, missing = [], step * size, size
    while missing:
        epoch, place = divmod(start, count)
        piece = _shuffle(seed, epoch, count)[place : place + missing]
        pieces.append(piece)
        start, missing = start + len(piece), missing - len(piece)
    return torch.cat(pieces)


@lru_cache(maxsize=2)
def _shuffle(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
