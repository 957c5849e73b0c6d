"""Refuses fields that a configuration model does not have, at every level, with what it has instead.

Pydantic's own refusal is off in Dagster's configuration classes, and its message does not say what is known.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel


def unknown_fields(model: type[BaseModel], given: Any, path: str) -> Iterator[str]:
    """A sentence for each field of `given`, plain data for `model`, that no model at that level has.

    Follows nested models, lists of models and mappings to models. What is no mapping is left to validation.
    """
    if not isinstance(given, Mapping):
        return
    for name, value in given.items():
        field = model.model_fields.get(str(name))
        if field is None:
            yield f"{path}.{name} is unknown{suggestion(str(name), sorted(model.model_fields))}"
            continue
        for inner, nested, place in _nested(field.annotation, value, f"{path}.{name}"):
            yield from unknown_fields(inner, nested, place)


def suggestion(name: str, known: Sequence[str]) -> str:
    """The nearest of the known names, if one is near, and all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {near[0]}?" if near else ";"
    return f"{meant} Known are {', '.join(known)}"


def _nested(annotation: Any, value: Any, path: str) -> Iterator[tuple[type[BaseModel], Any, str]]:
    """The models that an annotation holds, with the data for them."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, value, path
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _nested(argument, value, path)
    elif origin is dict and isinstance(value, Mapping):
        for name, item in value.items():
            yield from _nested(arguments[1], item, f"{path}.{name}")
    elif origin in (list, tuple) and isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from _nested(arguments[0], item, f"{path}[{index}]")
