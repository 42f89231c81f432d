"""Checks a request against botocore's own service model, further than botocore does before it sends one.

botocore checks types and required members. The model also holds enums, patterns, lengths and counts, and the service
refuses what breaks them, some minutes and a role check later. Here they are checked first, all at once.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from gorgon.errors import CloudError, MissingDependencyError


def validate(model: Any, operation: str, parameters: dict[str, Any]) -> None:
    """Raises CloudError with every member of `parameters` that the service model does not allow.

    Args: model: botocore's model of the service; operation: as the model names it, such as "CreateTrainingJob".
    """
    problems: list[str] = []
    shape = model.operation_model(operation).input_shape
    if shape is not None:
        _walk(shape, parameters, operation, problems)
    if problems:
        head = problems[0] if len(problems) == 1 else f"{len(problems)} values that the service would refuse"
        rest = "" if len(problems) == 1 else "".join(f"\n  - {p}" for p in problems)
        raise CloudError(head + rest, hint="the limits are those of the service's own model")


@lru_cache
def service_model(service: str) -> Any:
    """botocore's model of a service; needs neither credentials nor a network.

    Raises: MissingDependencyError when boto3 is not installed.
    """
    try:
        import botocore.session
    except ImportError as error:
        raise MissingDependencyError(
            "SageMaker needs boto3", field="boto3", hint="pip install 'gorgon-llm[sagemaker]'"
        ) from error
    return botocore.session.get_session().get_service_model(service)


def _walk(shape: Any, value: Any, path: str, problems: list[str]) -> None:
    kinds: dict[str, Any] = {
        "structure": dict, "map": dict, "list": list, "string": str, "boolean": bool, "integer": int, "long": int,
        "float": (int, float), "double": (int, float),
    }  # fmt: skip
    kind = kinds.get(shape.type_name)
    if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and shape.type_name != "boolean")):
        problems.append(f"{path}: must be a {shape.type_name}, given {value!r}")
        return
    match shape.type_name:
        case "structure":
            problems += [f"{path}.{key}: required" for key in shape.required_members if key not in value]
            for key, inner in value.items():
                if key not in shape.members:
                    problems.append(f"{path}.{key}: no such member")
                else:
                    _walk(shape.members[key], inner, f"{path}.{key}", problems)
        case "list":
            _count(shape, len(value), path, "entries", problems)
            for number, inner in enumerate(value):
                _walk(shape.member, inner, f"{path}[{number}]", problems)
        case "map":
            _count(shape, len(value), path, "entries", problems)
            for key, inner in value.items():
                _walk(shape.key, key, f"{path} key {key!r}", problems)
                _walk(shape.value, inner, f"{path}[{key!r}]", problems)
        case "string":
            _text(shape, value, path, problems)
        case "integer" | "long" | "float" | "double":
            _count(shape, value, path, "", problems)


def _count(shape: Any, count: float, path: str, unit: str, problems: list[str]) -> None:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    unit = f" {unit}" if unit else ""
    if low is not None and count < low:
        problems.append(f"{path}: {count}{unit}, at least {low}")
    if high is not None and count > high:
        problems.append(f"{path}: {count}{unit}, at most {high}")


def _text(shape: Any, value: str, path: str, problems: list[str]) -> None:
    _count(shape, len(value), path, "characters", problems)
    allowed = shape.enum
    if allowed and value not in allowed:
        from gorgon.config import nearest

        shown = nearest(value, allowed) if len(allowed) > 8 else f"allowed: {', '.join(allowed)}"
        problems.append(f"{path}: {value!r} is not known here; {shown[:200]}")
    pattern = shape.metadata.get("pattern")
    if pattern and not _pattern(pattern).fullmatch(value):
        problems.append(f"{path}: {value[:80]!r} does not match {pattern}")


SAME_IN_PYTHON = {
    r"\p{L}": r"\w", r"\p{Z}": r"\s", r"\p{N}": r"\d", r"\p{Alnum}": "a-zA-Z0-9", r"\p{Print}": r"\x20-\x7e",
    r"\uD800\uDC00-\uDBFF\uDFFF": r"\U00010000-\U0010FFFF", r"\z": r"\Z",
}  # fmt: skip
"""Java's notation in the models' patterns, and Python's. \\w also holds digits and _, which they all allow."""


@lru_cache
def _pattern(java: str) -> re.Pattern[str]:
    text = java
    for theirs, ours in SAME_IN_PYTHON.items():
        text = text.replace(theirs, ours)
    if java.startswith(r"\p{Print}"):  # stands outside a set
        text = text.replace(r"\x20-\x7e", r"[\x20-\x7e]")
    try:
        return re.compile(text, re.DOTALL)
    except re.error:  # a later botocore's: what cannot be checked here is left to the service
        return re.compile(".*", re.DOTALL)
