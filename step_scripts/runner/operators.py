"""What each operator of Ray Data has taken while a step ran. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_found: ContextVar[list[dict[str, Any]] | None] = ContextVar("operators", default=None)


@contextmanager
def operators_noted() -> Iterator[list[dict[str, Any]]]:
    """The list to which `note_operators` adds within the block."""
    found: list[dict[str, Any]] = []
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


def note_operators(function: str, summary: Any) -> None:
    """Add the operators of one execution; `summary` is what `Dataset.get_stats_summary` returns."""
    if (found := _found.get()) is None:
        return
    for operator in summary.operators_stats:
        wall, cpu, rows = operator.wall_time, operator.cpu_time, operator.task_rows
        found.append(
            {
                "operator": operator.operator_name.replace("MapBatches(_report)", function),
                "tasks": rows.count if rows else 0,
                "seconds": round(operator.time_total_s or 0.0, 4),
                "task_seconds": round(wall.sum, 4) if wall else 0.0,
                "cpu_seconds": round(cpu.sum, 4) if cpu else 0.0,
            }
        )
