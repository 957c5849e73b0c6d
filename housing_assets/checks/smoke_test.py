"""Rows whose predictions are known, to compare a served model with the offline one."""

from __future__ import annotations

from resources.endpoints.base import SmokeTest
from step_scripts.runner.contract import Artifact

# Served and offline predictions come from the same float32 model; only the text form of a number may differ.
RELATIVE_TOLERANCE = 1e-5


def smoke_test_from(model: Artifact, rows: Artifact, count: int) -> SmokeTest:
    """The first `count` rows of `rows` as CSV of raw features, with the predictions of `model` made here."""
    import polars as pl

    from step_scripts.model.artifact import load_model
    from step_scripts.runner import storage

    trained = load_model(model.uri, threads=1)
    frames: list[pl.DataFrame] = []
    for uri in rows.file_uris(".parquet"):
        with storage.open_input(uri) as file:
            frames.append(pl.read_parquet(file, n_rows=count - sum(f.height for f in frames)))
        if sum(f.height for f in frames) >= count:
            break
    frame = pl.concat(frames).select(trained.table.features)
    return SmokeTest(
        body=frame.write_csv(include_header=False),
        expected=tuple(float(value) for value in trained.predict(frame)),
        tolerance=RELATIVE_TOLERANCE,
    )
