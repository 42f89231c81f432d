"""The `distill` step: the backbone answers the prompts itself, because its heads must predict its own words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gorgon.artifacts import StepResult, StepRun, require_step_file, run_step
from gorgon.config import DistillConfig
from gorgon.data.chat import encode_prompt
from gorgon.data.examples import Example, read_examples, write_examples
from gorgon.errors import DataError, Interrupted
from gorgon.interrupts import requested
from gorgon.models.backbone import Backbone, load_backbone, resolve_model
from gorgon.progress import bar

SPLITS = ("train", "validation")


def distill(config: DistillConfig, out: Path, *, force: bool = False) -> StepResult:
    """Writes train.jsonl and validation.jsonl with the model's greedy answers and their exact token ids.

    Raises: DataError when no prompt leaves room for an answer.
    """
    files = {s: require_step_file(config.data, f"{s}.jsonl", field="data", step="prepare") for s in SPLITS}
    model = resolve_model(config.model)
    inputs: dict[str, str | Path | None] = {"model": model, "data": files["train"], "validation": files["validation"]}
    return run_step("distill", config, inputs, out, lambda run: _body(config, files, run), force=force)


def _body(config: DistillConfig, files: dict[str, Path], run: StepRun) -> None:
    backbone = load_backbone(config.model, dtype=config.dtype, quantization=config.quantization)
    backbone.run_steps("eager")
    for split, limit in zip(SPLITS, (config.rows, config.validation_rows), strict=True):
        examples = read_examples(files[split])[:limit]
        with run.timed(split):
            answered, unfinished = _answer(backbone, examples, config, f"answering {split} prompts")
        if not answered:
            raise DataError("no prompt leaves room for an answer in the model's context", file=files[split])
        write_examples(run.directory / f"{split}.jsonl", answered)
        same = sum(a.answer.strip() == e.answer.strip() for a, e in _by_id(answered, examples))
        run.metrics[split] = {
            "rows": len(answered),
            "too_long": len(examples) - len(answered),
            "unfinished": unfinished,
            "tokens": sum(len(e.answer_ids or []) for e in answered),
            "equal_to_reference": round(same / len(answered), 4),
        }
        if unfinished:
            run.warnings.append(f"{unfinished} {split} answers were cut at {config.max_new_tokens} tokens")
        if len(answered) < len(examples):
            run.warnings.append(f"{len(examples) - len(answered)} {split} prompts were too long and were dropped")


def _by_id(answered: Sequence[Example], examples: Sequence[Example]) -> list[tuple[Example, Example]]:
    references = {e.id: e for e in examples}
    return [(a, references[a.id]) for a in answered]


def _answer(
    backbone: Backbone, examples: Sequence[Example], config: DistillConfig, title: str
) -> tuple[list[Example], int]:
    """Answers in the examples' order, and how many of them ended at the length limit."""
    prompts = [encode_prompt(backbone.tokenizer, e.messages) for e in examples]
    fits = [i for i, p in enumerate(prompts) if len(p) + config.max_new_tokens <= backbone.max_length]
    order = sorted(fits, key=lambda i: len(prompts[i]))  # neighbours of equal length waste no padding
    answers: dict[int, list[int]] = {}
    with bar(title, len(order)) as progress:
        for start in range(0, len(order), config.batch_size):
            if requested():
                raise Interrupted("stopped before the end", hint="the same command starts this step again")
            batch = order[start : start + config.batch_size]
            answers.update(zip(batch, _generate(backbone, [prompts[i] for i in batch], config), strict=True))
            progress.advance(len(batch))
    unfinished = sum(ids[-1] not in backbone.end_ids for ids in answers.values())
    texts = {i: backbone.tokenizer.decode(ids, skip_special_tokens=True) for i, ids in answers.items()}
    return [replace(examples[i], answer=texts[i], answer_ids=answers[i]) for i in sorted(answers)], unfinished


@torch.inference_mode()
def _generate(backbone: Backbone, prompts: Sequence[list[int]], config: DistillConfig) -> list[list[int]]:
    """Batched greedy answers through transformers' own generate, cut after the end token."""
    longest = max(map(len, prompts))
    pad = _pad_id(backbone)
    ids_BT = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    output = backbone.model.generate(
        ids_BT.to(backbone.device),
        attention_mask=mask_BT.to(backbone.device),
        generation_config=_greedy(backbone, config.max_new_tokens, pad),
    )
    return [_until_end(row, backbone.end_ids) for row in output[:, longest:].tolist()]


def _pad_id(backbone: Backbone) -> int:
    pad = backbone.tokenizer.pad_token_id
    return int(pad if pad is not None else min(backbone.end_ids))


def _greedy(backbone: Backbone, max_new_tokens: int, pad: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(backbone.end_ids), pad_token_id=pad
    )


def _until_end(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids) - 1)
    return ids[: end + 1]
