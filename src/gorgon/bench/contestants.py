"""The decoders of a comparison, made from one model directory. Only this file knows the engine's constructors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gorgon.bench.decoders import MEDUSA, PLAIN, Answer, Decoder, EngineDecoder, TransformersDecoder
from gorgon.config import Dtype, Quantization, StepMode
from gorgon.core.draft import Draft
from gorgon.core.tree import DraftTree
from gorgon.decode.drafts import Drafter
from gorgon.decode.engine import Engine
from gorgon.decode.load import load_engine
from gorgon.decode.ngrams import NgramIndex
from gorgon.decode.step import HeadChoices
from gorgon.models.backbone import load_backbone
from gorgon.models.directory import base_model


@dataclass(frozen=True)
class Contestants:
    """Plain decoding, Medusa decoding, `transformers.generate` and any further trees, on the same weights."""

    engine: Engine
    decoders: list[Decoder]

    @staticmethod
    def load(
        model: Path, *, dtype: Dtype, quantization: Quantization, steps: StepMode, extra: Mapping[int, DraftTree]
    ) -> Contestants:
        """Loads the model directory and names its decoders; `extra` is size -> tree, named 'tree_SIZE'.

        On a CPU `transformers.generate` gets weights of its own: our engine lays them out for itself, and a
        comparison must not slow down the other side. On a GPU nothing is changed, so memory is shared.
        """
        engine = load_engine(model, dtype=dtype, quantization=quantization, steps=steps)
        theirs = engine.backbone
        if theirs.device.type == "cpu":
            theirs = load_backbone(base_model(model), dtype=dtype, quantization=quantization)
        decoders: list[Decoder] = [
            EngineDecoder(PLAIN, engine.plain()),
            EngineDecoder(MEDUSA, engine),
            TransformersDecoder(theirs),
            *(EngineDecoder(f"tree_{size}", engine.with_tree(tree)) for size, tree in extra.items()),
        ]
        return Contestants(engine, decoders)

    def facts(self) -> dict[str, Any]:
        """What was measured: architecture, sizes, dtype, device and threads."""
        import torch

        backbone, heads = self.engine.backbone, self.engine.heads
        gpu = backbone.device.type == "cuda"
        return {
            "type": str(backbone.text_config.model_type),
            "parameters": backbone.parameters,
            "layers": int(backbone.text_config.num_hidden_layers),
            "hidden_size": backbone.hidden_size,
            "vocab_size": backbone.vocab_size,
            "max_length": backbone.max_length,
            "heads": 0 if heads is None else len(heads),
            "head_parameters": 0 if heads is None else sum(p.numel() for p in heads.parameters()),
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "quantization": backbone.quantization,
            "device": torch.cuda.get_device_name(backbone.device) if gpu else backbone.device.type,
            "threads": torch.get_num_threads(),
            "steps": backbone.steps,
        }

    def blocks(self, answer: Answer) -> list[dict[str, Any]]:
        """The answer's text cut where its steps ended: [{"tokens": 3, "text": "..."}], the prefill's token first.

        Invariant: the texts together are the decoded answer, special tokens left out. Bytes of a character that a
        later step completes are shown with that step.
        """
        tokenizer = self.engine.backbone.tokenizer
        blocks: list[dict[str, Any]] = []
        end, shown = 0, ""
        first = len(answer.token_ids) - sum(answer.step_tokens)
        for count in (first, *answer.step_tokens):
            end += count
            text = str(tokenizer.decode(answer.token_ids[:end], skip_special_tokens=True))
            if end < len(answer.token_ids):
                text = text.rstrip("\ufffd")
            blocks.append({"tokens": count, "text": text[len(shown) :]})
            shown = text
        return blocks

    def example_step(self, prompt_ids: list[int], steps: int = 24) -> dict[str, Any]:
        """The tree of the step with the most accepted drafts among the first steps of an answer, with its tokens."""
        watched = _Watched(self.engine.drafter(1))
        answer = self.engine.with_drafter(watched).answer(prompt_ids, max_new_tokens=8 * steps)
        drafts = watched.drafts[: max(1, min(steps, len(answer.step_nodes)))]
        if not drafts:
            return {"parents": [0], "texts": [""], "accepted": [True]}
        best = max(range(len(drafts)), key=lambda i: drafts[i].depth(answer.step_nodes[i]))
        draft, path = drafts[best], drafts[best].path(answer.step_nodes[best])
        decode = self.engine.backbone.tokenizer.decode
        return {
            "parents": draft.parents,
            "texts": [str(decode([token])) for token in draft.tokens],
            "accepted": [node in path for node in range(draft.nodes)],
        }


class _Watched:
    """A drafter that keeps what another one drafts."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter, self.drafts = drafter, list[Draft]()
        self.nodes, self.heads, self.width, self.copies = drafter.nodes, drafter.heads, drafter.width, drafter.copies

    def draft(self, root: int, choices: HeadChoices | None, context: NgramIndex | None) -> Draft:
        """The other's draft."""
        self.drafts.append(self._drafter.draft(root, choices, context))
        return self.drafts[-1]
