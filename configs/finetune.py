"""Fine-tuning of the public DiT-XL/2 on seven smaller data sets, with or without noise-condition dropout.

    python -m nag_jax.main --mode=encode --config=configs/finetune.py:food101          images to latents, once
    python -m nag_jax.main --config=configs/finetune.py:food101,nag                    fine-tune, evaluate, report
    python -m nag_jax.main --config=configs/finetune.py:food101                        its matched control
    python -m nag_jax.main --config=configs/finetune.py:smoke                          tiny, on made-up data

Before, `python -m nag_jax.convert` makes converted/sd_vae_ema and converted/dit_xl2; docs/data.md has the steps.

24,000 steps of 32 at a rate of 1e-4, then 10,000 samples in 50 steps: the protocol of Domain Guidance (Zhong et al.,
ICLR 2025). That NAG's paper (arXiv 2510.12497) follows it is inferred from its table: FID of 10k samples, without
guidance and with NAG, Food 16.04, 11.18; SUN 21.41, 14.95; Caltech 31.34, 24.32; CUB 9.81, 5.68; Cars 11.29, 5.92;
DF-20M 17.92, 14.79; ArtBench 22.76, 19.22. None of them was run here.

Options, behind a colon, in any order:
    food101, sun397, caltech101, cub, cars, df20m, artbench     the data set (default food101)
    nag            trains with noise-condition dropout .1 and evaluates NAG; without it the matched control
    smoke          a tiny network on 64 made-up latents and an autoencoder of random weights, from scratch: conversion,
                   encoding and Domain Guidance are left out

To train the null noise embedding alone, start from the control, whose classes are the data's:
--config.init_from=runs/finetune-food101 --config.optimizer.trainable=null_noise_embedding
"""

import ml_collections

from nag_jax.config import choose_options, defaults
from nag_jax.data.fine_tuning_sets import FINE_TUNING_SETS
from nag_jax.smoke_config import shrink_latent_config

# Domain Guidance asks the network that fine-tuning started from for its null class.
CONTROL_METHODS = ("plain", "cfg", "domain")
NAG_METHODS = ("nag", "cfg+nag", "domain+nag")


def get_config(options: str = "") -> ml_collections.ConfigDict:
    sets = tuple(FINE_TUNING_SETS)
    chosen = choose_options(options, (*sets, "nag", "smoke"), exclusive=[sets])
    name = next((option for option in chosen if option in sets), "food101")
    data = FINE_TUNING_SETS[name]
    config = defaults()

    config.init_from = "converted/dit_xl2"
    config.batch_size = 32
    config.num_steps = 24_000

    config.data.name = data.name
    config.data.split = data.split
    config.data.eval_split = data.eval_split
    config.data.image_size = 256
    config.data.channels = 3
    config.data.vae = "converted/sd_vae_ema"
    config.data.latents = f"latents/{name}"
    config.data.random_flip = True

    config.model.size = "XL"
    config.model.patch_size = 2
    config.model.learn_sigma = True
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"
    config.process.name = "ddpm"
    config.objective.prediction = "noise"
    config.objective.learn_variance = True
    config.objective.label_dropout = 0.1
    config.objective.noise_dropout = 0.1 if "nag" in chosen else 0.0
    config.optimizer.learning_rate = 1e-4
    config.ema.ema.decay = 0.9999
    config.checkpoint.every_steps = 2000
    config.log.every_steps = 100

    config.sampling.stepper = "ddpm_learned"
    config.sampling.num_steps = 50
    config.sampling.batch_size = 64
    config.sampling.guided_channels = 3
    config.sampling.cfg_scale = 1.5
    config.sampling.domain_scale = 1.5
    config.eval.methods = CONTROL_METHODS + NAG_METHODS if "nag" in chosen else CONTROL_METHODS
    config.eval.num_samples = 10_000

    if "smoke" in chosen:
        shrink_latent_config(config)
    return config
