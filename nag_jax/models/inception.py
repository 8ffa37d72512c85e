"""FID's Inception-v3: the network of 5 December 2015 that FID, sFID and the Inception Score are defined by.

It is TensorFlow's `classify_image_graph_def.pb` (inception-2015-12-05), which is no other library's Inception-v3: its
average pools leave padding out, the last block has a max pool where the paper (Szegedy et al., arXiv 1512.00567) has an
average, and it has 1008 classes and no auxiliary head. Modules bear the names of torchvision's, as the weight files in
circulation do; `convert/feature_nets.py` carries those over. Distances between features are `metrics/`'s affair.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nag_jax.metrics.features import FID_NETWORK, FeatureNet
from nag_jax.metrics.resize import resize_bilinear_tf1, to_pixels
from nag_jax.models.conv_norm import ConvNorm
from nag_jax.params_hash import params_hash

INPUT_SIZE = 299
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7

# Name and width of everything that `Inception` answers.
TAPS = {
    "pool1": 64,
    "pool2": 192,
    "spatial": 17 * 17 * SPATIAL_CHANNELS,
    "mixed_6e": 768,
    "pool3": 2048,
    "logits_unbiased": NUM_CLASSES,
    "logits": NUM_CLASSES,
}


def _average_pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _halving_max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), strides=(2, 2))


def _join(branches: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


class InceptionA(nn.Module):
    """[B, 35, 35, C] -> its four branches of 64, 64, 96 and `pool_features` channels, same size."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        one = ConvNorm(64, name="branch1x1")(x)
        five = ConvNorm(48, name="branch5x5_1")(x)
        five = ConvNorm(64, (5, 5), name="branch5x5_2")(five)
        double = ConvNorm(64, name="branch3x3dbl_1")(x)
        double = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(double)
        double = ConvNorm(96, (3, 3), name="branch3x3dbl_3")(double)
        pool = ConvNorm(self.pool_features, name="branch_pool")(_average_pool(x))
        return one, five, double, pool


class InceptionB(nn.Module):
    """[B, 35, 35, C] -> its three branches of 384, 96 and C channels, [B, 17, 17, ...]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        three = ConvNorm(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        double = ConvNorm(64, name="branch3x3dbl_1")(x)
        double = ConvNorm(96, (3, 3), name="branch3x3dbl_2")(double)
        double = ConvNorm(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(double)
        return three, double, _halving_max_pool(x)


class InceptionC(nn.Module):
    """[B, 17, 17, 768] -> its four branches of 192 channels, same size; `width` channels inside the long ones."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        one = ConvNorm(192, name="branch1x1")(x)
        seven = ConvNorm(self.width, name="branch7x7_1")(x)
        seven = ConvNorm(self.width, (1, 7), name="branch7x7_2")(seven)
        seven = ConvNorm(192, (7, 1), name="branch7x7_3")(seven)
        double = ConvNorm(self.width, name="branch7x7dbl_1")(x)
        double = ConvNorm(self.width, (7, 1), name="branch7x7dbl_2")(double)
        double = ConvNorm(self.width, (1, 7), name="branch7x7dbl_3")(double)
        double = ConvNorm(self.width, (7, 1), name="branch7x7dbl_4")(double)
        double = ConvNorm(192, (1, 7), name="branch7x7dbl_5")(double)
        pool = ConvNorm(192, name="branch_pool")(_average_pool(x))
        return one, seven, double, pool


class InceptionD(nn.Module):
    """[B, 17, 17, 768] -> its three branches of 320, 192 and 768 channels, [B, 8, 8, ...]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        three = ConvNorm(192, name="branch3x3_1")(x)
        three = ConvNorm(320, (3, 3), 2, "VALID", name="branch3x3_2")(three)
        seven = ConvNorm(192, name="branch7x7x3_1")(x)
        seven = ConvNorm(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = ConvNorm(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = ConvNorm(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(seven)
        return three, seven, _halving_max_pool(x)


class InceptionE(nn.Module):
    """[B, 8, 8, C] -> its branches of 320, 384, 384, 384, 384 and 192 channels, same size.

    Attributes:
        has_max_pool: whether the pool takes the largest value, as in the last block of this network alone.
    """

    has_max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        one = ConvNorm(320, name="branch1x1")(x)
        three = ConvNorm(384, name="branch3x3_1")(x)
        three_a = ConvNorm(384, (1, 3), name="branch3x3_2a")(three)
        three_b = ConvNorm(384, (3, 1), name="branch3x3_2b")(three)
        double = ConvNorm(448, name="branch3x3dbl_1")(x)
        double = ConvNorm(384, (3, 3), name="branch3x3dbl_2")(double)
        double_a = ConvNorm(384, (1, 3), name="branch3x3dbl_3a")(double)
        double_b = ConvNorm(384, (3, 1), name="branch3x3dbl_3b")(double)
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.has_max_pool else _average_pool(x)
        pool = ConvNorm(192, name="branch_pool")(pooled)
        return one, three_a, three_b, double_a, double_b, pool


class ClassScores(nn.Module):
    """[B, 2048] -> scores of the 1008 classes without and with the bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], NUM_CLASSES))
        bias = self.param("bias", nn.initializers.zeros, (NUM_CLASSES,))
        unbiased = jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST)
        return unbiased, unbiased + bias


class Inception(nn.Module):
    """Pixels to every feature that a metric is defined on.

    Args of a call:
        pixels: [B, H, W, 3] float32, 0..255, of any size.

    Returns of a call, a dict of float32 arrays [B, width] as in `TAPS`:
        pool3: the mean of the last block, `pool_3:0`; the features of FID.
        spatial: the first 7 channels of `mixed_6/conv:0`, the 1x1 branch of Mixed_6d after normalisation and ReLU,
            flattened in the order row, column, channel; the features of sFID. Both as in ADM's evaluator
            (github.com/openai/guided-diffusion, evaluations/evaluator.py, FID_SPATIAL_NAME).
        logits_unbiased: class scores without the bias, by which the Inception Score is computed there.
        logits: class scores.
        pool1, pool2, mixed_6e: means of earlier layers, torch-fidelity's features 64, 192 and 768.
    """

    @nn.compact
    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]:
        taps = {}
        x = (resize_bilinear_tf1(pixels, INPUT_SIZE, INPUT_SIZE) - 128.0) / 128.0
        x = ConvNorm(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _halving_max_pool(x)
        taps["pool1"] = x.mean(axis=(1, 2))
        x = ConvNorm(80, name="Conv2d_3b_1x1")(x)
        x = ConvNorm(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = _halving_max_pool(x)
        taps["pool2"] = x.mean(axis=(1, 2))
        x = _join(InceptionA(32, name="Mixed_5b")(x))
        x = _join(InceptionA(64, name="Mixed_5c")(x))
        x = _join(InceptionA(64, name="Mixed_5d")(x))
        x = _join(InceptionB(name="Mixed_6a")(x))
        x = _join(InceptionC(128, name="Mixed_6b")(x))
        x = _join(InceptionC(160, name="Mixed_6c")(x))
        branches = InceptionC(160, name="Mixed_6d")(x)
        taps["spatial"] = branches[0][..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = _join(branches)
        x = _join(InceptionC(192, name="Mixed_6e")(x))
        taps["mixed_6e"] = x.mean(axis=(1, 2))
        x = _join(InceptionD(name="Mixed_7a")(x))
        x = _join(InceptionE(has_max_pool=False, name="Mixed_7b")(x))
        x = _join(InceptionE(has_max_pool=True, name="Mixed_7c")(x))
        taps["pool3"] = x.mean(axis=(1, 2))
        taps["logits_unbiased"], taps["logits"] = ClassScores(name="fc")(taps["pool3"])
        return taps


def param_shapes() -> Any:
    """The tree of shapes of the parameters of `Inception`."""
    return jax.eval_shape(Inception().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))[
        "params"
    ]


def make_feature_net(params: Any) -> FeatureNet:
    """The network as a feature net, its features being `pool3` and its taps those of `TAPS`."""
    return FeatureNet(FID_NETWORK, _pool3, params, TAPS["pool3"], params_hash(params), TAPS, _taps)


def _taps(params: Any, images: jax.Array) -> dict[str, jax.Array]:
    taps: Any = Inception().apply({"params": params}, to_pixels(images))
    return taps


def _pool3(params: Any, images: jax.Array) -> jax.Array:
    return _taps(params, images)["pool3"]
