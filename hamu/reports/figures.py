"""The picture of a sweep: forgetting against utility, one mark a trial, the Pareto front as a step line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hamu.reports.rows import Row
from hamu.reports.tables import comparable, pareto_front, recommended, setting_text, varying_settings
from hamu.reports.timing import is_timing, timing_rows
from hamu.reports.views import View, view_of
from hamu.storage.files import patiently, replacing

# Colours that stay apart for colour-blind readers and in print; HAMU's two are the strongest. The marks differ as well.
METHOD_STYLES: dict[str, tuple[str, str]] = {
    "hamu-q": ("#0072B2", "o"), "hamu-u": ("#D55E00", "s"), "ft": ("#009E73", "^"), "ga": ("#CC79A7", "v"),
    "gdiff": ("#8C6D1F", "D"), "kl": ("#56B4E9", "P"), "scrub": ("#6A3D9A", "X"), "gru": ("#E69F00", "<"),
    "pcgrad": ("#555555", ">"),
}  # fmt: skip
_OTHER_STYLES = (("#1B9E77", "h"), ("#7570B3", "p"), ("#A6761D", "*"))
_MAX_LABELS = 12
_FARTHEST = -1.0
"""Closeness from which on a trial is drawn (twice as far from the retrained model as the original): the rest would crowd it."""
_AXIS_WORDS = {
    "forget_quality": "forget quality: rise of the forget loss from the original (nats{scale})",
    "forget_closeness": "forget closeness: share of the way from the original (0) to the retrained model (1){scale}",
    "retain_utility": "retain utility: minus the rise\nof the retain loss (nats{scale})",
}
_X, _Y = "x", "y"  # where a row is drawn
_SYMLOG_FROM = 10.0
"""Largest value over the typical one from which an axis turns symlog: a diverged trial would else flatten the rest."""


def pareto_png(rows: Sequence[Row], path: Path, *, title: str = "", dpi: int = 150, view: View | None = None) -> None:
    """Draw the trials and their Pareto front as a PNG, replacing `path` whole; for a sweep of times alone, bars of those.

    Args:
        rows: one dict a trial, columns of TRIAL_SCHEMA; failed, pruned and non-finite ones are counted, not drawn.
        path: the file to write.
        title: what was swept ("digits/quickstart"); the number of trials is added.
        dpi: pixels an inch; the figure is 10 x 6.2 inches.
        view: the axes; None: as `view_of` the rows.
    """
    view = view or view_of(rows)
    figure = Figure(figsize=(10.0, 6.2), dpi=dpi, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if is_timing(rows):
        _draw_times(axes, rows, title)
    else:
        _draw_sweep(axes, canvas, rows, title, view)

    def write() -> None:
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": "hamu"})

    patiently(write, folder=Path(path).parent)


def _draw_times(axes: Axes, rows: Sequence[Row], title: str) -> None:
    table = timing_rows(rows)[::-1]
    names, values = [str(row["method"]) for row in table], [row["step_ms"] or 0.0 for row in table]
    bars = axes.barh(names, values, color=[_style_of(name)[0] for name in names])
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=9)
    axes.set_xlabel("milliseconds a step (median over the method's trials; one at a time is the truest)")
    axes.set_title(
        f"{title or 'Sweep'}: time of a step, n = {sum(row['trials'] for row in table)} trials", fontsize=12, loc="left"
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_sweep(axes: Axes, canvas: FigureCanvasAgg, rows: Sequence[Row], title: str, view: View) -> None:
    every, front = [[_placed(row, view) for row in some] for some in (comparable(rows, view), pareto_front(rows, view))]
    near = [row for row in every if view.name == "paper" or row[_X] >= _FARTHEST or row in front]
    shown = near or every
    names = varying_settings(rows)
    for name, key in (("x", _X), ("y", _Y)):
        _scale_axis(axes, name, [row[key] for row in shown], [row[key] for row in front])
    _draw_trials(axes, shown, front)
    _draw_front(axes, front)
    _draw_original(axes, shown)
    if view.name == "reference" and shown:
        axes.axvline(1.0, color="#009E73", lw=0.9, ls="--", zorder=1, label="like the retrained model")
    chosen = recommended(rows, view)
    if chosen is not None:
        axes.plot(
            chosen[view.axes[0]], chosen[view.axes[1]], "o", ms=17, mfc="none", mec="#222222", mew=1.3,
            zorder=6, ls="none", label="setting to use",
        )  # fmt: skip
    _write_words(axes, rows, shown, front, title, view, n_far=len(every) - len(shown))
    canvas.draw()  # fixes the layout: labels are placed in pixels
    labelled = [front[i] for i in sorted(set(np.linspace(0, len(front) - 1, min(len(front), _MAX_LABELS)).astype(int)))]
    _place_labels(axes, canvas, labelled, [setting_text(row, names) for row in labelled], shown, front)


def _placed(row: Row, view: View) -> dict[str, Any]:
    """A row with its place in the view under two names, so that the drawing does not know the view."""
    return {**row, _X: row[view.axes[0]], _Y: row[view.axes[1]]}


def _style_of(method: str) -> tuple[str, str]:
    return METHOD_STYLES.get(method) or _OTHER_STYLES[sum(method.encode()) % len(_OTHER_STYLES)]


def _scale_axis(axes: Axes, name: str, values: Sequence[float], front_values: Sequence[float]) -> None:
    """Linear, or symlog when a value is _SYMLOG_FROM times the typical one, whose surroundings stay linear."""
    axis, set_scale, set_limits = (
        (axes.xaxis, axes.set_xscale, axes.set_xlim) if name == "x" else (axes.yaxis, axes.set_yscale, axes.set_ylim)
    )
    sizes, front_sizes = (np.abs([v for v in some if v != 0.0]) for some in (values, front_values))
    if sizes.size == 0:
        set_limits(-1.0, 1.0)
        return
    typical = min(float(np.median(some)) for some in (sizes, front_sizes) if some.size)
    if sizes.max() > _SYMLOG_FROM * typical:
        threshold = 10.0 ** math.ceil(math.log10(typical))
        set_scale("symlog", linthresh=threshold, linscale=1.5)
        decades = math.ceil(math.log10(sizes.max() / threshold)) + 1
        steps = threshold * np.array([0.5, *(10.0 ** np.arange(decades))])
        axis.set_major_locator(FixedLocator([*-steps[::-1], 0.0, *steps]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    scale = axis.get_transform()
    low, high = scale.transform(np.array([min(0.0, *values, 0.0), max(0.0, *values, 0.0)]))
    margin = 0.12 * (high - low)
    limits = scale.inverted().transform(np.array([low - margin, high + margin]))
    set_limits(float(limits[0]), float(limits[1]))


def _draw_trials(axes: Axes, shown: Sequence[Row], front: Sequence[Row]) -> None:
    on_front = {_key_of(row) for row in front}
    counts: dict[str, int] = {}
    for row in shown:
        counts[str(row.get("method"))] = counts.get(str(row.get("method")), 0) + 1
    known = [*METHOD_STYLES, *sorted(set(counts) - set(METHOD_STYLES))]
    for method in (name for name in known if name in counts):
        colour, mark = _style_of(method)
        axes.plot([], [], mark, color=colour, ms=7, ls="none", label=f"{method} ({counts[method]})")
        for row in shown:
            if str(row.get("method")) == method:
                is_best = _key_of(row) in on_front
                axes.plot(
                    row[_X], row[_Y], mark, color=colour, ms=9 if is_best else 6,
                    mec="black" if is_best else "white", mew=0.9 if is_best else 0.5, alpha=1.0 if is_best else 0.55,
                    zorder=5 if is_best else 3,
                )  # fmt: skip


def _draw_front(axes: Axes, front: Sequence[Row]) -> None:
    """The border of what some trial reaches: from each point flat to the left, and down to the next one's height."""
    if not front:
        return
    bottom = axes.get_ylim()[0]
    x, y = _front_line(axes, front)
    axes.step(x, y, where="pre", color="#333333", lw=1.2, zorder=2, label=f"Pareto front ({len(front)})")
    axes.fill_between(x, y, bottom, step="pre", color="#333333", alpha=0.05, lw=0, zorder=1)


def _front_line(axes: Axes, front: Sequence[Row]) -> tuple[list[float], list[float]]:
    x = [axes.get_xlim()[0], *(row[_X] for row in front), front[-1][_X]]
    y = [front[0][_Y], *(row[_Y] for row in front), axes.get_ylim()[0]]
    return x, y


def _draw_original(axes: Axes, shown: Sequence[Row]) -> None:
    unmoved = sum(row.get("steps") == 0 for row in shown)
    label = "original model" + (f"\n(+ {unmoved} without a step)" if unmoved else "")
    axes.axhline(0.0, color="#999999", lw=0.7, ls=":", zorder=1)
    axes.axvline(0.0, color="#999999", lw=0.7, ls=":", zorder=1)
    axes.plot(0.0, 0.0, "*", ms=15, color="white", mec="black", mew=1.1, zorder=4, ls="none", label=label)


def _write_words(
    axes: Axes, rows: Sequence[Row], shown: Sequence[Row], front: Sequence[Row], title: str, view: View, *, n_far: int
) -> None:
    left_out = len(rows) - len(shown) - n_far
    counted = f"n = {len(shown)} trials, {len(front)} on the front (up and right is better; {view.name} view)"
    if left_out:
        counted += f"; not drawn: {left_out} failed, pruned, dropped or not finite"
    if n_far:
        counted += f"; farther than closeness {_FARTHEST:g}: {n_far}"
    axes.set_title(f"{title or 'Sweep'}: forgetting against utility", fontsize=12, loc="left", pad=22)
    axes.text(0.0, 1.02, counted, transform=axes.transAxes, fontsize=9, color="#444444")
    for axis, name in zip((axes.get_xaxis(), axes.get_yaxis()), view.axes, strict=True):
        axis.set_label_text(_AXIS_WORDS[name].format(scale=_scale_words(axis)))
    axes.grid(True, color="#e6e6e6", lw=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not shown:
        axes.text(0.5, 0.5, "no trial has finite results yet", transform=axes.transAxes, ha="center")
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, fontsize=8.5, frameon=False, alignment="left",
        title="method (trials)", markerscale=0.9,
    )  # fmt: skip


def _scale_words(axis: Any) -> str:
    if axis.get_scale() != "symlog":
        return ""
    return f"; logarithmic beyond ±{axis.get_transform().linthresh:g}"


def _place_labels(
    axes: Axes,
    canvas: FigureCanvasAgg,
    labelled: Sequence[Row],
    texts: Sequence[str],
    shown: Sequence[Row],
    front: Sequence[Row],
) -> None:
    """Put each text at the free place nearest its point, greedily, with a thin line to it where it had to move away."""
    if not labelled:
        return
    renderer = canvas.get_renderer()
    points = axes.transData.transform([(row[_X], row[_Y]) for row in shown])
    unit = canvas.figure.dpi / 72.0  # pixels a typographic point
    taken = [(x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for x, y in points]  # left, bottom, right, top
    corners = axes.transData.transform(np.column_stack(_front_line(axes, front)))
    for (x0, y0), (x1, y1) in pairwise(corners):  # the front's line: down at x0, then flat at y1
        taken.append((x0 - unit, min(y0, y1), x0 + unit, max(y0, y1)))
        taken.append((x0, y1 - unit, x1, y1 + unit))
    border = np.array([axes.get_window_extent(renderer).extents])
    offsets = [
        (distance * math.cos(angle), distance * math.sin(angle))
        for distance in (10, 18, 28, 40, 55, 72, 92, 115)
        for angle in np.deg2rad([35, -35, 145, -145, 80, -80, 100, -100, 10, -10, 170, -170])
    ]
    for row, text in zip(labelled, texts, strict=True):
        point = (row[_X], row[_Y])
        x, y = axes.transData.transform(point)
        words = axes.text(0, 0, text, fontsize=8)
        width, height = words.get_window_extent(renderer).size
        words.remove()
        shifts = unit * np.array(offsets)
        left = x + shifts[:, 0] - np.where(shifts[:, 0] < 0, width, 0.0)
        bottom = y + shifts[:, 1] - height / 2
        boxes = np.column_stack([left, bottom, left + width, bottom + height])
        outside = width * height - _shared_areas(boxes, border)
        costs = _shared_areas(boxes, np.array(taken)) + 4.0 * outside + 0.002 * width * height * np.hypot(*shifts.T) / unit
        best = int(np.argmin(costs))
        taken.append(tuple(boxes[best]))
        side = ("left", 0.0) if offsets[best][0] >= 0 else ("right", 1.0)
        is_near = math.hypot(*offsets[best]) < 15
        line = {"arrowstyle": "-", "color": "#777777", "lw": 0.6, "shrinkA": 1, "shrinkB": 5, "relpos": (side[1], 0.5)}
        note = axes.annotate(
            text, point, xytext=offsets[best], textcoords="offset points", fontsize=8, ha=side[0], va="center",
            zorder=7, color=_style_of(str(row.get("method")))[0], arrowprops=None if is_near else line,
        )  # fmt: skip
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _shared_areas(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The area that each of the boxes (n, 4) shares with the others (m, 4), summed over those: (n,)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0.0, None).prod(axis=2).sum(axis=1)


def _key_of(row: Row) -> tuple[Any, ...]:
    return row.get("trial_id"), row[_X], row[_Y]
