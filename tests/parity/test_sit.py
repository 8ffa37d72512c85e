"""SiT's samplers and training loss against the published definitions, with a torch network as the predictor.

The reference works in the public code's own time s, which is 0 for noise and 1 for data (x_s = s x_0 + (1 - s) eps, the
network predicts x_0 - eps), in float64 with a torch twin in float32 (arXiv 2401.08740). Ours runs the other way.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.diffusion.objective import Draws, Objective, loss
from nag_jax.diffusion.stepping import Euler, EulerMaruyama, Heun

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

SHAPE, CLASSES = (8, 8, 4), 5
LABELS = np.array([3, 0], np.int32)
GRADIENT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def twin(random_network, twin_of):
    return twin_of(random_network(), "sit")


def euler_step(velocity, x, s, s_next, noise):
    return x + (s_next - s) * velocity(x, s)


def heun_step(velocity, x, s, s_next, noise):
    """The trapezoidal rule; the last step is Euler's, for ours asks no network at clean data."""
    first = velocity(x, s)
    if s_next == 1.0:
        return x + (s_next - s) * first
    return x + (s_next - s) * 0.5 * (first + velocity(x + (s_next - s) * first, s_next))


def euler_maruyama_step(velocity, x, s, s_next, noise):
    """The diffusion coefficient is the noise level 1 - s; the last step, to data, goes along the mean."""
    v, diffusion = velocity(x, s), 1.0 - s
    score = (s * v - x) / (1.0 - s)
    mean = x + (s_next - s) * (v + diffusion * score)
    return mean if s_next == 1.0 else mean + np.sqrt(2.0 * diffusion * (s_next - s)) * noise


ODE_GRID = np.linspace(0.0, 1.0, 51)
SDE_GRID = np.append(np.linspace(0.0, 0.96, 250), 1.0)
SAMPLERS = pytest.mark.parametrize(
    ("stepper", "published_step", "grid"),
    [
        pytest.param(Euler(), euler_step, ODE_GRID, id="euler"),
        pytest.param(Heun(), heun_step, ODE_GRID, id="heun"),
        pytest.param(EulerMaruyama(), euler_maruyama_step, SDE_GRID, id="euler_maruyama"),
    ],
)


@SAMPLERS
def test_each_step_and_all_together(twin, stepper, published_step, grid):
    def velocity(x, s):
        with torch.no_grad():
            return twin.output(x, s, LABELS).numpy()[..., : SHAPE[-1]]  # The other half, a variance, is thrown away.

    def published(noises, disturbances):
        states = [noises[0].astype(np.float64)]
        for row in range(len(grid) - 1):
            states.append(published_step(velocity, states[-1], grid[row], grid[row + 1], noises[row + 1]))
            if disturbances is not None:
                states[-1] += disturbances[row]
        return np.stack(states)

    twin.compare_sampler(stepper, LABELS, published, len(grid) - 1).check()


def test_velocity_loss_and_the_gradient_of_every_tensor(twin):
    rng = np.random.default_rng(2)
    t = np.array([0.0, 0.01, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0], np.float32)
    labels = np.arange(8) % CLASSES
    data, noise = rng.standard_normal((2, 8, *SHAPE), np.float32)
    drop_label, drop_noise = np.arange(8) % 4 == 1, np.arange(8) >= 6

    s = 1 - t[:, None, None, None]
    output = twin.output(s * data + (1 - s) * noise, 1 - t, np.where(drop_label, CLASSES, labels), drop_noise)
    target = torch.from_numpy(data - noise)
    expected = (output[..., : SHAPE[-1]] - target).square().flatten(1).mean(1)
    twin.network.zero_grad()
    expected.mean().backward()

    draws = Draws(jnp.asarray(t), jnp.asarray(noise), drop_label, drop_noise)
    batch = {"image": jnp.asarray(data), "label": jnp.asarray(labels, jnp.int32)}

    def mean_loss(params):
        losses = loss(Objective(prediction="velocity"), twin.denoiser, params, batch, draws).total
        return losses.mean(), losses

    gradient, losses = jax.jit(jax.grad(mean_loss, has_aux=True))(twin.denoiser.params)
    np.testing.assert_allclose(losses, expected.detach().numpy(), rtol=1e-5)
    errors = twin.gradient_errors(gradient)
    assert max(errors.values()) <= GRADIENT_TOLERANCE, errors
