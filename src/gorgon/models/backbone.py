"""The backbone: a transformers causal LM, loaded, checked, frozen, and read through two calls.

Shapes: B batch, T positions, N nodes of a draft, Q nodes of all drafts that are no fillers, S rows of the cache that a
forward reads, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gorgon.config import EMBEDDED, Dtype, Quantization, StepMode
from gorgon.core.accept import ancestors
from gorgon.core.packing import pack, unpack
from gorgon.errors import ModelError
from gorgon.models import attention
from gorgon.models.cache import TreeCache
from gorgon.models.compiler import Binder, BoundFunction, StepFunction, pick_mode, step_function
from gorgon.models.families import attention_of, refuse_mismatch, refuse_other_results, refuse_unsupported
from gorgon.models.gpu import run_layers, run_on_gpu
from gorgon.models.graphs import Graphs
from gorgon.models.kernels import kernels_work
from gorgon.models.last_row import LastRow
from gorgon.models.linear import lay_out_linear_weights
from gorgon.models.masks import (
    additive,
    packed_spans,
    prompt_spans,
    prompt_visibility,
    tree_spans,
    tree_visibility,
    within,
)
from gorgon.models.quantize import quantizer

log = logging.getLogger(__name__)
ROUNDED = 256
"""Rows of the cache are given to captured steps in multiples of this, so that few shapes are captured."""
EMBEDDED_DIRECTORY = Path(__file__).parent / "embedded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_model(name: str | Path) -> str:
    """A directory's path, a hub id, or for 'embedded' the directory inside the package.

    A directory that holds `base-model/` is one of ours: its backbone is meant.
    Raises: ModelError when a path is given and nothing is there.
    """
    if str(name) == EMBEDDED:
        return str(EMBEDDED_DIRECTORY)
    path = Path(name)
    if (path / "base-model").is_dir():
        return str(path / "base-model")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                "not a model directory: config.json is missing", field="model", value=str(name),
                hint="give a directory saved with save_pretrained, a hub id, or 'embedded'",
            )  # fmt: skip
        return str(path)
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise ModelError("no such model directory", field="model", value=str(name))
    return str(name)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turns transformers' many ways of failing to load into one ModelError that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load '{name}': {first}", field="model", value=name,
            hint="is it a complete model directory, or a hub id that this machine can reach?",
        ) from error  # fmt: skip


def load_tokenizer(name: str | Path) -> Any:
    """The model's tokenizer.

    Raises: ModelError when it cannot be loaded, or has no chat template or no end token.
    """
    from transformers import AutoTokenizer

    source = resolve_model(name)
    with _loading(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template", field="chat_template", value=source,
            hint="use an instruction-tuned model, or put a chat_template.jinja beside its tokenizer.json",
        )  # fmt: skip
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end token", field="eos_token", value=source)
    return tokenizer


@dataclass
class Backbone:
    """A frozen causal LM with what the rest of Gorgon needs to know of it.

    Attributes:
        kernels: whether our own kernels run its steps (`models.kernels`).
        spans: whether its layers are told what nodes see as spans (`models.attention`), not as masks.
        layers: the decoder as it was compiled on a GPU, for steps and prompts alike (`models.gpu`).
        last_row: how a prompt is read of which only the last row is wanted.
    """

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    steps: StepMode = "eager"
    quantization: Quantization = "none"
    graphs: Graphs | None = None
    kernels: bool = False
    spans: bool = False
    layers: BoundFunction | None = None
    last_row: LastRow = field(default_factory=LastRow)
    _functions: dict[StepFunction, Binder] = field(default_factory=dict)

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.text_config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """V: rows of the output layer (may exceed the tokenizer's own count through padding)."""
        return int(self.lm_head.out_features)

    @cached_property
    def text_config(self) -> Any:
        """The decoder's configuration (multimodal configurations hold it one level down)."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def lm_head(self) -> nn.Linear:
        """The output layer, [V, H]."""
        head: nn.Linear = self.model.get_output_embeddings()
        return head

    @property
    def decoder(self) -> nn.Module:
        """The transformer without its output layer; its first output is the hidden state that `lm_head` reads."""
        decoder: nn.Module = self.model.get_decoder()
        return decoder

    @property
    def max_length(self) -> int:
        """Longest context in tokens: as far as the position embeddings reach."""
        return int(getattr(self.text_config, "max_position_embeddings", 1 << 20))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the generation config's, else the tokenizer's."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        if configured is None:
            configured = self.tokenizer.eos_token_id
        return frozenset([configured] if isinstance(configured, int) else configured)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters as loaded: weights that are laid out otherwise are no parameters to torch any more."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def _windows(self) -> dict[str, int | None]:
        """Attention window by layer type, None being all of the context; one entry when all layers are alike."""
        window = getattr(self.text_config, "sliding_window", None)
        if not getattr(self.text_config, "use_sliding_window", True):  # Qwen: a number is given but not used
            window = None
        types = getattr(self.text_config, "layer_types", None)
        if types is None:  # without layer types a window holds for every layer, as in Mistral
            return {"every": window}
        return {t: window if t == "sliding_attention" else None for t in types}

    def _by_layers(self, make: Callable[[int | None], Tensor]) -> Any:
        """The `attention_mask` argument: one for all layers, or one by layer type where their windows differ."""
        windows = set(self._windows.values())
        if len(windows) == 1:
            return make(windows.pop())
        return {kind: make(window) for kind, window in self._windows.items()}

    def _mask(self, visible_BNS: Tensor, queries_BN: Tensor, keys_BS: Tensor) -> Any:
        return self._by_layers(lambda window: additive(within(visible_BNS, queries_BN, keys_BS, window), self.dtype))

    def visible(self, needed: int, capacity: int) -> int:
        """Cache rows that a forward is given, of which it needs so many: where nodes look at spans all that there are,
        a number that stays the same; where steps are captured by shape a round one."""
        if self.spans:
            return capacity
        return needed if self.graphs is None else min(-(-needed // ROUNDED) * ROUNDED, capacity)

    @property
    def packs(self) -> bool:
        """Whether a batch of drafts is run without the nodes that only fill it up."""
        return self.kernels and self.spans and self.graphs is None

    def forward_tree(
        self,
        cache: TreeCache,
        tokens_BN: Tensor,
        depths_BN: Tensor,
        bits_BN: Tensor,
        lengths_B: Tensor,
        visible: int,
        rows_Q: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, N, H] of every node of B draft trees, each behind its own context; rows go to the cache.

        Args:
            tokens_BN: int64; negative for a node that only fills up the shape.
            depths_BN: distance from the root. Nodes beyond the last position the model knows are moved there; the
                caller's length limit makes sure that none of them becomes output.
            bits_BN: ancestors as `core.accept.ancestors` reads them.
            lengths_B: committed rows of each sequence.
            visible: S, cache rows to read: at least the longest length plus N.
            rows_Q: places in [B * N] of the nodes to be run, where the backbone `packs`; zeros come out for the others.
        """
        positions_BN = (lengths_B[:, None] + depths_BN).clamp(max=self.max_length - 1)
        slots_BN = lengths_B[:, None] + torch.arange(tokens_BN.shape[1], device=tokens_BN.device)
        tokens_BN = tokens_BN.clamp(min=0)

        def spans(window: int | None) -> Tensor:
            return tree_spans(bits_BN, positions_BN, lengths_B, window)

        if rows_Q is not None:
            tokens_1Q, positions_1Q, slots_1Q = (pack(x, rows_Q)[None] for x in (tokens_BN, positions_BN, slots_BN))
            cache.place(slots_1Q, visible, sequences_1Q=(rows_Q // tokens_BN.shape[1])[None])
            mask = self._by_layers(lambda window: packed_spans(spans(window), rows_Q, visible))
            hidden_1QH = self._run(cache, tokens_1Q, positions_1Q, mask)
            return unpack(hidden_1QH[0], rows_Q, *tokens_BN.shape)
        cache.place(slots_BN, visible)
        if self.spans:
            mask = self._by_layers(spans)
        else:
            seen_BNS, keys_BS = tree_visibility(ancestors(bits_BN), positions_BN, lengths_B, visible)
            mask = self._mask(seen_BNS, positions_BN, keys_BS)
        return self._run(cache, tokens_BN, positions_BN, mask)

    def forward_prompt(self, cache: TreeCache, tokens_1T: Tensor, start_1: Tensor, visible: int) -> Tensor:
        """Hidden states [1, T, H] of a part of a prompt that begins at position `start_1`; rows go to the cache."""
        slots_1T = start_1[:, None] + torch.arange(tokens_1T.shape[1], device=tokens_1T.device)
        cache.place(slots_1T, visible)
        positions_1T = slots_1T.clamp(max=self.max_length - 1)  # of tokens that only fill up the shape
        if self.spans:
            mask = self._by_layers(lambda window: prompt_spans(positions_1T, window))
        else:
            seen_1TS, keys_1S = prompt_visibility(positions_1T, visible)
            mask = self._mask(seen_1TS, positions_1T, keys_1S)
        return self._run(cache, tokens_1T, positions_1T, mask)

    def _run(self, cache: TreeCache, tokens_BN: Tensor, positions_BN: Tensor, mask: Any) -> Tensor:
        if self.layers is None or not cache.keys:
            return run_layers(self, cache, tokens_BN, positions_BN, mask)
        hidden_BNH: Tensor = self.layers(tokens_BN, positions_BN, mask, *cache.placed, *cache.buffers)[0]
        return hidden_BNH

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Next-token logits [..., V] as the model class itself makes them from `hidden`, scaling and capping included.

        Checked against the model's own forward when it is loaded (`families.refuse_other_results`).
        """
        config, logits_NV = self.text_config, self.lm_head(hidden_NH)
        if scaling := getattr(config, "logits_scaling", None):  # Granite
            logits_NV = logits_NV / scaling
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits_NV = logits_NV * scale
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits_NV = torch.tanh(logits_NV / cap) * cap
        result: Tensor = logits_NV
        return result

    def likeliest(self, logits_NV: Tensor) -> Tensor:
        """The token with the largest logit, int64 [...]: the first of equals, or of those that are no numbers."""
        if self.kernels and logits_NV.dtype == torch.float32:
            tokens_N: Tensor = torch.ops.gorgon.first_max(logits_NV)
            return tokens_N
        return logits_NV.max(dim=-1).indices  # cheaper than argmax

    def run_steps(self, mode: StepMode) -> None:
        """From now on step functions run in this mode; their tokens stay the same.

        Raises: MissingDependencyError when compiling is asked for and no compiler is there, or capturing without CUDA.
        """
        self.steps, self._functions, self.layers = pick_mode(mode, self.parameters, self.device), {}, None
        if self.device.type == "cuda":
            run_on_gpu(self)
            return
        lay_out_linear_weights(self.model)
        self.kernels = self.dtype == torch.float32 and kernels_work()
        if self.kernels:
            self.attend_over_spans()
        self.last_row.use(self)

    def attend_over_spans(self) -> None:
        """From now on attention is our own kernel's, unless the model needs more than it has (`families`)."""
        before = self.model.config._attn_implementation
        if before != "sdpa":
            return
        attention.register(self.device)
        self.model.set_attn_implementation(attention.NAME)
        self.spans = True
        try:
            refuse_other_results(self)
        except ModelError as error:
            log.info("attention stays torch's: %s", error)
            self.spans = False
            self.model.set_attn_implementation(before)

    def step_function(self, function: StepFunction) -> Binder:
        """A function of a step on this backbone as `run_steps` has it run; made once, so that engines share it."""
        if function not in self._functions:
            self._functions[function] = step_function(function, self, self.steps)
        return self._functions[function]

    @torch.inference_mode()
    def hidden(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Last hidden state [B, T, H] after the final norm: what `lm_head` and the heads read. Keeps no cache."""
        output = self.decoder(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
        result: Tensor = output[0]
        return result


def pick_device(device: str = "auto") -> torch.device:
    """'auto' is the first CUDA device if there is one, else the CPU."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[dtype]


def load_backbone(
    name: str | Path, *, dtype: Dtype = "auto", device: str = "auto", quantization: Quantization = "none"
) -> Backbone:
    """Loads a causal LM and its tokenizer, in evaluation mode, with gradients off.

    Args: name: directory, hub id, or 'embedded'.
    Raises: ModelError when it cannot be loaded, is not a decoder whose attention our masks can express, has missing or
        surplus tensors, or gives other results through a tree than through its own forward; what `quantizer`
        raises.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # our own progress is on stderr; a bar per weight file says nothing

    source = resolve_model(name)
    tokenizer = load_tokenizer(name)
    place = pick_device(device)
    chosen = pick_dtype(dtype, place)
    quantize = quantizer(quantization, chosen, place)
    with _loading(source):
        config = AutoConfig.from_pretrained(source)
        refuse_unsupported(config, source)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=chosen, attn_implementation=attention_of(config), output_loading_info=True
        )
    refuse_mismatch(report, source)
    model.to(place).eval().requires_grad_(False)
    quantize(model)
    backbone = Backbone(source, model, tokenizer, place, chosen, quantization=quantization)
    refuse_other_results(backbone)
    return backbone
