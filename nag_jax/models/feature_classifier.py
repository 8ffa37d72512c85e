"""A small convolutional classifier for low-resolution images, whose penultimate layer gives features.

It makes a Fréchet distance meaningful where Inception is out of its depth (8x8 digits, small icons). It is
trained in seconds on the training split; the distance on its features is named after it and is not FID.
"""

import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import traverse_util

from nag_jax import storage
from nag_jax.errors import UserError
from nag_jax.metrics.features import FeatureNet, features
from nag_jax.params_hash import params_hash

STEPS_PER_CALL = 50  # how often progress is told; the trained parameters do not depend on it


@dataclass(frozen=True)
class FeatureClassifierConfig:
    """Settings of the classifier and its training.

    Attributes:
        num_steps: optimizer steps.
        batch_size: images per step, drawn with replacement.
        learning_rate: peak of AdamW's cosine schedule.
        feature_dimension: width of the penultimate layer, d.
        width: channels of the first convolution; each halving of the resolution doubles them.
    """

    num_steps: int = 300
    batch_size: int = 64
    learning_rate: float = 3e-3
    feature_dimension: int = 64
    width: int = 16


class FeatureTrunk(nn.Module):
    """Images [B, H, W, C] in [-1, 1] -> features [B, feature_dimension], everything before the class scores.

    A 3x3 convolution, `num_halvings` strided ones and a dense layer, each followed by GELU, at full float32
    precision.
    """

    width: int
    num_halvings: int
    feature_dimension: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        highest = jax.lax.Precision.HIGHEST
        x = nn.gelu(nn.Conv(self.width, (3, 3), precision=highest, name="stem")(images))
        for i in range(self.num_halvings):
            channels = self.width * 2 ** (i + 1)
            x = nn.gelu(nn.Conv(channels, (3, 3), strides=(2, 2), precision=highest, name=f"halving_{i}")(x))
        x = x.reshape(x.shape[0], -1)
        return nn.gelu(nn.Dense(self.feature_dimension, precision=highest, name="features")(x))


class Classifier(nn.Module):
    """Images [B, H, W, C] in [-1, 1] -> class scores [B, num_classes], linear in the features."""

    width: int
    num_halvings: int
    feature_dimension: int
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        vectors = FeatureTrunk(self.width, self.num_halvings, self.feature_dimension, name="trunk")(images)
        return nn.Dense(self.num_classes, precision=jax.lax.Precision.HIGHEST, name="head")(vectors)


def train_feature_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    config: FeatureClassifierConfig = FeatureClassifierConfig(),  # noqa: B008  (frozen, so sharing it is safe)
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
    *,
    test_images: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
    name: str = "classifier",
) -> tuple[FeatureNet, dict[str, Any], float | None]:
    """Trains the classifier and returns its feature net.

    Args:
        images: [N, H, W, C] float32 in [-1, 1], the training split.
        labels: [N] integers in [0, num_classes).
        num_classes: number of classes.
        config: settings.
        seed: initialization and batches; equal arguments give bitwise equal parameters on one platform.
        progress: called as progress(step, num_steps, loss) every `STEPS_PER_CALL` steps and after the last.
        test_images, test_labels: held-out data for the accuracy, given together.
        name: name of the features, such as "digits-classifier".

    Returns:
        (feature net of the trunk, parameters {"trunk", "head"}, held-out accuracy in [0, 1] or None).

    Raises:
        UserError: shapes, types or labels that do not fit, or settings below 1.
    """
    _check_data(images, labels, num_classes, "training")
    if (test_images is None) != (test_labels is None):
        raise UserError("Feature classifier: give test_images and test_labels together, or neither.")
    if min(config.num_steps, config.batch_size, config.feature_dimension, config.width) < 1:
        raise UserError(f"Feature classifier: every size must be at least 1, got {config}.")

    model = Classifier(config.width, _num_halvings(images.shape[1:3]), config.feature_dimension, num_classes)
    batch_key = jax.random.key(seed)
    all_x, all_y = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)
    params = _initial_params(model, all_x[:1], seed)
    opt_state = jax.jit(_optimizer(config).init)(params)
    for start in range(0, config.num_steps, STEPS_PER_CALL):
        stop = min(start + STEPS_PER_CALL, config.num_steps)
        params, opt_state, loss = _run_steps(
            model, config, params, opt_state, start, stop, batch_key, all_x, all_y
        )
        if progress is not None:
            progress(stop, config.num_steps, float(loss))

    params = jax.device_get(params)
    feature_net = _feature_net(name, params["trunk"])
    if test_images is None or test_labels is None:
        return feature_net, params, None
    _check_data(test_images, test_labels, num_classes, "held-out")
    scores = features(feature_net, test_images) @ params["head"]["kernel"] + params["head"]["bias"]
    return feature_net, params, float((scores.argmax(axis=-1) == test_labels).mean())


def _optimizer(config: FeatureClassifierConfig) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_decay_schedule(config.learning_rate, config.num_steps), weight_decay=1e-2)


def _initial_params(model: Classifier, image: jax.Array, seed: int) -> Any:
    """Kernels N(0, 1/fan_in), biases 0; drawn on the host, as XLA takes long to compile a draw per shape."""
    rng = np.random.default_rng(seed)
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), image)["params"])
    return traverse_util.unflatten_dict(
        {
            path: rng.normal(size=leaf.shape, scale=np.prod(leaf.shape[:-1]) ** -0.5).astype(np.float32)
            if path[-1] == "kernel"
            else np.zeros(leaf.shape, np.float32)
            for path, leaf in sorted(shapes.items())
        }
    )


# `start` and `stop` are traced, so that a shorter last call runs the same program.
@partial(jax.jit, static_argnames=("model", "config"))
def _run_steps(
    model: Classifier,
    config: FeatureClassifierConfig,
    params: Any,
    opt_state: Any,
    start: int,
    stop: int,
    batch_key: jax.Array,
    all_x: jax.Array,
    all_y: jax.Array,
) -> tuple[Any, Any, jax.Array]:
    """Steps start to stop (exclusive); the batch of step i depends on (batch_key, i) alone."""

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        scores = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    def step(i: jax.Array, carry: Any) -> Any:
        params, opt_state, _ = carry
        rows = jax.random.randint(jax.random.fold_in(batch_key, i), (config.batch_size,), 0, len(all_x))
        loss, grads = jax.value_and_grad(loss_fn)(params, all_x[rows], all_y[rows])
        updates, opt_state = _optimizer(config).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.lax.fori_loop(start, stop, step, (params, opt_state, jnp.float32(0.0)))


def save_feature_net(path: str | os.PathLike[str], feature_net: FeatureNet) -> None:
    """Writes parameters, name and fingerprint of a feature net of this module to an npz file, all or nothing.

    Args:
        path: the file, local or gs://; an existing one is replaced.
        feature_net: from `train_feature_classifier` or `load_feature_net`.
    """
    content = traverse_util.flatten_dict({"params": feature_net.params}, sep="/")
    content |= {"name": feature_net.name, "fingerprint": feature_net.fingerprint}
    buffer = io.BytesIO()
    np.savez(buffer, **content)
    storage.write_bytes(path, buffer.getvalue())


def load_feature_net(path: str | os.PathLike[str]) -> FeatureNet:
    """Reads a feature net written by `save_feature_net`; parameters are bitwise those that were saved.

    Raises:
        UserError: the file is missing, damaged, no feature net, or does not match its fingerprint.
    """
    source = epath.Path(path)
    try:
        with np.load(io.BytesIO(source.read_bytes()), allow_pickle=False) as archive:
            stored = {key: archive[key] for key in archive.files}
        name, fingerprint = str(stored.pop("name")), str(stored.pop("fingerprint"))
        feature_net = _feature_net(name, traverse_util.unflatten_dict(stored, sep="/")["params"])
    except FileNotFoundError:
        raise UserError(f"Feature net: {source} does not exist.") from None
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"Feature net: {source} is damaged or no feature net ({error}).") from error
    if feature_net.fingerprint != fingerprint:
        raise UserError(f"Feature net: {source} does not match its fingerprint; train it again.")
    return feature_net


def _feature_net(name: str, trunk_params: dict[str, Any]) -> FeatureNet:
    """The feature net of trunk parameters; their shapes say which trunk it is."""
    width = trunk_params["stem"]["kernel"].shape[-1]
    num_halvings = sum(key.startswith("halving_") for key in trunk_params)
    dimension = trunk_params["features"]["kernel"].shape[-1]
    trunk = FeatureTrunk(width, num_halvings, dimension)

    def apply(params: Any, images: jax.Array) -> jax.Array:
        return jnp.asarray(trunk.apply({"params": params}, images))

    return FeatureNet(name, apply, trunk_params, dimension, params_hash(trunk_params))


def _num_halvings(size: tuple[int, ...]) -> int:
    """Halvings (rounding up, as strided convolutions do) until the shorter side is at most 4 pixels."""
    return max(0, (min(size) - 1).bit_length() - 2)


def _check_data(images: np.ndarray, labels: np.ndarray, num_classes: int, which: str) -> None:
    if images.ndim != 4 or len(images) == 0 or not np.issubdtype(images.dtype, np.floating):
        raise UserError(
            f"Feature classifier: {which} images are {images.dtype} {list(images.shape)}; "
            "expected float [N, H, W, C] in [-1, 1]."
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"Feature classifier: {which} labels are {labels.dtype} {list(labels.shape)}; "
            f"expected {len(images)} integers."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"Feature classifier: {which} labels span {labels.min()} to {labels.max()}; "
            f"expected 0 to {num_classes - 1}."
        )
