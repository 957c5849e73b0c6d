"""Plots are small PNG files of one width that show what they are given."""

from __future__ import annotations

import base64
import io
import logging
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

import dagster as dg
import numpy as np
import pytest
from PIL import Image

from housing_assets.reporting import plots
from housing_assets.reporting.metadata import plot_metadata, run_metadata
from step_scripts.runner.contract import StepResult
from step_scripts.table.spec import ColumnSpec, TableSpec

TABLE = TableSpec(
    name="t",
    columns=(
        ColumnSpec(name="PRICE", dtype="float64", description="Sale price, US dollars."),
        ColumnSpec(name="X", dtype="float64"),
    ),
    target="PRICE",
)
RANDOM = np.random.default_rng(0)
ACTUAL = RANDOM.normal(4e5, 1e5, 2000)
PREDICTIONS = {"actual": ACTUAL.tolist(), "predicted": (ACTUAL + RANDOM.normal(0, 9e3, 2000)).tolist()}
CURVE = {
    "round": list(range(1, 301)),
    "train": [1e5 / r for r in range(1, 301)],
    "validation": [1e5 / r + 900 for r in range(1, 301)],
    "best_rounds": 250,
}
IMPORTANCE = {f"FEATURE_{i}": {"gain": 10.0 * i, "weight": 3.0, "cover": 1.0} for i in range(30)}
TRIALS = [
    {"parameters": {"max_depth": i % 5 + 1, "eta": 0.02 * i + 0.01}, "rmse": 9000.0 - 100 * i if i != 3 else None}
    for i in range(12)
]
PLOTS: dict[str, Callable[[], bytes]] = {
    "prediction": lambda: plots.prediction_plot(PREDICTIONS, TABLE),
    "residual": lambda: plots.residual_plot(PREDICTIONS, TABLE),
    "learning curve": lambda: plots.learning_curve_plot(CURVE, TABLE),
    "importance": lambda: plots.importance_plot(IMPORTANCE),
    "trials": lambda: plots.trials_plot(TRIALS),
    "one trial": lambda: plots.trials_plot([{"parameters": {"eta": 0.1}, "rmse": 1.0}]),
    "no trial finished": lambda: plots.trials_plot([{"parameters": {"eta": 0.1}, "rmse": None}]),
    "no importance": lambda: plots.importance_plot({"X": {"gain": 0.0, "weight": 0.0, "cover": 0.0}}),
    "outliers": lambda: plots.residual_plot(
        {"actual": [*PREDICTIONS["actual"], 9e6, -9e6], "predicted": [*PREDICTIONS["predicted"], 0.0, 0.0]}, TABLE
    ),
    "one row": lambda: plots.residual_plot({"actual": [1.0], "predicted": [1.0]}, TABLE),
}


@pytest.mark.parametrize("name", PLOTS)
def test_plots_are_small_pngs_on_white(name: str) -> None:
    png = PLOTS[name]()
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.width == 640
    assert len(png) <= 40_000
    pixels = np.asarray(image.convert("RGB"))
    assert (pixels[-1] == 255).all()  # the background
    assert (pixels < 128).any()  # something is drawn


def test_plots_show_their_data() -> None:
    shifted = {**PREDICTIONS, "predicted": [p + 2e5 for p in PREDICTIONS["predicted"]]}
    assert plots.prediction_plot(PREDICTIONS, TABLE) != plots.prediction_plot(shifted, TABLE)
    assert plots.prediction_plot(PREDICTIONS, TABLE) == plots.prediction_plot(PREDICTIONS, TABLE)


def test_markdown_holds_the_picture() -> None:
    text = plots.to_markdown(b"\x89PNG", "learning curve").value
    assert text.startswith("![learning curve](data:image/png;base64,")
    assert base64.b64decode(text.rpartition(",")[2].rstrip(")")) == b"\x89PNG"


@pytest.mark.parametrize("reason", [ValueError("no finite value"), ImportError("libpng.so is missing")])
def test_a_plot_that_cannot_be_drawn_fails_nothing_and_is_drawn_when_it_can_be(
    reason: Exception,
) -> None:
    """What it would show is done. A later run with the same result tries again, and takes over the others."""
    drawn: list[str] = []
    broken: list[Exception] = [reason]

    def draw(name: str) -> bytes:
        if name == "residuals" and broken:
            raise broken.pop()
        drawn.append(name)
        return name.encode()

    @dg.asset
    def report(context):
        reused = bool(context.instance.get_latest_materialization_event(context.asset_key))
        result = StepResult(
            step="s", request_digest="q", code_version="c", created_at=datetime.now(UTC), params={}, inputs={},
            outputs={}, reused=reused,
        )  # fmt: skip
        pictures = {name: partial(draw, name) for name in ("residuals", "importance")}
        metadata = plot_metadata(context, result, pictures)
        return dg.MaterializeResult(metadata={**metadata, **run_metadata(result)})

    with dg.DagsterInstance.ephemeral() as instance:
        shown, said = [], []
        for _ in range(3):
            done = dg.materialize([report], instance=instance)
            assert done.success
            [event] = done.asset_materializations_for_node("report")
            shown.append({name for name in event.metadata if name in ("residuals", "importance")})
            said += [entry.user_message for entry in instance.all_logs(done.run_id) if entry.level == logging.WARNING]
    assert shown == [{"importance"}, {"residuals", "importance"}, {"residuals", "importance"}]
    assert drawn == ["importance", "residuals"]
    assert said == [f"residuals is left out of the metadata: {type(reason).__name__}: {reason}"]


def test_no_global_state_is_touched() -> None:
    code = """
import sys
from housing_assets.reporting.plots import importance_plot
assert "matplotlib" not in sys.modules
importance_plot({"X": {"gain": 1.0, "weight": 2.0}})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("value", "text"), [(0.05, "0.05"), (1999, "1.999k"), (-250_000, "−250k"), (1.2e6, "1.2M"), (3e9, "3G"), (0, "0")]
)
def test_numbers_on_axes_are_short(value: float, text: str) -> None:
    assert plots.short_number(value) == text
