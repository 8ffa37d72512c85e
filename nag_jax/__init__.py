"""Noise Awareness Guidance and noise-shift measurement for diffusion models, in JAX.

    denoiser = nag_jax.load("runs/digits")
    samples = nag_jax.sample(denoiser, labels, seed=0, guidance=nag_jax.guidance.nag(1.0))
    images = nag_jax.to_uint8(samples.x)
    shifts = nag_jax.noise_shift.measure(denoiser, estimator, held_out_images, held_out_labels)

Names are imported when they are first asked for, so that `import nag_jax` is quick and touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nag_jax import noise_shift
    from nag_jax.data.images import to_uint8
    from nag_jax.diffusion import guidance
    from nag_jax.diffusion.sampler import sample
    from nag_jax.loading import load

__all__ = ["guidance", "load", "noise_shift", "sample", "to_uint8"]

_MODULES = {"guidance": "nag_jax.diffusion.guidance", "noise_shift": "nag_jax.noise_shift"}
_FUNCTIONS = {"load": "nag_jax.loading", "sample": "nag_jax.diffusion.sampler", "to_uint8": "nag_jax.data.images"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
