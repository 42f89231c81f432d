"""A recipe: steps chained by their directories, each run in order or reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gorgon.artifacts import StepResult
from gorgon.cloud.config import SageMakerConfig
from gorgon.config import (
    EMBEDDED,
    STEPS,
    CompareConfig,
    DistillConfig,
    ExportConfig,
    FinetuneConfig,
    PrepareConfig,
    StepConfig,
    TrainHeadsConfig,
    TuneConfig,
    build,
    nearest,
    parse_assignments,
    read_yaml,
)
from gorgon.errors import ConfigError
from gorgon.progress import say

PLACES = ("local", "job", "sagemaker")
"""Where a recipe can run."""
RECIPES = Path(__file__).parent / "recipes"
CLOUD = "sagemaker"
RECIPE_KEYS = ("name", "description", "model", *STEPS, CLOUD)


@dataclass(frozen=True)
class Recipe:
    """A named chain of steps with their resolved configurations, in the order in which they run."""

    name: str
    description: str
    steps: dict[str, StepConfig]
    sagemaker: SageMakerConfig = field(default_factory=SageMakerConfig)
    model: str = EMBEDDED


def find_recipe(name: str) -> Path:
    """A recipe's file from a path, or from the name of a recipe that ships with the package.

    Raises: ConfigError naming the recipes there are.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    built_in = RECIPES / f"{name}.yaml"
    if not built_in.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise ConfigError(
            [f"there is no recipe '{name}': {nearest(name, known)}"], hint="give a built-in recipe's name, or a file"
        )
    return built_in


def load_recipe(path: Path, assignments: Sequence[str], out: Path) -> Recipe:
    """Reads a recipe, applies `step.key=value` assignments, and fills in each step's inputs from the steps before it.

    A step runs when its section is there; `--set finetune=null` leaves one out. A recipe's `model` is the backbone to
    start from.
    Args: out: directory under which each step gets its own.
    Raises: ConfigError with every problem found.
    """
    document = read_yaml(path)
    problems = [f"unknown key '{k}' in {path}: {nearest(k, RECIPE_KEYS)}" for k in document if k not in RECIPE_KEYS]
    problems += [
        f"'{step}' in {path} must be a mapping of settings; {{}} takes every default"
        for step in (*STEPS, CLOUD)
        if not isinstance(document.get(step, {}), dict)
    ]
    sections = {step: dict(document[step]) for step in (*STEPS, CLOUD) if isinstance(document.get(step), dict)}
    model = str(document.get("model", EMBEDDED))
    for key, value in parse_assignments(assignments).items():
        step, dot, name = key.partition(".")
        if key == "model":
            model = str(value)
        elif step not in (*STEPS, CLOUD):
            problems.append(f"unknown key '{key}' in --set: {nearest(step, ['model', *STEPS, CLOUD])}")
        elif dot and step == CLOUD:
            _assign(sections.setdefault(step, {}), name, value)
        elif dot:
            sections.setdefault(step, {})[name] = value
        elif value is None:
            sections.pop(step, None)
        else:
            problems.append(
                f"'--set {key}=...' needs a setting, as in {key}.NAME=VALUE (or {key}=null to leave it out)"
            )
    steps: dict[str, StepConfig] = {}
    cloud = SageMakerConfig()
    try:
        cloud = build(SageMakerConfig, sections.pop(CLOUD, {}), step=CLOUD)
    except ConfigError as error:
        problems.extend(error.problems)
    for step, values in _wired(sections, model, out).items():
        try:
            steps[step] = build(STEPS[step], values, step=step)
        except ConfigError as error:
            problems.extend(error.problems)
    if not steps and not problems:
        problems.append(f"{path} has no steps; give at least one of: {', '.join(STEPS)}")
    if problems:
        raise ConfigError(problems, hint="`gorgon STEP --help` lists a step's settings with their defaults")
    return Recipe(
        str(document.get("name", path.stem)), str(document.get("description", "")).strip(), steps, cloud, model
    )


def _assign(section: dict[str, Any], name: str, value: Any) -> None:
    """`endpoint.instance_type=x` sets one setting of the section inside the section."""
    outer, dot, inner = name.partition(".")
    if dot and isinstance(section.get(outer, {}), dict):
        section[outer] = {**section.get(outer, {}), inner: value}
    else:
        section[name] = value


def _wired(sections: Mapping[str, dict[str, Any]], model: str, out: Path) -> dict[str, dict[str, Any]]:
    """Sections in running order with their inputs: the outputs of earlier steps, unless the recipe names others."""
    wired = {}
    backbone, data, with_heads = model, str(out / "prepare"), str(out / "train-heads")
    written = str(out / "distill") if "distill" in sections else data  # what the model itself writes, if it was asked
    for step in STEPS:
        if step not in sections:
            continue
        inputs = {
            "prepare": {"model": model},
            "finetune": {"model": model, "data": data},
            "distill": {"model": backbone, "data": data},
            "train-heads": {"model": backbone, "data": written},
            "tune": {"model": with_heads, "data": written},
            "compare": {"model": str(out / "tune"), "data": data},
        }[step]
        wired[step] = {**inputs, **sections[step]}
        if step == "finetune":
            backbone = str(out / "finetune")
    return wired


def run_recipe(recipe: Recipe, out: Path, *, force: bool = False) -> dict[str, StepResult]:
    """Runs the steps in order; a step whose settings and inputs are unchanged is reused.

    Raises: what the steps raise; steps finished before stay and are reused by the next run.
    """
    results = {}
    for number, (step, config) in enumerate(recipe.steps.items(), start=1):
        say(f"[{number}/{len(recipe.steps)}] {step}")
        results[step] = run_one(config, out / step, force=force)
        done = results[step]
        how = "unchanged, reused" if done.reused else f"done in {done.manifest['seconds']:.0f} s"
        say(f"      {how}: {out / step}")
        for warning in done.manifest.get("warnings", []):
            say(f"      note: {warning}")
    return results


def run_elsewhere(recipe: Recipe, out: Path, *, on: str, recipe_file: Path, dry_run: bool) -> dict[str, Any]:
    """Runs a recipe's steps as jobs: `job` here, in directories laid out like /opt/ml, or `sagemaker` there.

    Args: dry_run: show the jobs, or every API call, instead.
    Returns: where each step's result is, or what would be done.
    """
    if on == "job":
        from gorgon.cloud.local import run_chain
        from gorgon.cloud.plan import plan_jobs

        jobs = plan_jobs(recipe.steps, out, run=recipe.name, stamp="local")
        if dry_run:
            return {"name": recipe.name, "jobs": [{"argv": j.argv(out / j.step), **asdict(j)} for j in jobs]}
        return {step: str(path) for step, path in run_chain(jobs, out).items()}
    from gorgon.cloud.run import CloudRun

    cloud_run = CloudRun(recipe.name, recipe.steps, recipe.sagemaker, out, recipe_file, recipe.model)
    if dry_run:
        from gorgon.cloud.dry import dry_run as show_calls

        return show_calls(cloud_run)
    from gorgon.cloud.submit import after_jobs, run_jobs

    results = run_jobs(cloud_run)
    return {**results, **after_jobs(cloud_run, results, report_endpoints)}


def report_endpoints(measured: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Numbers and page of a comparison on endpoints, as `gorgon compare` makes them; returns the numbers."""
    from gorgon.bench.endpoints import report

    return report(measured, out)


def run_one(  # noqa: PLR0911 - one return a step
    config: StepConfig, out: Path, *, force: bool = False
) -> StepResult:  # fmt: skip
    """Runs the step that a configuration belongs to; heavy imports happen here, so that `gorgon --help` is instant."""
    match config:
        case PrepareConfig():
            from gorgon.data.prepare import prepare
            from gorgon.models.backbone import load_tokenizer

            return prepare(config, out, tokenizer=load_tokenizer(config.model), force=force)
        case FinetuneConfig():
            from gorgon.train.finetune import finetune

            return finetune(config, out, force=force)
        case DistillConfig():
            from gorgon.decode.distill import distill

            return distill(config, out, force=force)
        case TrainHeadsConfig():
            from gorgon.train.heads import train_heads

            return train_heads(config, out, force=force)
        case TuneConfig():
            from gorgon.decode.tune import tune

            return tune(config, out, force=force)
        case CompareConfig():
            from gorgon.bench.compare import compare

            return compare(config, out, force=force)
        case ExportConfig():
            from gorgon.models.export import export_model

            return export_model(config, out, force=force)
    raise AssertionError(f"no step for {type(config).__name__}")
