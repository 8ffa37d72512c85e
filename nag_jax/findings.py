"""What an evaluation shows, in plain sentences made from its numbers, whichever way it went. Layout is `report.py`'s.

A difference counts as seen where its interval excludes zero, or, where none was measured in pairs, two intervals are
apart; anything else is undecided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nag_jax.noise_shift.difference import NAG_PAIRS


def distance_findings(metrics: Mapping[str, Any]) -> list[str]:
    """Sentences on the Fréchet distances of a metrics.json: every method against plain, the best against the floor."""
    methods = metrics["methods"]
    distances = {name: result["frechet_distance"] for name, result in methods.items()}
    measured = {name: distance for name, distance in distances.items() if distance is not None}
    if not measured:
        return ["No method has a finite Fréchet distance."]
    sentences = []
    if "plain" in measured:
        sentences.append(
            f"Plain sampling is at a Fréchet distance of {number(measured['plain'])} on {metrics['features']['name']} "
            "features; lower is closer to the reference."
        )
    unpaired = [name for name in measured if name != "plain" and "difference_to_plain" not in methods[name]]
    if unpaired:
        found = _join([f"{name} ({number(measured[name])})" for name in unpaired])
        sentences.append(f"Without intervals there is no verdict on {found}.")
    groups: dict[str, list[str]] = {"closer": [], "farther": [], "undecided": []}
    for name, result in methods.items():
        if "difference_to_plain" in result and name in measured:
            verdict = side_of_zero(result["difference_to_plain"]["interval"], "closer", "farther")
            groups[verdict].append(f"{name} ({number(measured[name])})")
    for verdict in ("closer", "farther"):
        if groups[verdict]:
            verb = "is" if len(groups[verdict]) == 1 else "are"
            side = "below" if verdict == "closer" else "above"
            sentences.append(
                f"{_join(groups[verdict])} {verb} {verdict} than plain sampling: the interval of the paired difference "
                f"lies {side} zero."
            )
    if groups["undecided"]:
        sentences.append(
            f"For {_join(groups['undecided'])} that interval contains zero: these samples do not decide whether it is "
            "closer or farther than plain sampling."
        )
    return sentences + _floor_sentences(metrics, measured)


def _floor_sentences(metrics: Mapping[str, Any], measured: Mapping[str, float]) -> list[str]:
    floor = metrics.get("floor")
    if not floor or floor["frechet_distance"] is None:
        return ["The distance between two sets of real images was not measured."]
    best = min(measured, key=lambda name: measured[name])
    real = floor["frechet_distance"]
    start = f"Two sets of real images are {number(real)} apart"
    if not floor.get("interval"):
        return [f"{start}; the closest method, {best}, is at {number(measured[best])}, both without intervals."]
    if not _are_apart(metrics["methods"][best].get("interval"), floor.get("interval")):
        return [f"{start}, and the interval of the closest method, {best}, overlaps with theirs."]
    if measured[best] < real:
        return [f"{start}, more than the closest method, {best}, at {number(measured[best])}."]
    ratio = f", {number(measured[best] / real, 2)} times that" if real > 0 else ""
    return [f"{start}; the closest method, {best}, is at {number(measured[best])}{ratio}."]


def shift_findings(noise_shift: Mapping[str, Any]) -> list[str]:
    """Sentences on a noise_shift.json: which way the states are off, and whether NAG makes the shift smaller."""
    methods = noise_shift["methods"]
    sentences = []
    if "plain" in methods:
        shifts = [shift["calibrated_shift"] for shift in methods["plain"]["shifts"]]
        sides = [side_of_zero((shift["low"], shift["high"]), "cleaner", "noisier") for shift in shifts]
        sentences.append(
            f"States of plain sampling look noisier than their time says at {sides.count('noisier')} of {len(sides)} "
            f"times, and cleaner at {sides.count('cleaner')}; at the others the interval contains zero."
        )
    differences = noise_shift.get("differences", {})
    for with_nag, without in NAG_PAIRS.items():
        if with_nag in methods and without in methods:
            pair = with_nag, methods[with_nag], without, methods[without]
            in_pairs = differences.get(with_nag)
            sentences.append(_paired_sentence(*pair, in_pairs) if in_pairs else _unpaired_sentence(*pair))
    return sentences or ["There is no pair of methods with and without NAG to compare."]


def _paired_sentence(
    name: str, shift: Mapping[str, Any], base_name: str, base: Mapping[str, Any], difference: Mapping[str, Any]
) -> str:
    interval = difference["mean_absolute"]
    if interval["estimate"] is None:
        return f"The shifts of {name} and {base_name} could not be calibrated, so they are not compared."
    verdict = side_of_zero((interval["low"], interval["high"]), "smaller", "larger")
    places = decimals((interval["low"], interval["high"]), digits=2)
    ends = f"{fixed(interval['low'], places, sign=True)} to {fixed(interval['high'], places, sign=True)}"
    start = f"{_sizes(name, shift, base_name, base)}: "
    if verdict == "undecided":
        start += f"undecided, for the interval of the paired difference, {ends}, contains zero."
    else:
        side = "below" if verdict == "smaller" else "above"
        start += f"{verdict} with NAG, for the interval of the paired difference, {ends}, lies {side} zero."
    smaller, larger = sides_by_time(difference)
    count = len(difference["by_time"])
    return (
        f"{start} Taken one by one, the shift is smaller with NAG at {smaller} of {count} times and larger at {larger}."
    )


def sides_by_time(difference: Mapping[str, Any]) -> tuple[int, int]:
    """At how many times the interval of an entry of "differences" lies below zero, and at how many above."""
    sides = [side_of_zero((at_time["low"], at_time["high"]), "below", "above") for at_time in difference["by_time"]]
    return sides.count("below"), sides.count("above")


def _unpaired_sentence(name: str, shift: Mapping[str, Any], base_name: str, base: Mapping[str, Any]) -> str:
    size, base_size = (shift_size(each)["estimate"] for each in (shift, base))
    if size is None or base_size is None:
        return f"The shifts of {name} and {base_name} could not be calibrated, so they are not compared."
    smaller, larger = 0, 0
    for at_time, base_at_time in zip(shift["shifts"], base["shifts"], strict=True):
        interval, base_interval = _absolute(at_time["calibrated_shift"]), _absolute(base_at_time["calibrated_shift"])
        if _are_apart(interval, base_interval):
            smaller += interval[1] < base_interval[0]
            larger += interval[0] > base_interval[1]
    start = f"{_sizes(name, shift, base_name, base)}: "
    count = len(shift["shifts"])
    if smaller == larger == 0:
        return f"{start}undecided, for the intervals of the shift's size overlap at all {count} times."
    if smaller and larger:
        return f"{start}mixed, for the shift is smaller with NAG at {smaller} of {count} times and larger at {larger}."
    word, times, agrees = ("smaller", smaller, size < base_size) if smaller else ("larger", larger, size > base_size)
    if not agrees:
        return f"{start}mixed, for only {times} of {count} times have intervals apart, and there it is {word} with NAG."
    return f"{start}{word} with NAG, with intervals apart at {times} of {count} times."


def _sizes(name: str, shift: Mapping[str, Any], base_name: str, base: Mapping[str, Any]) -> str:
    sizes = [shift_size(each)["estimate"] for each in (base, shift)]
    places = decimals(sizes)
    return (
        f"The mean absolute shift in t is {fixed(sizes[0], places)} with {base_name} and {fixed(sizes[1], places)} "
        f"with {name}"
    )


def shift_size(shift: Mapping[str, Any]) -> Mapping[str, float | None]:
    """The mean absolute shift of an entry of "methods": "estimate", "low" and "high", each None where it is missing."""
    stored = shift.get("mean_absolute_shift")
    return stored or {"estimate": mean_absolute_shift(shift), "low": None, "high": None}


def mean_absolute_shift(shift: Mapping[str, Any]) -> float | None:
    """The mean over times of the calibrated shift's absolute value; None if it is missing at every time."""
    estimates = [at_time["calibrated_shift"]["estimate"] for at_time in shift["shifts"]]
    sizes = [abs(estimate) for estimate in estimates if estimate is not None]
    return sum(sizes) / len(sizes) if sizes else None


def side_of_zero(interval: Iterable[float | None], below: str, above: str) -> str:
    """`below` or `above` for an interval that lies wholly there, "undecided" otherwise and for a missing end."""
    low, high = interval
    if low is None or high is None or low <= 0.0 <= high:
        return "undecided"
    return below if high < 0.0 else above


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent; "n/a" where none was measured."""
    return fixed(value, decimals([value], digits))


def fixed(value: float | None, num_decimals: int, sign: bool = False) -> str:
    """A number with so many decimals; "n/a" where none was measured."""
    if value is None:
        return "n/a"
    return f"{value:{'+' if sign else ''},.{num_decimals}f}".replace("-", "\N{MINUS SIGN}")


def decimals(values: Iterable[float | None], digits: int = 3) -> int:
    """The decimals, at most 6, at which the largest of `values` has so many significant digits."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return min(6, max(0, digits - 1 - (math.floor(math.log10(largest)) if largest else 0)))


def _absolute(shift: Mapping[str, float | None]) -> tuple[float, float]:
    """The interval of a shift's absolute value; without ends, all sizes."""
    low, high = shift["low"], shift["high"]
    if low is None or high is None:
        return 0.0, float("inf")
    sizes = sorted((abs(low), abs(high)))
    return (0.0 if low <= 0.0 <= high else sizes[0]), sizes[1]


def _are_apart(first: Sequence[float | None] | None, second: Sequence[float | None] | None) -> bool:
    ends = (*(first or (None,)), *(second or (None,)))
    if first is None or second is None or None in ends:
        return False
    return first[1] < second[0] or second[1] < first[0]  # type: ignore[operator]


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
