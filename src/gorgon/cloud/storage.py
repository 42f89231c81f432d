"""Inputs and code into S3: content-addressed, so that nothing is uploaded twice; checked before a job reads them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gorgon.artifacts import MANIFEST, digest_file, digest_input
from gorgon.cloud.aws import Aws, AwsError, aws_errors
from gorgon.cloud.plan import Place, split_uri
from gorgon.cloud.sagemaker import Call
from gorgon.cloud.wheel import build_wheel
from gorgon.errors import DataError

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Upload:
    """Local files that belong under one S3 prefix: address -> file."""

    prefix: str
    files: Mapping[str, Path]

    def calls(self) -> list[Call]:
        """As API calls; the body is shown as the path of the file."""
        bucket, key = split_uri(self.prefix)
        shown = [Call("s3", "ListObjectsV2", {"Bucket": bucket, "Prefix": f"{key}/"}, note="what is there already")]
        for uri, path in self.files.items():
            bucket, key = split_uri(uri)
            size = f"{path.stat().st_size:,} bytes; left out when it is there already"
            shown.append(Call("s3", "PutObject", {"Bucket": bucket, "Key": key, "Body": path.name}, note=size))
        return shown


def upload_of(source: str, place: Place, run: str) -> Upload:
    """A local file or directory as an upload, under a prefix named by its contents."""
    path = Path(source)
    prefix = place.uri(run, "inputs", digest_input(path)[:16])
    if path.is_file():
        return Upload(prefix, {f"{prefix}/{path.name}": path})
    files = {f"{prefix}/{p.relative_to(path).as_posix()}": p for p in sorted(path.rglob("*")) if p.is_file()}
    if not files:
        raise DataError("the directory is empty", file=path)
    return Upload(prefix, files)


@contextmanager
def code_upload(place: Place, run: str, recipe: Path | None) -> Iterator[Upload]:
    """The code channel: our wheel, the start script and the recipe. The files exist within the block."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [build_wheel(Path(folder)), ASSETS / "start.sh"]
        if recipe is not None:
            paths.append(Path(shutil.copy(recipe, Path(folder) / "recipe.yaml")))
        prefix = place.uri(run, "code", digest_file(paths[0])[:16])
        yield Upload(prefix, {f"{prefix}/{path.name}": path for path in paths})


def send(upload: Upload, aws: Aws) -> int:
    """Uploads what is not there yet and returns the number of files that were."""
    there = {entry["Key"]: entry["Size"] for entry in listing(aws, upload.prefix + "/")}
    sent = 0
    for uri, path in upload.files.items():
        bucket, key = split_uri(uri)
        if there.get(key) == path.stat().st_size:
            continue
        with aws_errors(f"upload to {uri}"):
            aws.client("s3").upload_file(str(path), bucket, key)
        sent += 1
    return sent


def listing(aws: Aws, prefix: str) -> list[dict[str, object]]:
    """The objects below an S3 prefix."""
    bucket, key = split_uri(prefix)
    return list(aws.pages("s3", "list_objects_v2", "Contents", Bucket=bucket, Prefix=key))


def read_text(source: str, name: str, aws: Aws | None) -> str | None:
    """A file of a directory, here or in S3; None when it is not there.

    Raises: DataError for an S3 address without a client; CloudError, OSError, UnicodeDecodeError.
    """
    if not source.startswith("s3://"):
        path = Path(source) / name
        return path.read_text(encoding="utf-8") if path.is_file() else None
    if aws is None:
        raise DataError("this is in S3", file=source)
    bucket, key = split_uri(source.rstrip("/"))
    try:
        body: bytes = aws.call("s3", "get_object", Bucket=bucket, Key=f"{key}/{name}")["Body"].read()
    except AwsError as error:
        if error.code in ("NoSuchKey", "404"):
            return None
        raise
    return body.decode()


def check_prefix(aws: Aws, uri: str, field: str) -> None:
    """Raises DataError when an input in S3 is empty, or a step's output of which files are missing."""
    prefix = uri.rstrip("/") + "/"
    bucket, base = split_uri(prefix)
    keys = {str(entry["Key"]).removeprefix(base) for entry in listing(aws, prefix)}
    if not keys:
        raise DataError("this S3 prefix is empty", file=uri, field=field, hint="has the step that writes it finished?")
    if MANIFEST not in keys:
        return
    try:
        body = aws.call("s3", "get_object", Bucket=bucket, Key=base + MANIFEST)["Body"].read()
        outputs = json.loads(body).get("outputs", {})
    except (AwsError, ValueError) as error:
        raise DataError("the manifest of this step's output cannot be read", file=uri, field=field) from error
    missing = sorted(set(outputs) - keys)
    if missing:
        raise DataError(
            f"this S3 prefix is only partly uploaded: {len(missing)} files are missing, {missing[0]} first", file=uri,
            field=field, hint="run the step before this one again",
        )  # fmt: skip


def delete_prefix(aws: Aws, uri: str) -> int:
    """Deletes everything below an S3 prefix and returns the number of objects."""
    bucket, _ = split_uri(uri)
    keys = [str(entry["Key"]) for entry in listing(aws, uri.rstrip("/") + "/")]
    for start in range(0, len(keys), 1000):
        batch = [{"Key": key} for key in keys[start : start + 1000]]
        aws.call("s3", "delete_objects", Bucket=bucket, Delete={"Objects": batch, "Quiet": True})
    return len(keys)
