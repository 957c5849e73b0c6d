"""Configuration models: other defaults for their fields, and a refusal, at every level, of fields that they lack.

Pydantic's own refusal is off in Dagster's configuration classes, and its message does not say what is known.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any, TypeVar

from pydantic import BaseModel, create_model

_Model = TypeVar("_Model", bound=BaseModel)
# Fields by their former names.
RENAMED = {
    "patience_seconds": "retry_timeout_seconds",
    "invocation_patience_seconds": "invocation_retry_timeout_seconds",
    "prove_on_candidate": "smoke_test_on_candidate",
}


def with_defaults(model: type[_Model], values: Mapping[str, Any]) -> type[_Model]:
    """`model` with other defaults for the fields named, which Dagster shows too; `values` are valid for the model.

    A class of the same name, derived from `model`; `model` itself where there are no values.
    """
    if not values:
        return model
    plain = model(**values).model_dump(include=set(values))  # of the fields' types; Dagster's schema takes no objects
    fields: dict[str, Any] = {}
    for name, value in plain.items():
        field = copy(model.model_fields[name])
        field.default, field.default_factory, field.validate_default = value, None, True
        fields[name] = (field.annotation, field)
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, __module__=model.__module__, **fields)


def unknown_fields(model: type[BaseModel], given: Any, path: str) -> Iterator[str]:
    """A sentence for each field of `given`, plain data for `model`, that no model at that level has.

    Follows nested models, lists of models and mappings to models. What is no mapping is left to validation.
    """
    if not isinstance(given, Mapping):
        return
    for name, value in given.items():
        field = model.model_fields.get(str(name))
        if field is None and RENAMED.get(str(name)) in model.model_fields:
            yield f"{path}.{name} is now called {RENAMED[str(name)]}"
            continue
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
