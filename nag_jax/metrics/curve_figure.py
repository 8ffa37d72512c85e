"""Draws a Fréchet distance against the number of samples, with its extrapolation. Nothing is measured here."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nag_jax.metrics.extrapolation import DistanceCurve


def curve_figure(curve: DistanceCurve, label: str) -> bytes:
    """A PNG file: distances over 1 / n, and the line to infinitely many samples.

    Args:
        curve: from `distance_curve`.
        label: what the distance is called.
    """
    figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    axes = figure.subplots()
    inverse = 1.0 / curve.sizes
    ends = np.array([0.0, inverse.max()])
    axes.plot(ends, curve.limit + curve.slope * ends, color="#D55E00", label="least-squares line")
    axes.plot(inverse, curve.distances, "o", color="#0072B2", label="random subsets")
    axes.plot([0.0], [curve.limit], "D", color="#D55E00", label=f"extrapolated: {curve.limit:.4g}")
    shown = np.unique(np.linspace(0, len(curve.sizes) - 1, 5).round().astype(int))
    ticks = [0.0, *inverse[shown]]
    axes.set_xticks(ticks, ["∞", *(f"{size:,}" for size in curve.sizes[shown])], rotation=45)
    axes.set_xlabel("samples (axis linear in 1 / n)")
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#E5E5E5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
