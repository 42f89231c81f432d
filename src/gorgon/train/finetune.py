"""Fine-tuning: LoRA or QLoRA on the answers alone, their end token included, merged back into full weights.

Sources: LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314. The loop is TRL's; what is learnt from is decided here,
because the usual set-up (loss over the whole text, padding = end token, padding ignored) also trains on the prompt
and never teaches the model to stop.
Shapes: B texts in a batch, T positions, V vocabulary.
"""

from __future__ import annotations

import gc
import json
import math
import random
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gorgon.artifacts import StepResult, StepRun, require_step_file
from gorgon.config import FinetuneConfig
from gorgon.core.loss import IGNORE
from gorgon.errors import Interrupted, MissingDependencyError
from gorgon.models.backbone import Backbone, load_backbone, load_tokenizer, pick_device, pick_dtype, resolve_model
from gorgon.progress import bar, say
from gorgon.train.checkpoint import curve_writer
from gorgon.train.features import Text, read_texts
from gorgon.train.processes import ALONE, Processes, run_step_together, together
from gorgon.train.watch import Watch, answer_loss

TRAINER = "trainer"
BEST = "best"
CURVES = "tensorboard"
SORTED_BATCHES = 32
"""Batches whose rows are sorted by length together: more means less padding, fewer means more chance."""
MERGE_TOLERANCE = 0.05
"""Relative change of the loss that rounding the merged weights explains."""
LOG_STEPS = 10
"""Optimizer steps between two points of the training curves."""
CHECKPOINT_FILES = ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")


def finetune(config: FinetuneConfig, out: str | Path, *, force: bool = False) -> StepResult:
    """Fine-tunes a backbone on the answers and writes a plain model directory with the merged weights.

    Source: arXiv:2106.09685, section 4; with `quantization: nf4` arXiv:2305.14314, section 3.
    Args: config.data: directory with `train.jsonl` and `validation.jsonl`.
    Raises: DataError when the data is missing, empty or too long for the backbone; ModelError when the backbone cannot
        be used; MissingDependencyError when nf4 is asked for without CUDA or bitsandbytes; Interrupted on SIGTERM,
        after writing a checkpoint that the same command resumes; PeerError when another of several processes failed
        first.
    Invariant: the weights kept are those with the lowest held-out loss, in nats per answer token. Without dropout, W
        processes give, up to rounding, the weights that one process gives with W times the `batch_size`.
    """
    files = {
        name: require_step_file(config.data, f"{name}.jsonl", field="data", step="prepare")
        for name in ("train", "validation")
    }
    if config.quantization == "nf4":
        _require_nf4()
    inputs = {"model": resolve_model(config.model), "data": config.data}

    with together() as processes:

        def body(run: StepRun) -> None:
            with _quiet():
                _finetune(run, config, files, processes)

        return run_step_together(processes, "finetune", config, inputs, Path(out), body, force=force)


def _finetune(run: StepRun, config: FinetuneConfig, files: dict[str, Path], processes: Processes) -> None:
    with run.timed("load"):
        backbone = _load(config)
        texts = {split: read_texts(run, backbone, file, split) for split, file in files.items()}
    held_out = texts["validation"][: config.eval_rows]
    with run.timed("train"):
        watch = _run_trainer(run, config, backbone, texts["train"], held_out, processes)
    if not processes.first:
        return
    name, device = backbone.name, backbone.device
    del backbone
    gc.collect()  # the trainer and its model refer to each other; the merge needs their memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with run.timed("merge"):
        merged, loss = _merge(config, run.checkpoints / BEST, held_out)
        merged.model.save_pretrained(run.directory)
        merged.tokenizer.save_pretrained(run.directory)
    best = watch.best
    if config.quantization == "none" and abs(loss - best["loss"]) > MERGE_TOLERANCE * best["loss"]:
        run.warnings.append(
            f"the merged weights have a held-out loss of {loss:.4f}, the adapters {best['loss']:.4f}: "
            "did the backbone's files change meanwhile?"
        )
        say(run.warnings[-1])
    say(f"held-out loss {watch.evaluations[0]['loss']:.4f} before, {loss:.4f} after merging step {best['step']}")
    run.metrics.update(
        backbone=name, loss_before=watch.evaluations[0]["loss"], loss_after=loss, best_step=best["step"],
        best_loss=best["loss"], steps=watch.evaluations[-1]["step"], evaluations=watch.evaluations,
        evaluated_rows=len(held_out), parameters=merged.parameters, processes=processes.count,
    )  # fmt: skip
    shutil.copytree(run.checkpoints / CURVES, run.directory / CURVES)


def training_rows(texts: Sequence[Text]) -> Any:
    """A `datasets.Dataset` with `input_ids` and `labels`: the prompt ignored, the answer and its end token kept."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [text.ids for text in texts],
            "labels": [[IGNORE] * text.prompt_length + text.ids[text.prompt_length :] for text in texts],
        }
    )


def data_order(lengths: Sequence[int], batch_size: int, epochs: float, seed: int) -> list[int]:
    """Row numbers of all epochs in the order of training; consecutive `batch_size` rows are of like length.

    Depends on the arguments alone. transformers' own length-grouped sampler draws from the global random state at the
    start of an epoch, so that a resumed run would go on with other rows than the run that was stopped.
    Invariant: after whole epochs every row has come equally often.
    """
    rng = random.Random(f"rows {seed}")
    order: list[int] = []
    left_over: list[int] = []
    wanted = math.ceil(epochs * len(lengths))
    while len(order) < wanted:
        epoch = rng.sample(range(len(lengths)), len(lengths))
        pool = left_over + epoch
        left_over = pool[len(pool) - len(pool) % batch_size :]
        batches = []
        size = batch_size * SORTED_BATCHES
        for start in range(0, len(pool) - len(left_over), size):
            rows = sorted(pool[start : min(start + size, len(pool) - len(left_over))], key=lambda i: lengths[i])
            batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        order += [row for batch in batches for row in batch]
        if len(order) + len(left_over) >= wanted:
            order += left_over
    return order[:wanted]


def build_trainer(
    config: FinetuneConfig, backbone: Backbone, texts: Sequence[Text], folder: Path, processes: int = 1
) -> Any:
    """TRL's SFTTrainer on a LoRA-adapted backbone, writing its checkpoints below `folder`.

    Its one epoch is all of ours, in `data_order`. Labels come ready-made (`training_rows`). Of W processes
    each takes every W-th batch of the order; those of one step are of like length, so that none waits for another.
    """
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(config.seed)  # the adapters' first values are drawn before the trainer sets its own seed
    on_gpu = backbone.device.type == "cuda"
    arguments = SFTConfig(
        output_dir=str(folder), num_train_epochs=1.0, max_steps=total_steps(config, len(texts), processes),
        learning_rate=config.learning_rate, lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup_fraction, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation, max_grad_norm=config.max_grad_norm,
        optim=config.optimizer, weight_decay=0.0, seed=config.seed, data_seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=on_gpu and backbone.dtype == torch.bfloat16, fp16=on_gpu and backbone.dtype == torch.float16,
        use_cpu=not on_gpu, dataloader_pin_memory=on_gpu, train_sampling_strategy="sequential",
        logging_steps=LOG_STEPS, eval_strategy="no", save_strategy="steps", save_steps=config.save_steps,
        save_total_limit=2, report_to="none", disable_tqdm=True,
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        # only an expert that no token was sent to leaves its adapters without a gradient
        ddp_find_unused_parameters=any("expert" in name for name in backbone.text_config.to_dict()),
    )  # fmt: skip
    if arguments.n_gpu > 1:  # one process drives one GPU: TRL refuses DataParallel
        arguments._n_gpu = 1
    adapters = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        bias="none", task_type="CAUSAL_LM", target_modules="all-linear",
    )  # fmt: skip
    order = data_order([len(text.ids) for text in texts], config.batch_size * processes, config.epochs, config.seed)
    trainer = SFTTrainer(
        model=backbone.model, args=arguments, train_dataset=training_rows(texts).select(order),
        processing_class=backbone.tokenizer, peft_config=adapters,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to data
    return trainer


def _run_trainer(
    run: StepRun,
    config: FinetuneConfig,
    backbone: Backbone,
    texts: Sequence[Text],
    held_out: Sequence[Text],
    processes: Processes = ALONE,
) -> Watch:
    folder = run.checkpoints / TRAINER
    checkpoint = processes.share(latest_checkpoint(folder, processes.count))
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    trainer = build_trainer(config, backbone, texts, folder, processes.count)
    total = total_steps(config, len(texts), processes.count)
    drawn = run.checkpoints / CURVES if processes.first else None
    with curve_writer(drawn, step) as curves, bar("fine-tuning", total) as shown:
        watch = Watch(
            run.checkpoints, held_out, every=config.eval_steps, total=total, step=step, curves=curves, shown=shown,
            processes=processes,
        )  # fmt: skip
        trainer.add_callback(watch)
        if checkpoint is None:
            watch.look(trainer.model, 0)
        else:
            say(f"resuming at step {step}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if watch.stopped:
        processes.barrier()  # every process has written its part of the checkpoint
        raise Interrupted(f"stopped at step {trainer.state.global_step} of {total}", hint="the same command resumes")
    run.metrics["trainable_parameters"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return watch


def total_steps(config: FinetuneConfig, rows: int, processes: int = 1) -> int:
    """Optimizer steps of the whole run."""
    batches = math.ceil(math.ceil(config.epochs * rows) / (config.batch_size * processes))
    steps = math.ceil(batches / config.gradient_accumulation)
    return min(steps, config.max_steps or steps)


def latest_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """The newest of the trainer's checkpoints that was written to its end; a kill can leave half of one."""
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    files = [*CHECKPOINT_FILES, *random_states]
    candidates = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for path in candidates:
        if all((path / name).is_file() for name in files):
            try:
                json.loads((path / CHECKPOINT_FILES[0]).read_text())
            except ValueError:
                continue  # its last file was being written
            return path
    return None


def _require_nf4() -> None:
    """Raises: MissingDependencyError before anything is loaded."""
    from importlib.util import find_spec

    if not torch.cuda.is_available():
        raise MissingDependencyError(
            "4-bit training needs a CUDA GPU, and there is none", field="finetune.quantization", value="nf4",
            allowed="none", hint="set finetune.quantization=none",
        )  # fmt: skip
    if find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            "4-bit training needs the package bitsandbytes", field="finetune.quantization", value="nf4",
            allowed="none", hint="pip install 'gorgon-llm[gpu]'",
        )  # fmt: skip


def _load(config: FinetuneConfig) -> Backbone:
    """The backbone to put adapters on; with nf4 its weights in 4 bits (arXiv:2305.14314, section 3)."""
    if config.quantization == "none":
        return load_backbone(config.model, dtype=config.dtype)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = pick_device()
    dtype = pick_dtype(config.dtype, device)
    source = resolve_model(config.model)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    own = torch.cuda.current_device()  # one process, one GPU
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=nf4, device_map={"": own})
    return Backbone(source, model, load_tokenizer(config.model), device, dtype)


def _merge(config: FinetuneConfig, adapters: Path, held_out: Sequence[Text]) -> tuple[Backbone, float]:
    """The unquantized backbone with the adapters added to its weights, and its held-out loss."""
    from peft import PeftModel

    backbone = load_backbone(config.model, dtype=config.dtype)
    backbone.model = PeftModel.from_pretrained(backbone.model, adapters).merge_and_unload()
    return backbone, answer_loss(backbone.model, held_out, backbone.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block transformers shows no bars, logs errors only, and keeps its own deprecations to itself."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
