"""How tables are cut into pieces, and how Ray tasks over them behave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from step_scripts.runner.contract import Artifact, FileInfo, StepError
from step_scripts.runner.ray_session import RaySession, worker_environment
from step_scripts.runner.ray_tasks import FilePart, Progress, completed_tasks, pieces_of, read_part


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


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("sizes", [[1000], [10] * 100, [0, 350, 0, 5, 5, 400], [30], []])
def test_pieces_hold_every_row_once_in_order(tmp_path: Path, sizes: list[int], counted: bool) -> None:
    pieces = pieces_of(table(tmp_path, sizes, counted=counted), columns=1, piece_rows=200)
    frames = [read_part(part, ["n"]) for piece in pieces for part in piece.parts]
    values = pl.concat(frames)["n"].to_list() if frames else []
    assert values == list(range(sum(sizes)))
    assert all(0 < piece.rows <= 200 for piece in pieces)
    assert len(pieces) <= -(-sum(sizes) // 200) * 2


def test_small_files_share_a_piece_and_large_ones_are_divided(tmp_path: Path) -> None:
    many = pieces_of(table(tmp_path / "many", [10] * 100), columns=1, piece_rows=200)
    assert [len(piece.parts) for piece in many] == [20] * 5
    one = pieces_of(table(tmp_path / "one", [1000], row_group_size=250), columns=1, piece_rows=600)
    assert [piece.parts[0].row_groups for piece in one] == [(0, 1), (2, 3)]
    wide = pieces_of(table(tmp_path / "one", [1000], row_group_size=250), columns=24_000)
    assert len(wide) == 4  # a row takes more memory


def test_unreadable_and_foreign_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(StepError, match=r"bad\.parquet is not a readable Parquet file"):
        read_part(FilePart(str(tmp_path / "bad.parquet"), None, 1), ["a"])
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "foreign.parquet")
    with pytest.raises(StepError, match=r"foreign\.parquet lacks the columns \['b'\]; it has \['a'\]"):
        read_part(FilePart(str(tmp_path / "foreign.parquet"), None, 1), ["a", "b"])


# Tasks are defined inside the tests: workers cannot import test modules, so their code is sent along.


def test_results_come_with_their_index(ray_session: RaySession) -> None:
    def squared(number: int) -> int:
        return number * number

    found = dict(completed_tasks(squared, [(i,) for i in range(20)]))
    assert found == {i: i * i for i in range(20)}
    assert dict(completed_tasks(squared, [])) == {}


def test_workers_have_their_settings(ray_session: RaySession) -> None:
    def environment(names: list[str]) -> dict[str, str | None]:
        import polars as pl

        assert pl.Series([1]).sum() == 1
        return {name: os.environ.get(name) for name in names}

    wanted = worker_environment()
    [(_, found)] = completed_tasks(environment, [(list(wanted),)])
    allocator, wanted_allocator = found.pop("_RJEM_MALLOC_CONF"), wanted.pop("_RJEM_MALLOC_CONF")
    assert found == wanted
    assert allocator is not None
    assert allocator.endswith(wanted_allocator)  # Polars puts its own before; the last setting counts
    assert wanted_allocator.endswith("dirty_decay_ms:10000")


@pytest.mark.parametrize("importing", range(4), ids=lambda n: f"{n} processes above import Polars")
def test_what_polars_sets_is_not_taken_for_a_choice(importing: int) -> None:
    """A run's driver inherits what its parents' imports have set: those of Dagster, of a schedule, of a benchmark."""
    script = "from step_scripts.runner.ray_session import worker_environment as w; print(w()['_RJEM_MALLOC_CONF'])"
    call = ["-c", script]
    parent = "import polars, subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True)"
    for _ in range(importing):
        call = ["-c", parent, *call]
    environment = {name: value for name, value in os.environ.items() if name != "_RJEM_MALLOC_CONF"}
    done = subprocess.run([sys.executable, *call], env=environment, capture_output=True, text=True, check=True)
    settings = done.stdout.strip()
    # Fails where Polars sets something else: then `_DECAY_BY_POLARS` has to follow.
    assert settings.count("dirty_decay_ms:500") == importing
    assert settings.endswith("dirty_decay_ms:10000")


def test_what_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    by_polars = os.environ["_RJEM_MALLOC_CONF"]
    monkeypatch.setenv("POLARS_MAX_THREADS", "3")
    monkeypatch.setenv("_RJEM_MALLOC_CONF", f"{by_polars},dirty_decay_ms:77")
    found = worker_environment()
    assert found["POLARS_MAX_THREADS"] == "3"
    assert found["_RJEM_MALLOC_CONF"] == f"{by_polars},dirty_decay_ms:77"


def test_several_results_stay_in_the_object_store(ray_session: RaySession) -> None:
    import ray

    def parts(number: int) -> tuple[int, str, str]:
        return number, "a" * number, "b" * number

    answers = dict(completed_tasks(parts, [(1,), (2,)], results_each=3))
    assert [ray.get(answers[i]) for i in (0, 1)] == [[1, "a", "b"], [2, "aa", "bb"]]


def test_an_input_error_of_a_task_ends_the_others(ray_session: RaySession, tmp_path: Path) -> None:
    def refuse_three(number: int) -> int:
        if number == 3:
            raise StepError("three is refused", details={"number": 3})
        if number > 3:
            time.sleep(60)
            (tmp_path / str(number)).touch()
        return number

    with pytest.raises(StepError, match="three is refused") as caught:
        list(completed_tasks(refuse_three, [(i,) for i in range(8)]))
    assert caught.value.details == {"number": 3}
    # The CPUs are free again, and no task has gone on to its end.
    assert dict(completed_tasks(lambda: 5, [()])) == {0: 5}
    assert not list(tmp_path.iterdir())


def test_progress_is_reported_at_the_end_and_not_for_every_piece() -> None:
    class Log:
        def __init__(self) -> None:
            self.messages: list[str] = []

        def info(self, message: str) -> None:
            self.messages.append(message)

        warning = info

    log = Log()
    progress = Progress(log, "reading", 50_000)
    for _ in range(50):
        progress.add(1000)
    assert len(log.messages) < 10
    assert log.messages[-1].startswith("reading: 50,000 of 50,000 rows, ")
