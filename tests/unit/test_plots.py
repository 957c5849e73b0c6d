"""Plots are small PNG files of one width that show what they are given."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from housing_assets.reporting import plots
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
