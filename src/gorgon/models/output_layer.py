"""The backbone's output layer, found and read without loading the backbone. Shapes: V vocabulary, H hidden size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gorgon.errors import ModelError

OTHER_NAMES = ("embed_out.weight",)
"""Names in files that transformers renames while loading (GPT-NeoX)."""


@dataclass(frozen=True)
class OutputLayer:
    """Where the output layer's weight lies: V, H, and the names it may have (tied weights are stored once)."""

    directory: Path
    vocab_size: int
    hidden_size: int
    names: tuple[str, ...]

    def read(self) -> Tensor:
        """The weight [V, H] as it is stored.

        Raises: ModelError when no safetensors file of the backbone holds it.
        """
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    held = set(file.keys())
                    for name in self.names:
                        if name in held:
                            weight_VH: Tensor = file.get_tensor(name)
                            return self._checked(name, weight_VH)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"cannot read {path}: {error}", field="backbone") from error
        raise ModelError(
            "the backbone's files hold no output layer", field=self.names[0], value=str(self.directory),
            hint="save the backbone with save_pretrained, which writes safetensors",
        )  # fmt: skip

    def _checked(self, name: str, weight_VH: Tensor) -> Tensor:
        expected = (self.vocab_size, self.hidden_size)
        if tuple(weight_VH.shape) != expected:
            raise ModelError("the output layer does not fit the backbone's config.json", field=name,
                             value=tuple(weight_VH.shape), allowed=str(expected))  # fmt: skip
        return weight_VH


def find_output_layer(directory: str | Path) -> OutputLayer:
    """Sizes and names of a backbone's output layer, from its config.json alone.

    Raises: ModelError when transformers does not know the architecture or it has no output layer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        layer, table = model.get_output_embeddings(), model.get_input_embeddings()
        vocab_size, hidden_size = (int(size) for size in layer.weight.shape)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"cannot make out the backbone's output layer: {str(error).strip().partition(chr(10))[0]}",
            field="backbone", value=str(directory), hint="the backbone must be a causal LM that transformers knows",
        ) from error  # fmt: skip
    tied = getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False)
    wanted = [layer, table] if tied else [layer]
    names = [f"{name}.weight" for module in wanted for name, other in model.named_modules() if other is module]
    names[1:1] = OTHER_NAMES  # an untied layer before the tied one
    return OutputLayer(Path(directory), vocab_size, hidden_size, tuple(names))
