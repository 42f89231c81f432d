"""Trains a Llama on text-to-SQL rows, from nothing, and runs the whole recipe on it: a real speed-up on a GPU.

    python benchmarks/sql_on_gpu.py --train ROWS.jsonl --test ROWS.jsonl     # 139M parameters; about ten minutes
    python benchmarks/sql_on_gpu.py --train ROWS.jsonl --test ROWS.jsonl --size 4M --seconds 60    # anywhere

No pretrained model is needed: the tokenizer is the embedded model's. Training is a plain loop over whole texts, for as
long as is asked for; how good the model is matters little, only that it is one. The recipe is text-to-sql-gpu.yaml;
`python benchmarks/record.py OUT` keeps the result.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from gorgon.core.loss import IGNORE
from gorgon.data.chat import encode_answer, encode_prompt
from gorgon.data.examples import read_examples
from gorgon.models.backbone import load_tokenizer, pick_device
from gorgon.pipeline import load_recipe, run_one, run_recipe
from gorgon.progress import say

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Path(__file__).with_name("text-to-sql-gpu.yaml")
SIZES: dict[str, dict[str, int]] = {
    "4M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 2},
    "139M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
             "num_key_value_heads": 4},
    "300M": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 25, "num_attention_heads": 16,
             "num_key_value_heads": 4},
}  # fmt: skip
BATCH_TOKENS, SORTED_ROWS = 12_288, 4096
"""Tokens of a batch, padding included, and rows that are sorted by length together."""
PEAK, WARM_UP, CLIP = 8e-4, 0.03, 1.0
"""Learning rate, the share of the time in which it rises, and the largest gradient norm."""
EVERY = 100
"""Steps between two lines of progress."""


def new_model(size: str, tokenizer: Any) -> Any:
    """A model with random weights, for this tokenizer."""
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=1024, bos_token_id=None, **ids, **SIZES[size]
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(**ids)
    return model


def texts(file: Path, tokenizer: Any) -> list[list[int]]:
    """Chats with their answers, as ids."""
    return [encode_prompt(tokenizer, e.messages) + encode_answer(tokenizer, e) for e in read_examples(file)]


def batches(rows: list[list[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of texts of like length [B, T], without end."""
    rng = random.Random(0)
    while True:
        order = rng.sample(rows, len(rows))
        for start in range(0, len(order), SORTED_ROWS):
            part = sorted(order[start : start + SORTED_ROWS], key=len)
            packed: list[list[list[int]]] = [[]]
            for row in part:
                if len(row) * (len(packed[-1]) + 1) > BATCH_TOKENS:
                    packed.append([])
                packed[-1].append(row)
            rng.shuffle(packed)
            for batch in packed:
                ids_BT = torch.zeros(len(batch), len(batch[-1]), dtype=torch.int64)
                labels_BT = torch.full_like(ids_BT, IGNORE)
                for b, row in enumerate(batch):
                    ids_BT[b, : len(row)] = labels_BT[b, : len(row)] = torch.tensor(row)
                yield ids_BT, labels_BT


def train(model: Any, rows: list[list[int]], seconds: float, device: torch.device) -> None:
    """AdamW on all tokens, prompt and answer, for so long; the rate falls as a cosine of the time that is left."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    begun, tokens = time.perf_counter(), 0
    for step, (ids_BT, labels_BT) in enumerate(batches(rows)):
        done = (time.perf_counter() - begun) / seconds
        if done >= 1:
            break
        rate = PEAK * min(1.0, done / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids_BT.to(device), labels=labels_BT.to(device), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int((labels_BT != IGNORE).sum())
        if step % EVERY == 0:
            say(f"step {step}, {tokens / 1e6:.1f}M tokens, loss {loss.item():.3f}, {100 * done:.0f} % of the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="rows to learn from")
    parser.add_argument("--test", type=Path, required=True, help="rows to measure")
    parser.add_argument("--size", choices=list(SIZES), default="139M")
    parser.add_argument("--seconds", type=float, default=150.0, help="time to train the model")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "text-to-sql-gpu")
    parser.add_argument("--set", action="append", default=[], dest="assignments", help="a setting of the recipe")
    options = parser.parse_args()
    backbone, tokenizer = options.out / "backbone", load_tokenizer("embedded")
    files = [f"prepare.train={options.train.resolve()}", f"prepare.test={options.test.resolve()}"]
    recipe = load_recipe(RECIPE, [f"model={backbone}", *files, *options.assignments], options.out)
    rows = run_one(recipe.steps["prepare"], options.out / "prepare").directory / "train.jsonl"
    if not (backbone / "config.json").is_file():
        model = new_model(options.size, tokenizer)
        train(model, texts(rows, tokenizer), options.seconds, pick_device())
        model.to("cpu").save_pretrained(backbone)
        tokenizer.save_pretrained(backbone)
        del model
    run_recipe(recipe, options.out)


if __name__ == "__main__":
    main()
