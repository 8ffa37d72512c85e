"""The figures of reports and of comparisons, as PNG bytes. What they show is not judged here.

Drawn with matplotlib's object interface on the Agg canvas, so nothing global changes and no display is needed. The
noise-shift figure is `noise_shift/figure.py`'s.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from nag_jax.curve_styles import style_of
from nag_jax.errors import UserError

MAX_GRID_CLASSES = 10

# Colours that stay apart for colour-blind readers, Okabe and Ito (2008).
INK, MUTED, GRID = "#222222", "#6b6b6b", "#e3e3e3"
KEPT, DROPPED = "#0072B2", "#D55E00"

_DPI = 180
# Widths in inches of a figure that has the page's width, and of one of two side by side.
_FULL_WIDTH, _HALF_WIDTH = 9.2, 5.0
# Sides in pixels that a grid's images are brought to, by whole factors: small ones grow, large ones shrink.
_SMALLEST_CELL, _LARGEST_CELL = 48, 128
# The distance between two sets of real images: a line, and its interval.
_FLOOR_LINE: dict[str, Any] = {"color": MUTED, "linewidth": 1.3, "linestyle": (0, (4, 2))}
_FLOOR_SPAN: dict[str, Any] = {"color": MUTED, "alpha": 0.18, "linewidth": 0}
_GAP, _BLOCK_GAP, _MARGIN, _TITLE_HEIGHT, _LABEL_WIDTH = 2, 28, 12, 44, 40


def shown_samples(labels: np.ndarray, per_class: int) -> np.ndarray:
    """The indices [K] of the samples that `sample_grid` shows: the first of each of the lowest classes in `labels`."""
    classes = np.unique(labels)[:MAX_GRID_CLASSES]
    return np.sort(np.concatenate([np.flatnonzero(labels == each)[:per_class] for each in classes]))


def sample_grid(samples: Mapping[str, tuple[np.ndarray, np.ndarray]], per_class: int = 6) -> bytes:
    """Samples of several methods: a block for each method, a row for each class.

    Sample i of every method was made from the same noise and label, so the same place in two blocks shows what a method
    changed. Images are enlarged by a whole factor without smoothing, or shrunk by one if they are large.

    Args:
        samples: method -> (uint8 images [N, H, W, 1 or 3], integer labels [N]). The 10 lowest classes are shown.
        per_class: images of a class in each block; places without an image stay empty.

    Returns:
        A PNG file.

    Raises:
        UserError: no samples, images of another shape or type, or methods whose labels differ.
    """
    if not samples:
        raise UserError("A sample grid needs samples of at least one method.")
    _, labels = next(iter(samples.values()))
    for method, (images, its_labels) in samples.items():
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or len(images) == 0:
            raise UserError(
                f"Sample grid: the images of {method!r} are {images.dtype} {list(images.shape)}; expected uint8 "
                "[N, H, W, 1 or 3]."
            )
        if not np.array_equal(its_labels, labels):
            raise UserError(f"Sample grid: the labels of {method!r} differ from the first method's; use the same.")

    classes = np.unique(labels)[:MAX_GRID_CLASSES]
    blocks = [_block(images, labels, classes, per_class) for images, _ in samples.values()]
    width = _LABEL_WIDTH + sum(block.shape[1] + _BLOCK_GAP for block in blocks) - _BLOCK_GAP + _MARGIN
    height = _TITLE_HEIGHT + blocks[0].shape[0] + _MARGIN
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    left = _LABEL_WIDTH
    for method, block in zip(samples, blocks, strict=True):
        figure.figimage(block, left, _MARGIN, origin="upper")
        middle = (left + block.shape[1] / 2) / width
        figure.text(middle, 1 - _TITLE_HEIGHT / 2 / height, method, ha="center", va="center", size=11, color=INK)
        left += block.shape[1] + _BLOCK_GAP
    row_height = (blocks[0].shape[0] + _GAP) / len(classes)
    for row, label in enumerate(classes):
        y = 1 - (_TITLE_HEIGHT + (row + 0.5) * row_height) / height
        figure.text(_LABEL_WIDTH / 2 / width, y, str(label), ha="center", va="center", size=9, color=MUTED)
    return _png(figure)


def _block(images: np.ndarray, labels: np.ndarray, classes: np.ndarray, per_class: int) -> np.ndarray:
    """One method's images on white, uint8 RGB [height, width, 3]."""
    first = _resized(images[0])
    cell_height, cell_width = first.shape[0] + _GAP, first.shape[1] + _GAP
    block = np.full((len(classes) * cell_height - _GAP, per_class * cell_width - _GAP, 3), 255, np.uint8)
    for row, label in enumerate(classes):
        for column, index in enumerate(np.flatnonzero(labels == label)[:per_class]):
            image = _resized(images[index])
            top, left = row * cell_height, column * cell_width
            block[top : top + image.shape[0], left : left + image.shape[1]] = image
    return block


def _resized(image: np.ndarray) -> np.ndarray:
    side = max(image.shape[:2])
    if side <= _LARGEST_CELL:
        factor = math.ceil(_SMALLEST_CELL / side)
        return np.repeat(np.repeat(image, factor, axis=0), factor, axis=1)
    pillow = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    reduced = np.asarray(pillow.reduce(math.ceil(side / _LARGEST_CELL)))
    return reduced if reduced.ndim == 3 else reduced[..., None]


def loss_curve(metrics_lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The training loss over steps, apart for examples with and without their noise condition.

    Args:
        metrics_lines: lines of metrics.jsonl with "loss/noise_kept" and "loss/noise_dropped"; a line without one of
            them leaves a gap. Where none has them, "loss" is drawn.

    Returns:
        A PNG file.
    """
    figure, axes = _figure(_HALF_WIDTH, 3.2)
    steps = [line["step"] for line in metrics_lines]
    curves = [
        ("loss/noise_dropped", "noise condition dropped", DROPPED),
        ("loss/noise_kept", "noise condition kept", KEPT),
    ]
    present = [curve for curve in curves if any(curve[0] in line for line in metrics_lines)]
    for key, label, colour in present or [("loss", "all examples", INK)]:
        values = [_float(line.get(key)) for line in metrics_lines]
        axes.plot(steps, values, color=colour, label=label, linewidth=1.3, marker="o", markersize=2)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (mean squared error)")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(steps, default=1))
    axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def loss_by_level(metrics_lines: Sequence[Mapping[str, Any]], last: float = 0.25) -> bytes:
    """The loss at each noise level near the end of training, with and without the noise condition.

    Args:
        metrics_lines: lines of metrics.jsonl with "loss_by_level/i" and "loss_by_level_noise_dropped/i" for equal
            intervals i of t.
        last: share of the lines, from the end, that each point averages.

    Returns:
        A PNG file.
    """
    figure, axes = _figure(_HALF_WIDTH, 3.2)
    lines = last_lines(metrics_lines, last)
    prefixes = {"loss_by_level/": ("noise condition kept", KEPT, "o"),
                "loss_by_level_noise_dropped/": ("noise condition dropped", DROPPED, "s")}  # fmt: skip
    indices = {int(key.split("/")[1]) for line in metrics_lines for key in line if key.startswith(tuple(prefixes))}
    num_intervals = max(indices, default=0) + 1
    t = (np.arange(num_intervals) + 0.5) / num_intervals
    for prefix, (label, colour, marker) in prefixes.items():
        values = [_mean(line.get(f"{prefix}{i}") for line in lines) for i in range(num_intervals)]
        if np.isfinite(values).any():
            axes.plot(t, values, color=colour, label=label, linewidth=1.3, marker=marker, markersize=4.5)
    axes.set_xlabel("t (0 = data, 1 = noise)")
    axes.set_ylabel("loss (mean squared error)")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def last_lines(metrics_lines: Sequence[Mapping[str, Any]], last: float = 0.25) -> Sequence[Mapping[str, Any]]:
    """The last share of the lines, at least one, that `loss_by_level` averages."""
    return metrics_lines[-max(1, round(last * len(metrics_lines))) :]


def frechet_figure(metrics: Mapping[str, Any]) -> bytes:
    """The Fréchet distance of each method with its interval, beside the distance between two sets of real images.

    Args:
        metrics: the content of an evaluation's metrics.json: "methods" (name -> "frechet_distance" and "interval"),
            "features" ("name") and, if it was measured, "floor".

    Returns:
        A PNG file.
    """
    methods = metrics["methods"]
    figure, axes = _figure(_FULL_WIDTH, 1.0 + 0.34 * len(methods))
    for row, result in enumerate(methods.values()):
        low, high = map(_float, result.get("interval") or (None, None))
        axes.plot([low, high], [row, row], color=KEPT, linewidth=2.2, solid_capstyle="butt")
        axes.plot(_float(result["frechet_distance"]), row, "o", color=KEPT, markersize=6.5)
    floor = metrics.get("floor")
    if floor:
        low, high = map(_float, floor.get("interval") or (None, None))
        if np.isfinite([low, high]).all():
            axes.axvspan(low, high, **_FLOOR_SPAN)
        axes.axvline(_float(floor["frechet_distance"]), **_FLOOR_LINE)
        axes.annotate(
            "real against real",
            (_float(floor["frechet_distance"]), 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            size=8.5,
            color=MUTED,
            ha="left",
        )
    axes.set_yticks(range(len(methods)), list(methods))
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 1.03 * axes.get_xlim()[1])
    axes.set_xlabel(f"Fréchet distance on {metrics['features']['name']} features (lower is closer to real images)")
    return _png(figure)


def compare_figure(comparison: Mapping[str, Any]) -> bytes:
    """Fréchet distance and mean absolute calibrated noise shift over NAG's weight, a line for each scale of CFG.

    Args:
        comparison: the content of a comparison's compare.json: "entries" ("cfg_scale", "nag_scale",
            "frechet_distance", "interval", "mean_absolute_shift"), "features" ("name") and, if measured, "floor".

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(_FULL_WIDTH, 3.8), dpi=_DPI, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    by_cfg: dict[float, list[Mapping[str, Any]]] = {}
    for entry in sorted(comparison["entries"], key=lambda entry: (entry["cfg_scale"], entry["nag_scale"])):
        by_cfg.setdefault(entry["cfg_scale"], []).append(entry)
    spread = np.ptp([entry["nag_scale"] for entry in comparison["entries"]])
    for index, (cfg_scale, entries) in enumerate(by_cfg.items()):
        style: dict[str, Any] = {
            **style_of(index)._asdict(),
            "label": f"CFG {cfg_scale:g}" + (" (off)" if cfg_scale == 1.0 else ""),
        }
        # Side by side, so that overlapping intervals stay readable.
        offset = (index - 0.5 * (len(by_cfg) - 1)) * 0.012 * spread
        x = np.array([entry["nag_scale"] for entry in entries]) + offset
        distances = [(entry["frechet_distance"], *(entry["interval"] or (None, None))) for entry in entries]
        shifts = [[entry["mean_absolute_shift"][end] for end in ("estimate", "low", "high")] for entry in entries]
        _line_with_intervals(left, x, distances, style)
        _line_with_intervals(right, x, shifts, style)
    floor = comparison.get("floor")
    if floor:
        low, high = map(_float, floor.get("interval") or (None, None))
        if np.isfinite([low, high]).all():
            left.axhspan(low, high, **_FLOOR_SPAN)
        left.axhline(_float(floor["frechet_distance"]), **_FLOOR_LINE, label="real against real")
    left.set_ylabel(f"Fréchet distance on\n{comparison['features']['name']} features")
    right.set_ylabel("mean absolute noise shift\n(calibrated, in units of t)")
    for axes in (left, right):
        _make_quiet(axes)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("nag_scale (0: off)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    return _png(figure)


def _line_with_intervals(axes: Axes, x: np.ndarray, values: Sequence[Sequence[Any]], style: Mapping[str, Any]) -> None:
    """A line through estimates with their intervals, from (estimate, low, high) at each of `x`; None leaves a gap."""
    estimate, low, high = np.array([[_float(value) for value in triple] for triple in values]).T
    ends = np.maximum([estimate - low, high - estimate], 0.0)
    axes.errorbar(x, estimate, yerr=ends, markersize=4.5, linewidth=1.3, elinewidth=1.0, capsize=2, **style)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with one pair of quiet axes."""
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    _make_quiet(axes)
    return figure, axes


def _make_quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _mean(values: Any) -> float:
    """The mean of the numbers among `values`; NaN without any."""
    numbers = [float(value) for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else math.nan


def _float(value: Any) -> float:
    """A number from JSON, where null stands for one that is not finite."""
    return math.nan if value is None else float(value)
