import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.diffusion.ancestral import AncestralCoefficients, ancestral_coefficients
from nag_jax.diffusion.process import DDPM, GVP, Linear

BETAS = np.linspace(1e-4, 0.02, 1000)


def definition(steps: list[int]) -> dict[str, np.ndarray]:
    """Posterior of a DDPM that keeps `steps` of the 1000, by the definitions with betas (Ho et al., equation 7)."""
    alpha_bar = np.cumprod(1 - BETAS)[steps]
    previous = np.append(1.0, alpha_bar[:-1])
    betas = 1 - alpha_bar / previous
    variance = betas * (1 - previous) / (1 - alpha_bar)
    return {
        "data": betas * np.sqrt(previous) / (1 - alpha_bar),
        "x": (1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bar),
        "log_variance_min": np.log(np.append(variance[1], variance[1:])),
        "log_variance_max": np.log(betas),
    }


def respaced(count: int) -> list[int]:
    steps, position = [], 0.0
    for _ in range(count):
        steps.append(round(position))
        position += 999 / (count - 1)
    return steps


@pytest.mark.parametrize("steps", [list(range(1000)), respaced(250), respaced(50)], ids=["1000", "250", "50"])
def test_equals_the_definition_with_betas(steps):
    process = DDPM()
    grid = process.time_grid(len(steps))
    np.testing.assert_array_equal(np.round(grid[:-1] * 1000).astype(int) - 1, steps[::-1])
    got = ancestral_coefficients(process, grid[:-1], grid[1:], floor_step=(grid[-3], grid[-2]))
    for name, want in definition(steps).items():
        np.testing.assert_allclose(getattr(got, name)[::-1], want, rtol=1e-9, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("process", [Linear(), GVP(), DDPM()], ids=lambda process: process.name)
def test_step_keeps_the_marginals(process):
    # Drawing x_s from q(x_s | x_t, x_0) with x_t = alpha_t x_0 + sigma_t eps must give alpha_s x_0 + sigma_s eps'.
    t, s = np.array([1.0, 0.7, 0.3, 0.002]), np.array([0.8, 0.2, 0.299, 0.001])
    c = ancestral_coefficients(process, t, s)
    np.testing.assert_allclose(c.x * process.alpha(t) + c.data, process.alpha(s), rtol=1e-10)
    variance = c.x**2 * process.sigma(t) ** 2 + np.exp(c.log_variance_min)
    np.testing.assert_allclose(variance, process.sigma(s) ** 2, rtol=1e-10)


def test_step_to_clean_data_is_the_data():
    c = ancestral_coefficients(Linear(), np.array([0.3]), np.array([0.0]))
    assert (c.x, c.data, c.log_variance_min) == (0.0, 1.0, -np.inf)
    np.testing.assert_allclose(c.log_variance_max, 2 * np.log(0.3))


def test_learned_range_ends_and_middle():
    c = AncestralCoefficients(0.0, 0.0, -4.0, -2.0)
    assert [c.log_variance(v) for v in (-1.0, 0.0, 1.0)] == [-4.0, -3.0, -2.0]


def test_jax_agrees_with_numpy():
    process = DDPM()
    grid = process.time_grid(50)
    host = ancestral_coefficients(process, grid[:-1], grid[1:], (grid[-3], grid[-2]))
    device = ancestral_coefficients(
        process, jnp.asarray(grid[:-1], jnp.float32), jnp.asarray(grid[1:], jnp.float32), (grid[-3], grid[-2])
    )
    for name, want in host._asdict().items():
        np.testing.assert_allclose(getattr(device, name), want, rtol=2e-4, atol=2e-5, err_msg=name)
