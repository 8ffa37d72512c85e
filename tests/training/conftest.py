import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.denoiser import NetworkFunction, from_network
from nag_jax.diffusion.process import Linear

SHAPE, CLASSES = (2, 2, 1), 3


class TinyNetwork(nn.Module):
    """A few dense layers with every condition of a DiT."""

    @nn.compact
    def __call__(self, x, time, labels, drop_label, drop_noise, time_embedding_offset=None):
        null = self.param("null_noise_embedding", nn.initializers.normal(0.02), (8,))
        noise = jnp.where(drop_noise[:, None], null, nn.Dense(8)(time[:, None]))
        label = nn.Embed(CLASSES + 1, 8)(jnp.where(drop_label, CLASSES, labels))
        hidden = jnp.tanh(nn.Dense(16)(x.reshape(x.shape[0], -1)) + nn.Dense(16)(jnp.tanh(noise + label)))
        return nn.Dense(x[0].size)(hidden).reshape(x.shape)


@pytest.fixture(scope="session")
def tiny_denoiser():
    rows = (jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros(1, jnp.int32), jnp.zeros(1, bool), jnp.zeros(1, bool))
    params = jax.jit(TinyNetwork().init)(jax.random.key(0), *rows)["params"]
    return from_network(
        NetworkFunction(TinyNetwork()), params, Linear(), num_classes=CLASSES, sample_shape=SHAPE
    )


@pytest.fixture(scope="session")
def batch_of():
    """batch_of(step, size): images of two clusters, different at each step."""

    def batch(step, size=12):
        rng = np.random.default_rng((9, step))
        label = rng.integers(0, CLASSES, size).astype(np.int32)
        image = np.tanh(label - 1)[:, None, None, None] + 0.1 * rng.normal(size=(size, *SHAPE))
        return {"image": image.astype(np.float32), "label": label}

    return batch
