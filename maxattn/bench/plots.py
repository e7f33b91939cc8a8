"""Plots of results, as SVG. They need matplotlib, which is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maxattn.bench.results import Result, Row, cases, told
from maxattn.bench.scaling import FULL, WINDOWS, pixels, value_of
from maxattn.bench.tables import FLOOR, OURS, short, slopes
from maxattn.weights.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CREATOR = "maxattn bench report"
"""Who made a plot, as its file says."""
OURS_COLOUR, THEIRS_COLOUR, LINE = "#0b6e8f", "#c9c9c9", "#444444"


def draw(result: Result, path: Path) -> bool:
    """Draw a result into an SVG file; False for a kind that has no plot, or a result without times.

    The file depends on nothing but the result and matplotlib's version.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    if result.kind not in OF_KIND or not any(row.time for row in result.rows):
        return False
    with matplotlib().rc_context(
        {
            "svg.hashsalt": "maxattn",
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        figure = OF_KIND[result.kind](result)
        figure.suptitle(f"{result.machine.gpu or result.machine.cpu}, torch {result.machine.torch}", fontsize=9)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": CREATOR})
    return True


def matplotlib() -> Any:
    """The library, which is asked for before anything is measured for its sake.

    Raises:
        ModuleNotFoundError: where it is not installed, saying how to install it.
    """
    try:
        return import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'maxattn[plot]'", name="matplotlib") from error


def _scaling(result: Result) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    found = slopes(result.rows)
    for axes, what, name in zip(figure.subplots(1, 2), ("time", "mib"), ("seconds", "peak memory, MiB"), strict=True):
        for kind, colour in ((WINDOWS, OURS_COLOUR), (FULL, "#c1121f")):
            points = [
                (pixels(row), value)
                for row in result.rows
                if row.candidate == kind and row.time is not None and (value := value_of(row, what)) is not None
            ]
            if not points:
                continue
            slope = f", pixels^{found[kind, what]:.2f}" if (kind, what) in found else ""
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=f"{kind}{slope}")
        axes.set(xscale="log", yscale="log", xlabel="pixels of the image", ylabel=name)
        sides = {pixels(row): str(row.case["img_size"]) for row in result.rows if row.time is not None}
        axes.set_xticks(list(sides), [side if "x" in side else f"{side}\u00b2" for side in sides.values()], minor=False)
        axes.xaxis.minorticks_off()
        axes.grid(which="major", color="#eeeeee")
        axes.legend(frameon=False)
    return figure


def _networks(result: Result) -> Figure:
    return _bars(result, "images/s", lambda row, case: int(case["batch"]) / _median(row), short)


def _op(result: Result) -> Figure:
    """A row of panels for each bias, a panel a pass, a line a case: how many times the floor each candidate takes."""
    from matplotlib.figure import Figure

    biases, passes = (list(dict.fromkeys(row.case[name] for row in result.rows)) for name in ("bias", "pass"))
    names = list(dict.fromkeys(row.candidate for row in result.rows if row.time and row.candidate != FLOOR))
    of_panel = {
        (bias, what): cases([row for row in result.rows if (row.case["bias"], row.case["pass"]) == (bias, what)])
        for bias in biases
        for what in passes
    }
    apart = ("dtype", "bias", "pass")
    lines = max(map(len, of_panel.values()))
    figure = Figure(figsize=(11, len(biases) * (1.2 + 0.24 * lines)), layout="constrained")
    panels = list(figure.subplots(len(biases), len(passes), sharey=True, squeeze=False).flat)
    for axes, ((bias, what), groups) in zip(panels, of_panel.items(), strict=True):
        for number, name in enumerate(names):
            points = [
                (_median(row) / _median(floor), told({key: case[key] for key in case if key not in apart}))
                for case, rows in groups
                for floor in rows
                for row in rows
                if floor.candidate == FLOOR and row.candidate == name and row.time is not None
            ]
            colour = {"copy": THEIRS_COLOUR, "triton": OURS_COLOUR}.get(name, f"C{number}")
            if points:
                axes.plot(*zip(*points, strict=True), "o", color=colour, label=name)
        axes.set(xscale="log", xlabel=f"times the floor, {told({'bias': bias})}", title=what)
        axes.axvline(1, color=LINE, linewidth=0.8)
        axes.grid(color="#eeeeee")
    panels[0].invert_yaxis()
    handles = {line.get_label(): line for axes in panels for line in axes.get_legend_handles_labels()[0]}
    figure.legend(handles=handles.values(), loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _bars(
    result: Result,
    what: str,
    value: Callable[[Row, dict[str, Any]], float],
    text: Callable[[float], str],
) -> Figure:
    """A panel a case, a bar a candidate, ours in colour; the panels side by side if there are several."""
    from matplotlib.figure import Figure

    groups = [(case, [row for row in rows if row.time is not None]) for case, rows in cases(result.rows)]
    groups = [(case, rows) for case, rows in groups if rows]
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    tallest = max(len(rows) for _, rows in groups)
    figure = Figure(figsize=(5.5 * columns, lines * (0.9 + 0.24 * tallest) + 0.4), layout="constrained")
    panels: list[Axes] = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (case, rows) in zip(panels, groups, strict=False):
        values = [value(row, case) for row in rows]
        colours = [OURS_COLOUR if row.library == OURS else THEIRS_COLOUR for row in rows]
        bars = axes.barh([row.candidate for row in rows], values, color=colours)
        axes.bar_label(bars, [text(one) for one in values], padding=3, color=LINE)
        axes.set_title(told(case), fontsize=9, loc="left")
        axes.invert_yaxis()
        axes.set_xlabel(what)
        axes.margins(x=0.15)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    return figure


def _median(row: Row) -> float:
    assert row.time is not None
    return row.time.median


OF_KIND: dict[str, Callable[[Result], Figure]] = {
    "op": _op,
    "model": _networks,
    "train": _networks,
    "scaling": _scaling,
}
