"""What is between configuration and its classes: files with defaults, and the refusal of what is wrong or unknown.

Fields that a class lacks are refused at every level. Pydantic's own refusal is off in Dagster's configuration classes,
and its message does not say what is known.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
from pydantic import BaseModel, ValidationError, create_model

from housing_assets.settings import Settings
from resources.sources.listing import expanded

# Fields by their former names.
RENAMED = {
    "patience_seconds": "retry_timeout_seconds",
    "invocation_patience_seconds": "invocation_retry_timeout_seconds",
    "prove_on_candidate": "smoke_test_on_candidate",
}

# By the name of the op that Dagster makes of the assets, filled by `configures`.
CONFIG_OF_OP: dict[str, type[dg.Config]] = {}
_Config = TypeVar("_Config", bound=dg.Config)


def load_launch_defaults(environment: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """By op: the fields that the file named by `HOUSING_CONFIG` sets for every launch, as it has them.

    The file is run configuration, as `--config` takes it. Raises `ValueError` for another form.
    """
    path = Settings.load(environment).config
    content = yaml_file("HOUSING_CONFIG", path)
    form = f"HOUSING_CONFIG={path!r} must be run configuration, as YAML: `ops: {{raw_csv: {{config: {{…}}}}}}`"
    if others := sorted(map(str, set(content) - {"ops"})):
        raise ValueError(f"{form}. It has {', '.join(others)}, which gives no defaults")
    sections = {}
    for op, section in mapping(content.get("ops"), form).items():
        section = mapping(section, f"{form}. ops.{op} is not of this form")
        if others := sorted(map(str, set(section) - {"config"})):
            raise ValueError(f"{form}. ops.{op} has {', '.join(others)} beside or instead of config")
        sections[str(op)] = mapping(section.get("config"), f"{form}. ops.{op}.config is not of this form")
    return sections


def _problems(op: str, model: type[dg.Config], given: dict[str, Any]) -> list[str]:
    """What is wrong with values for the fields of `model`: a sentence each."""
    problems = list(unknown_fields(model, given, op))
    try:
        model(**{str(name): value for name, value in given.items()})
    except ValidationError as error:
        for found in error.errors():
            message = found["msg"].removeprefix("Value error, ")
            if location := ".".join(map(str, found["loc"])):
                field = model.model_fields.get(str(found["loc"][0]))
                meaning = f" ({field.description})" if field is not None and field.description else ""
                problems.append(f"{op}.{location} = {found['input']!r}: {message}{meaning}")
            else:
                problems.append(f"{op}: {message}")
    return problems


def configures(op: str) -> Callable[[type[_Config]], type[_Config]]:
    """Makes a class the configuration of `op`, with the defaults that `HOUSING_CONFIG` gives its fields.

    Raises `ValueError` naming every wrong field and value.
    """

    def configure(config: type[_Config]) -> type[_Config]:
        given = _LAUNCH_DEFAULTS.get(op, {})
        if given and (problems := _problems(op, config, given)):
            raise ValueError(f"HOUSING_CONFIG: {'; '.join(problems)}")
        CONFIG_OF_OP[op] = configured = with_defaults(config, given)
        return configured

    return configure


def refuse_unknown_ops() -> None:
    """Raise `ValueError` if `HOUSING_CONFIG` gives defaults to an op that takes none. For when all are configured."""
    if unknown := [
        f"ops.{op} is unknown{suggestion(op, [*CONFIG_OF_OP])}" for op in _LAUNCH_DEFAULTS if op not in CONFIG_OF_OP
    ]:
        raise ValueError(f"HOUSING_CONFIG: {'. '.join(unknown)}")


def check_run_config(run_config: dict[str, Any]) -> None:
    """Raise `dagster.Failure` naming every wrong value in `run_config`, and what is allowed, before any work starts."""
    problems: list[str] = []
    for op, section in (run_config.get("ops") or {}).items():
        if (model := CONFIG_OF_OP.get(op)) is not None:
            problems += _problems(op, model, (section or {}).get("config") or {})
    if problems:
        raise dg.Failure("run configuration: " + "; ".join(problems), allow_retries=False)


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


def with_defaults(model: type[_Config], values: Mapping[str, Any]) -> type[_Config]:
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


_LAUNCH_DEFAULTS = load_launch_defaults()
