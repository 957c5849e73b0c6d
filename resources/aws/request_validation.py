"""Checks a request against botocore's service model before it is sent.

botocore itself checks required members and types only; patterns, enumerations, lengths and ranges are in the model
all the same, and the service refuses what breaks them after the job's files have been uploaded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from step_scripts.runner.wording import counted

# The model's patterns are Java's. Unicode classes that Python lacks are replaced by the nearest it has, which hold a
# little more: what passes here may still be refused by the service, but nothing valid is refused here.
_UNICODE_CLASSES = {
    r"\p{L}": r"\w",
    r"\p{N}": r"\w",
    r"\p{Z}": r"\s",
    r"\p{M}": r"\u0300-\u036f\w",
    r"\p{S}": r"\u0021-\u007e\u00a1-\uffff",
    r"\p{P}": r"\u0021-\u007e\u00a1-\uffff",
    r"\p{Alnum}": r"a-zA-Z0-9",
}
_LONG = 60


class InvalidJobRequest(ValueError):
    """A request that SageMaker would refuse. `problems` names each member, its value and the limit."""

    def __init__(self, operation: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(f"{operation} would be refused: " + "; ".join(problems))


def check_request(operation: str, params: Mapping[str, Any]) -> None:
    """Raise `InvalidJobRequest` with all problems of a SageMaker request, if it has any."""
    if found := problems(operation, params):
        raise InvalidJobRequest(operation, found)


def problems(operation: str, params: Mapping[str, Any]) -> list[str]:
    """What is wrong with a request to a SageMaker operation; empty if nothing is."""
    shape = _model().operation_model(operation).input_shape
    found = list(_check(shape, params, "", operation))
    return found or list(_rules(params))


@functools.cache
def _model() -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model("sagemaker")


def _check(shape: Any, value: object, path: str, operation: str) -> Iterator[str]:
    kind = shape.type_name
    if kind == "structure":
        yield from _structure(shape, value, path, operation)
    elif kind == "list":
        if not isinstance(value, list | tuple):
            yield f"{path} must be a list, not {_shown(value)}"
            return
        yield from _length(shape, len(value), path, "entries", operation)
        for index, item in enumerate(value):
            yield from _check(shape.member, item, f"{path}[{index}]", operation)
    elif kind == "map":
        if not isinstance(value, Mapping):
            yield f"{path} must be a mapping, not {_shown(value)}"
            return
        yield from _length(shape, len(value), path, "entries", operation)
        for key, item in value.items():
            yield from _check(shape.key, key, f"the key {_shown(key)} of {path}", operation)
            yield from _check(shape.value, item, f"{path}[{key!r}]", operation)
    elif kind == "string":
        yield from _string(shape, value, path, operation)
    elif kind in ("integer", "long", "float", "double"):
        yield from _number(shape, value, path, operation)
    elif kind == "boolean" and not isinstance(value, bool):
        yield f"{path} must be true or false, not {_shown(value)}"


def _structure(shape: Any, value: object, path: str, operation: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{path or operation} must be a mapping, not {_shown(value)}"
        return
    prefix = f"{path}." if path else ""
    for name in shape.required_members:
        if name not in value:
            yield f"{prefix}{name} is missing"
    for name, item in value.items():
        if name not in shape.members:
            yield f"{prefix}{name} is not a member of {shape.name}"
        else:
            yield from _check(shape.members[name], item, f"{prefix}{name}", operation)


def _string(shape: Any, value: object, path: str, operation: str) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{path} must be a string, not {_shown(value)}"
        return
    if allowed := shape.metadata.get("enum"):
        if value not in allowed:
            yield f"{path} is {_shown(value)}; it must be one of {_choices(value, allowed)}"
        return
    yield from _length(shape, len(value), path, "characters", operation)
    pattern = shape.metadata.get("pattern")
    if pattern and not compiled(pattern).fullmatch(value):
        yield f"{path} is {_shown(value)}, which does not match {pattern}"


def _number(shape: Any, value: object, path: str, operation: str) -> Iterator[str]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        yield f"{path} must be a number, not {_shown(value)}"
        return
    least, most = shape.metadata.get("min"), shape.metadata.get("max")
    if least is not None and value < least:
        yield f"{path} is {value}; {operation} allows no less than {least}"
    if most is not None and value > most:
        yield f"{path} is {value}; {operation} allows at most {most}"


def _length(shape: Any, length: int, path: str, unit: str, operation: str) -> Iterator[str]:
    least, most = shape.metadata.get("min"), shape.metadata.get("max")
    if least is not None and length < least:
        yield f"{path} has {length} {unit}; {operation} needs at least {least}"
    if most is not None and length > most:
        yield f"{path} has {length} {unit}; {operation} allows at most {most}"


def _rules(params: Mapping[str, Any]) -> Iterator[str]:
    """Rules that the documentation gives and the service model does not."""
    stopping = params.get("StoppingCondition", {})
    longest, wait = stopping.get("MaxRuntimeInSeconds", 86400), stopping.get("MaxWaitTimeInSeconds")
    spot = bool(params.get("EnableManagedSpotTraining"))
    if spot and (wait is None or wait < longest):
        yield (
            f"StoppingCondition.MaxWaitTimeInSeconds is {wait}; with managed spot training it must be at least "
            f"MaxRuntimeInSeconds ({longest})"
        )
    if not spot and wait is not None:
        yield "StoppingCondition.MaxWaitTimeInSeconds is allowed with managed spot training only"
    if spot and params.get("ResourceConfig", {}).get("KeepAlivePeriodInSeconds"):
        yield "ResourceConfig.KeepAlivePeriodInSeconds (warm pool) cannot be combined with managed spot training"
    for tag in params.get("Tags", []):
        if tag["Key"].lower().startswith("aws:"):
            yield f"tag {tag['Key']!r}: keys that start with aws: are kept for AWS"


@functools.cache
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of the service model as a Python pattern."""
    # `$` with a quantifier, which Java ignores and Python refuses.
    translated = re.sub(r"\$\{\d+(,\d*)?\}", "$", pattern)
    for java, python in _UNICODE_CLASSES.items():
        translated = translated.replace(java, python)
    return re.compile(translated.replace(r"\uD800\uDC00-\uDBFF\uDFFF", "\U00010000-\U0010ffff"))


def _choices(value: str, allowed: list[str]) -> str:
    if len(allowed) <= 12:
        return ", ".join(allowed)
    family = value.rpartition(".")[0] or value[:4]
    near = [choice for choice in allowed if family and choice.startswith(family)][:8] or allowed[:4]
    return f"{', '.join(near)} … ({counted(len(allowed), 'value')})"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"
