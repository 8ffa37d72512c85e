"""Finding the largest batch that fits with few compilations. What a compilation is, the caller knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

LARGEST_STEP = 8  # how many times as large as anything tried before the next try may be
LARGEST_GROWTH = 32  # how many times as large as the first try anything may be: beyond, memory is no concern


class Attempt(NamedTuple):
    """What was learned of one batch size.

    Attributes:
        fits: whether it fits.
        needed_bytes: memory that it takes or would take; None if that is not known.
    """

    fits: bool
    needed_bytes: float | None


class Largest(NamedTuple):
    """The outcome of a search.

    Attributes:
        fits: the largest multiple that was seen to fit; 0 if none did.
        too_large: the smallest that was seen not to fit; None if all did, and larger ones may.
    """

    fits: int
    too_large: int | None


def largest_fitting(
    attempt: Callable[[int], Attempt],
    known: dict[int, Attempt],
    *,
    limit: float,
    fixed_bytes: float,
    max_attempts: int,
) -> Largest:
    """Searches the largest multiple of a smallest batch that fits, to about an eighth.

    Memory grows about linearly with the batch, so the next try is where the straight line through what is known meets
    the limit, kept between what fits and what does not.

    Args:
        attempt: tries a multiple, at least 1.
        known: what is known already, by multiple; at least one entry. New attempts are added, of at most
            `LARGEST_GROWTH` times the smallest.
        limit: bytes of memory.
        fixed_bytes: bytes that do not depend on the batch, for the line through a single point.
        max_attempts: entries of `known` at which the search ends.
    """
    largest_size = LARGEST_GROWTH * min(known)
    while True:
        fits = max((size for size, one in known.items() if one.fits), default=0)
        too_large = min((size for size, one in known.items() if not one.fits), default=None)
        if too_large is not None and too_large - fits <= max(1, fits // 8):
            return Largest(fits, too_large)
        if len(known) >= max_attempts or fits >= largest_size:
            return Largest(fits, too_large)
        if too_large is None:
            highest = min(LARGEST_STEP * max(known), largest_size)
        else:  # a ninth below: where the compiler understates what is missing, the line leads down one by one
            highest = too_large - max(1, too_large // 9)
        guess = _line_meets(known, limit, fixed_bytes)
        if guess is None:
            guess = highest if too_large is None else (fits + too_large) // 2
        elif guess <= fits:  # By the line nothing larger fits; one try a little above settles it.
            guess = fits + max(1, fits // 8)
        guess = min(guess, highest)
        known[guess] = attempt(guess)


def _line_meets(known: dict[int, Attempt], limit: float, fixed_bytes: float) -> int | None:
    """The multiple at which memory reaches the limit by the line through the two largest points that are known."""
    points = sorted((size, one.needed_bytes) for size, one in known.items() if one.needed_bytes is not None)
    if not points:
        return None
    (size, needed), *rest = points[::-1]
    smaller, smaller_bytes = rest[0] if rest else (0, fixed_bytes)
    slope = (needed - smaller_bytes) / (size - smaller)
    return int(size + (limit - needed) / slope) if slope > 0 else None
