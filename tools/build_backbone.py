"""How the embedded backbone is made: a 4.26M-parameter Llama, trained on text-to-SQL rows on two CPU cores.

    python tools/build_backbone.py --rows A.jsonl B.jsonl --held-out test.jsonl --minutes 25 --out DIR [--init DIR]

`--rows` are files in the format of the hub dataset b-mc2/sql-create-context (question, context, answer). They are mixed
with fresh synthetic rows in every epoch: from `BACKBONE_DOMAINS`, and from made-up domains whose names are words of the
real rows or no words at all, so that the model learns to copy a schema's names. `SAMPLE_DOMAINS` are never trained on.
Rows whose question occurs in `--held-out` are left out. Without `--init` tokenizer and model are trained from scratch.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gorgon.data.sample import BACKBONE_DOMAINS, SAMPLE_DOMAINS, draw_question, generate_rows
from gorgon.data.sample.schema import TableSpec, draw_schema
from gorgon.progress import say

Row = dict[str, str]
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELD_OUT_SEED = 987_654_321  # training seeds are small numbers


def prompt_text(row: Row) -> str:
    """The prompt as the chat template renders it; written out because rendering Jinja per row is slow."""
    return f"<|system|>{row['context']}<|end|><|user|>{row['question']}<|end|><|assistant|>"


def read_rows(files: list[Path]) -> list[Row]:
    """All rows of some JSONL files."""
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line]


def fresh_model(rows: list[Row]) -> tuple[Any, Any]:
    """A byte-level BPE tokenizer trained on the rows, and a new Llama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=SPECIAL, initial_alphabet=alphabet)
    bpe.train_from_iterator((prompt_text(r) + r["answer"] + "<|end|>" for r in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")  # noqa: S106
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=4,
        vocab_size=2048,
        intermediate_size=704,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config), tokenizer


def name_pool(rows: list[Row]) -> list[str]:
    """Column names of the real rows that are plain words."""
    found = {name for row in rows for name in re.findall(r"[(,] ?(\w+) [A-Z]+", row["context"])}
    return sorted(name for name in found if re.fullmatch(r"[a-z]{3,12}(_[a-z]{2,10}){0,2}", name))


def invented_name(rng: random.Random, pool: list[str]) -> str:
    """A name from the pool, or syllables without meaning."""
    if rng.random() < 0.6:
        return rng.choice(pool)
    syllables = ["".join(rng.choice(part) for part in ("bdfgklmnprstvz", "aeiou", "lnrst")) for _ in range(3)]
    return "".join(syllables[: rng.randint(2, 3)]) + rng.choice(("", "_code", "_name", "_count", "_date", "_id_no"))


def made_up_rows(seed: int, count: int, pool: list[str]) -> list[Row]:
    """Rows of domains that exist nowhere: every table and column has an invented name."""
    rng = random.Random(f"made-up {seed}")
    kinds = ("person", "city", "country", "date", "year", "company", "title", "code", "language", "colour")
    rows: list[Row] = []
    while len(rows) < count:
        names: dict[str, None] = {}
        while len(names) < 3 + 3 * 5:
            names[invented_name(rng, pool)] = None
        tables, rest = list(names)[:3], iter(list(names)[3:])
        domain = {}
        for i, table in enumerate(tables):
            drawn: list[tuple[tuple[str, ...], str | tuple[str, ...]]] = []
            for _ in range(5):
                low = rng.choice((0, 1, 10, 100, 1000))
                number = f"{rng.choice(('int', 'int', 'real'))} {low} {low * 90 + 60} {rng.choice((1, 1, 0.5))}"
                words = tuple(dict.fromkeys(rng.choice(pool).replace("_", " ") for _ in range(5)))
                drawn.append(((next(rest),), rng.choice((number, number, words, rng.choice(kinds), rng.choice(kinds)))))
            plural = table + ("" if table.endswith("s") else "s")
            domain[table] = TableSpec(table, plural, tuple(tables[:i]), tuple(drawn))
        schema = draw_schema(rng, domain)
        for _ in range(2):
            pair = draw_question(rng, schema)
            if pair is not None:
                rows.append({"question": pair[0], "context": schema.context, "answer": pair[1]})
    return rows[:count]


def swap_value(row: Row, values: list[str], rng: random.Random) -> Row:
    """The row with one quoted value exchanged for another row's, in question and answer.

    Makes the model copy values from the question instead of remembering them.
    """
    found = [v for v in re.findall(r'"([^"%]+)"', row["answer"]) if v.lower() in row["question"].lower()]
    if not found or rng.random() < 0.5:
        return row
    old, new = rng.choice(found), rng.choice(values)
    start = row["question"].lower().index(old.lower())
    spelled = row["question"][start : start + len(old)]
    written = new if spelled == old else new.lower()
    return {
        "context": row["context"],
        "question": row["question"][:start] + new + row["question"][start + len(old) :],
        "answer": row["answer"].replace(f'"{old}"', f'"{written}"'),
    }


def batches(rows: list[Row], tokenizer: Any, prompt_weight: float, size: int, rng: random.Random) -> list[Any]:
    """Rows of similar length together: (token ids, loss weights) per row, `size` padded tokens per batch."""
    prompts = tokenizer([prompt_text(r) for r in rows], add_special_tokens=False)["input_ids"]
    answers = tokenizer([r["answer"] + "<|end|>" for r in rows], add_special_tokens=False)["input_ids"]
    pairs = [(p + a, [prompt_weight] * len(p) + [1.0] * len(a)) for p, a in zip(prompts, answers, strict=True)]
    pairs.sort(key=lambda pair: len(pair[0]) + rng.random() * 12)
    made, batch = [], []
    for pair in pairs:
        batch.append(pair)
        if len(batch) * len(pair[0]) >= size:
            made.append(batch)
            batch = []
    rng.shuffle(made)
    return made


def weighted_loss(model: Any, batch: Any) -> Tensor:
    """Cross-entropy of the next token, each position with its own weight."""
    longest = max(len(ids) for ids, _ in batch)
    ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
    weights_BT = torch.tensor([w + [0.0] * (longest - len(w)) for _, w in batch])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
    hidden_BTH = model.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state[:, :-1]
    weights_BT, targets_BT = weights_BT[:, 1:], ids_BT[:, 1:]
    counted = weights_BT > 0  # the vocabulary projection is a good part of the work: skip it where nothing is learnt
    losses = torch.nn.functional.cross_entropy(
        model.lm_head(hidden_BTH[counted]), targets_BT[counted], reduction="none"
    )
    return (losses * weights_BT[counted]).sum() / weights_BT.sum()


def train(model: Any, tokenizer: Any, real: list[Row], args: argparse.Namespace) -> None:
    """AdamW with a cosine over wall time: the budget is minutes, not steps."""
    rng = random.Random(args.seed)
    values = sorted({v for r in real for v in re.findall(r'"([^"%]+)"', r["answer"]) if 2 < len(v) < 30})
    pool = name_pool(real)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    start, budget, step, average, epoch = time.monotonic(), args.minutes * 60, 0, None, 0
    model.train()
    while time.monotonic() - start < budget:
        synthetic = generate_rows(args.seed + epoch, args.synthetic, BACKBONE_DOMAINS)
        made_up = made_up_rows(args.seed + epoch, args.made_up, pool)
        mixed = [swap_value(r, values, rng) for r in real] + synthetic + made_up
        for batch in batches(mixed, tokenizer, args.prompt_weight, args.batch_tokens, rng):
            elapsed = time.monotonic() - start
            if elapsed > budget:
                break
            cosine = 0.5 * (1 + math.cos(math.pi * elapsed / budget))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / 100) * (0.98 * cosine + 0.02)
            loss = weighted_loss(model, batch)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            if step % 100 == 0:
                say(f"{elapsed:.0f} s, epoch {epoch}, step {step}, loss {average:.3f}")
                if step % 1000 == 0:
                    model.save_pretrained(args.out)
        epoch += 1
    model.eval()


@torch.inference_mode()
def exact_match(model: Any, tokenizer: Any, rows: list[Row], batch_size: int = 50) -> float:
    """Share of rows whose greedy answer is the reference, character for character."""
    tokenizer.padding_side = "left"
    right = 0
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        encoded = tokenizer([prompt_text(r) for r in part], padding=True, add_special_tokens=False, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=128, do_sample=False)
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        right += sum(text == row["answer"] for text, row in zip(texts, part, strict=True))
    return right / len(rows)


def evaluate(model: Any, tokenizer: Any, held_out: list[Row]) -> dict[str, float]:
    """Greedy exact match on the held-out real rows and on unseen synthetic rows of either group of domains."""
    sets = {
        "held-out real rows": held_out,
        "first 200 held-out real rows": held_out[:200],
        "synthetic, backbone domains": generate_rows(HELD_OUT_SEED, 300, BACKBONE_DOMAINS),
        "synthetic, sample domains": generate_rows(HELD_OUT_SEED, 300, SAMPLE_DOMAINS),
    }
    return {name: round(exact_match(model, tokenizer, rows), 4) for name, rows in sets.items() if rows}


def store_bfloat16(directory: Path) -> None:
    """Rewrites the weights as bfloat16, half the size; the config keeps float32, which they are loaded as."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    weights = {name: t.to(torch.bfloat16).contiguous() for name, t in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


@torch.no_grad()
def average(model: Any, other: Path, share: float) -> None:
    """Mixes in an earlier stage's weights, `share` of them: keeps what the last stage's narrower data let go."""
    from transformers import AutoModelForCausalLM

    earlier = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).state_dict()
    model.load_state_dict({name: torch.lerp(t, earlier[name], share) for name, t in model.state_dict().items()})


def main() -> None:
    """Reads the arguments, trains, evaluates before and after rounding, writes the directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="JSONL: question, context, answer")
    parser.add_argument("--held-out", type=Path, help="JSONL that is only measured on; its questions are left out")
    parser.add_argument("--init", type=Path, help="continue from this model directory, with its tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25.0, help="0 only evaluates --init")
    parser.add_argument("--average", type=Path, help="at the end, mix in the weights of this model directory")
    parser.add_argument("--average-share", type=float, default=0.3, help="how much of the result they are")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--synthetic", type=int, default=14_000, help="fresh rows of BACKBONE_DOMAINS per epoch")
    parser.add_argument("--made-up", type=int, default=14_000, help="fresh rows of made-up domains per epoch")
    parser.add_argument("--prompt-weight", type=float, default=0.0, help="loss weight of prompt tokens; answers have 1")
    parser.add_argument("--batch-tokens", type=int, default=3072)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    held_out = read_rows([args.held_out]) if args.held_out else []
    banned = {row["question"].strip().lower() for row in held_out}
    real = [row for row in read_rows(args.rows) if row["question"].strip().lower() not in banned]
    random.Random(args.seed).shuffle(real)
    if args.init:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(args.init, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.init)
    else:
        model, tokenizer = fresh_model(real)
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(real)} real rows")
    tokenizer.save_pretrained(args.out)  # before padding settings for the evaluation get into it
    train(model, tokenizer, real, args)
    if args.average:
        average(model, args.average, args.average_share)
    say(f"float32: {evaluate(model, tokenizer, held_out)}")
    model.save_pretrained(args.out)
    store_bfloat16(args.out)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    say(f"stored as bfloat16: {evaluate(model, tokenizer, held_out)}")


if __name__ == "__main__":
    main()
