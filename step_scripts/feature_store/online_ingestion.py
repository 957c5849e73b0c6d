"""The part of an ingestion that brings the online store up to date, before anything is committed offline."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from step_scripts.feature_store.ingestion_plan import WriteItem
from step_scripts.feature_store.online_progress import PiecePlace, progress_reported
from step_scripts.feature_store.online_store import OnlineOutcome, OnlineTarget, write_online
from step_scripts.runner import storage
from step_scripts.runner.contract import Reporter, StepError
from step_scripts.runner.wording import counted
from step_scripts.table.spec import TableSpec

MISSING_RECORDS = "missing_record_ids.csv"
_SHOWN = 10  # ids in a message


def bring_online(
    run: Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]],
    items: Sequence[WriteItem],
    table: TableSpec,
    target: OnlineTarget,
    expected: int,
    log: Reporter,
    *,
    scratch: str,
    offline: str,
    missing_uri: str | None,
) -> None:
    """Have the online store hold the `expected` records of the pieces `items`.

    Raises `StepError` if it does not: with how many it holds, what is `offline`, and the first ids of the others; all
    of them are written to `missing_uri`.
    """
    folder = storage.join(scratch, "online")
    calls = [(item, table, target, PiecePlace(folder, number)) for number, item in enumerate(items)]
    outcomes: list[OnlineOutcome] = []
    with progress_reported(log, folder, expected, target.patience_seconds):
        for _, outcome in run(write_online, calls):
            outcomes.append(outcome)
            log.info(f"{sum(o.written for o in outcomes):,} of {counted(expected, 'record')} in the online store")
    written, missing = sum(o.written for o in outcomes), sum(o.missing for o in outcomes)
    if written == expected and not missing:
        return
    problem = next((o.problem for o in outcomes if o.problem), "not all records were written")
    unread = sum(o.unread for o in outcomes)
    first = sorted(record_id for o in outcomes for record_id in o.first_missing)[:_SHOWN]
    keep = {}
    if missing_uri is not None:
        _concatenate([o.missing_uri for o in outcomes if o.missing_uri], missing_uri)
        keep[MISSING_RECORDS] = missing_uri
    named = f": {', '.join(first)}{' and others' if missing > len(first) else ''}" if first else ""
    unknown = f" (nothing is known of {unread:,} of these: they cannot be read now)" if unread else ""
    listed = f". {MISSING_RECORDS} lists them all" if keep else ""
    raise StepError(
        f"{problem}. Online: {written:,} of {counted(expected, 'record')} as this ingestion has them, {missing:,} not"
        f"{unknown}{named}{listed}. Offline: none of them; {offline}. Nothing was committed. Remedy: ingest again when "
        "the online store answers, which writes what is missing, or with fewer calls in flight",
        details={
            "records_online": written,
            "records_missing_online": missing,
            "records_unread_online": unread,
            "missing_record_ids": list(first),
            "records_offline": 0,
        },
        keep=keep,
    )


def _concatenate(parts: Sequence[str], uri: str) -> None:
    with storage.open_output(uri) as target:
        target.write(b"record_id\n")
        for part in parts:
            with storage.open_input(part) as source:
                shutil.copyfileobj(source, target)
