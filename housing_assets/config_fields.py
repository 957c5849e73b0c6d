"""Configuration from files: what a model takes of it, and a refusal, at every level, of fields that it lacks.

Pydantic's own refusal is off in Dagster's configuration classes, and its message does not say what is known.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, create_model

from resources.sources.listing import expanded

_Model = TypeVar("_Model", bound=BaseModel)
# Fields by their former names.
RENAMED = {
    "patience_seconds": "retry_timeout_seconds",
    "invocation_patience_seconds": "invocation_retry_timeout_seconds",
    "prove_on_candidate": "smoke_test_on_candidate",
}


def yaml_file(variable: str, path: str | None) -> dict[Any, Any]:
    """The mapping in the file that the variable names; an empty one without a file.

    Raises `ValueError` if it cannot be read, or holds something else.
    """
    import yaml

    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(expanded(path)).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{variable}={path!r} cannot be read: {error}") from error
    return mapping(content, f"{variable}={path!r} must hold sections with fields, as YAML")


def mapping(value: Any, problem: str) -> dict[Any, Any]:
    """`value`, a mapping; an empty one for nothing. Raises `ValueError` with `problem` for anything else."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(problem)
    return value or {}


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
