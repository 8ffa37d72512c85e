"""The feature net of a work folder's Fréchet distances: a converted one, or one trained once on the training images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from etils import epath

from nag_jax import feature_nets, storage
from nag_jax.config import Config, to_dict
from nag_jax.hosts import from_first, is_first, wait_for_all
from nag_jax.jobs.experiment import Experiment
from nag_jax.metrics.features import FeatureNet
from nag_jax.models.feature_classifier import load_feature_net, save_feature_net, train_feature_classifier
from nag_jax.progress import progress

DESCRIPTION = "features.json"


def prepare(experiment: Experiment) -> tuple[FeatureNet, float | None]:
    """The feature net that distances are measured with, and its accuracy on held-out images where that is known.

    Without `eval.feature_net` it is a classifier that lies in features/ and is used again while the settings, the seed
    and the data are the same. Of several processes the first trains it, and all read the same file.
    """
    config = experiment.config
    pretrained = read_pretrained(config)
    if pretrained is not None:
        return pretrained, None
    folder = experiment.workdir / "features"
    made_with = storage.as_json(
        {
            "settings": to_dict(config.features),
            "seed": config.seed,
            "data": experiment.train_source.fingerprint,
            "images": len(experiment.train_states[0]),
            "vae": experiment.decoder.vae and experiment.decoder.vae.fingerprint,
        }
    )
    if not from_first(lambda: _is_there(folder, made_with)):
        if is_first():
            _train(experiment, folder, made_with)
        wait_for_all("feature classifier")
    return load_feature_net(folder / "features.npz"), storage.read_json(folder / DESCRIPTION)["held_out_accuracy"]


def _is_there(folder: epath.Path, made_with: Any) -> bool:
    return (folder / DESCRIPTION).exists() and storage.read_json(folder / DESCRIPTION)["made_with"] == made_with


def _train(experiment: Experiment, folder: epath.Path, made_with: Any) -> None:
    """Trains the classifier on this process' devices and writes it."""
    config = experiment.config
    start = time.perf_counter()
    with progress("feature classifier", config.features.num_steps) as report_progress:
        feature_net, _, accuracy = train_feature_classifier(
            experiment.train_images,
            experiment.train_states[1],
            experiment.train_source.num_classes,
            config.features,
            seed=config.seed,
            progress=lambda step, num_steps, loss: report_progress(step, f"loss {loss:.3f}"),
            test_images=experiment.eval_images,
            test_labels=experiment.eval_states[1],
            name=f"{config.data.name}-classifier",
        )
    # The description is removed first and written last: it stands only beside the net that it describes.
    (folder / DESCRIPTION).unlink(missing_ok=True)
    save_feature_net(folder / "features.npz", feature_net)
    storage.write_json(folder / DESCRIPTION, {"made_with": made_with, "held_out_accuracy": accuracy})
    experiment.add_seconds(**{"feature classifier": time.perf_counter() - start})


def read_pretrained(config: Config) -> FeatureNet | None:
    """The network in `eval.feature_net`, None where the config names none. Raises UserError if it cannot be read."""
    if not config.eval.feature_net:
        return None
    return seeing_grey(feature_nets.load_feature_net(config.eval.feature_net))


def seeing_grey(feature_net: FeatureNet) -> FeatureNet:
    """A network of colour images that takes grey ones too, with their one channel three times."""

    def in_colour(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, images: function(
            params, jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
        )

    apply_taps = feature_net.apply_taps and in_colour(feature_net.apply_taps)
    return dataclasses.replace(feature_net, apply=in_colour(feature_net.apply), apply_taps=apply_taps)
