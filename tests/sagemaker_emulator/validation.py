"""Request validation from botocore's service model, worded as AWS words it.

botocore checks required members and types before it sends; the service also checks patterns, enumerations,
lengths and ranges. This module checks all of them on the server's side.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any

import botocore.session
from botocore.model import ListShape, MapShape, StructureShape

from tests.sagemaker_emulator.errors import ApiError

# What the model's Java patterns use and Python's do not have, in Python's closest terms.
_PRINTABLE = r"[^\x00-\x08\x0e-\x1f\x7f]"
_JAVA_CLASSES = {
    r"[\p{L}\p{M}\p{Z}\p{S}\p{N}\p{P}]": _PRINTABLE,
    r"[\p{L}\p{M}\p{Z}\p{N}\p{P}]": _PRINTABLE,
    r"[\p{L}\p{M}\p{S}\p{N}\p{P}]": r"[^\s\x00-\x1f\x7f]",
    r"\p{Alnum}": "a-zA-Z0-9",
    r"\uD800\uDC00-\uDBFF\uDFFF": r"\U00010000-\U0010ffff",
    r"\p{L}": r"\w",
    r"\p{N}": r"\d",
    r"\p{Z}": r"\s",
    r"\p{ASCII}": r"[\x00-\x7f]",
    r"[\p{Print}]": r"[\x20-\x7e]",
    r"\z": r"\Z",
}


# botocore's shapes are built from lazy properties that type checkers cannot see through.
Shape = Any


@functools.cache
def service_model(service: str) -> Any:
    """botocore's model of one service."""
    return botocore.session.get_session().get_service_model(service)


def operation_model(service: str, operation: str) -> Any:
    """Model of an operation, or None if the service has no such operation."""
    model = service_model(service)
    return model.operation_model(operation) if operation in model.operation_names else None


def check(service: str, operation: str, params: dict[str, Any], code: str = "ValidationException") -> None:
    """Raise AWS's validation error unless `params` satisfy the operation's input shape."""
    model = operation_model(service, operation)
    if model is None or model.input_shape is None:
        return
    problems = list(_structure(model.input_shape, params, ""))
    if problems:
        count = len(problems)
        noun = "validation error" if count == 1 else "validation errors"
        raise ApiError(code, f"{count} {noun} detected: " + "; ".join(problems))


def _structure(shape: Shape, value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield _problem(value, path, "Member must be a structure")
        return
    for name in shape.metadata.get("required", []):
        if value.get(name) is None:
            yield _problem(None, _join(path, name), "Member must not be null")
    for name, member in value.items():
        if member is not None and name in shape.members:
            yield from _value(shape.members[name], member, _join(path, name))


def _value(shape: Shape, value: Any, path: str) -> Iterator[str]:
    if isinstance(shape, StructureShape):
        yield from _structure(shape, value, path)
    elif isinstance(shape, ListShape):
        yield from _list(shape, value, path)
    elif isinstance(shape, MapShape):
        yield from _map(shape, value, path)
    else:
        for constraint in _scalar(shape, value):
            yield _problem(value, path, constraint)


def _list(shape: Shape, value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield _problem(value, path, "Member must be a list")
        return
    for constraint in _length(shape, len(value)):
        yield _problem(value, path, constraint)
    for index, item in enumerate(value, start=1):
        yield from _value(shape.member, item, f"{path}.{index}.member")


def _map(shape: Shape, value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield _problem(value, path, "Member must be a map")
        return
    for constraint in _length(shape, len(value)):
        yield _problem(value, path, constraint)
    for key, item in value.items():
        if bad := list(_scalar(shape.key, key)):
            yield _problem(value, path, f"Map keys must satisfy constraint: [{', '.join(bad)}]")
        if isinstance(shape.value, StructureShape | ListShape | MapShape):
            yield from _value(shape.value, item, f"{path}.{key}")
        elif bad := list(_scalar(shape.value, item)):
            yield _problem(value, path, f"Map value must satisfy constraint: [{', '.join(bad)}]")


def _scalar(shape: Shape, value: Any) -> Iterator[str]:
    if shape.type_name == "string":
        if not isinstance(value, str):
            yield "Member must be a string"
            return
        if enum := shape.metadata.get("enum"):
            if value not in enum:
                yield f"Member must satisfy enum value set: [{', '.join(enum)}]"
            return
        yield from _length(shape, len(value))
        pattern = shape.metadata.get("pattern")
        if pattern and not compiled(pattern).fullmatch(value):
            yield f"Member must satisfy regular expression pattern: {pattern}"
    elif shape.type_name in ("integer", "long", "float", "double"):
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield "Member must be a number"
            return
        low, high = shape.metadata.get("min"), shape.metadata.get("max")
        if low is not None and value < low:
            yield f"Member must have value greater than or equal to {low}"
        if high is not None and value > high:
            yield f"Member must have value less than or equal to {high}"


def _length(shape: Shape, length: int) -> Iterator[str]:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    if low is not None and length < low:
        yield f"Member must have length greater than or equal to {low}"
    if high is not None and length > high:
        yield f"Member must have length less than or equal to {high}"


@functools.cache
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of the service model as a Python pattern."""
    # Java lets an anchor be repeated, which changes nothing; Python refuses it.
    translated = re.sub(r"\$\{\d+(,\d*)?\}", "$", pattern)
    for java, python in _JAVA_CLASSES.items():
        translated = translated.replace(java, python)
    return re.compile(translated)


def _join(path: str, name: str) -> str:
    member = name[:1].lower() + name[1:]
    return f"{path}.{member}" if path else member


def _problem(value: Any, path: str, constraint: str) -> str:
    shown = "null" if value is None else f"'{_shown(value)}'"
    return f"Value {shown} at '{path}' failed to satisfy constraint: {constraint}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}={_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    return str(value)
