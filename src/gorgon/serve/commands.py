"""The command `serve`; what it needs beyond parsing is imported when it runs, never for `--help`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gorgon.config import build, parse_value
from gorgon.errors import GorgonError, MissingDependencyError


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(serve)


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Directory that `tune` wrote [GORGON_MODEL; in a SageMaker container /opt/ml/model]."),
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
    from gorgon.serve.settings import ServeConfig, container_defaults, environment_settings

    given = {"model": model, "host": host, "port": port, "api_key": api_key, "slots": slots, "context": context,
             "queue": queue, "drafts": drafts, "warmup": warmup, "playground": playground}  # fmt: skip
    values = (container_defaults() if model is None else {}) | environment_settings()
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


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise GorgonError("--set needs KEY=VALUE", field="--set", value=text)
    return key.strip().replace("-", "_"), parse_value(value)
