"""A convolution with its frozen norm equals the one convolution that both can be folded to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.models.conv_norm import ConvNorm


@pytest.mark.parametrize("groups", [1, 6])
def test_folding_the_norm_into_the_convolution_changes_nothing(groups):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 7, 6), np.float32)
    kernel = rng.standard_normal((3, 3, 6 // groups, 6), np.float32)
    scale, bias, mean = rng.standard_normal((3, 6), np.float32)
    var = rng.uniform(1e-4, 1e-2, 6).astype(np.float32)  # so small that the epsilon shows
    params = {"conv": {"kernel": kernel}, "bn": {"scale": scale, "bias": bias, "mean": mean, "var": var}}
    factor = scale / np.sqrt(var + 1e-3)
    folded = jax.lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(kernel * factor),
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=jax.lax.Precision.HIGHEST,
    )
    expected = np.maximum(folded + (bias - mean * factor), 0)
    actual = ConvNorm(6, (3, 3), 2, groups=groups).apply({"params": params}, x)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * expected.max())
