"""DiT's sampler, guidance and training loss against the published definitions, with a torch network as the predictor.

The reference keeps betas and cumulative products in float64 as the public code does (arXiv 2006.11239, equations 6 and
7; arXiv 2102.09672, equations 15 and 16); its network is a torch twin in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nag_jax
from nag_jax.diffusion.guidance import cfg
from nag_jax.diffusion.objective import Draws, Objective, loss
from nag_jax.diffusion.stepping import Ancestral

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

SHAPE, CLASSES = (8, 8, 4), 5
LABELS = np.array([3, 0], np.int32)
STATE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 5e-5  # An answer good to 1e-5 leaves a residual, which is several times smaller, good to this.


def respaced(count: int) -> list[int]:
    """The steps of 1000 that a sampler of `count` steps keeps: a fractional stride, added up and then rounded."""
    stride, position, steps = 999 / (count - 1), 0.0, []
    for _ in range(count):
        steps.append(round(position))
        position += stride
    return steps


class PublishedDDPM:
    """The process that keeps some of the 1000 steps with linear betas: their own betas follow from the kept products.

    Attributes:
        steps: what the network is told, ascending.
        alpha_bar, previous, betas, log_smallest, log_largest: float64 [len(steps)].
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps
        self.alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[steps]
        self.previous = np.append(1.0, self.alpha_bar[:-1])
        self.betas = 1 - self.alpha_bar / self.previous
        posterior = self.betas * (1 - self.previous) / (1 - self.alpha_bar)
        # The first step's is 0, and its logarithm is cut off at the second's.
        self.log_smallest = np.log(np.append(posterior[1], posterior[1:]))
        self.log_largest = np.log(self.betas)

    def data(self, i, x, noise):
        return x / self.alpha_bar[i] ** 0.5 - (1 / self.alpha_bar[i] - 1) ** 0.5 * noise

    def mean(self, i, x, data):
        of_data = self.betas[i] * self.previous[i] ** 0.5
        of_x = (1 - self.previous[i]) * (1 - self.betas[i]) ** 0.5
        return (of_data * data + of_x * x) / (1 - self.alpha_bar[i])

    def log_variance(self, i, interpolation):
        fraction = (interpolation + 1) / 2
        return fraction * self.log_largest[i] + (1 - fraction) * self.log_smallest[i]

    def step(self, i: int, x: np.ndarray, output: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """From the state at kept step `i` to the one below, given the network's output [B, H, W, 2 C]."""
        prediction, interpolation = np.split(output, 2, axis=-1)
        deviation = np.exp(0.5 * self.log_variance(i, interpolation)) if i > 0 else 0.0
        return self.mean(i, x, self.data(i, x, prediction)) + deviation * noise


@pytest.fixture(scope="module")
def twin(random_network, twin_of):
    """A twin whose final layer is fitted to predict noise from its otherwise random features.

    A network that says nothing about a state lets the sampler grow it by 1 / alpha = 157, beside which noise and
    answers would be too small to be compared. This one keeps states near the data. Its patch embedding and modulations
    are smaller than the other tensors, so that the layer norms leave it the size of a state.
    """
    network, process = random_network(), PublishedDDPM(list(range(1000)))
    generator = torch.Generator().manual_seed(1)
    count = 1000
    data = 0.3 * torch.randn(CLASSES, 4, 8, 8, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, 4, 8, 8, generator=generator)
    alpha_bar = torch.from_numpy(process.alpha_bar).float().view(-1, 1, 1, 1)
    inputs = []
    network.final_layer.linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "adaLN_modulation" in name or "x_embedder" in name:
                parameter *= 0.3
        x_t = alpha_bar.sqrt() * data[labels] + (1 - alpha_bar).sqrt() * noise
        network(x_t, torch.arange(count).float(), labels)
        features = torch.cat([inputs[0], torch.ones(len(inputs[0]), 1)], dim=1)
        patches = noise.view(count, 4, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16)
        fitted = torch.linalg.lstsq(features, patches).solution
        # Rows of the final layer are (row, column, channel), the noise in the first half of the channels.
        linear = network.final_layer.linear
        linear.weight.view(2, 2, 8, 64)[:, :, :4] = fitted[:-1].T.reshape(2, 2, 4, 64)
        linear.bias.view(2, 2, 8)[:, :, :4] = fitted[-1].view(2, 2, 4)
    return twin_of(network, "dit")


def test_250_steps_each_and_all_together(twin):
    process = PublishedDDPM(respaced(250))

    def published(noises, disturbances):
        states = [noises[0].astype(np.float64)]
        for row, i in enumerate(reversed(range(250))):
            with torch.no_grad():
                output = twin.output(states[-1], process.steps[i], LABELS).numpy()
            states.append(process.step(i, states[-1], output, noises[row + 1]))
            if disturbances is not None:
                states[-1] += disturbances[row]
        return np.stack(states)

    twin.compare_sampler(Ancestral("learned"), LABELS, published, 250).check()


@pytest.mark.parametrize(("level", "next_level"), [(999, 995), (500, 480), (20, 0)])
def test_guidance_on_three_of_four_channels(twin, error, sampler_noise, level, next_level):
    (x, noise), cfg_scale = sampler_noise(0, len(LABELS), 1, SHAPE), 4.0
    with torch.no_grad():
        conditional = twin.output(x, level, LABELS).numpy()
        unconditional = twin.output(x, level, np.full_like(LABELS, CLASSES)).numpy()
    # The public forward_with_cfg: all but the first three channels, the variance's included, are the conditional one's.
    output = conditional.copy()
    output[..., :3] = unconditional[..., :3] + cfg_scale * (conditional - unconditional)[..., :3]
    expected = PublishedDDPM([next_level, level]).step(1, x, output, noise)

    stepper = Ancestral("learned", t_max=(level + 1) / 1000, t_min=(next_level + 1) / 1000)
    guidance = cfg(cfg_scale, channels=3)
    result = nag_jax.sample(twin.denoiser, LABELS, seed=0, stepper=stepper, num_steps=1, guidance=guidance)
    assert error(result.x, expected) <= STATE_TOLERANCE


def published_hybrid_loss(i: np.ndarray, data, noise, x_t, output):
    """The loss of each example in torch, float64: mean squared error plus one level's term of the bound in bits.

    The public DiT makes its process with rescale_learned_sigmas off, so the term has weight 1.
    """
    process = PublishedDDPM(list(range(1000)))
    for name in ("alpha_bar", "previous", "betas", "log_smallest", "log_largest"):
        setattr(process, name, torch.from_numpy(getattr(process, name)).view(-1, 1, 1, 1))
    prediction, interpolation = output.chunk(2, dim=-1)
    # The mean learns from the squared error alone.
    model_mean = process.mean(i, x_t, process.data(i, x_t, prediction.detach()))
    gap = process.mean(i, x_t, data) - model_mean
    log_true, log_model = process.log_smallest[i], process.log_variance(i, interpolation)
    divergence = 0.5 * (log_model - log_true - 1 + (log_true - log_model).exp() + gap**2 * (-log_model).exp())

    def distribution(x):
        return 0.5 * (1 + torch.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

    below, above = (distribution((data - model_mean + side / 255) * (-0.5 * log_model).exp()) for side in (-1, 1))
    probability = torch.where(data < -0.999, above, torch.where(data > 0.999, 1 - below, above - below))
    is_first = torch.from_numpy(i == 0).view(-1, 1, 1, 1)
    nats = torch.where(is_first, -probability.clamp(min=1e-12).log(), divergence)
    squared = (prediction - noise).square().flatten(1).mean(1)
    return squared + nats.flatten(1).mean(1) / np.log(2)


def test_hybrid_loss_and_the_gradient_of_every_tensor(twin):
    rng = np.random.default_rng(2)
    level = np.array([0, 0, 1, 40, 300, 700, 999, 500])
    labels = np.arange(8) % CLASSES
    data = rng.uniform(-1.1, 1.1, (8, *SHAPE)).clip(-1, 1).astype(np.float32)
    noise = rng.standard_normal((8, *SHAPE), np.float32)
    # At the first level a probability is a difference of two numbers near 1, which float32 (the public code's too) does
    # not resolve in the tails: little noise keeps the data out of them.
    noise[level == 0] *= 0.5
    drop_label, drop_noise = np.arange(8) % 4 == 1, np.arange(8) >= 6

    alpha_bar = PublishedDDPM(list(range(1000))).alpha_bar[level][:, None, None, None]
    x_t = np.sqrt(alpha_bar) * data + np.sqrt(1 - alpha_bar) * noise
    output = twin.output(x_t, level, np.where(drop_label, CLASSES, labels), drop_noise)
    expected = published_hybrid_loss(level, *(torch.from_numpy(array) for array in (data, noise, x_t)), output)
    twin.network.zero_grad()
    expected.mean().backward()

    draws = Draws(jnp.asarray((level + 1) / 1000, jnp.float32), jnp.asarray(noise), drop_label, drop_noise)
    batch = {"image": jnp.asarray(data), "label": jnp.asarray(labels, jnp.int32)}

    def mean_loss(params):
        objective = Objective(prediction="noise", learn_variance=True)
        losses = loss(objective, twin.denoiser, params, batch, draws).total
        return losses.mean(), losses

    gradient, losses = jax.jit(jax.grad(mean_loss, has_aux=True))(twin.denoiser.params)
    np.testing.assert_allclose(losses, expected.detach().numpy(), rtol=LOSS_TOLERANCE)
    errors = twin.gradient_errors(gradient)
    assert max(errors.values()) <= GRADIENT_TOLERANCE, errors
