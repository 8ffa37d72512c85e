"""Draws Fréchet distances against the number of samples, with their extrapolation. Nothing is measured here."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nag_jax.curve_styles import style_of
from nag_jax.metrics.extrapolation import DistanceCurve


def curve_figure(curves: Mapping[str, DistanceCurve], label: str) -> bytes:
    """A PNG file: distances over 1 / n, and the lines to infinitely many samples.

    Args:
        curves: from `distance_curve`, by the samples' name; at least one.
        label: what the distance is called.
    """
    figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    axes = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        colour, _, marker = style_of(index)
        inverse = 1.0 / curve.sizes
        ends = np.array([0.0, inverse.max()])
        axes.plot(ends, curve.limit + curve.slope * ends, color=colour, linewidth=1.0)
        axes.plot(inverse, curve.distances, marker, color=colour, markersize=4.5)
        axes.plot([0.0], [curve.limit], marker, color=colour, fillstyle="none", label=f"{name}: {curve.limit:.4g} at ∞")
    sizes = next(iter(curves.values())).sizes
    shown = sizes[np.unique(np.linspace(0, len(sizes) - 1, 5).round().astype(int))]
    axes.set_xticks([0.0, *(1.0 / shown)], ["∞", *(f"{size:,}" for size in shown)], rotation=45)
    axes.set_xlabel("samples (axis linear in 1 / n); hollow: extrapolated by a straight line")
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#E5E5E5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
