"""ImageNet at 256 x 256 pixels with DiT or SiT, with or without noise-condition dropout.

    python -m nag_jax.main --config=configs/imagenet256.py:sit_xl2,nag --workdir=DIR
    python -m nag_jax.main --config=configs/imagenet256.py:smoke       the same code on made-up images, about a minute

The network works on pixels in patches of 16 (p x 8 for a size named "/p"), which gives the tokens and the cost of the
published networks on SD-VAE latents (8 pixels a latent, patches of p). It is not the published protocol: encoding to
latents and the Inception features of FID are not in this version, so no figure of this config compares with a paper's.

Options, behind a colon, in any order:
    sit_s2 ... sit_xl8, dit_s2 ... dit_xl8   family, size and patch (default sit_xl2). sit: linear path, velocity,
                                             Euler-Maruyama in 250 steps. dit: DDPM, noise and learned variance, 250
                                             ancestral steps.
    nag                                      trains with noise-condition dropout .1 and evaluates NAG; without it the
                                             matched control.
    smoke                                    a tiny network on 64 made-up images of 32 x 32 pixels.
"""

import ml_collections

from nag_jax.config import choose_options, defaults

FAMILIES = tuple(
    f"{family}_{size}{patch}" for family in ("sit", "dit") for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)
)
LATENT_PIXELS = 8  # pixels that one latent of the SD-VAE covers


def get_config(options: str = "") -> ml_collections.ConfigDict:
    chosen = choose_options(options, (*FAMILIES, "nag", "smoke"), exclusive=[FAMILIES])
    family = next((option for option in chosen if option in FAMILIES), "sit_xl2")
    kind, size = family.split("_")
    config = defaults()

    config.batch_size = 256
    config.num_steps = 400_000

    config.data.name = "imagenet2012"
    config.data.split = "train"
    config.data.eval_split = "validation"
    config.data.image_size = 256
    config.data.channels = 3
    config.data.random_flip = True

    config.model.size = size[:-1].upper()
    config.model.patch_size = int(size[-1]) * LATENT_PIXELS
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
    if kind == "sit":
        config.process.name = "linear"
        config.objective.prediction = "velocity"
        config.sampling.stepper = "euler_maruyama"
    else:
        config.process.name = "ddpm"
        config.objective.prediction = "noise"
        config.objective.learn_variance = True
        config.model.learn_sigma = True
        config.sampling.stepper = "ddpm_learned"

    if "smoke" in chosen:
        config.data.mock_examples = 64
        config.data.image_size = 32
        config.model.size = ""
        config.model.depth = 2
        config.model.hidden_size = 32
        config.model.num_heads = 2
        config.model.dtype = "float32"
        config.batch_size = 8
        config.num_steps = 4
        config.checkpoint.every_steps = 2
        config.log.every_steps = 2
        config.sampling.num_steps = 4
        config.sampling.batch_size = 32
        # Of 1000 classes, balanced labels would hardly meet those of 64 made-up images.
        config.sampling.label_rule = "reference"
        config.eval.num_samples = 64
        config.eval.num_reference = 64
        config.eval.num_resamples = 20
        config.noise_shift.num_forward = 64
        config.estimator.num_steps = 4
        config.estimator.batch_size = 8
        config.features.num_steps = 4
        config.features.batch_size = 8
    return config
