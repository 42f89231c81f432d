"""One frozen configuration per step; YAML and `--set key=value` on top; unknown keys are errors.

A default stands here and nowhere else. `Field(description=...)` is also the help text of `gorgon STEP --help`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gorgon.errors import ConfigError

EMBEDDED = "embedded"
"""Name of the backbone and of the dataset that ship inside the package."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "int4"]
"""How the weights of the backbone's layers are held while it decodes (`models.quantize`)."""
QUANTIZATION_HELP = "Weights of the backbone's layers: in full (none), or int8 or int4 through torchao."
StepMode = Literal["auto", "eager", "recorded", "compiled", "captured"]
"""How decoding steps are run (`models.compiler`)."""
STEPS_HELP = (
    "How steps run; auto compiles where it can, on a GPU into CUDA graphs; captured makes them of uncompiled steps."
)


class StepConfig(BaseModel):
    """Base of every step's settings: immutable, no unknown keys, no silent coercion of strings to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class PrepareConfig(StepConfig):
    """Rows from a hub dataset, from files, or from the embedded generator, as chat examples in three splits."""

    dataset: str | None = Field(None, description="Hugging Face dataset id, or 'embedded' for the synthetic sample.")
    dataset_split: str = Field("train", description="Split of the hub dataset to read.")
    train: str | None = Field(None, description="Local file to read instead: .jsonl, .json, .csv or .parquet.")
    validation: str | None = Field(None, description="Local file for validation; without it rows are held out.")
    test: str | None = Field(None, description="Local file for the test split; without it rows are held out.")
    rows: int | None = Field(None, ge=3, description="Use at most this many rows, after the seeded shuffle.")
    test_rows: int | None = Field(None, ge=1, description="Keep at most this many test rows.")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="Share of the rows held out for validation.")
    test_fraction: float = Field(0.1, gt=0, lt=1, description="Share of the rows held out for testing.")
    disjoint: list[str] = Field(
        ["question", "context"], description="Columns whose values no two splits share; [] turns this off."
    )
    columns: dict[str, str] = Field(
        {"question": "question", "context": "context", "answer": "answer"},
        description="Our name of a column: its name in the file. A 'messages' column replaces all three.",
    )
    system: str | None = Field(
        "{context}", description="System message, a template over the columns; null leaves it out."
    )
    user: str = Field("{question}", description="User message, a template over the columns.")
    answer: str = Field("{answer}", description="Assistant message, a template over the columns.")
    model: str = Field(EMBEDDED, description="Backbone whose tokenizer and chat template measure the rows.")
    max_length: int = Field(1024, ge=8, description="Rows longer than this many tokens are dropped and counted.")
    seed: int = Field(42, description="Seed of shuffle, splits and the embedded generator.")


class FinetuneConfig(StepConfig):
    """LoRA or QLoRA on the answers (end token included), merged back into full weights."""

    model: str = Field(EMBEDDED, description="Backbone: directory, hub id, or 'embedded'.")
    data: str | None = Field(None, description="Directory that `prepare` wrote.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    scheduler: Literal["constant", "constant_with_warmup", "cosine", "linear"] = Field(
        "cosine", description="Learning-rate schedule."
    )
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="Share of the steps spent warming up.")
    batch_size: int = Field(8, ge=1, description="Rows per device and forward pass.")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    lora_rank: int = Field(16, ge=1, description="Rank r of the adapters.")
    lora_alpha: float = Field(16.0, gt=0, description="Scale of the adapters: updates are multiplied by alpha / r.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout in front of the adapters.")
    quantization: Literal["none", "nf4"] = Field("none", description="nf4 trains QLoRA; needs CUDA and bitsandbytes.")
    gradient_checkpointing: bool = Field(False, description="Trade compute for memory.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping.")
    optimizer: str = Field("adamw_torch", description="Optimizer name as transformers' TrainingArguments knows it.")
    dtype: Dtype = Field("auto", description="Weights' dtype; auto is bfloat16 on a GPU and float32 on a CPU.")
    eval_steps: int = Field(50, ge=1, description="Optimizer steps between evaluations.")
    save_steps: int = Field(50, ge=1, description="Optimizer steps between checkpoints.")
    eval_rows: int | None = Field(None, ge=1, description="Evaluate on at most this many validation rows.")
    seed: int = Field(42, description="Seed of data order and adapters.")


class DistillConfig(StepConfig):
    """The backbone's own greedy answers to the training and validation prompts: what its heads will have to predict."""

    model: str = Field(EMBEDDED, description="Fine-tuned backbone: directory or hub id.")
    data: str | None = Field(None, description="Directory that `prepare` wrote.")
    rows: int | None = Field(None, ge=1, description="Answer at most this many training prompts.")
    validation_rows: int | None = Field(None, ge=1, description="Answer at most this many validation prompts.")
    max_new_tokens: int = Field(128, ge=1, description="Length limit of one answer, in tokens.")
    batch_size: int = Field(32, ge=1, description="Prompts answered together.")
    dtype: Dtype = Field("auto", description="Weights' dtype; auto is bfloat16 on a GPU and float32 on a CPU.")
    quantization: Quantization = Field("none", description=QUANTIZATION_HELP)


class TrainHeadsConfig(StepConfig):
    """Medusa-1: K heads on the frozen backbone (arXiv:2401.10774, section 2.2.1)."""

    model: str = Field(EMBEDDED, description="Fine-tuned backbone: directory or hub id.")
    data: str | None = Field(None, description="Directory that `distill` or `prepare` wrote.")
    heads: int = Field(5, ge=1, le=16, description="Number of heads K; head k predicts the token k+2 places ahead.")
    layers: int = Field(1, ge=1, le=4, description="Residual blocks per head, each with weights of its own.")
    epochs: float = Field(3.0, gt=0, description="Passes over the cached hidden states.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Share of the steps spent warming up.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    decay: float = Field(0.8, gt=0, le=1, description="Weight of head k's loss is decay ** k (the paper's lambda_k).")
    batch_tokens: int = Field(1024, ge=16, description="Answer positions per optimizer step and process.")
    gradient_clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    evaluations: int = Field(5, ge=1, description="Held-out evaluations over the run; the best one's heads are kept.")
    checkpoint_seconds: float = Field(120.0, gt=0, description="Seconds between checkpoints.")
    feature_batch_tokens: int = Field(4096, ge=16, description="Tokens per backbone forward while caching.")
    dtype: Dtype = Field("auto", description="Dtype of backbone and heads; auto is bfloat16 on a GPU, else float32.")
    quantization: Quantization = Field("none", description=QUANTIZATION_HELP)
    seed: int = Field(42, description="Seed of data order and biases.")


class TuneConfig(StepConfig):
    """Rank statistics, measured step times, and the draft tree that maximises tokens per second."""

    model: str | None = Field(None, description="Directory that `train-heads` wrote.")
    data: str | None = Field(
        None, description="Directory that `distill` or `prepare` wrote: validation prompts calibrate, training answers "
        "make the phrasebook.",
    )  # fmt: skip
    prompts: int = Field(100, ge=1, description="Validation prompts with the model's answers that are counted.")
    max_new_tokens: int = Field(128, ge=1, description="Length limit of one answer, in tokens.")
    max_nodes: int = Field(64, ge=1, le=64, description="Largest tree considered, root included.")
    max_rank: int = Field(10, ge=1, le=64, description="Ranks of a head that may become nodes.")
    ngram_lengths: list[int] = Field(
        [0, 2, 4, 6, 8], description="Lengths of the n-gram branch to try; [0] turns the branch off."
    )
    dynamic: bool = Field(True, description="Also try trees grown in every step from what heads and context say.")
    width: int = Field(6, ge=1, le=64, description="Choices of a head that a dynamic tree looks at.")
    phrasebook: bool = Field(True, description="Also draft what usually follows in the training answers.")
    batch_sizes: list[int] = Field([1], min_length=1, description="Numbers of sequences decoded together to tune for.")
    draft_coverage: float = Field(
        0.95, gt=0, le=1, description="Heads draft the tokens that make up this share of all answers; 1 drafts any."
    )
    trials: int = Field(5, ge=3, description="Timing passes per tree size; the median counts.")
    finalist_answers: int = Field(
        48, ge=1, description="Answers that each of the likeliest choices decodes, or 8 per sequence."
    )
    steps: StepMode = Field("auto", description=STEPS_HELP)
    dtype: Dtype = Field("auto", description="Weights' dtype; auto is bfloat16 on a GPU and float32 on a CPU.")
    quantization: Quantization = Field("none", description=QUANTIZATION_HELP)
    seed: int = Field(42, description="Seed of the prompt choice.")


class CompareConfig(StepConfig):
    """Plain decoding, Medusa decoding and `transformers.generate` on the same prompts, and a report."""

    model: str | None = Field(None, description="Directory that `tune` wrote.")
    data: str | None = Field(None, description="Directory that `prepare` wrote; its test prompts are answered.")
    prompts: int | None = Field(None, ge=1, description="Use at most this many test prompts.")
    max_new_tokens: int = Field(128, ge=1, description="Length limit of one answer, in tokens.")
    trials: int = Field(5, ge=1, description="Timed, interleaved passes over the prompts.")
    warmup_prompts: int = Field(8, ge=0, description="Prompts answered by every decoder before timing starts.")
    stop: list[str] = Field([], description="Strings that end an answer.")
    sql: bool = Field(True, description="Run answers and references in SQLite on each row's schema.")
    extra_nodes: list[int] = Field([], description="Also measure the best trees of these sizes, without n-gram branch.")
    steps: StepMode = Field("auto", description=STEPS_HELP)
    examples: int = Field(6, ge=0, description="Example answers shown in the report.")
    dtype: Dtype = Field("auto", description="Weights' dtype; auto is bfloat16 on a GPU and float32 on a CPU.")
    quantization: Quantization = Field("none", description=QUANTIZATION_HELP)
    seed: int = Field(42, description="Seed of the prompt choice.")


class ExportConfig(StepConfig):
    """A model directory in the layout of another program."""

    model: str = Field(description="Directory that `train-heads` or `tune` wrote.")
    format: Literal["tgi", "vllm", "medusa"] = Field(description="Whose layout.")
    backbone_path: str | None = Field(None, description="Where the server will find the backbone.")


class ImportConfig(StepConfig):
    """Published heads as a model directory."""

    source: str = Field(description="Directory, file or hub id of the heads.")
    backbone: str = Field(description="Directory or hub id of the backbone they were trained for.")


STEPS: dict[str, type[StepConfig]] = {
    "prepare": PrepareConfig,
    "finetune": FinetuneConfig,
    "distill": DistillConfig,
    "train-heads": TrainHeadsConfig,
    "tune": TuneConfig,
    "compare": CompareConfig,
}
"""Steps in the order in which a recipe runs them."""

C = TypeVar("C", bound=StepConfig)


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean 'x'?` for the closest known name, or the list of all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def _problem(prefix: str, kind: type[StepConfig], error: Mapping[str, Any]) -> str:
    path = ".".join([prefix, *(str(part) for part in error["loc"])])
    if error["type"] == "extra_forbidden":
        known: Sequence[str] = list(kind.model_fields)
        for part in error["loc"][:-1]:  # a section inside the section
            inner = kind.model_fields[str(part)].annotation
            known = list(next((k for k in (inner, *get_args(inner)) if hasattr(k, "model_fields")), kind).model_fields)
        return f"unknown key '{path}': {nearest(str(error['loc'][-1]), known)}"
    return f"'{path}': {error['msg'][0].lower()}{error['msg'][1:]}, given {error['input']!r}"


def build(kind: type[C], values: Mapping[str, Any], *, step: str) -> C:
    """Validates `values` into a step's configuration.

    Raises: ConfigError with every problem found: unknown keys (with the nearest known name), wrong types, ranges.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        problems = [_problem(step, kind, dict(e)) for e in error.errors()]
        raise ConfigError(problems, hint=f"`gorgon {step} --help` lists every key with its default") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises: ConfigError when the file is missing, is not YAML, or is not a mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError([f"no such file: {path}"], hint="check the path of the recipe or config file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} is not valid YAML: {error}"]) from error
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}"]) from error
    if not isinstance(loaded, dict):
        raise ConfigError([f"{path} must be a mapping of keys to values, not {type(loaded).__name__}"])
    return {str(key): value for key, value in loaded.items()}


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "c=x"]` as `{"a.b": 1, "c": "x"}`; values are read as YAML.

    Raises: ConfigError when one has no `=` or no key, or its value is not YAML.
    """
    parsed: dict[str, Any] = {}
    problems = []
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            problems.append(f"'--set {text}' is not of the form key=value")
            continue
        try:
            parsed[key.strip()] = parse_value(value)
        except yaml.YAMLError:
            problems.append(f"'--set {text}': the value is not valid YAML")
    if problems:
        raise ConfigError(problems, hint="for example: --set train-heads.epochs=3")
    return parsed


def parse_value(text: str) -> Any:
    """A value from the command line: YAML, except that `1e-3` is a number, as every user means it.

    YAML 1.1 reads it as a string.
    """
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value) if any(c.isdigit() for c in value) else value
        except ValueError:
            return value
    return value
