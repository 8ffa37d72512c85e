"""The figure is drawn for one guidance and for several, also of answers that are all the same."""

import io

import matplotlib.image
import numpy as np
import pytest

from nag_jax.curve_styles import style_of
from nag_jax.errors import UserError
from nag_jax.noise_shift import noise_shift_figure
from nag_jax.noise_shift.answers import Answers
from nag_jax.noise_shift.calibration import Calibration
from nag_jax.noise_shift.measurement import compare_answers

CALIBRATION = Calibration((0.1, 0.9), (0.1, 0.9), (0.05, 0.05))


def shift_at(times, spread=0.02, calibration=CALIBRATION):
    rng = np.random.default_rng(0)
    sides = [times[:, None] + spread * rng.standard_normal((len(times), 50)) for _ in range(2)]
    sampled, forward = (Answers(mean, np.zeros_like(mean)) for mean in sides)
    return compare_answers(times, sampled, forward, calibration, seed=0, num_resamples=50)


@pytest.mark.parametrize("count, spread", [(1, 0.02), (12, 0.02), (2, 0.0)])
def test_is_a_picture(count, spread):
    times = np.linspace(0.1, 0.9, min(8, 1 + count))
    figure = noise_shift_figure({f"guidance {i}": shift_at(times, spread) for i in range(count)}, dpi=40)
    picture = matplotlib.image.imread(io.BytesIO(figure), format="png")
    assert picture.shape[0] > 100 and picture.std() > 0.05


def test_guidances_look_different_in_every_panel():
    styles = [style_of(index) for index in range(12)]
    assert len({(style.color, style.linestyle) for style in styles}) == len(styles)
    assert len({(style.color, style.marker) for style in styles}) == len(styles)


def test_shifts_without_a_calibration_are_left_out():
    silent = Calibration((0.1, 0.9), (0.5, 0.5), (0.05, 0.05))
    assert noise_shift_figure({"plain": shift_at(np.array([0.5]), calibration=silent)}, dpi=40)


def test_refuses_what_it_cannot_compare():
    with pytest.raises(UserError, match="same times"):
        noise_shift_figure({"a": shift_at(np.array([0.5])), "b": shift_at(np.array([0.4]))})
    with pytest.raises(UserError, match="at least one"):
        noise_shift_figure({})
