"""Whether the table, the slices and the configured ranges fit together: checked when the code location loads.

The table is declared with pandera, which takes most of a second to import. So a child process loads it, and what it
found is kept in the user's cache folder for as long as the schema's code, Python, pandera and Polars stay the same.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from step_scripts.parameters import Slice, check_slices
from step_scripts.runner.code_version import module_version
from step_scripts.runner.contract import StepError
from step_scripts.runner.local_files import open_private, private_folder
from step_scripts.table.spec import ColumnRange, TableSpec

SCHEMA = Path(__file__).with_name("schema.py")
_PROJECT = SCHEMA.parents[1]
_SECONDS = 120.0


class _Verdict(BaseModel):
    """The table, and the versions of all that it was found with."""

    table: TableSpec
    found_with: dict[str, str]


def check_table(slices: Sequence[Slice], ranges: Mapping[str, Mapping[str, Any]]) -> TableSpec:
    """The table, for which the slices and the default ranges are right. Raises `ValueError` naming what is not."""
    found_with = _found_with()
    # What was kept never refuses: it may be damaged, and the schema may read more than its modules.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        kept = _Verdict.model_validate_json(_place().read_bytes())
        if kept.found_with == found_with:
            return _fitting(kept.table, slices, ranges)
    table = _loaded_table()
    _keep(_Verdict(table=table, found_with=found_with))
    return _fitting(table, slices, ranges)


def _fitting(table: TableSpec, slices: Sequence[Slice], ranges: Mapping[str, Mapping[str, Any]]) -> TableSpec:
    try:
        check_slices(slices, table)
    except StepError as error:
        raise ValueError(f"SLICES in {SCHEMA.with_name('config.py')}: {error}") from None
    try:
        table.with_ranges({name: ColumnRange(**bounds) for name, bounds in ranges.items()})
    except ValueError as error:
        raise ValueError(f"HOUSING_CONFIG: raw_csv.{error}") from None
    return table


def _loaded_table() -> TableSpec:
    """The table that a child process loads."""
    path = os.pathsep.join(filter(None, (str(_PROJECT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{SCHEMA} could not be loaded within {_SECONDS:.0f} s") from None
    if done.returncode:
        raise ValueError(f"the table cannot be used: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return TableSpec.model_validate_json(done.stdout.splitlines()[-1])


def _keep(verdict: _Verdict) -> None:
    """Write it to the user's cache folder. Where that is not possible, every load asks a child process again."""
    with contextlib.suppress(OSError, RuntimeError):
        if not Path.home().is_dir() and not os.environ.get("XDG_CACHE_HOME"):
            return  # a home folder is made by whoever made the user
        place = _place()
        private_folder(place.parent)
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            with open_private(temporary) as file:
                file.write(verdict.model_dump_json().encode())
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)


def _place() -> Path:
    """One file for each place where the project lies. Raises `RuntimeError` if the user has no home folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    caches = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    return caches / "housing-assets" / f"table-{sha256(str(SCHEMA).encode()).hexdigest()[:16]}.json"


def _found_with() -> dict[str, str]:
    """What the table depends on, as it is now."""
    libraries = {name: importlib.metadata.version(name) for name in ("pandera", "polars")}
    try:
        code = module_version("housing_assets.schema")
    except FileNotFoundError:  # the project is installed as a library: of its modules, any may be the schema's
        sources = sorted(SCHEMA.parent.rglob("*.py"))
        code = sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
        code += module_version("step_scripts.table.column_types")
    return {"python": sys.version, "code": code, **libraries}


def main() -> int:
    """Print what there is to keep, or say on the standard error what is wrong with the schema."""
    try:
        from housing_assets.schema import HOUSING_TABLE

        if not isinstance(HOUSING_TABLE, TableSpec):
            raise TypeError(
                f"HOUSING_TABLE is not a TableSpec but {type(HOUSING_TABLE).__name__}; use table_from_pandera"
            )
    except Exception as error:  # noqa: BLE001  # whatever a person's file raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(SCHEMA)]
        where = f"{SCHEMA}, line {lines[-1]}" if lines else str(SCHEMA)
        text = "; ".join(traceback.format_exception_only(error)[-1].strip().splitlines())
        sys.stderr.write(f"{where}: {text}\n")
        return 1
    sys.stdout.write(f"\n{HOUSING_TABLE.model_dump_json()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
