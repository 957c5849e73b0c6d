"""Plots for asset metadata: small PNG files, 640 pixels wide, on white, so that they read in a light and a dark UI.

They live in Dagster's event log, hence the reduced palette. matplotlib is used through its objects alone: `pyplot`
would keep figures in a global list and choose a display.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import dagster as dg

from step_scripts.runner.wording import counted
from step_scripts.table.spec import TableSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = 48
_BLUE, _ORANGE, _GREY, _INK = "#2b6cb0", "#c2560c", "#8a94a0", "#28323c"
_SMALL = 9  # font size of ticks, legends, and what stands on the right of a title
_MOST_BARS = 20
_STYLE: Any = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 11,
    "text.color": _INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "axes.labelsize": 9.5,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    **{f"{axis}tick.{name}": value for axis in "xy" for name, value in (
        ("color", _INK), ("labelsize", _SMALL), ("major.size", 3))},
    "legend.fontsize": _SMALL,
    "legend.labelcolor": _INK,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,  # lines behind it would be read as a part of the words
}  # fmt: skip
_Data = ParamSpec("_Data")


def _plot(draw: Callable[Concatenate[Figure, _Data], None]) -> Callable[_Data, bytes]:
    """Makes a PNG of what is drawn on a figure, in the common look and with a reduced palette.

    The palette makes it a third of the size, without a visible difference.
    """

    @functools.wraps(draw)
    def plot(*data: _Data.args, **options: _Data.kwargs) -> bytes:
        import matplotlib
        from matplotlib.figure import Figure
        from PIL import Image

        full, reduced = io.BytesIO(), io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=(6.4, 3.7))
            draw(figure, *data, **options)
            figure.savefig(full, format="png")
        Image.open(full).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(reduced, "PNG", optimize=True)
        return reduced.getvalue()

    return plot


@_plot
def prediction_plot(figure: Figure, predictions: Mapping[str, Sequence[float]], table: TableSpec) -> None:
    """Predicted against actual values. `predictions` holds two equally long lists, `actual` and `predicted`."""
    actual, predicted = predictions["actual"], predictions["predicted"]
    figure.set_figheight(4.6)
    axes = _axes(figure, "Predicted against actual values", counted(len(actual), "test row"))
    axes.scatter(actual, predicted, s=9, color=_BLUE, alpha=0.35, linewidths=0)
    low, high = min(*actual, *predicted), max(*actual, *predicted)
    axes.plot([low, high], [low, high], color=_ORANGE, linewidth=1.3, label="equal")
    axes.set(xlabel=f"Actual: {_described(table)}", ylabel=f"Predicted: {_described(table)}")
    axes.legend(loc="upper left")


@_plot
def residual_plot(figure: Figure, predictions: Mapping[str, Sequence[float]], table: TableSpec) -> None:
    """Residuals (actual minus predicted) over the predicted value, and their histogram beside.

    The axis ends at twice the residual that 99 % stay below, so that a few outliers do not flatten the rest; what lies
    beyond is drawn as triangles on the edge, and counted.
    """
    pairs = list(zip(predictions["predicted"], predictions["actual"], strict=True))
    points = [(predicted, actual - predicted) for predicted, actual in pairs]
    sizes = sorted(abs(residual) for _, residual in points)
    limit = min(2 * sizes[int(0.99 * (len(sizes) - 1))], sizes[-1]) or 1.0
    inside = [point for point in points if abs(point[1]) <= limit]
    outside = [point for point in points if abs(point[1]) > limit]
    beyond = f", {len(outside)} beyond the axis (up to {short_number(sizes[-1])})" if outside else ""
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    _title(left, "Residuals")
    _title(right, "", f"{counted(len(points), 'test row')}{beyond}")
    left.scatter([x for x, _ in inside], [y for _, y in inside], s=9, color=_BLUE, alpha=0.35, linewidths=0)
    for sign, marker in ((1, "^"), (-1, "v")):
        edge = [x for x, y in outside if y * sign > 0]
        left.scatter(edge, [sign * limit] * len(edge), s=26, marker=marker, color=_ORANGE, clip_on=False)
    right.hist([y for _, y in inside], bins=40, range=(-limit, limit), orientation="horizontal", color=_BLUE)
    for axes in (left, right):
        axes.axhline(0, color=_ORANGE, linewidth=1.3)
        axes.set_ylim(-1.04 * limit, 1.04 * limit)
    left.set(xlabel=f"Predicted: {_described(table)}", ylabel=_with_unit("Actual − predicted", table))
    right.set_xlabel("Rows")


@_plot
def learning_curve_plot(figure: Figure, curve: Mapping[str, Any], table: TableSpec) -> None:
    """RMSE of both splits over the rounds of the final fit.

    `curve` holds equally long lists `round`, `train` and `validation`, and `best_rounds`.
    """
    axes = _axes(figure, "Learning curve of the final fit", f"best after {counted(curve['best_rounds'], 'round')}")
    axes.plot(curve["round"], curve["train"], color=_BLUE, linewidth=1.5, label="train")
    axes.plot(curve["round"], curve["validation"], color=_ORANGE, linewidth=1.5, label="validation")
    axes.axvline(curve["best_rounds"], color=_GREY, linewidth=1, linestyle="--", label="best round")
    _log_if_wide(axes, "y", [*curve["train"], *curve["validation"]])
    axes.set(xlabel="Boosting rounds", ylabel=_with_unit("RMSE", table))
    axes.legend(loc="upper right")


@_plot
def importance_plot(figure: Figure, importance: Mapping[str, Mapping[str, float]]) -> None:
    """Share of each feature in the reduction of the loss.

    `importance` holds, for each feature, the mean `gain` of its splits and their number (`weight`).
    """
    totals = {name: figures["gain"] * figures["weight"] for name, figures in importance.items()}
    whole = sum(totals.values()) or 1.0
    shown = sorted(totals.items(), key=lambda item: item[1])[-_MOST_BARS:]
    shares = [100 * total / whole for _, total in shown]
    figure.set_figheight(1.2 + 0.26 * max(len(shown), 3))
    left_out = len(totals) - len(shown)
    axes = _axes(figure, "Feature importance", f"{counted(left_out, 'weaker feature')} not shown" if left_out else "")
    bars = axes.barh(range(len(shown)), shares, color=_BLUE, height=0.68)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.bar_label(bars, [f"{share:.1f} %" for share in shares], padding=3, fontsize=_SMALL)
    axes.set(xlim=(0, max(shares, default=1.0) * 1.13 or 1.0), xlabel="Share of the total gain of all splits, per cent")
    axes.grid(visible=False, axis="y")


@_plot
def trials_plot(figure: Figure, trials: Sequence[Mapping[str, Any]]) -> None:
    """RMSE over each tuned parameter. A trial has `parameters` (name to number) and `rmse` (None if it failed)."""
    done = [trial for trial in trials if trial["rmse"] is not None]
    names = list(dict.fromkeys(name for trial in done for name in trial["parameters"]))
    columns = 2 if len(names) > 1 else 1
    rows = max(1, -(-len(names) // columns))
    figure.set_figheight(0.6 + 2.1 * rows)
    best = min(done, key=lambda trial: trial["rmse"], default=None)
    failed = len(trials) - len(done)
    title = f"Trials: {len(done)} finished" + (f", {failed} failed" if failed else "")
    title += f"; best RMSE {best['rmse']:,.6g} (orange)" if best is not None else ""
    figure.suptitle(title, x=0.02, ha="left")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    for index, (panel, name) in enumerate(zip(panels, names, strict=False)):
        _title(panel)
        having = [trial for trial in done if name in trial["parameters"]]
        values = [trial["parameters"][name] for trial in having]
        scores = [trial["rmse"] for trial in having]
        panel.scatter(values, scores, s=26, color=_BLUE, alpha=0.7, linewidths=0)
        if best is not None and name in best["parameters"]:
            panel.scatter([best["parameters"][name]], [best["rmse"]], s=60, color=_ORANGE)
        _log_if_wide(panel, "x", values)
        _log_if_wide(panel, "y", scores)
        if all(isinstance(value, int) for value in values):
            panel.locator_params(axis="x", integer=True)
        panel.set_xlabel(name)
        if index % columns == 0:
            panel.set_ylabel("RMSE")


def to_markdown(png: bytes, alt: str) -> dg.MarkdownMetadataValue:
    """The picture as Markdown that needs no other file. The UI shows a picture for this type of metadata only."""
    return dg.MetadataValue.md(f"![{alt}](data:image/png;base64,{base64.b64encode(png).decode()})")


def load_matplotlib() -> None:
    """Import what the plots need (0.7 s), so that a thread can do it while there is nothing to draw yet."""
    with contextlib.suppress(Exception):  # the reason comes again, as that of a plot that cannot be drawn
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import matplotlib.ticker  # noqa: F401


def _axes(figure: Figure, title: str, subtitle: str) -> Axes:
    axes = figure.subplots()
    _title(axes, title, subtitle)
    return axes


def _title(axes: Axes, title: str = "", subtitle: str = "") -> None:
    """A title on the left, smaller words on the right, and short numbers on both axes."""
    axes.set_title(title)
    axes.set_title(subtitle, loc="right", fontsize=_SMALL, color=_GREY)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(short_number)


def _log_if_wide(axes: Axes, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis where values span more than a factor of ten."""
    from matplotlib.ticker import LogLocator

    if values and min(values) > 0 and max(values) >= 10 * min(values):
        axes.set(**{f"{which}scale": "log"})
        axis = axes.xaxis if which == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(short_number)
        axis.set_minor_formatter("")


def short_number(value: float, _: float | None = None) -> str:
    """A number for an axis: `250k`, `1.2M`, `0.05`. Matplotlib also gives its position, which does not matter."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def _described(table: TableSpec) -> str:
    """The target in words, with its unit: `sale price, US dollars`."""
    description = table.column(table.target).description.strip().rstrip(".")
    return description[0].lower() + description[1:] if description else table.target


def _with_unit(what: str, table: TableSpec) -> str:
    """`what` in the target's unit, which is what follows the last comma of its description."""
    _, comma, unit = table.column(table.target).description.strip().rstrip(".").rpartition(", ")
    return f"{what}, {unit}" if comma else what
