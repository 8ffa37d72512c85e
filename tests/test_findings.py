"""The sentences follow the numbers: better, worse, undecided and mixed are told apart, and nothing else is claimed."""

from typing import Any

import pytest

from nag_jax.findings import decimals, distance_findings, fixed, mean_absolute_shift, number, shift_findings, shift_size

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


def metrics(plain: float, nag: float, width: float = 0.5, floor: float = 2.0) -> dict[str, Any]:
    def around(value: float) -> list[float]:
        return [value - width, value + width]

    return {
        "methods": {
            "plain": {"frechet_distance": plain, "interval": around(plain)},
            "nag": {
                "frechet_distance": nag,
                "interval": around(nag),
                "difference_to_plain": {"value": nag - plain, "interval": around(nag - plain)},
            },
        },
        "floor": {"frechet_distance": floor, "interval": around(floor)},
        "features": {"name": "digits-classifier"},
    }


def shift(*values: float | None, width: float = 0.002) -> dict[str, Any]:
    def around(value: float | None) -> dict[str, float | None]:
        if value is None:
            return {"estimate": None, "low": None, "high": None}
        return {"estimate": value, "low": value - width, "high": value + width}

    return {"shifts": [{"t": t, "calibrated_shift": around(v)} for t, v in zip(TIMES, values, strict=True)]}


def test_closer_farther_and_undecided() -> None:
    closer, farther = " ".join(distance_findings(metrics(12, 10))), " ".join(distance_findings(metrics(12, 14)))
    undecided = " ".join(distance_findings(metrics(12, 10, width=3.0)))
    assert "Plain sampling is at a Fréchet distance of 12.0 on digits-classifier features" in closer
    assert "nag (10.0) is closer than plain sampling" in closer
    assert "farther" not in closer and "decide" not in closer
    assert "nag (14.0) is farther than plain sampling" in farther
    assert "is closer than" not in farther and "decide" not in farther
    assert "For nag (10.0) that interval contains zero" in undecided
    assert "is closer than" not in undecided and "is farther than" not in undecided


def test_several_methods_share_a_sentence() -> None:
    several = metrics(12, 10)
    several["methods"]["cfg"] = several["methods"]["cfg+nag"] = several["methods"]["nag"]
    assert "nag (10.0), cfg (10.0) and cfg+nag (10.0) are closer" in " ".join(distance_findings(several))


def test_best_method_stands_beside_the_floor() -> None:
    assert "the closest method, nag, is at 8.00, 4.0 times that." in distance_findings(metrics(12, 8))[-1]
    assert "the closest method, plain, is at 12.0, 6.0 times that." in distance_findings(metrics(12, 14))[-1]
    assert "the closest method, nag, overlaps with theirs" in distance_findings(metrics(12, 2.2))[-1]
    assert "more than the closest method, nag, at 2.00" in distance_findings(metrics(12, 2, floor=5.0))[-1]
    without = metrics(12, 8) | {"floor": None}
    assert "was not measured" in distance_findings(without)[-1]


def test_distances_that_are_missing() -> None:
    partly = metrics(12, 8)
    partly["methods"]["nag"]["frechet_distance"] = None
    assert "nag (" not in " ".join(distance_findings(partly))
    partly["methods"]["plain"]["frechet_distance"] = None
    assert distance_findings(partly) == ["No method has a finite Fréchet distance."]
    alone = {"methods": {"nag": {"frechet_distance": 3.0, "interval": [2.0, 4.0]}}}
    assert "plain" not in " ".join(distance_findings(alone))


@pytest.mark.parametrize(
    ("plain", "nag", "expected"),
    [
        (0.02, 0.005, "0.0200 with plain and 0.0050 with nag: smaller with NAG, with intervals apart at 5 of 5 times"),
        (-0.02, 0.005, "0.0200 with plain and 0.0050 with nag: smaller with NAG, with intervals apart at 5 of 5"),
        (0.005, -0.02, "0.0050 with plain and 0.0200 with nag: larger with NAG, with intervals apart at 5 of 5"),
        (0.005, 0.006, "undecided, for the intervals of the shift's size overlap at all 5 times"),
        # A sign that flips is no change of size.
        (0.005, -0.005, "undecided"),
    ],
)
def test_shifts_are_compared_by_their_size(plain: float, nag: float, expected: str) -> None:
    text = " ".join(shift_findings({"methods": {"plain": shift(*[plain] * 5), "nag": shift(*[nag] * 5)}}))
    assert expected in text
    noisier, cleaner = (5, 0) if plain > 0 else (0, 5)
    assert f"noisier than their time says at {noisier} of 5 times, and cleaner at {cleaner}" in text


def test_shifts_that_go_both_ways_are_mixed() -> None:
    both = {"plain": shift(*[0.02] * 5), "nag": shift(0.05, *[0.005] * 4)}
    assert (
        "mixed, for the shift is smaller with NAG at 4 of 5 times and larger at 1"
        in shift_findings({"methods": both})[-1]
    )
    # Larger on average, yet the only times with intervals apart are smaller: neither may be claimed.
    contrary = {"plain": shift(0.01, *[0.005] * 4), "nag": shift(0.004, *[0.008] * 4)}
    assert (
        "mixed, for only 1 of 5 times have intervals apart, and there it is smaller with NAG"
        in shift_findings({"methods": contrary})[-1]
    )


def test_nag_is_compared_with_the_same_method_without_it() -> None:
    methods = {"cfg": shift(*[0.02] * 5), "cfg+nag": shift(*[0.03] * 5)}
    (only,) = shift_findings({"methods": methods})
    assert "0.020 with cfg" in only.replace("0.0200", "0.020") and "larger with NAG" in only
    assert shift_findings({"methods": {"cfg": methods["cfg"]}}) == [
        "There is no pair of methods with and without NAG to compare."
    ]


def test_shifts_that_could_not_be_calibrated() -> None:
    unknown, partly = shift(*[None] * 5), shift(None, *[-0.02] * 4)
    assert mean_absolute_shift(unknown) is None
    assert mean_absolute_shift(partly) == shift_size(partly)["estimate"] == pytest.approx(0.02)
    stored = {"estimate": 0.03, "low": 0.02, "high": 0.04}
    assert shift_size(partly | {"mean_absolute_shift": stored}) == stored
    text = shift_findings({"methods": {"plain": partly, "nag": unknown}})[-1]
    assert "could not be calibrated" in text
    text = shift_findings({"methods": {"plain": partly, "nag": shift(*[0.005] * 5)}})[-1]
    assert "smaller with NAG, with intervals apart at 4 of 5 times" in text


def paired(mean: float | None, *by_time: float, width: float = 0.001) -> dict[str, Any]:
    def around(value: float | None) -> dict[str, float | None]:
        low, high = (None, None) if value is None else (value - width, value + width)
        return {"estimate": value, "low": low, "high": high}

    of_times = [{"t": t} | around(v) for t, v in zip(TIMES, by_time, strict=True)]
    return {"nag": {"against": "plain", "mean_absolute": around(mean), "by_time": of_times}}


@pytest.mark.parametrize(
    ("mean", "by_time", "expected"),
    [
        (-0.004, (-0.01, -0.01, 0.0005, -0.01, 0.01), "smaller with NAG, for the interval of the paired difference, "),
        (0.004, (0.01, 0.01, 0.0005, 0.01, -0.01), "larger with NAG, for the interval of the paired difference, "),
        (
            0.0005,
            (0.0, 0.0, 0.0, 0.0, 0.0),
            "undecided, for the interval of the paired difference, −0.0005 to +0.0015,",
        ),
    ],
)
def test_pairs_decide_where_the_intervals_of_the_shifts_overlap(
    mean: float, by_time: tuple[float, ...], expected: str
) -> None:
    methods = {"plain": shift(*[0.02] * 5, width=0.01), "nag": shift(*[0.02 + mean] * 5, width=0.01)}
    assert "undecided" in shift_findings({"methods": methods})[-1]
    text = shift_findings({"methods": methods, "differences": paired(mean, *by_time)})[-1]
    assert f"0.0200 with plain and {0.02 + mean:.4f} with nag: {expected}" in text
    smaller, larger = sum(v <= -0.01 for v in by_time), sum(v >= 0.01 for v in by_time)
    assert f"smaller with NAG at {smaller} of 5 times and larger at {larger}." in text
    unknown = shift_findings({"methods": methods, "differences": paired(None, *by_time)})[-1]
    assert "could not be calibrated" in unknown


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0.00"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (0.012345, "0.0123"),
        (-0.5, "−0.500"),
        (1e-9, "0.000000"),
        (None, "n/a"),
    ],
)
def test_numbers_have_significant_digits_and_no_exponent(value: float | None, expected: str) -> None:
    assert number(value) == expected


def test_numbers_of_a_column_have_the_decimals_of_its_largest() -> None:
    places = decimals([0.0123, -12.3, None], digits=3)
    assert [fixed(value, places, sign=True) for value in (0.0123, -12.3, None)] == ["+0.0", "−12.3", "n/a"]
    assert decimals([]) == decimals([0.0]) == 2
