"""The default: handwritten digits of 8 x 8 pixels, on any machine, in a few minutes.

    ./launch/local.sh                                  (or: python -m nag_jax.main --config=configs/digits.py)

A SiT of 16 tokens, 128 wide and 4 layers deep, trained with class and noise-condition dropout on scikit-learn's digits
(1,297 for training, 500 held out), then {plain, CFG, NAG, CFG + NAG} on the same noise and labels, their Fréchet
distances on a digits classifier's features, and their noise shift. It shows that everything works and what the numbers
look like; digits are too easy to prove NAG right or wrong.

Options, behind a colon: `smoke` runs the same code in seconds, with numbers that mean nothing.
"""

import ml_collections

from nag_jax.config import choose_options, defaults


def get_config(options: str = "") -> ml_collections.ConfigDict:
    chosen = choose_options(options, ("smoke",))
    config = defaults()

    config.batch_size = 64
    config.num_steps = 1000

    config.data.name = "digits"
    config.data.image_size = 8
    config.data.channels = 1

    config.model.depth = 4
    config.model.hidden_size = 128
    config.model.num_heads = 4
    config.model.patch_size = 2
    # One loop iteration a block costs more than it saves on a CPU at this size.
    config.model.scan_blocks = False

    config.objective.noise_dropout = 0.1
    config.objective.label_dropout = 0.1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.clip_norm = 1.0
    config.ema.ema.decay = 0.99
    config.checkpoint.every_steps = 250
    config.log.every_steps = 25

    config.sampling.stepper = "heun"
    config.sampling.num_steps = 8
    config.sampling.batch_size = 125
    config.sampling.cfg_scale = 1.5
    config.sampling.nag_scale = 0.5
    config.eval.num_samples = 1000
    config.noise_shift.times = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
    config.estimator.num_steps = 100
    config.estimator.batch_size = 128

    if "smoke" in chosen:
        config.batch_size = 16
        config.num_steps = 6
        config.model.depth = 1
        config.model.hidden_size = 16
        config.model.num_heads = 2
        config.optimizer.warmup_steps = 2
        config.checkpoint.every_steps = 3
        config.log.every_steps = 2
        config.sampling.num_steps = 3
        config.sampling.batch_size = 50
        config.eval.num_samples = 100
        config.eval.num_resamples = 20
        config.eval.num_reference = 200
        config.noise_shift.num_forward = 100
        config.estimator.num_steps = 4
        config.estimator.batch_size = 16
        config.features.num_steps = 10
    return config
