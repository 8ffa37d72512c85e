"""Operations counted by hand, beside the published counts, the networks' own products, and the compiler's count."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from nag_jax import flops
from nag_jax.models.dit import ModelConfig, build_model, dimensions, init_params
from nag_jax.models.vae import Vae, VaeConfig

# Patch 2 on latents of 32 x 32 x 4, and XL/2 on 64 x 64 x 4: "Gflops" of arXiv 2212.09748, tables 4 and 2.
PUBLISHED = {("S", 32): 6.06, ("B", 32): 23.01, ("L", 32): 80.71, ("XL", 32): 118.64, ("XL", 64): 524.60}
SMALL = ModelConfig(depth=3, hidden_size=64, num_heads=4, learn_sigma=True, scan_blocks=False)


def product_flops(jaxpr):
    """Operations of all products and convolutions of a jaxpr, two for each multiply-add; a scan's body counts often."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shared = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * shared
        elif equation.primitive.name == "conv_general_dilated":
            output_features = equation.params["dimension_numbers"].rhs_spec[0]
            kernel = equation.invars[1].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[output_features]
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += repeats * sum(product_flops(inner) for inner in jaxprs_in_params(equation.params))
    return total


def dit_call(config, shape):
    """(function, shapes of its arguments) of one evaluation on one state."""
    model = build_model(config, input_shape=shape, num_classes=10)
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    row = {dtype: jax.ShapeDtypeStruct((1,), dtype) for dtype in (jnp.float32, jnp.int32, jnp.bool_)}
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    def call(params, *inputs):
        return model.apply({"params": params}, *inputs)

    return call, (params, x, row[jnp.float32], row[jnp.int32], row[jnp.bool_], row[jnp.bool_])


@pytest.mark.parametrize(("size", "side"), PUBLISHED)
def test_published_counts(size, side):
    """They are multiply-adds, and hold one operation for each normalised element of a block, which we leave out."""
    config = ModelConfig(size=size, patch_size=2, learn_sigma=True)
    depth, hidden, _ = dimensions(config)
    normalised = 2 * depth * (side // 2) ** 2 * hidden
    gflops = (flops.dit_forward(config, (side, side, 4)) / 2 + normalised) / 1e9
    assert round(gflops, 2) == PUBLISHED[size, side]
    assert normalised < 0.001 * flops.dit_forward(config, (side, side, 4))


@pytest.mark.parametrize("scan_blocks", [True, False])
@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("shape", [(8, 8, 4), (4, 8, 1)])
def test_a_forward_pass_is_the_network_s_products(scan_blocks, learn_sigma, shape):
    config = ModelConfig(depth=3, hidden_size=64, num_heads=4, learn_sigma=learn_sigma, scan_blocks=scan_blocks)
    call, arguments = dit_call(config, shape)
    assert flops.dit_forward(config, shape) == product_flops(jax.make_jaxpr(call)(*arguments).jaxpr)


def test_xl_is_the_network_s_products():
    config = ModelConfig(size="XL", patch_size=2, learn_sigma=True)
    call, arguments = dit_call(config, (32, 32, 4))
    forward = flops.dit_forward(config, (32, 32, 4))
    assert forward == product_flops(jax.make_jaxpr(call)(*arguments).jaxpr)


def test_training_is_the_products_of_forward_and_backward():
    """All but two: nothing asks for gradients with respect to patches and time features."""
    shape = (8, 8, 4)
    call, arguments = dit_call(SMALL, shape)
    gradient = jax.grad(lambda params, *inputs: call(params, *inputs).sum())
    products = product_flops(jax.make_jaxpr(gradient)(*arguments).jaxpr)
    to_patches = 2 * 16 * 16 * 64  # tokens, patch elements, width
    to_features = 2 * 256 * 64
    assert products == flops.dit_training(SMALL, shape) - to_patches - to_features


def test_the_compiler_counts_products_and_what_is_left_out():
    """Elementwise work comes on top (norms, GELU, softmax, modulation): 0 to 5 % at this size, less at larger ones."""
    config = ModelConfig(depth=2, hidden_size=256, num_heads=4, learn_sigma=True, scan_blocks=False)
    call, arguments = dit_call(config, (16, 16, 4))
    counted = jax.jit(call).lower(*arguments).compile().cost_analysis()["flops"]
    assert 1.0 <= counted / flops.dit_forward(config, (16, 16, 4)) < 1.05


def test_sampling_counts_evaluations():
    shape = (8, 8, 4)
    assert flops.dit_sampling(SMALL, shape, 750) == 750 * flops.dit_forward(SMALL, shape)


@pytest.mark.parametrize(
    "config", [VaeConfig(), VaeConfig(block_out_channels=(32, 64), layers_per_block=1, norm_groups=8)]
)
def test_the_autoencoder_is_its_products(config):
    """At the size of Stable Diffusion too; nothing of it runs."""
    height, width = 64, 32
    vae = Vae(config)
    image = jax.ShapeDtypeStruct((1, height, width, config.channels), jnp.float32)
    latent_size = (height // config.downsampling, width // config.downsampling)
    latent = jax.ShapeDtypeStruct((1, *latent_size, config.latent_channels), jnp.float32)
    encoded = jax.make_jaxpr(lambda x: vae.init_with_output(jax.random.key(0), x, method="encode_moments")[0])(image)
    decoded = jax.make_jaxpr(lambda z: vae.init_with_output(jax.random.key(0), z, method="decode")[0])(latent)
    assert flops.vae_encode(config, height, width) == product_flops(encoded.jaxpr)
    assert flops.vae_decode(config, height, width) == product_flops(decoded.jaxpr)
