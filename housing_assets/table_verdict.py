"""Whether the table, the slices and the configured ranges fit together: asked when the code location loads.

The table is declared with pandera, which takes most of a second to import. So a child process looks at it, and what it
found is kept in the user's cache folder for as long as the files that it loaded, pandera and Polars stay the same.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from step_scripts.parameters import Slice, check_slices
from step_scripts.runner.contract import StepError
from step_scripts.runner.loaded_code import own_places
from step_scripts.runner.private_files import private_folder
from step_scripts.table.spec import ColumnRange, TableSpec

SCHEMA = Path(__file__).with_name("schema.py")
_PROJECT = SCHEMA.parents[1]
_LIBRARIES = ("pandera", "polars")
_SECONDS = 120.0


class WrongTable(ValueError):
    """The table cannot be worked with; the message names the file, the line or the field."""


class _Verdict(BaseModel):
    """The table, and what it was found with: digests of source files by path, versions of libraries."""

    table: TableSpec
    files: dict[str, str]
    versions: dict[str, str]


def check_table(slices: Sequence[Slice], ranges: Mapping[str, Mapping[str, Any]]) -> TableSpec:
    """The table, for which the slices and the default ranges are right. Raises `WrongTable` for what is not."""
    if (kept := _kept_table()) is not None:
        with contextlib.suppress(WrongTable):  # what is kept refuses nothing: the schema may read more than its modules
            return _fitting(kept, slices, ranges)
    return _fitting(_asked_table(), slices, ranges)


def _fitting(table: TableSpec, slices: Sequence[Slice], ranges: Mapping[str, Mapping[str, Any]]) -> TableSpec:
    try:
        check_slices(slices, table)
    except StepError as error:
        raise WrongTable(f"SLICES in {SCHEMA.with_name('config.py')}: {error}") from None
    try:
        table.with_ranges({name: ColumnRange(**bounds) for name, bounds in ranges.items()})
    except ValueError as error:
        raise WrongTable(f"HOUSING_CONFIG: raw_csv.{error}") from None
    return table


def _asked_table() -> TableSpec:
    """The table that a child process finds, which is then kept."""
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
        raise WrongTable(f"{SCHEMA} could not be loaded within {_SECONDS:.0f} s") from None
    if done.returncode:
        raise WrongTable(f"the table cannot be used: {done.stderr.strip() or f'exit code {done.returncode}'}")
    verdict = _Verdict.model_validate_json(done.stdout.splitlines()[-1])
    _keep(verdict)
    return verdict.table


def _kept_table() -> TableSpec | None:
    """The table that was found last, if nothing has changed since."""
    try:
        verdict = _Verdict.model_validate_json(_place().read_bytes())
        if verdict.versions != _versions():
            return None
        for name, digest in verdict.files.items():
            if _digest(Path(name)) != digest:
                return None
    except (OSError, RuntimeError, ValidationError):
        return None
    return verdict.table


def _keep(verdict: _Verdict) -> None:
    """Write it to the user's cache folder. Where that is not possible, every load asks again."""
    with contextlib.suppress(OSError, RuntimeError):
        place = _place()
        if not Path.home().is_dir() and not os.environ.get("XDG_CACHE_HOME"):
            return  # a home folder is made by whoever made the user
        private_folder(place.parent)
        descriptor, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(verdict.model_dump_json())
            Path(temporary).replace(place)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _place() -> Path:
    """One file for each place where the project lies. Raises `RuntimeError` if the user has no home folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    caches = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    return caches / "housing-assets" / f"table-{sha256(str(SCHEMA).encode()).hexdigest()[:16]}.json"


def _versions() -> dict[str, str]:
    return {"python": sys.version, **{name: importlib.metadata.version(name) for name in _LIBRARIES}}


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _loaded_files() -> dict[str, str]:
    """Digests of the project's modules that this process has loaded, by path."""
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and (Path(file).is_relative_to(SCHEMA.parent) or own_places(name.partition(".")[0])):
            found[file] = _digest(Path(file))
    return found


def main() -> int:
    """Print what there is to keep, or say on the standard error what is wrong with the schema."""
    try:
        from housing_assets.schema import HOUSING_TABLE

        if not isinstance(HOUSING_TABLE, TableSpec):
            raise TypeError(f"HOUSING_TABLE is no TableSpec but {type(HOUSING_TABLE).__name__}; use table_from_pandera")
    except Exception as error:  # noqa: BLE001  # whatever a person's file raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(SCHEMA)]
        where = f"{SCHEMA}, line {lines[-1]}" if lines else str(SCHEMA)
        text = "; ".join(traceback.format_exception_only(error)[-1].strip().splitlines())
        sys.stderr.write(f"{where}: {text}\n")
        return 1
    verdict = _Verdict(table=HOUSING_TABLE, files=_loaded_files(), versions=_versions())
    sys.stdout.write(f"\n{verdict.model_dump_json()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
