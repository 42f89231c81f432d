"""The command line: parse, build a configuration, make one call, print; heavy imports wait until they are needed."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gorgon.config import STEPS, StepConfig, build, parse_value
from gorgon.errors import GorgonError, MissingDependencyError

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
SetOption = Annotated[list[str], typer.Option("--set", metavar="STEP.KEY=VALUE", help="Change a setting; repeatable.")]


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _step_command(step: str, kind: type[StepConfig]) -> Callable[..., None]:
    """A command with one option per setting of the step."""

    def command(out: Path, force: bool, as_json: bool, **given: str | None) -> None:
        from gorgon.interrupts import graceful
        from gorgon.pipeline import run_one

        values = {name: _typed(kind, name, text) for name, text in given.items() if text is not None}
        with graceful():
            result = run_one(build(kind, values, step=step), out, force=force)
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
    for name, field in kind.model_fields.items():
        shown = "none" if field.default is None else json.dumps(field.default)
        option = typer.Option(
            f"--{name.replace('_', '-')}", metavar="VALUE", show_default=False, help=f"{field.description} [{shown}]"
        )
        parameters.append(inspect.Parameter(name, keyword, default=None, annotation=Annotated[str | None, option]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = kind.__doc__
    return command


def _typed(kind: type[StepConfig], name: str, text: str) -> Any:
    """A setting's text as YAML, except where the setting is text and `007` must stay what it is."""
    value = parse_value(text)
    is_text = "str" in str(kind.model_fields[name].annotation)
    return text if is_text and not isinstance(value, (list, dict, type(None))) else value


for _step, _kind in STEPS.items():
    app.command(_step)(_step_command(_step, _kind))


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of a built-in recipe.")],
    assignments: SetOption = [],  # noqa: B006 - typer copies it
    out: Annotated[Path | None, typer.Option(help="Directory for all steps [runs/NAME].")] = None,
    force: ForceFlag = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved steps and stop.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Runs a recipe: its steps in order, each reused when nothing changed."""
    from gorgon.interrupts import graceful
    from gorgon.pipeline import find_recipe, load_recipe, run_recipe

    path = find_recipe(recipe)
    directory = out if out is not None else Path("runs") / path.stem
    loaded = load_recipe(path, assignments, directory)
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
    run("quickstart", assignments, out, force, False, as_json)


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

    engine = load_engine(model)
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


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Directory that `tune` wrote; inside a SageMaker container it is known.")
    ] = None,
    host: Annotated[str | None, typer.Option(envvar="GORGON_HOST", help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(envvar="GORGON_PORT", help="Port; 0 picks a free one [8000].")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="GORGON_API_KEY", help="Bearer key that requests must show [none].")
    ] = None,
    slots: Annotated[int | None, typer.Option(envvar="GORGON_SLOTS", help="Requests decoded together [8].")] = None,
    context: Annotated[
        int | None, typer.Option(envvar="GORGON_CONTEXT", help="Tokens that a slot holds [the model's, at most 4096].")
    ] = None,
    queue: Annotated[int | None, typer.Option(envvar="GORGON_QUEUE", help="Answers that may wait [64].")] = None,
    drafts: Annotated[
        str | None, typer.Option(envvar="GORGON_DRAFTS", help="What is drafted: tuned, ngram or none [tuned].")
    ] = None,
    warmup: Annotated[
        bool | None, typer.Option("--warmup/--no-warmup", help="Decode at every batch size first [warmup].")
    ] = None,
    playground: Annotated[
        bool | None, typer.Option("--playground/--no-playground", help="Serve the page at / [playground].")
    ] = None,
    assignments: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Any other setting (docs/serving.md); repeatable.")
    ] = [],  # noqa: B006 - typer copies it
) -> None:
    """Serves a model over HTTP: OpenAI's interface, SageMaker's, metrics, and a playground at /."""
    from gorgon.serve.settings import ServeConfig, container_defaults

    given = {"model": model, "host": host, "port": port, "api_key": api_key, "slots": slots, "context": context,
             "queue": queue, "drafts": drafts, "warmup": warmup, "playground": playground}  # fmt: skip
    values = container_defaults() if model is None else {}
    values |= {name: value for name, value in given.items() if value is not None}
    values |= dict(_assignment(text) for text in assignments)
    if "model" not in values:
        raise GorgonError("no model is given", field="model", hint="gorgon serve runs/quickstart/tune")
    config = build(ServeConfig, values, step="serve")
    try:
        from gorgon.serve.server import serve as run_server
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "the server's packages are not installed", field=error.name, hint="pip install 'gorgon-llm[serve]'"
        ) from error
    run_server(config)


@app.command()
def bench(
    url: Annotated[str, typer.Argument(help="Address of a server, such as http://127.0.0.1:8000.")],
    api: Annotated[str, typer.Option(help="Interface: openai, invocations (SageMaker) or tgi.")] = "openai",
    clients: Annotated[str, typer.Option(help="Clients of each level, each waiting for its answers.")] = "1,2,4,8",
    rate: Annotated[str, typer.Option(help="Requests per second of further levels, sent without waiting.")] = "",
    requests: Annotated[int, typer.Option(min=1, help="Requests of a level.")] = 64,
    prompts: Annotated[Path | None, typer.Option(help="Text file (one per line) or JSONL [four built in].")] = None,
    reference: Annotated[Path | None, typer.Option(help="JSONL with the answers to compare with.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model, where the server asks for one.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="GORGON_API_KEY", help="Bearer key.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer, in tokens.")] = 128,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before the first level.")] = 4,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a server may be silent.")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="Directory for load.json, load.html and answers.jsonl.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measures a server under load: throughput, latency percentiles, errors, and whether answers stay the same."""
    from gorgon.bench.load import Level
    from gorgon.bench.load_client import PATHS
    from gorgon.bench.load_run import bench as run_bench
    from gorgon.interrupts import graceful

    if api not in PATHS:
        raise GorgonError("no such interface", field="api", value=api, allowed=", ".join(PATHS))
    levels = [Level(requests, clients=int(n)) for n in _numbers(clients, "clients")]
    levels += [Level(requests, rate=n) for n in _numbers(rate, "rate")]
    with graceful():
        document = run_bench(
            url, api=api, levels=levels, prompts=prompts, model=model, api_key=api_key, max_tokens=max_tokens,  # type: ignore[arg-type]
            warmup=warmup, timeout_s=timeout, reference=reference, out=out,
        )  # fmt: skip
    if as_json:
        _print_json(document)
    elif out is not None:
        print(out / "load.html")


def _numbers(text: str, field: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [-1.0]
    if any(not 0 < n < 10_000 or (field == "clients" and n != int(n)) for n in numbers):
        raise GorgonError("not a list of positive numbers", field=field, value=text, hint="such as 1,2,4")
    return numbers


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise GorgonError("--set needs KEY=VALUE", field="--set", value=text)
    return key.strip().replace("-", "_"), parse_value(value)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("gorgon-llm"))
        raise typer.Exit


def main() -> None:
    """Entry point: runs a command; a typed error becomes a message on stderr and its exit code, never a traceback."""
    try:
        app()
    except GorgonError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"\nhint: {error.hint}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
