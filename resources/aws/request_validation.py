"""Checks a request against botocore's service model before it is sent.

botocore itself checks members, types and minima. Patterns, enumerations and maxima are in the model all the same, and
the service refuses what breaks them, after the job's files have been uploaded.
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
_TYPES: dict[str, Any] = {"structure": Mapping, "map": Mapping, "list": list | tuple, "string": str,
                          "integer": int, "long": int, "float": int | float, "double": int | float}  # fmt: skip
_LONG = 60


class InvalidJobRequest(ValueError):
    """A request that SageMaker would refuse; the message names each member, its value and the limit."""


def check_request(operation: str, params: Mapping[str, Any]) -> None:
    """Raise `InvalidJobRequest` with all problems of a SageMaker request, if it has any."""
    from botocore.validate import ParamValidator

    shape = _model().operation_model(operation).input_shape
    report = ParamValidator().validate(params, shape)  # members that are missing or unknown, types, minima
    if found := [*report.generate_report().splitlines(), *_limits(shape, params, "", operation)]:
        raise InvalidJobRequest(f"{operation} would be refused: {'; '.join(found)}")


@functools.cache
def _model() -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model("sagemaker")


def _limits(shape: Any, value: Any, path: str, operation: str) -> Iterator[str]:
    """What enumerations, maxima and patterns of the service model forbid, of values that have the right type."""
    kind, limits = shape.type_name, shape.metadata
    if not isinstance(value, _TYPES.get(kind, object)):
        return
    if kind == "structure":
        for name in [name for name in value if name in shape.members]:
            yield from _limits(shape.members[name], value[name], f"{path}.{name}" if path else name, operation)
    elif kind == "list":
        for index, item in enumerate(value):
            yield from _limits(shape.member, item, f"{path}[{index}]", operation)
    elif kind == "map":
        for key, item in value.items():
            yield from _limits(shape.key, key, f"the key {_shown(key)} of {path}", operation)
            yield from _limits(shape.value, item, f"{path}[{key!r}]", operation)
    if "enum" in limits:
        if value not in limits["enum"]:
            yield f"{path} is {_shown(value)}; it must be one of {_choices(value, limits['enum'])}"
        return
    if "max" in limits:
        number, most = isinstance(value, int | float), limits["max"]
        size = value if number else len(value)
        unit = "characters" if kind == "string" else "entries"
        if size > most:
            found = f"is {size}" if number else f"has {size} {unit}"
            yield f"{path} {found}; {operation} allows at most {most}"
    if "pattern" in limits and not compiled(limits["pattern"]).fullmatch(value):
        yield f"{path} is {_shown(value)}, which does not match {limits['pattern']}"


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
