"""Where the time of a run went."""

import time
from typing import Any

import dagster as dg
import psutil
import pytest

from housing_assets.reporting import metadata
from housing_assets.reporting.metadata import KINDS, run_timeline
from resources.compute.base import table


def _metadata(reused: bool, **seconds: float) -> dict[str, Any]:
    phases = [{"phase": name.replace("_", " "), "seconds": value} for name, value in seconds.items()]
    return {"phases": table(phases), "reused": reused}


@dg.multi_asset(specs=[dg.AssetSpec("a"), dg.AssetSpec("b")])
def twins() -> Any:
    time.sleep(0.3)
    for key in ("a", "b"):
        metadata = _metadata(False, start_Ray=0.05, read_headers=0.02, tune=0.1, fit=0.05, write=0.01, total=0.25)
        yield dg.MaterializeResult(key, metadata=metadata)


@dg.asset(deps=["a"])
def reused() -> dg.MaterializeResult[Any]:
    return dg.MaterializeResult(metadata=_metadata(True, tune=99.0, total=99.0))


@pytest.mark.parametrize("own_process", [True, False])
def test_seconds_of_a_run_by_asset_and_kind(own_process: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "_LONGEST_START", 1e9 if own_process else 0.0)
    seen: list[dict[str, Any]] = []
    ended: list[float] = []

    @dg.asset(deps=["b", "reused"])
    def last(context: dg.AssetExecutionContext) -> None:
        ended.append(time.time())
        seen.extend(run_timeline(context.instance, context.run.run_id))

    with dg.DagsterInstance.ephemeral() as instance:
        begun = time.time()
        dg.materialize([twins, reused, last], instance=instance)
    rows = {row["asset"]: row for row in seen}
    start = rows.pop("(start of the process)", None)
    assert list(rows) == ["twins", "reused", "last"]
    for row in seen:
        assert sum(row[kind] for kind in KINDS) == pytest.approx(row["seconds"], abs=0.03)
    spent = rows["twins"]
    assert [spent[kind] for kind in KINDS[:-1]] == [0.05, 0.02, 0.15, 0.01]
    assert spent["seconds"] >= 0.3
    assert rows["reused"]["compute"] == 0
    assert rows["reused"]["begins"] >= spent["begins"] + 0.3
    if own_process:
        assert start is not None
        assert start["start-up"] == spent["begins"]
        created = psutil.Process().create_time()
        assert begun - created - 0.1 <= spent["begins"] <= ended[0] - created + 0.1
    else:
        assert start is None
        assert spent["begins"] == 0


def test_a_run_without_steps_has_no_timeline() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        assert run_timeline(instance, "none") == []
