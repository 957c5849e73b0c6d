"""A run with PostgreSQL as Dagster's storage: a real server, the instance file that teams copy, the real command."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from tests.ports import free_port
from tests.unit.project.test_deployment_files import POSTGRES_FILE
from tests.waiting import until

ROOT = Path(__file__).parents[2]


def postgres_program(name: str) -> str | None:
    """Debian keeps the server's programs out of the search path."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: int(p.parts[-3]))
    return str(versions[-1]) if versions else shutil.which(name)


def unprivileged_user() -> str | None:
    """Somebody that the server may run as: it refuses root."""
    names = [entry.pw_name for entry in pwd.getpwall()]
    return next((name for name in ("postgres", "nobody") if name in names), None)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server for these tests; the variables with which Dagster reaches it."""
    initdb, server = postgres_program("initdb"), postgres_program("postgres")
    if initdb is None or server is None:
        pytest.skip("initdb and postgres are not installed (Debian: apt-get install postgresql)")
    folder = Path("/tmp") / f"housing-postgres-{os.getpid()}"  # pytest's own folders are closed to other users
    folder.mkdir(mode=0o700)
    user = None
    if os.geteuid() == 0:
        user = unprivileged_user()
        if user is None:
            pytest.skip("the server cannot run as root, and there is neither a user postgres nor nobody")
        shutil.chown(folder, user, pwd.getpwnam(user).pw_gid)
    (folder / "password").write_text("secret of this test\n")
    (folder / "password").chmod(0o644)
    data, log = folder / "data", (folder / "server.log").open("wb")
    process = None
    try:
        command = [initdb, "--pgdata", str(data), "--username", "dagster", "--pwfile", str(folder / "password")]
        command += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--no-sync"]
        subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=log, timeout=120, user=user)
        port = free_port()
        # Nothing here must survive a crash of the machine.
        command = [server, "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1", "-F"]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, user=user)
        variables = {"HOST": "127.0.0.1", "PORT": str(port), "DB": "postgres", "USER": "dagster"}
        variables |= {"PASSWORD": "secret of this test"}
        wait_for(variables, process, folder / "server.log")
        yield {f"DAGSTER_PG_{name}": value for name, value in variables.items()}
    finally:
        if process is not None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(variables: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    psycopg2 = pytest.importorskip("psycopg2")

    def answers() -> bool:
        try:
            psycopg2.connect(
                host=variables["HOST"],
                port=variables["PORT"],
                dbname=variables["DB"],
                user=variables["USER"],
                password=variables["PASSWORD"],
            ).close()
        except psycopg2.OperationalError:
            return False
        return True

    until(answers, process=process, log=log)


@pytest.mark.slow
def test_a_run_is_stored_in_postgres(postgres: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "dagster"
    home.mkdir()
    shutil.copy(POSTGRES_FILE, home / "dagster.yaml")
    variables = {**postgres, "DAGSTER_HOME": str(home), "HOUSING_ROOT": str(tmp_path / "data")}
    variables |= {"HOUSING_SAMPLE_ROWS": "500", "HOUSING_NUM_CPUS": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "--select", "raw_csv"]
    command += ["-m", "housing_assets.definitions"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(home.rglob("*.db")), "SQLite was used for something"

    limit = [sys.executable, "-m", "dagster", "instance", "concurrency", "set", "ray", "1"]
    subprocess.run(limit, cwd=ROOT, capture_output=True, timeout=120, check=True)
    with dg.DagsterInstance.get() as instance:
        assert "Postgres" in type(instance.event_log_storage).__name__
        [run] = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.SUCCESS
        assert run.asset_selection == {dg.AssetKey("raw_csv")}
        event = instance.get_latest_materialization_event(dg.AssetKey("raw_csv"))
        assert event is not None
        assert event.asset_materialization is not None
        assert event.asset_materialization.metadata["dagster/row_count"].value == 500
        check = dg.AssetCheckKey(dg.AssetKey("raw_csv"), "schema")
        record = instance.event_log_storage.get_latest_asset_check_execution_by_key([check])[check]
        assert record is not None
        assert record.status.value == "SUCCEEDED"
        assert type(instance.run_coordinator).__name__ == "QueuedRunCoordinator"
        assert instance.event_log_storage.get_concurrency_info("ray").slot_count == 1
    assert not [line for line in done.stderr.splitlines() if postgres["DAGSTER_PG_PASSWORD"] in line]
