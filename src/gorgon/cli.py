"""The command line: parse, build a configuration, make one call, print; heavy imports wait until they are needed."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gorgon import ranks
from gorgon.bench.commands import register as register_bench
from gorgon.cloud.commands import register as register_cloud
from gorgon.config import (
    QUANTIZATION_HELP,
    STEPS,
    ExportConfig,
    ImportConfig,
    Quantization,
    StepConfig,
    build,
    nearest,
    parse_value,
)
from gorgon.errors import ConfigError, GorgonError
from gorgon.serve.commands import register as register_serve

if TYPE_CHECKING:
    from gorgon.artifacts import StepResult

app = typer.Typer(
    name="gorgon",
    help="Makes a fine-tuned language model answer several times faster with exactly the same answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
ForceFlag = Annotated[bool, typer.Option("--force", help="Run even if nothing has changed since the last run.")]
OutOption = Annotated[Path, typer.Option("--out", help="Directory to write.")]
ProcessesOption = Annotated[
    int, typer.Option("--processes", min=1, help="Start so many processes, one per GPU, each with a batch of its own.")
]
SetOption = Annotated[list[str], typer.Option("--set", metavar="STEP.KEY=VALUE", help="Change a setting; repeatable.")]


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _step_command(step: str, kind: type[StepConfig]) -> Callable[..., None]:
    """A command with one option per setting of the step."""

    def command(out: Path, force: bool, as_json: bool, processes: int = 1, **given: str | None) -> None:
        values = {name: _typed(kind, name, text) for name, text in given.items() if text is not None}
        config = build(kind, values, step=step)
        if processes > 1 and ranks.this().count == 1:
            from gorgon.train.launch import run_processes

            options = [part for name, text in given.items() if text is not None for part in (_option(name), text)]
            options += ["--force"] * force + ["--json"] * as_json
            raise SystemExit(run_processes([step, "--out", str(out), *options], processes))
        from gorgon.interrupts import graceful
        from gorgon.pipeline import run_one

        with graceful():
            result = run_one(config, out, force=force)
        if not ranks.this().first:
            return
        if as_json:
            _print_json({"directory": str(result.directory), "reused": result.reused, **result.manifest})
        else:
            print(result.directory)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("out", keyword, annotation=OutOption),
        inspect.Parameter("force", keyword, default=False, annotation=ForceFlag),
        inspect.Parameter("as_json", keyword, default=False, annotation=JsonFlag),
    ]
    if step in ranks.TOGETHER:
        parameters.append(inspect.Parameter("processes", keyword, default=1, annotation=ProcessesOption))
    for name, field in kind.model_fields.items():
        shown = "none" if field.default is None else json.dumps(field.default)
        option = typer.Option(_option(name), metavar="VALUE", show_default=False, help=f"{field.description} [{shown}]")
        parameters.append(inspect.Parameter(name, keyword, default=None, annotation=Annotated[str | None, option]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = kind.__doc__
    return command


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _typed(kind: type[StepConfig], name: str, text: str) -> Any:
    """A setting's text as YAML, except where the setting is text and `007` must stay what it is."""
    value = parse_value(text)
    is_text = "str" in str(kind.model_fields[name].annotation)
    return text if is_text and not isinstance(value, (list, dict, type(None))) else value


for _step, _kind in STEPS.items():
    app.command(_step)(_step_command(_step, _kind))


@app.command("step")
def step_(
    name: Annotated[str, typer.Argument(help="The step to run, such as train-heads.")],
    base_dir: Annotated[Path, typer.Option(help="A directory laid out like SageMaker's /opt/ml.")] = Path("/opt/ml"),
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes for finetune and train-heads [one per GPU of the instance].")
    ] = None,
) -> None:
    """Runs a step as a job: inputs, checkpoints and results where a SageMaker container has them."""
    from gorgon.cloud.container import process_count, run_in_container, run_in_processes

    count = process_count(name, base_dir, processes)
    if count > 1:
        from gorgon.train.launch import run_processes

        raise SystemExit(run_in_processes(name, base_dir, count, run_processes))
    from gorgon.pipeline import run_one

    run_in_container(name, base_dir, run_one)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of a built-in recipe.")],
    assignments: SetOption = [],  # noqa: B006 - typer copies it
    out: Annotated[Path | None, typer.Option(help="Directory for all steps [runs/NAME].")] = None,
    force: ForceFlag = False,
    on: Annotated[str, typer.Option(help="local, job (here, as a container would) or sagemaker.")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print resolved steps, or API calls, and stop.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Runs a recipe: its steps in order, each reused when nothing changed."""
    from gorgon.interrupts import graceful
    from gorgon.pipeline import PLACES, find_recipe, load_recipe, run_elsewhere, run_recipe

    path = find_recipe(recipe)
    directory = out if out is not None else Path("runs") / path.stem
    loaded = load_recipe(path, assignments, directory)
    if on not in PLACES:
        raise ConfigError([f"'--on {on}': {nearest(on, PLACES)}"])
    if on != "local" and force:
        raise ConfigError(
            ["'--force' is for steps that run in this process"], hint="choose another --out to start over"
        )
    if on != "local":
        _print_json(run_elsewhere(loaded, directory, on=on, recipe_file=path, dry_run=dry_run))
        return
    if dry_run:
        steps = {step: config.model_dump(mode="json") for step, config in loaded.steps.items()}
        _print_json({"name": loaded.name, "description": loaded.description, "out": str(directory), "steps": steps})
        return
    with graceful():
        results = run_recipe(loaded, directory, force=force)
    summary = None
    if "compare" in results:
        summary = json.loads((directory / "compare" / "summary.json").read_text(encoding="utf-8"))
    if as_json:
        steps = {step: {"directory": str(r.directory), "reused": r.reused, "seconds": r.manifest["seconds"],
                        "metrics": r.manifest["metrics"]} for step, r in results.items()}  # fmt: skip
        _print_json({"name": loaded.name, "steps": steps, "summary": summary})
    elif summary is not None:
        _print_summary(summary, directory / "compare")
    else:
        print(directory)


@app.command()
def quickstart(
    assignments: SetOption = [],  # noqa: B006 - typer copies it
    out: Annotated[Path | None, typer.Option(help="Directory for all steps [runs/quickstart].")] = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Runs the built-in recipe `quickstart`: everything, on the embedded model and sample, in a few minutes."""
    run("quickstart", assignments, out, force, as_json=as_json)


def _print_summary(summary: dict[str, Any], directory: Path) -> None:
    speed, latency = summary["speedup"], summary["latency_ms"]
    print(f"exact match with plain decoding   {summary['exact_match']:.4f}")
    print(f"tokens per step                   {summary['tokens_per_step']:.2f}")
    print(f"speed-up over plain decoding      {speed['vs_plain']:.2f}x")
    print(f"speed-up over transformers        {speed['vs_transformers']:.2f}x")
    for name in ("plain", "medusa", "transformers"):
        row = latency[name]
        print(f"latency {name:<13} mean {row['mean']:.1f} ms   p50 {row['p50']:.1f}   p90 {row['p90']:.1f}")
    print(f"report: {directory / 'report.html'}")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Directory that `tune` wrote.")],
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' reads it from stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts instead: a text file (one per line) or JSONL.")] = None,
    system: Annotated[str | None, typer.Option(help="System message, such as the schema.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of an answer, in tokens.")] = 256,
    stop: Annotated[list[str], typer.Option(help="A string that ends the answer; repeatable.")] = [],  # noqa: B006
    plain: Annotated[bool, typer.Option("--plain", help="Decode without drafts, to compare.")] = False,
    quantization: Annotated[Quantization, typer.Option(help=QUANTIZATION_HELP)] = "none",
    as_json: JsonFlag = False,
) -> None:
    """Answers a prompt, or every prompt of a file, as it decodes; speed goes to stderr."""
    from gorgon.decode.prompts import conversation, read_prompts

    if (prompt is None) == (file is None):
        raise GorgonError(
            "give either a prompt or --file", field="prompt", hint="gorgon generate MODEL 'your question'"
        )
    if file is not None:
        chats = read_prompts(file, system)
    else:
        chats = [conversation(sys.stdin.read() if prompt == "-" else str(prompt), system)]

    from gorgon.data.chat import encode_prompt
    from gorgon.decode.load import load_engine
    from gorgon.decode.request import Request
    from gorgon.decode.text import TextStream
    from gorgon.progress import say

    engine = load_engine(model, quantization=quantization)
    engine = engine.plain() if plain else engine
    tokenizer = engine.backbone.tokenizer
    answers = []
    for messages in chats:
        stream = TextStream(tokenizer, stop)
        shown = taken = 0
        for generation in engine.stream(Request(encode_prompt(tokenizer, messages), max_new_tokens, stop)):
            for token in generation.token_ids[taken:]:
                stream.push(token)
            taken = len(generation.token_ids)
            if not as_json:
                sys.stdout.write(stream.text[shown:])
                sys.stdout.flush()
                shown = max(shown, len(stream.text))
        rest = stream.finish()
        if not as_json:
            print(rest[shown:])
        seconds = max(generation.seconds, 1e-9)
        rate = len(generation.token_ids) / seconds
        answers.append(
            {"text": rest, "tokens": len(generation.token_ids), "finish": generation.finish,
             "tokens_per_step": round(generation.tokens_per_step, 3), "tokens_per_s": round(rate, 1),
             "seconds": round(seconds, 4)}
        )  # fmt: skip
        say(
            f"{len(generation.token_ids)} tokens, {generation.tokens_per_step:.2f} tokens per step, {rate:.0f} tokens/s"
        )
    if as_json:
        _print_json(answers)


@app.command("export")
def export_(
    model: Annotated[str, typer.Argument(help="Directory that `train-heads` or `tune` wrote.")],
    format_: Annotated[str, typer.Option("--format", help="tgi, vllm or medusa (FasterDecoding).")],
    out: OutOption,
    backbone_path: Annotated[
        str | None, typer.Option(help="Where the server will find the backbone [tgi: /opt/ml/model/base-model].")
    ] = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Writes heads and backbone as TGI, vLLM or FasterDecoding/Medusa read them, and says how to serve them."""
    from gorgon.models.export import export_model

    values = {"model": model, "format": format_, "backbone_path": backbone_path}
    result = export_model(build(ExportConfig, values, step="export"), out, force=force)
    _print_result(result, as_json)
    if not as_json:
        metrics = result.manifest["metrics"]
        print(f"read by {metrics['read_by']}\n  {metrics['serve']}")


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="Published heads: a directory, a file, or a hub id.")],
    backbone: Annotated[str, typer.Option(help="Backbone they were trained for: a directory or a hub id.")],
    out: OutOption,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Turns published heads (FasterDecoding, TGI, vLLM) and their backbone into a model directory for `tune`."""
    from gorgon.models.imports import import_heads

    values = {"source": source, "backbone": backbone}
    _print_result(import_heads(build(ImportConfig, values, step="import"), out, force=force), as_json)


def _print_result(result: StepResult, as_json: bool) -> None:
    if as_json:
        _print_json({"directory": str(result.directory), "reused": result.reused, **result.manifest})
        return
    from gorgon.progress import say

    for warning in result.manifest["warnings"]:
        say(f"note: {warning}")
    print(result.directory)


@app.command("inspect")
def inspect_(
    model: Annotated[str, typer.Argument(help="A model directory, with or without heads, or 'embedded'.")],
    as_json: JsonFlag = False,
) -> None:
    """Shows what a model directory holds: backbone, heads, tree, provenance."""
    from gorgon.models.inspect import inspect_model

    facts = inspect_model(model)
    if as_json:
        _print_json(facts)
        return
    for part in ("backbone", "heads", "tree", "provenance"):
        print(part)
        for key, value in (facts.get(part) or {"-": "none"}).items():
            print(f"  {key:<24} {value}")


def _recipe(name: str) -> Any:
    from gorgon.pipeline import find_recipe, load_recipe

    path = find_recipe(name)
    return load_recipe(path, [], Path("runs") / path.stem)


def _export(model: Path, out: Path, form: str) -> object:
    from gorgon.models.export import export_model

    return export_model(build(ExportConfig, {"model": str(model), "format": form}, step="export"), out)


def _report(measured: Mapping[str, Any], out: Path) -> dict[str, Any]:
    from gorgon.pipeline import report_endpoints

    return report_endpoints(measured, out)


def _to_endpoint(name: str, region: str | None, timeout_s: float) -> Callable[[], object]:
    from gorgon.cloud.runtime import connector

    return connector(name, region, timeout_s)


register_serve(app)
register_bench(app, _to_endpoint)
register_cloud(app, _recipe, _export, _report)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if context.invoked_subcommand not in (None, "step"):  # a job's step says so in output/failure
        ranks.refuse_several(str(context.invoked_subcommand))
    if version:
        from importlib.metadata import version as installed

        print(installed("gorgon-llm"))
        raise typer.Exit


def main() -> None:
    """Entry point: runs a command; a typed error becomes a message on stderr and its exit code, never a traceback."""
    try:
        app()
    except GorgonError as error:
        if ranks.tells(error):
            print(f"error: {error}", file=sys.stderr)
            if error.hint:
                print(f"\nhint: {error.hint}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
