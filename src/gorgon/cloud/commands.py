"""The cloud's commands: parse, one call, print. boto3 is imported when one of them runs, never for `--help`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gorgon.errors import CloudError, ConfigError

LoadRecipe = Callable[[str], Any]
Export = Callable[[Path, Path, str], object]
Report = Callable[[Mapping[str, Any], Path], dict[str, Any]]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RegionOption = Annotated[str | None, typer.Option(help="AWS region [the profile's].")]
JobName = Annotated[str, typer.Argument(help="Name of the job.")]
EndpointName = Annotated[str, typer.Argument(help="Name of the endpoint.")]

jobs = typer.Typer(name="jobs", help="Training jobs of ours on SageMaker.", no_args_is_help=True)
endpoints = typer.Typer(name="endpoints", help="Endpoints of ours on SageMaker.", no_args_is_help=True)


def register(app: typer.Typer, load: LoadRecipe, export: Export, report: Report) -> None:
    """Adds the commands to the command line.

    Args: load: a recipe by file or name; export: writes a model directory in another server's format; report: writes
        the numbers and the page of a comparison. All live in layers that this one must not import.
    """
    app.add_typer(jobs)
    app.add_typer(endpoints)
    app.command("iam-policy")(_iam_policy(load))
    app.command("doctor")(_doctor(load))
    app.command("deploy")(_deploy(load, export))
    endpoints.command("compare")(_compare(load, export, report))


def _print(document: object) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def _table(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        _print(rows)
        return
    keys = list(rows[0]) if rows else []
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in keys}
    for row in ({key: key for key in keys}, *rows) if rows else ():
        typer.echo("  ".join(f"{row[key]!s:<{widths[key]}}" for key in keys).rstrip())


@jobs.command("list")
def jobs_list(
    run: Annotated[str | None, typer.Option(help="Only jobs of this run.")] = None,
    region: RegionOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Lists our jobs, newest first."""
    from gorgon.cloud.aws import Aws
    from gorgon.cloud.jobs import list_jobs

    _table(list_jobs(Aws(region), run), as_json)


@jobs.command("logs")
def jobs_logs(name: JobName, region: RegionOption = None) -> None:
    """Prints a job's log so far."""
    from gorgon.cloud.aws import Aws
    from gorgon.cloud.logs import TRAINING, LogTail

    for line in LogTail(Aws(region), TRAINING, f"{name}/").new():
        typer.echo(line)


@jobs.command("stop")
def jobs_stop(name: JobName, region: RegionOption = None) -> None:
    """Stops a job; it writes a checkpoint first."""
    from gorgon.cloud.aws import Aws
    from gorgon.cloud.jobs import stop

    stop(Aws(region), name)
    typer.echo(f"{name}: stopping")


@jobs.command("attach")
def jobs_attach(name: JobName, region: RegionOption = None) -> None:
    """Follows a job that runs, from the beginning of its log; Ctrl-C leaves it running."""
    from gorgon.cloud.aws import Aws
    from gorgon.cloud.jobs import follow

    follow(Aws(region), name)
    typer.echo(f"{name}: Completed")


@endpoints.command("list")
def endpoints_list(region: RegionOption = None, as_json: JsonFlag = False) -> None:
    """Lists our endpoints: all of them are billed."""
    from gorgon.cloud.aws import Aws
    from gorgon.cloud.deploy import list_endpoints

    _table(list_endpoints(Aws(region)), as_json)


@endpoints.command("describe")
def endpoints_describe(name: EndpointName, region: RegionOption = None) -> None:
    """Prints what SageMaker knows of an endpoint, its configuration and model."""
    from gorgon.cloud.aws import Aws

    aws = Aws(region)
    endpoint = aws.call("sagemaker", "describe_endpoint", EndpointName=name)
    config = aws.call("sagemaker", "describe_endpoint_config", EndpointConfigName=endpoint["EndpointConfigName"])
    models = [
        aws.call("sagemaker", "describe_model", ModelName=variant["ModelName"])
        for variant in config["ProductionVariants"] if "ModelName" in variant
    ]  # fmt: skip
    typer.echo(json.dumps({"endpoint": endpoint, "config": config, "models": models}, indent=2, default=str))


@endpoints.command("logs")
def endpoints_logs(name: EndpointName, region: RegionOption = None) -> None:
    """Prints the log of an endpoint's containers so far."""
    from gorgon.cloud.aws import Aws
    from gorgon.cloud.deploy import log_lines

    for line in log_lines(Aws(region), name):
        typer.echo(line)


@endpoints.command("invoke")
def endpoints_invoke(
    name: EndpointName,
    prompt: Annotated[str, typer.Argument(help="The user's message.")],
    system: Annotated[str | None, typer.Option(help="System message, such as the schema.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Length limit of the answer, in tokens.")] = 256,
    stream: Annotated[bool, typer.Option("--stream/--whole", help="Print the answer as it decodes.")] = True,
    region: RegionOption = None,
) -> None:
    """Asks an endpoint."""
    from gorgon.cloud.aws import Aws
    from gorgon.cloud.deploy import invoke, invoke_stream

    messages = [{"role": "system", "content": system}] if system else []
    said = [*messages, {"role": "user", "content": prompt}]
    request = {"messages": said, "max_tokens": max_tokens, "temperature": 0}  # always the same answer
    aws = Aws(region)
    if not stream:
        typer.echo(invoke(aws, name, request)["choices"][0]["message"]["content"])
        return
    for piece in invoke_stream(aws, name, request):
        typer.echo(piece["choices"][0]["delta"].get("content") or "", nl=False)
    typer.echo("")


@endpoints.command("delete")
def endpoints_delete(
    name: Annotated[str | None, typer.Argument(help="Name of the endpoint.")] = None,
    overdue: Annotated[bool, typer.Option("--overdue", help="All whose --delete-after time is past.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All endpoints of ours in the region.")] = False,
    region: RegionOption = None,
) -> None:
    """Deletes an endpoint with its configuration, model and scaling."""
    from gorgon.cloud.aws import Aws
    from gorgon.cloud.deploy import delete, list_endpoints

    if (name is not None) + overdue + everything != 1:
        raise ConfigError(["give one of: a name, --overdue, --all"], hint="gorgon endpoints list")
    aws = Aws(region)
    chosen = [name] if name else [e["name"] for e in list_endpoints(aws) if everything or e["overdue"]]
    left = {one: parts for one in chosen if (parts := delete(aws, one))}
    for one in chosen:
        if one not in left:
            typer.echo(f"{one}: deleted, with its configuration and model")
    if left:
        raise CloudError(f"some parts could not be deleted: {left}", hint="run the same command again")


def _iam_policy(load: LoadRecipe) -> Callable[..., None]:
    def command(recipe: Annotated[str, typer.Argument(help="A recipe's file, or a built-in recipe.")]) -> None:
        """Prints the least IAM policies that a recipe needs: for the caller and for the execution role."""
        from gorgon.cloud.aws import offline_place
        from gorgon.cloud.permissions import policies
        from gorgon.cloud.plan import s3_inputs

        loaded = load(recipe)
        inputs = s3_inputs(loaded.steps, loaded.model)
        _print(policies(loaded.sagemaker, offline_place(loaded.sagemaker), run=loaded.name, inputs=inputs))

    return command


def _doctor(load: LoadRecipe) -> Callable[..., None]:
    def command(
        recipe: Annotated[str, typer.Argument(help="A recipe's file, or a built-in recipe.")] = "quickstart",
        as_json: JsonFlag = False,
    ) -> None:
        """Checks the AWS account for a recipe: credentials, role, region, quotas, bucket, images."""
        from gorgon.cloud.doctor import examine

        loaded = load(recipe)
        findings = list(examine(loaded.sagemaker, loaded.steps))
        if as_json:
            _print([vars(finding) for finding in findings])
        for finding in findings if not as_json else ():
            sign = {True: "ok", False: "FAILED", None: "unknown"}[finding.ok]
            typer.echo(f"{sign:<8} {finding.check:<12} {finding.detail}")
            if finding.advice:
                typer.echo(f"{'':<8} {'':<12} -> {finding.advice}")
        if any(finding.ok is False for finding in findings):
            raise CloudError("the account is not ready for this recipe", hint="each line says what to do")

    return command


def _deploy(load: LoadRecipe, export: Export) -> Callable[..., None]:
    def command(
        model: Annotated[str, typer.Argument(help="A model directory, or its s3:// address.")],
        engine: Annotated[str | None, typer.Option(help="gorgon, vllm or tgi [the recipe's, else gorgon].")] = None,
        recipe: Annotated[str | None, typer.Option(help="Recipe whose `sagemaker` section holds the settings.")] = None,
        name: Annotated[str | None, typer.Option(help="Name of the endpoint [gorgon-TIME].")] = None,
        instance_type: Annotated[str | None, typer.Option(help="Machine behind the endpoint.")] = None,
        image: Annotated[str | None, typer.Option(help="Container image: a key of the table or a URI.")] = None,
        delete_after: Annotated[int | None, typer.Option(help="Delete it after this many minutes.")] = None,
        price_per_hour: Annotated[float | None, typer.Option(help="USD per hour, if the price list fails.")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every API call and stop.")] = False,
        region: RegionOption = None,
    ) -> None:
        """Deploys a model to an endpoint and waits until it serves."""
        from gorgon.cloud.config import EndpointConfig, SageMakerConfig
        from gorgon.cloud.launch import Launch
        from gorgon.config import build

        cloud: SageMakerConfig = load(recipe).sagemaker if recipe else SageMakerConfig()
        settings = (cloud.endpoint or EndpointConfig()).model_dump()
        given = {"engine": engine, "instance_type": instance_type, "image": image, "delete_after_minutes": delete_after}
        settings |= {key: value for key, value in given.items() if value is not None}
        if engine is not None and image is None:
            settings["image"] = None  # the recipe's image belongs to the recipe's engine
        endpoint = build(EndpointConfig, settings, step="deploy")
        prices = cloud.price_per_hour
        if price_per_hour is not None:
            prices = {**prices, endpoint.instance_type: price_per_hour}
        update = {"endpoint": endpoint, "region": region or cloud.region, "price_per_hour": prices}
        launch = Launch(model, cloud.model_copy(update=update), name=name, export=export)
        if dry_run:
            _print([call.document() for call in launch.dry_run()])
            return
        typer.echo(launch.run())

    return command


def _compare(load: LoadRecipe, export: Export, report: Report) -> Callable[..., None]:
    def command(
        recipe: Annotated[str, typer.Argument(help="Recipe with the base model and the `sagemaker` section.")],
        model: Annotated[str, typer.Option(help="Model directory with heads, or its s3:// address.")],
        data: Annotated[str, typer.Option(help="Directory that `prepare` wrote, or its s3:// address.")],
        out: Annotated[Path, typer.Option(help="Directory for the results.")],
        prompts: Annotated[int | None, typer.Option(help="Test prompts to ask [the recipe's, else 100].")] = None,
        trials: Annotated[
            int | None, typer.Option(help="Timed passes over the prompts [the recipe's, else 3].")
        ] = None,
        max_tokens: Annotated[
            int | None, typer.Option(help="Length limit of an answer, in tokens [the recipe's, else 128].")
        ] = None,
    ) -> None:
        """Deploys base, fine-tuned and Medusa side by side, compares them, and deletes all three."""
        from gorgon.cloud.compare import compare_endpoints
        from gorgon.cloud.config import EndpointConfig
        from gorgon.cloud.plan import timestamp
        from gorgon.config import build

        loaded = load(recipe)
        given = {"compare_prompts": prompts, "compare_trials": trials, "compare_max_tokens": max_tokens}
        settings = (loaded.sagemaker.endpoint or EndpointConfig()).model_dump()
        settings |= {key: value for key, value in given.items() if value is not None}
        endpoint = build(EndpointConfig, settings, step="endpoints compare")
        compare_endpoints(
            loaded.model, model, data, loaded.sagemaker.model_copy(update={"endpoint": endpoint}), out, report=report,
            export=export, stamp=timestamp(),
        )  # fmt: skip
        typer.echo(str(out / "report.html"))

    return command
