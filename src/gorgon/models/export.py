"""`gorgon export`: a model directory in the layout of another program, bit for bit the same heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gorgon.artifacts import StepResult, StepRun, link_tree, run_step, write_json
from gorgon.config import ExportConfig
from gorgon.errors import GorgonError, ModelError
from gorgon.models.directory import (
    BASE,
    HEADS_FILE,
    TOKENIZER_FILES,
    base_model,
    load_heads,
    local_backbone,
    read_head_kind,
    read_model_config,
)
from gorgon.models.formats import TGI_VERSIONS, VLLM_VERSIONS, vllm_layout
from gorgon.models.output_layer import find_output_layer

SAGEMAKER_BASE = "/opt/ml/model/base-model"
"""TGI looks for a relative path where it was started, not beside config.json, so its path must be absolute."""


def export_model(config: ExportConfig, out: Path, *, force: bool = False) -> StepResult:
    """Writes heads and backbone as TGI, vLLM or FasterDecoding/Medusa read them; manifest.json says how to serve them.

    Raises: GorgonError for an option that the format does not have; ModelError for an incomplete directory, heads of a
        kind that the other program cannot run, or tensors that do not fit the backbone; StorageError.
    """
    if config.format == "vllm" and config.backbone_path is not None:
        raise GorgonError("vLLM's heads do not name their backbone", field="backbone_path", value=config.backbone_path,
                          allowed="tgi and medusa", hint="vLLM is given the backbone's path at its start")  # fmt: skip
    read_model_config(config.model)  # before anything is hashed, so that a wrong path is named at once
    kind = read_head_kind(config.model)
    if kind != "medusa":
        raise ModelError(f"{config.format} cannot run heads of this kind", field="head_kind", value=kind,
                         allowed="medusa")  # fmt: skip
    return run_step("export", config, {"model": config.model}, out, lambda run: _body(config, run, out), force=force)


def _body(config: ExportConfig, run: StepRun, out: Path) -> None:
    source = local_backbone(base_model(config.model))
    layer = find_output_layer(source)
    heads = load_heads(config.model, hidden_size=layer.hidden_size, vocab_size=layer.vocab_size)
    tensors = {key: value.contiguous() for key, value in heads.state_dict().items()}
    facts = {"heads": len(heads), "layers": heads.num_layers}
    run.metrics.update(facts, format=config.format)
    link_tree(source, run.directory / BASE, skip=frozenset({"manifest.json", "tensorboard", "README.md"}))
    WRITERS[config.format](config, run, tensors, facts)
    run.metrics["serve"] = run.metrics["serve"].replace("DIR", str(out))


def _medusa_config(config: ExportConfig, facts: Mapping[str, int], base: str) -> dict[str, Any]:
    return {
        "medusa_num_heads": facts["heads"],
        "medusa_num_layers": facts["layers"],
        "base_model_name_or_path": config.backbone_path or base,
        "version": "1",
    }


def _write_tgi(config: ExportConfig, run: StepRun, tensors: dict[str, Tensor], facts: Mapping[str, int]) -> None:
    _copy_tokenizer(run.directory)
    save_file(tensors, run.directory / HEADS_FILE, metadata={"format": "pt"})
    write_json(run.directory / "config.json", _medusa_config(config, facts, SAGEMAKER_BASE))
    run.metrics["read_by"] = f"text-generation-inference {TGI_VERSIONS}"
    run.metrics["serve"] = f"text-generation-launcher --model-id DIR --speculate {facts['heads']}"


def _write_medusa(config: ExportConfig, run: StepRun, tensors: dict[str, Tensor], facts: Mapping[str, int]) -> None:
    _copy_tokenizer(run.directory)
    torch.save(tensors, run.directory / "medusa_lm_head.pt")
    write_json(run.directory / "config.json", _medusa_config(config, facts, BASE))
    run.metrics["read_by"] = "FasterDecoding/Medusa, version 1 (TensorRT-LLM up to its last engine backend)"
    run.metrics["serve"] = "cd DIR && python -m medusa.inference.cli --model ."


def _write_vllm(config: ExportConfig, run: StepRun, tensors: dict[str, Tensor], facts: Mapping[str, int]) -> None:
    named, described = vllm_layout(tensors, facts["heads"], facts["layers"])
    save_file(named, run.directory / "model.safetensors", metadata={"format": "pt"})
    write_json(run.directory / "config.json", described)
    speculative = f'{{"method": "medusa", "model": "DIR", "num_speculative_tokens": {facts["heads"]}}}'
    run.metrics["read_by"] = f"vLLM {VLLM_VERSIONS}; 0.33 has no Medusa"
    run.metrics["serve"] = f"vllm serve DIR/{BASE} --speculative-config '{speculative}'"


WRITERS: dict[str, Callable[[ExportConfig, StepRun, dict[str, Tensor], Mapping[str, int]], None]] = {
    "tgi": _write_tgi,
    "vllm": _write_vllm,
    "medusa": _write_medusa,
}


def _copy_tokenizer(directory: Path) -> None:
    for name in TOKENIZER_FILES:
        if (directory / BASE / name).is_file():
            (directory / name).write_bytes((directory / BASE / name).read_bytes())
