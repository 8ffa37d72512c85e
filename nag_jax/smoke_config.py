"""The `smoke` option of the configs on latents: the same code in about a minute on a laptop, on made-up data."""

import ml_collections


def shrink_latent_config(config: ml_collections.ConfigDict) -> None:
    """Makes a config on latents run in about a minute on a laptop, without data and weights; its numbers mean nothing.

    Data and autoencoder are made up, so `data.latents` need not exist, and training starts from scratch.
    """
    config.init_from = ""
    config.data.mock_examples = 64
    config.data.image_size = 32
    config.data.vae = ""
    config.model.size = ""
    config.model.depth = 2
    config.model.hidden_size = 32
    config.model.num_heads = 2
    config.model.patch_size = 2
    config.model.dtype = "float32"
    config.batch_size = 8
    config.num_steps = 4
    config.optimizer.trainable = "all"
    config.checkpoint.every_steps = 2
    config.log.every_steps = 2
    config.sampling.num_steps = 4
    config.sampling.batch_size = 32
    # Of many classes, balanced labels would hardly meet those of 64 made-up images.
    config.sampling.label_rule = "reference"
    config.eval.methods = tuple(method for method in config.eval.methods if "domain" not in method)
    config.eval.num_samples = 64
    config.eval.num_reference = 64
    config.eval.num_resamples = 20
    config.noise_shift.num_forward = 64
    config.estimator.num_steps = 4
    config.estimator.batch_size = 8
    config.features.num_steps = 4
    config.features.batch_size = 8
