"""Figures are PNG files of the right size, and a sample grid shows the images themselves, each in its place."""

import io

import numpy as np
import pytest
from PIL import Image

from nag_jax import figures
from nag_jax.curve_styles import COLOURS
from nag_jax.errors import UserError

NUM_INTERVALS = 4


def decode(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def flat_images(values: list[int], side: int = 8, channels: int = 1) -> np.ndarray:
    """One image of a single value for each of `values`."""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), side, side, channels)).copy()


def metrics_lines(num_lines: int = 8, dropped: bool = True) -> list[dict[str, float]]:
    lines = []
    for i in range(1, num_lines + 1):
        line: dict[str, float] = {"step": 50 * i, "loss": 1.0 / i, "loss/noise_kept": 0.9 / i}
        line |= {f"loss_by_level/{k}": 1.0 / (i * (k + 1)) for k in range(NUM_INTERVALS)}
        if dropped:
            line["loss/noise_dropped"] = 1.2 / i
            line |= {f"loss_by_level_noise_dropped/{k}": 1.1 / (i * (k + 1)) for k in range(NUM_INTERVALS)}
        lines.append(line)
    return lines


def metrics(**floor: object) -> dict:
    result = {
        "methods": {
            "plain": {"frechet_distance": 12.0, "interval": [11.0, 13.0]},
            "nag": {"frechet_distance": 8.0, "interval": [7.5, 8.5]},
        },
        "features": {"name": "digits-classifier"},
    }
    return result | floor


def comparison(cfg_scales: tuple[float, ...] = (1.0, 1.5), **more: object) -> dict:
    entries = [
        {
            "cfg_scale": cfg_scale,
            "nag_scale": nag_scale,
            "frechet_distance": 5.0 + (nag_scale - cfg_scale) ** 2,
            "interval": [4.5 + (nag_scale - cfg_scale) ** 2, 5.5 + (nag_scale - cfg_scale) ** 2],
            "mean_absolute_shift": {"estimate": 0.02, "low": 0.01, "high": 0.03},
        }
        for cfg_scale in cfg_scales
        for nag_scale in (0.0, 1.0, 2.0)
    ]
    return {"entries": entries, "features": {"name": "digits-classifier"}} | more


def has_colour(png: bytes, colour: str) -> bool:
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return bool((decode(png) == wanted).all(axis=-1).any())


def runs(row: np.ndarray, value: int) -> list[tuple[int, int]]:
    """(start, length) of the stretches of `row` [width, 3] that have the grey value `value`."""
    hits = np.flatnonzero(np.diff(np.concatenate([[0], (row == value).all(axis=-1).astype(int), [0]])))
    return [(int(start), int(end - start)) for start, end in zip(hits[::2], hits[1::2], strict=True)]


def test_grid_has_a_row_for_each_class_and_methods_in_the_same_places() -> None:
    labels = np.array([1, 0, 1, 0])
    samples = {
        "plain": (flat_images([20, 10, 21, 11]), labels),
        "nag": (flat_images([120, 110, 121, 111]), labels),
    }
    pixels = decode(figures.sample_grid(samples, per_class=3))
    place = {}
    for value in (10, 11, 20, 21, 110, 111, 120, 121):
        for y in range(pixels.shape[0]):
            starts = [start for start, length in runs(pixels[y], value) if length == 48]
            if starts:
                place[value] = (y, starts[0])
                break
        y, x = place[value]
        assert (pixels[y : y + 48, x : x + 48] == value).all()  # enlarged by a whole factor, without smoothing
    assert place[10][0] == place[11][0] < place[20][0] == place[21][0]
    assert place[10][1] == place[20][1] < place[11][1] == place[21][1]
    shift = place[110][1] - place[10][1]
    assert shift > 3 * 48  # the second block begins right of the first, whose third column is empty
    for value in (10, 11, 20, 21):
        assert place[value + 100] == (place[value][0], place[value][1] + shift)


def test_the_samples_shown_are_the_first_of_the_lowest_classes_that_occur() -> None:
    labels = np.array([700, 3, 700, 3, 3, *range(800, 820)])
    shown = figures.shown_samples(labels, per_class=2)
    assert shown.tolist() == [0, 1, 2, 3, *range(5, 13)]
    images = flat_images(list(range(len(labels))))
    grid = figures.sample_grid({"plain": (images, labels)}, per_class=2)
    assert figures.sample_grid({"plain": (images[shown], labels[shown])}, per_class=2) == grid


def test_grid_size_follows_from_images_classes_and_columns() -> None:
    def size(num_classes: int, per_class: int, methods: int = 1) -> tuple[int, ...]:
        labels = np.arange(num_classes)
        samples = {f"m{i}": (flat_images([0] * num_classes), labels) for i in range(methods)}
        return decode(figures.sample_grid(samples, per_class)).shape[:2]

    cell = size(2, 2)[1] - size(2, 1)[1]
    assert cell == 48 + 2  # an image and the gap beside it
    assert size(5, 1)[0] - size(4, 1)[0] == cell
    assert size(25, 1) == size(10, 1)  # only the first ten classes are shown
    assert size(2, 1, methods=3)[1] - size(2, 1, methods=2)[1] == size(2, 1, methods=2)[1] - size(2, 1)[1]


def test_grid_keeps_colours_and_shrinks_large_images() -> None:
    images = np.zeros((1, 256, 256, 3), np.uint8)
    images[..., 0], images[..., 2] = 200, 40
    pixels = decode(figures.sample_grid({"plain": (images, np.array([0]))}, per_class=1))
    assert (pixels == (200, 0, 40)).all(axis=-1).sum() == 128 * 128


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, "at least one method"),
        ({"plain": (np.zeros((2, 8, 8, 1), np.float32), np.array([0, 1]))}, "expected uint8"),
        ({"plain": (np.zeros((2, 8, 8, 4), np.uint8), np.array([0, 1]))}, "1 or 3"),
        (
            {
                "plain": (np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1])),
                "nag": (np.zeros((2, 8, 8, 1), np.uint8), np.array([1, 0])),
            },
            "labels of 'nag' differ",
        ),
    ],
)
def test_grid_refuses_what_it_cannot_show(samples: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        figures.sample_grid(samples, per_class=1)


@pytest.mark.parametrize("lines", [metrics_lines(), metrics_lines(1), metrics_lines(dropped=False)])
def test_loss_figures_draw_what_was_logged(lines: list) -> None:
    for png in (figures.loss_curve(lines), figures.loss_by_level(lines)):
        assert decode(png).shape == (576, 900, 3)


def test_loss_figures_survive_missing_and_null_values() -> None:
    lines = metrics_lines()
    del lines[0]["loss/noise_dropped"], lines[-1]["loss_by_level/0"]
    lines[1]["loss"] = lines[1]["loss/noise_kept"] = None  # type: ignore[assignment]
    figures.loss_curve(lines), figures.loss_by_level(lines)
    bare = [{"step": 1, "loss": 0.5}]
    figures.loss_curve(bare), figures.loss_by_level(bare)


def test_both_conditions_are_drawn_apart() -> None:
    for draw in (figures.loss_curve, figures.loss_by_level):
        assert has_colour(draw(metrics_lines()), figures.KEPT)
        assert has_colour(draw(metrics_lines()), figures.DROPPED)
        assert not has_colour(draw(metrics_lines(dropped=False)), figures.DROPPED)


def test_last_lines_is_a_share_of_at_least_one() -> None:
    lines = metrics_lines(8)
    assert list(figures.last_lines(lines, 0.25)) == lines[-2:]
    assert list(figures.last_lines(lines[:1], 0.25)) == lines[:1]


def test_frechet_figure_draws_floor_and_missing_values() -> None:
    floor = {"frechet_distance": 1.0, "interval": [0.5, 1.5]}
    with_floor, without = figures.frechet_figure(metrics(floor=floor)), figures.frechet_figure(metrics())
    assert decode(with_floor).shape == decode(without).shape
    assert with_floor != without
    unknown = metrics(floor={"frechet_distance": 1.0, "interval": None})
    unknown["methods"]["nag"] = {"frechet_distance": None, "interval": [None, None]}
    decode(figures.frechet_figure(unknown))


def test_compare_figure_has_a_line_for_each_cfg_scale_and_the_floor() -> None:
    both, one = figures.compare_figure(comparison()), figures.compare_figure(comparison((1.0,)))
    first, second = COLOURS[:2]
    assert has_colour(both, first) and has_colour(both, second)
    assert has_colour(one, first) and not has_colour(one, second)
    with_floor = figures.compare_figure(comparison(floor={"frechet_distance": 1.0, "interval": None}))
    assert decode(with_floor).shape == decode(both).shape and with_floor != both


def test_compare_figure_survives_missing_values_and_many_lines() -> None:
    many = comparison(tuple(1.0 + i for i in range(9)), floor={"frechet_distance": 1.0, "interval": [0.5, 1.5]})
    many["entries"][0] |= {"frechet_distance": None, "interval": [None, None]}
    many["entries"][1]["mean_absolute_shift"] = {"estimate": None, "low": None, "high": None}
    decode(figures.compare_figure(many))
    single = comparison((1.5,))
    single["entries"] = single["entries"][:1]
    decode(figures.compare_figure(single))
