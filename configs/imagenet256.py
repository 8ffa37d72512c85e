"""ImageNet at 256 x 256 pixels on SD-VAE latents, with DiT or SiT, with or without noise-condition dropout.

    python -m nag_jax.main --mode=encode --config=configs/imagenet256.py                 images to latents, once
    python -m nag_jax.main --config=configs/imagenet256.py:sit_xl2,nag,finetune          the paper's experiment
    python -m nag_jax.main --config=configs/imagenet256.py:sit_xl2,finetune              its matched control
    python -m nag_jax.main --mode=sample --checkpoint=converted/sit_xl2 --config=configs/imagenet256.py:sit_xl2
    python -m nag_jax.main --config=configs/imagenet256.py:smoke                         tiny, on made-up data

Before, `python -m nag_jax.convert` makes converted/sd_vae_ema and converted/sit_xl2 or dit_xl2 of the published files;
docs/data.md has the steps. Other places: --config.data.vae, --config.data.latents, --config.init_from.

The paper's figures (arXiv 2510.12497, FID of 50k samples) for XL/2, without and with CFG: DiT 9.62 and 2.27, with NAG
2.59 and 2.14; SiT 8.61 and 2.06, with NAG 2.26 and 1.72. Nothing here was run on ImageNet. The distance that a run
reports is FID only with config.eval.feature_net (a converted Inception) and config.eval.reference; by default it is on
the features of a classifier of its own.

Options, behind a colon, in any order:
    sit_s2 ... sit_xl8, dit_s2 ... dit_xl8   family, size and patch (default sit_xl2). sit: linear path, velocity,
    sit_3b2 ... dit_3b8                      Euler-Maruyama in 250 steps. dit: DDPM, noise and learned variance, 250
                                             ancestral steps. Of 3b, 3 billion parameters, there is no public network.
    nag                                      trains with noise-condition dropout .1 and evaluates NAG; without it the
                                             matched control.
    finetune                                 10 epochs from the converted public network (XL/2), with a constant rate
                                             of 1e-4, batch 256 and EMA .9999: the public training's, for the paper
                                             does not say. Without it, 400,000 steps from scratch.
    null_only                                trains the null noise embedding alone (with nag and finetune).
    smoke                                    a tiny network on 64 made-up latents and an autoencoder of random weights,
                                             always from scratch: conversion and encoding are left out.
"""

import ml_collections

from nag_jax.config import choose_options, defaults
from nag_jax.errors import UserError
from nag_jax.smoke_config import shrink_latent_config

SIZES = ("s", "b", "l", "xl", "3b")
FAMILIES = tuple(f"{family}_{size}{patch}" for family in ("sit", "dit") for size in SIZES for patch in (2, 4, 8))
TRAINING_IMAGES = 1_281_167
FINE_TUNING_EPOCHS = 10


def get_config(options: str = "") -> ml_collections.ConfigDict:
    chosen = choose_options(options, (*FAMILIES, "nag", "finetune", "null_only", "smoke"), exclusive=[FAMILIES])
    family = next((option for option in chosen if option in FAMILIES), "sit_xl2")
    kind, size = family.split("_")
    if "null_only" in chosen and not {"nag", "finetune"} <= set(chosen):
        raise UserError("The option null_only trains the null noise embedding of a public network: add nag,finetune.")
    if "finetune" in chosen and size != "xl2":
        raise UserError(f"The option finetune starts from a public network, and there is none of {family}; use xl2.")
    config = defaults()

    config.batch_size = 256
    config.num_steps = 400_000

    config.data.name = "imagenet2012"
    config.data.split = "train"
    config.data.eval_split = "validation"
    config.data.image_size = 256
    config.data.channels = 3
    config.data.vae = "converted/sd_vae_ema"
    config.data.latents = "latents/imagenet256"
    config.data.random_flip = True

    config.model.size = size[:-1].upper()
    config.model.patch_size = int(size[-1])
    # The public networks of both families have outputs for a variance; SiT's are not used.
    config.model.learn_sigma = True
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.optimizer.learning_rate = 1e-4
    config.ema.ema.decay = 0.9999
    config.checkpoint.every_steps = 5000
    config.log.every_steps = 100

    config.objective.label_dropout = 0.1
    config.objective.noise_dropout = 0.1 if "nag" in chosen else 0.0
    config.eval.methods = ("plain", "cfg", "nag", "cfg+nag") if "nag" in chosen else ("plain", "cfg")
    config.eval.num_samples = 10_000
    config.sampling.num_steps = 250
    config.sampling.batch_size = 64
    # The public code guides by class on the first 3 of 4 channels. On which the paper guides is not published.
    config.sampling.guided_channels = 3
    if kind == "sit":
        config.process.name = "linear"
        config.objective.prediction = "velocity"
        config.sampling.stepper = "euler_maruyama"
    else:
        config.process.name = "ddpm"
        config.objective.prediction = "noise"
        config.objective.learn_variance = True
        config.sampling.stepper = "ddpm_learned"

    if "finetune" in chosen:
        config.init_from = f"converted/{family}"
        config.num_steps = FINE_TUNING_EPOCHS * TRAINING_IMAGES // config.batch_size
    if "null_only" in chosen:
        config.optimizer.trainable = "null_noise_embedding"
    if "smoke" in chosen:
        shrink_latent_config(config)
    return config
