"""Passes of Ray Data: what is read, what comes back, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from step_scripts.runner import ray_data
from step_scripts.runner.contract import Artifact, FileInfo, StepError, noted_operators
from step_scripts.runner.ray_data import Progress, each_call, parquet_blocks
from step_scripts.runner.ray_environment import worker_environment
from step_scripts.runner.ray_session import RaySession
from tests.source_steps import CollectingReporter


def table(folder: Path, sizes: list[int], *, row_group_size: int = 100, counted: bool = True) -> Artifact:
    folder.mkdir(exist_ok=True)
    infos, start = [], 0
    for index, size in enumerate(sizes):
        path = folder / f"{index:04}.parquet"
        pl.DataFrame({"n": range(start, start + size)}).write_parquet(path, row_group_size=row_group_size)
        infos.append(FileInfo(path=path.name, rows=size if counted else None, bytes=1, sha256=str(index)))
        start += size
    infos.append(FileInfo(path="notes.txt", bytes=1, sha256="x"))
    return Artifact.of(str(folder), infos)


@pytest.mark.parametrize(("files", "blocks"), [([1000], 1), ([10] * 100, 20), ([0, 350, 0, 5, 5, 400], 4), ([30], 1)])
def test_blocks_hold_every_row_once_in_order(
    ray_session: RaySession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[int], blocks: int
) -> None:
    def sizes(rows: pl.DataFrame) -> tuple[int, list[int]]:
        return rows.height, rows["n"].to_list()

    monkeypatch.setattr(ray_data, "_SMALLEST_BLOCK_ROWS", 50)
    monkeypatch.setattr(ray_data, "_BLOCKS_WANTED", 1000)
    found = parquet_blocks(table(tmp_path, files), ["n"])
    assert (found.rows, found.count) == (sum(files), blocks)
    assert [n for _, values in found.reports(sizes) for n in values] == list(range(sum(files)))
    assert list(found.files.values()) == list(range(len([size for size in files if size])))


def test_without_rows_there_is_nothing_to_do(ray_session: RaySession, tmp_path: Path) -> None:
    for files in ([], [0, 0]):
        found = parquet_blocks(table(tmp_path / str(len(files)), files), ["n"])
        assert (found.rows, found.reports(len), found.select("n").reports(len)) == (0, [], [])


def test_wide_rows_make_more_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_data._block_count(1_000, 9) == 1
    assert ray_data._block_count(100_000, 9) == 4
    assert ray_data._block_count(1_000_000, 9) == 8
    assert ray_data._block_count(1_000_000, 600) == 100  # a row takes more memory


def test_columns_that_some_files_lack_are_null(ray_session: RaySession, tmp_path: Path) -> None:
    pl.DataFrame({"n": [1, 2]}, schema={"n": pl.Int32}).write_parquet(tmp_path / "0.parquet")
    pl.DataFrame({"n": [3], "late": ["x"], "other": [1]}).write_parquet(tmp_path / "1.parquet")
    artifact = Artifact.of(str(tmp_path), [FileInfo(path=f"{i}.parquet", bytes=1, sha256=str(i)) for i in (0, 1)])

    def rows(frame: pl.DataFrame) -> list[dict[str, object]]:
        return frame.drop("path").to_dicts()

    [found] = parquet_blocks(artifact, ["n"], optional=["late", "nowhere"]).reports(rows)
    assert found == [{"n": 1, "late": None}, {"n": 2, "late": None}, {"n": 3, "late": "x"}]


def test_unreadable_and_foreign_files_are_named(tmp_path: Path) -> None:
    def artifact(name: str) -> Artifact:
        return Artifact.of(str(tmp_path), [FileInfo(path=name, bytes=1, sha256="x")])

    (tmp_path / "bad.parquet").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(StepError, match=r"bad\.parquet is not a readable Parquet file"):
        parquet_blocks(artifact("bad.parquet"), ["a"])
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "foreign.parquet")
    with pytest.raises(StepError, match=r"foreign\.parquet lacks the columns \['b'\]; it has \['a'\]"):
        parquet_blocks(artifact("foreign.parquet"), ["a", "b"])


# Tasks are defined inside the tests: workers cannot import test modules, so their code is sent along.


def test_results_come_with_their_index(ray_session: RaySession) -> None:
    def squared(number: int) -> int:
        return number * number

    found = dict(each_call(squared, [(i,) for i in range(20)]))
    assert found == {i: i * i for i in range(20)}
    assert dict(each_call(squared, [])) == {}


def test_workers_have_their_settings(ray_session: RaySession) -> None:
    def environment(names: list[str]) -> dict[str, str | None]:
        import polars as pl

        assert pl.Series([1]).sum() == 1
        return {name: os.environ.get(name) for name in names}

    wanted = worker_environment()
    [(_, found)] = each_call(environment, [(list(wanted),)])
    allocator, wanted_allocator = found.pop("_RJEM_MALLOC_CONF"), wanted.pop("_RJEM_MALLOC_CONF")
    assert found == wanted
    assert allocator is not None
    assert allocator.endswith(wanted_allocator)  # Polars puts its own before; the last setting counts
    assert wanted_allocator.endswith("dirty_decay_ms:10000")


@pytest.mark.parametrize("importing", range(4), ids=lambda n: f"{n} processes above import Polars")
def test_what_polars_sets_is_not_taken_for_a_choice(importing: int) -> None:
    """A run's driver inherits what its parents' imports have set: those of Dagster, of a schedule, of a benchmark."""
    script = "from step_scripts.runner.ray_environment import worker_environment as w; print(w()['_RJEM_MALLOC_CONF'])"
    call = ["-c", script]
    parent = "import polars, subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True)"
    for _ in range(importing):
        call = ["-c", parent, *call]
    environment = {name: value for name, value in os.environ.items() if name != "_RJEM_MALLOC_CONF"}
    done = subprocess.run([sys.executable, *call], env=environment, capture_output=True, text=True, check=True)
    settings = done.stdout.strip()
    assert settings.count("dirty_decay_ms:500") == importing
    assert settings.endswith("dirty_decay_ms:10000")


def test_what_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLARS_MAX_THREADS", "3")
    monkeypatch.setenv("_RJEM_MALLOC_CONF", "narenas:2")
    found = worker_environment()
    assert found["POLARS_MAX_THREADS"] == "3"
    assert found["_RJEM_MALLOC_CONF"].startswith("narenas:2,")


def test_results_keep_their_types(ray_session: RaySession) -> None:
    """Ray Data would turn tuples into lists and dictionaries into structures."""
    results = {"a": (1, 2.5, None), "b": [(1,)], 3: {"x": Path("y")}}
    assert list(each_call(lambda: results, [()])) == [(0, results)]


def test_what_operators_took_is_noted(ray_session: RaySession, tmp_path: Path) -> None:
    def work(rows: pl.DataFrame) -> int:
        return rows.height

    noted_operators.set(found := [])
    parquet_blocks(table(tmp_path, [100, 50]), ["n"]).reports(work)
    list(each_call(lambda n: n, [(n,) for n in range(3)]))
    noted_operators.set(None)
    assert [(operator["operator"], operator["tasks"]) for operator in found] == [
        ("ReadParquet->work", 1),
        ("<lambda>", 3),
    ]
    assert all(operator["task_seconds"] > 0 for operator in found)
    parquet_blocks(table(tmp_path, [100, 50]), ["n"]).reports(work)
    assert len(found) == 2


def test_leaving_early_ends_the_tasks(ray_session: RaySession, tmp_path: Path) -> None:
    def slow(number: int) -> int:
        if number:
            time.sleep(60)
            (tmp_path / str(number)).touch()
        return number

    for index, _ in each_call(slow, [(i,) for i in range(6)]):
        assert index == 0
        break
    assert dict(each_call(lambda: 5, [()])) == {0: 5}  # the CPUs are free again
    assert not list(tmp_path.iterdir())


def test_an_input_error_of_a_task_ends_the_others(ray_session: RaySession, tmp_path: Path) -> None:
    def refuse_three(number: int) -> int:
        if number == 3:
            raise StepError("three is refused", details={"number": 3})
        if number > 3:
            time.sleep(60)
            (tmp_path / str(number)).touch()
        return number

    with pytest.raises(StepError, match="three is refused") as caught:
        list(each_call(refuse_three, [(i,) for i in range(8)]))
    assert caught.value.details == {"number": 3}
    # The CPUs are free again, and no task has gone on to its end.
    assert dict(each_call(lambda: 5, [()])) == {0: 5}
    assert not list(tmp_path.iterdir())


def test_progress_is_reported_at_the_end_and_not_for_every_piece() -> None:
    log = CollectingReporter()
    progress = Progress(log, "reading", 50_000)
    for _ in range(50):
        progress.add(1000)
    assert len(log.messages) < 10
    assert log.messages[-1].startswith("reading: 50,000 of 50,000 rows, ")
