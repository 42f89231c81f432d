"""`gorgon import`: heads that others published become a model directory. Shapes: V vocabulary, U truncated."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gorgon.artifacts import StepResult, StepRun, run_step
from gorgon.config import ImportConfig
from gorgon.core.heads import MedusaHeads
from gorgon.errors import ModelError
from gorgon.models.backbone import resolve_model
from gorgon.models.directory import HEADS_FILE, fetch_from_hub, local_backbone, write_model_directory
from gorgon.models.formats import PublishedHeads, check_token_map, read_published
from gorgon.models.output_layer import OutputLayer, find_output_layer

FILES = (HEADS_FILE, "medusa_lm_head.pt", "model.safetensors", "pytorch_model.bin")
"""Where published heads lie, the first that is there: TGI and FasterDecoding v2, FasterDecoding v1, vLLM."""
PICKLED = (".pt", ".bin", ".pth")


def import_heads(config: ImportConfig, out: Path, *, force: bool = False) -> StepResult:
    """Writes published heads and their backbone as a model directory, ready for `gorgon tune`.

    Raises: ModelError naming the tensor that is missing, surplus, mis-shaped or not finite, or a file that cannot be
        read; StorageError.
    """
    source = _local_source(config.source)
    backbone = local_backbone(resolve_model(config.backbone))
    inputs: dict[str, str | Path | None] = {"source": source, "backbone": backbone}
    return run_step("import", config, inputs, out, lambda run: _body(config, source, backbone, run), force=force)


def _local_source(name: str) -> Path:
    path = Path(name)
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError("no such file or directory", field="source", value=name)
    return fetch_from_hub(name, ["*.json", "*.safetensors", "*.pt"])


def _body(config: ImportConfig, source: Path, backbone: Path, run: StepRun) -> None:
    file = _heads_file(source)
    described = _described(file.parent)
    read = read_published(_tensors(file), described)
    layer = find_output_layer(backbone)
    _fill_projections(read, layer)
    _check(read, layer)
    with torch.device("meta"):
        heads = MedusaHeads(read.heads, read.layers, layer.hidden_size, layer.vocab_size)
    heads.load_state_dict(read.tensors, assign=True)
    run.warnings += read.notes
    run.metrics.update(layout=read.layout, heads=read.heads, layers=read.layers, file=file.name)
    write_model_directory(
        run.directory, heads=heads, backbone_dir=backbone,
        provenance={
            "imported_from": config.source, "layout": read.layout, "config": described, "notes": read.notes,
            "draft_vocabulary": None if read.token_map_U is None else sorted(read.token_map_U.tolist()),
        },
    )  # fmt: skip


def _heads_file(source: Path) -> Path:
    if source.is_file():
        return source
    for name in FILES:
        if (source / name).is_file():
            return source / name
    raise ModelError("no heads here", field="source", value=str(source), allowed=" or ".join(FILES))


def _described(directory: Path) -> dict[str, Any]:
    """The config.json beside the heads; without one, nothing is claimed and the tensors speak for themselves."""
    path = directory / "config.json"
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is not valid JSON", field="config.json") from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{path} is not a JSON object", field="config.json")
    return loaded


def _tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a heads file. Pickled ones are read as data: code in them is refused, not run."""
    try:
        pickled = file.suffix in PICKLED
        loaded = torch.load(file, map_location="cpu", weights_only=True) if pickled else load_file(file)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"cannot read {file}: {first}", field="source",
            hint="the file is cut short, or holds more than tensors, which is never run",
        ) from error  # fmt: skip
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ModelError(f"{file} is not a table of tensors", field="source")
    return {str(key): value for key, value in loaded.items()}


def _fill_projections(read: PublishedHeads, layer: OutputLayer) -> None:
    """Gives every head a whole projection of its own, where it shares the backbone's or has a truncated one."""
    if read.shared:
        own_VH = layer.read()
        read.tensors |= {name: own_VH.clone() for name in read.projections}
        read.notes.append("the heads share the backbone's output layer; each gets a copy of its own")
    if read.token_map_U is None:
        return
    read.token_map_U = map_U = check_token_map(read.token_map_U, layer.vocab_size)
    rows = {read.tensors[name].shape[0] for name in read.projections}
    if rows == {layer.vocab_size}:
        return
    if rows != {len(map_U)}:
        raise ModelError("the projections do not fit the token map", field="token_map", value=sorted(rows),
                         allowed=f"{len(map_U)} or {layer.vocab_size} rows")  # fmt: skip
    whole_VH = layer.read()
    for name in read.projections:
        filled_VH = whole_VH.to(read.tensors[name].dtype, copy=True)
        filled_VH[map_U] = read.tensors[name]
        read.tensors[name] = filled_VH
    read.notes.append(
        f"the heads know {len(map_U)} of {layer.vocab_size} tokens; the rows of the others are the backbone's own"
    )


def _check(read: PublishedHeads, layer: OutputLayer) -> None:
    """Shapes against the backbone, floating point, finite; tensors that share memory become separate ones."""
    hidden = layer.hidden_size
    for name, tensor in read.tensors.items():
        if name in read.projections:
            expected: tuple[int, ...] = (layer.vocab_size, hidden)
        else:
            expected = (hidden,) if name.endswith("bias") else (hidden, hidden)
        if tuple(tensor.shape) != expected:
            raise ModelError(
                f"the tensor '{name}' does not fit the backbone", field=name, value=tuple(tensor.shape),
                allowed=str(expected), hint="were these heads trained for this backbone?",
            )  # fmt: skip
        if not tensor.is_floating_point():
            raise ModelError(f"the tensor '{name}' is not floating point", field=name, value=str(tensor.dtype))
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"the tensor '{name}' has values that are not finite", field=name)
    read.tensors = {name: tensor.clone().contiguous() for name, tensor in read.tensors.items()}
