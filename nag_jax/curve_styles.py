"""How curves are told apart in every figure: colours, lines and markers by their place. It draws nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

# Okabe and Ito's colours without the pale yellow: told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 2)))


class Style(NamedTuple):
    """The look of a curve, as keywords of matplotlib's `plot`."""

    color: str
    linestyle: Any
    marker: str


def style_of(index: int) -> Style:
    """The look of the curve at a place in the order: the first 49 differ in colour, or in both line and marker."""
    again = index + index // len(COLOURS)
    return Style(COLOURS[index % len(COLOURS)], LINES[again % len(LINES)], MARKERS[again % len(MARKERS)])
