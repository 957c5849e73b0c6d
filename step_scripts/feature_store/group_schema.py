"""Which changes of a table an existing feature group accepts: new columns that may be empty, nothing else."""

from __future__ import annotations

from step_scripts.runner.contract import StepError
from step_scripts.table.spec import TableSpec

RESERVED_COLUMNS = ("record_id", "event_time", "write_time", "api_invocation_time", "is_deleted")


def check_columns(group: str, table: TableSpec) -> None:
    """Raise `StepError` if a column has a name that the store itself uses."""
    own = [name for name in table.column_names if name in RESERVED_COLUMNS]
    if own:
        raise StepError(
            f"table {table.name!r} cannot be stored in feature group {group}: the store uses the names {own} itself. "
            "Rename these columns"
        )


def adopts(group: str, current: TableSpec, table: TableSpec) -> bool:
    """Whether `table` has columns that `current` lacks.

    Raises `StepError`, naming the columns, if rows of `table` and stored rows of `current` are not the same kind of
    record: other types, keys or event time, missing columns, new columns that may not be empty.
    """
    old = {c.name: c for c in current.columns}
    new = {c.name: c for c in table.columns}
    problems = [f"{name} is missing" for name in old if name not in new]
    for name, column in new.items():
        if name not in old:
            if not column.nullable:
                problems.append(f"{name} is new and must not be empty, but stored rows have no value for it")
            continue
        if column.dtype != old[name].dtype:
            problems.append(f"{name} is {column.dtype}, stored as {old[name].dtype}")
        if old[name].nullable and not column.nullable:
            problems.append(f"{name} must not be empty any more, but stored rows may have no value for it")
    if table.key_columns != current.key_columns:
        problems.append(f"key columns are {list(table.key_columns)}, were {list(current.key_columns)}")
    if table.event_time_column != current.event_time_column:
        problems.append(f"the event time column is {table.event_time_column}, was {current.event_time_column}")
    if problems:
        raise StepError(
            f"feature group {group} exists with another schema: {'; '.join(problems)}. Use another group name, "
            "delete the group, or add only columns that may be empty"
        )
    return any(name not in old for name in new)
