"""Backbones whose continuations are known, and tiny random ones, for the tests of training."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from gorgon.models.backbone import EMBEDDED_DIRECTORY, Backbone

END = 1


class NumberTokenizer:
    """A message's content is its token ids in decimal."""

    chat_template = "numbers"
    eos_token_id = END
    all_special_ids: tuple[int, ...] = ()

    def apply_chat_template(self, messages, **_):
        return [int(word) for message in messages for word in message["content"].split()]


class ScriptedModel(nn.Module):
    """Only what a Backbone asks of its model: the output layer and two configurations."""

    def __init__(self, vocab: int, max_length: int) -> None:
        super().__init__()
        self.head = nn.Linear(vocab, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.1)

        class Config:
            hidden_size = vocab
            max_position_embeddings = max_length

            def get_text_config(self, decoder=True):
                return self

        self.config = Config()
        self.generation_config = type("G", (), {"eos_token_id": END})()

    def get_output_embeddings(self):
        return self.head


class ScriptedBackbone(Backbone):
    """The hidden state is the one-hot vector of the current token; counts how often each text is read."""

    def __init__(self, directory: Path, vocab: int = 32, max_length: int = 64) -> None:
        torch.manual_seed(0)
        super().__init__(
            str(directory), ScriptedModel(vocab, max_length), NumberTokenizer(), torch.device("cpu"), torch.float32
        )
        self.seen: Counter[tuple[int, ...]] = Counter()

    def hidden(self, input_ids_BT, attention_mask_BT=None):
        for row in input_ids_BT.tolist():
            while row and row[-1] == 0:  # the scripted texts never hold token 0
                row.pop()
            self.seen[tuple(row)] += 1
        return nn.functional.one_hot(input_ids_BT, self.vocab_size).float()


def write_rows(folder: Path, name: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("w") as file:
        for number, row in enumerate(rows):
            file.write(json.dumps({"id": f"{name}-{number}", **row}) + "\n")


def markov_rows(seed: int, rows: int, cycle: list[int], stay: float, length: int = 24) -> list[dict]:
    """Answers whose next token is `cycle[token]` with probability `stay` (+ chance), else uniform over the tokens."""
    rng = random.Random(seed)
    tokens = [t for t in range(len(cycle)) if cycle[t] >= 0]
    found = []
    for _ in range(rows):
        ids = [rng.choice(tokens)]
        while len(ids) < length:
            ids.append(cycle[ids[-1]] if rng.random() < stay else rng.choice(tokens))
        prompt, answer = ids[:4], ids[4:]
        content = " ".join(map(str, prompt))
        found.append({"messages": [{"role": "user", "content": content}], "answer": "", "answer_ids": answer})
    return found


def random_cycle(vocab: int, seed: int = 3) -> list[int]:
    """A permutation of tokens 2..vocab-1 in one cycle; -1 for the two that never occur."""
    order = list(range(2, vocab))
    random.Random(seed).shuffle(order)
    following = [-1] * vocab
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        following[here] = there
    return following


def tiny_llama(folder: Path, *, max_length: int = 256, layers: int = 2) -> Path:
    """A random Llama of few layers with the embedded backbone's tokenizer, saved to `folder`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_DIRECTORY)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=max_length,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sql_rows(seed: int, rows: int) -> list[dict]:
    """Rows with a simple rule, so that a tiny model can learn something in a few steps."""
    rng = random.Random(seed)
    found = []
    for _ in range(rows):
        column, table = rng.choice(["name", "city", "year", "price"]), rng.choice(["shop", "team", "film"])
        found.append(
            {
                "messages": [
                    {"role": "system", "content": f"CREATE TABLE {table} ({column} VARCHAR)"},
                    {"role": "user", "content": f"Show every {column} of the {table}" + " please" * rng.randint(0, 3)},
                ],
                "answer": f"SELECT {column} FROM {table}",
            }
        )
    return found


def tiny_project(folder: Path, *, rows: int = 48) -> tuple[Path, Path]:
    """A tiny backbone and a data directory."""
    model = tiny_llama(folder / "model")
    write_rows(folder / "data", "train", sql_rows(1, rows))
    write_rows(folder / "data", "validation", sql_rows(2, 12))
    return model, folder / "data"
