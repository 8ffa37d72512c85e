"""Draws the noise shift: per time the density of an estimator's answers on true and on sampled states, then the shift.

The layout follows the figure of arXiv 2510.12497, with the shift against time and its confidence intervals added.
Nothing is measured here.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from nag_jax.curve_styles import style_of
from nag_jax.errors import UserError
from nag_jax.noise_shift.density import density_grid, kernel_density
from nag_jax.noise_shift.measurement import NoiseShift

PANELS_PER_ROW = 5
NAMES_PER_ROW = 5


def noise_shift_figure(shifts: Mapping[str, NoiseShift], *, dpi: int = 110) -> bytes:
    """Draws noise shifts measured at the same times against the same control.

    Args:
        shifts: name of a guidance to its shift, at least one.
        dpi: dots per inch.

    Returns:
        A PNG file.

    Raises:
        UserError: no shifts, or of different times.
    """
    if not shifts:
        raise UserError("A noise-shift figure needs at least one guidance.")
    first = next(iter(shifts.values()))
    if any(not np.array_equal(shift.times, first.times) for shift in shifts.values()):
        raise UserError("A noise-shift figure compares measurements at the same times; these differ.")
    num_columns = min(len(first.times), PANELS_PER_ROW)
    num_rows = math.ceil(len(first.times) / num_columns)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(2.5 * PANELS_PER_ROW, 1.9 * num_rows + 4.4), layout=layout)
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.9 * num_rows + 0.9, 3.5), squeeze=False).ravel()

    panels = top.subplots(num_rows, num_columns, squeeze=False).ravel()
    for index, axes in enumerate(panels):
        if index < len(first.times):
            _draw_densities(axes, shifts, index)
        else:
            axes.set_axis_off()
    top.suptitle("What noise level do the states look like?", fontsize=12, fontweight="bold")
    top.supxlabel("estimator's answer (dashed: true t)", fontsize=9)
    top.supylabel("density of answers", fontsize=9)

    raw, calibrated = bottom.subplots(1, 2)
    _draw_shift(raw, shifts, "raw_shift", "raw: mean answer, sampled − true")
    _draw_shift(calibrated, shifts, "calibrated_shift", "calibrated: the same in units of t")
    bottom.suptitle(f"Noise shift, with {first.level:.0%} intervals", fontsize=12, fontweight="bold")
    handles, names = panels[0].get_legend_handles_labels()
    bottom.legend(
        handles, names, loc="outside lower center", ncols=min(len(names), NAMES_PER_ROW), frameon=False, fontsize=9
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _draw_densities(axes: Axes, shifts: Mapping[str, NoiseShift], index: int) -> None:
    first = next(iter(shifts.values()))
    forward = first.forward_answers[index]
    grid = density_grid(forward, *(shift.sampled_answers[index] for shift in shifts.values()))
    axes.fill_between(grid, kernel_density(forward, grid), color="0.82", label="true states (held out)")
    for place, (name, shift) in enumerate(shifts.items()):
        style = style_of(place)
        density = kernel_density(shift.sampled_answers[index], grid)
        axes.plot(grid, density, color=style.color, linestyle=style.linestyle, linewidth=1.6, label=name)
    t = first.times[index]
    axes.axvline(t, color="0.25", linestyle="--", linewidth=1.0)
    axes.set_title(f"t = {t:.3g}", fontsize=9)
    axes.set_ylim(bottom=0.0)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=4)
    _tidy(axes)


def _draw_shift(axes: Axes, shifts: Mapping[str, NoiseShift], quantity: str, label: str) -> None:
    times = next(iter(shifts.values())).times
    spacing = np.diff(times).min() if len(times) > 1 else 0.1
    axes.axhline(0.0, color="0.25", linestyle="--", linewidth=1.0)
    # Side by side, so that overlapping intervals stay readable.
    gap = spacing * min(0.12, 0.8 / len(shifts))
    for place, shift in enumerate(shifts.values()):
        estimate, low, high = np.array([getattr(at_time, quantity) for at_time in shift.shifts]).T
        axes.errorbar(
            times + (place - 0.5 * (len(shifts) - 1)) * gap,
            estimate,
            # A percentile interval need not hold its estimate where the distribution is skew.
            yerr=np.maximum([estimate - low, high - estimate], 0.0),
            **style_of(place)._asdict(),
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )
    axes.set_xlabel("t (0: data, 1: noise)", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
