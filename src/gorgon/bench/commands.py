"""The command `bench`; what it needs beyond parsing is imported when it runs, never for `--help`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gorgon.errors import GorgonError

SAGEMAKER = "sagemaker://"
ToEndpoint = Callable[[str, str | None, float], Callable[[], Any]]


def register(app: typer.Typer, to_endpoint: ToEndpoint) -> None:
    """Adds the command to the command line.

    Args: to_endpoint: name, region and timeout of a SageMaker endpoint to a function that makes connections to it. It
        lives in a layer that this one must not import.
    """
    app.command("bench")(_bench(to_endpoint))


def _bench(to_endpoint: ToEndpoint) -> Callable[..., None]:
    def connector(url: str, region: str | None, api_key: str | None, timeout: float) -> Callable[[], Any] | None:
        if not url.startswith(SAGEMAKER):
            if region is not None:
                raise GorgonError("only SageMaker endpoints have a region", field="region", value=region,
                                  hint=f"the address of one is {SAGEMAKER}ENDPOINT-NAME")  # fmt: skip
            return None
        if api_key is not None:
            raise GorgonError("SageMaker's requests are signed and carry no key", field="api_key",
                              hint="leave --api-key out, and unset GORGON_API_KEY")  # fmt: skip
        return to_endpoint(url.removeprefix(SAGEMAKER), region, timeout)

    def bench(
        url: Annotated[
            str, typer.Argument(help="A server's address, such as http://127.0.0.1:8000, or sagemaker://ENDPOINT-NAME.")
        ],
        api: Annotated[str, typer.Option(help="Interface: openai, invocations (SageMaker) or tgi.")] = "openai",
        clients: Annotated[str, typer.Option(help="Clients of each level, each waiting for its answers.")] = "1,2,4,8",
        rate: Annotated[str, typer.Option(help="Requests per second of further levels, sent without waiting.")] = "",
        requests: Annotated[int, typer.Option(min=1, help="Requests of a level.")] = 64,
        prompts: Annotated[Path | None, typer.Option(help="Text file (one per line) or JSONL [four built in].")] = None,
        reference: Annotated[Path | None, typer.Option(help="JSONL with the answers to compare with.")] = None,
        model: Annotated[str | None, typer.Option(help="Name of the model, where the server asks for one.")] = None,
        region: Annotated[str | None, typer.Option(help="Region of a SageMaker endpoint [the AWS profile's].")] = None,
        api_key: Annotated[str | None, typer.Option(envvar="GORGON_API_KEY", help="Bearer key.")] = None,
        max_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer, in tokens.")] = 128,
        warmup: Annotated[int, typer.Option(min=0, help="Requests before the first level.")] = 4,
        timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a server may be silent.")] = 120.0,
        out: Annotated[Path | None, typer.Option(help="Directory for load.json, load.html and answers.jsonl.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    ) -> None:
        """Measures a server under load: throughput, latency percentiles, errors, and whether answers stay the same."""
        from gorgon.bench.load import Level
        from gorgon.bench.load_client import PATHS
        from gorgon.bench.load_run import bench as run_bench
        from gorgon.interrupts import graceful

        if api not in PATHS:
            raise GorgonError("no such interface", field="api", value=api, allowed=", ".join(PATHS))
        connect = connector(url, region, api_key, timeout)
        levels = [Level(requests, clients=int(n)) for n in _numbers(clients, "clients")]
        levels += [Level(requests, rate=n) for n in _numbers(rate, "rate")]
        if not levels:
            raise GorgonError("no load is given", field="clients", hint="--clients 1,2,4 or --rate 2.5, or both")
        with graceful():
            document = run_bench(
                url, api=api, levels=levels, prompts=prompts, model=model, api_key=api_key, max_tokens=max_tokens,  # type: ignore[arg-type]
                warmup=warmup, timeout_s=timeout, reference=reference, out=out, connect=connect,
            )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
        elif out is not None:
            typer.echo(out / "load.html")

    return bench


def _numbers(text: str, field: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [-1.0]
    if any(not 0 < n < 10_000 or (field == "clients" and n != int(n)) for n in numbers):
        raise GorgonError("not a list of positive numbers", field=field, value=text, hint="such as 1,2,4")
    return numbers
