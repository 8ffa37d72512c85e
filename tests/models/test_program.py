"""What the network is compiled to: dtypes of its products, what rematerialisation repeats, casts that are done once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from nag_jax.denoiser import NetworkFunction, from_network
from nag_jax.diffusion.guidance import cfg, nag, plain
from nag_jax.diffusion.process import Linear
from nag_jax.diffusion.sampler import Sampler
from nag_jax.diffusion.stepping import Euler
from nag_jax.models.dit import ModelConfig, build_model, init_params

SHAPE, CLASSES = (16, 8, 4), 5
HALF = ModelConfig(depth=3, hidden_size=64, num_heads=4, dtype="bfloat16")


def network(**changes):
    return build_model(dataclasses.replace(HALF, **changes), input_shape=SHAPE, num_classes=CLASSES)


def inputs(batch=2):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((batch, *SHAPE), np.float32))
    no = jnp.zeros(batch, bool)
    return x, jnp.linspace(0.2, 0.9, batch), jnp.arange(batch, dtype=jnp.int32), no, no


def random_params(model):
    """Gates and final layer are random too, so that every product matters."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32)), shapes)


def gradient_jaxpr(model):
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    loss = jax.grad(lambda params: jnp.square(model.apply({"params": params}, *inputs())).mean())
    return jax.make_jaxpr(loss)(shapes).jaxpr


def equations(jaxpr):
    """Those of a jaxpr and of all that it calls, each once: a scan's body is not repeated."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def products(jaxpr):
    """(scope, dtypes of both factors) of every matrix product."""
    for equation in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            scope = str(equation.source_info.name_stack)
            yield scope, {str(factor.aval.dtype) for factor in equation.invars}


@pytest.fixture
def traceable_flash_attention(monkeypatch):
    """Lets programs with cuDNN's attention be traced, not run, where there is no cuDNN."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


# Precision


@pytest.mark.parametrize("scan_blocks", [True, False])
@pytest.mark.parametrize("remat", ["none", "dots_flash"])
def test_float32_products_are_those_of_the_time_embedding_and_the_final_layer(
    traceable_flash_attention, scan_blocks, remat
):
    """Forward and backward; every other product is of bfloat16."""
    found = list(products(gradient_jaxpr(network(attention="cudnn", scan_blocks=scan_blocks, remat=remat))))
    in_float32 = {scope for scope, dtypes in found if "float32" in dtypes}
    in_bfloat16 = {scope for scope, dtypes in found if dtypes == {"bfloat16"}}
    assert in_float32 == {scope for scope, _ in found if "t_embedder" in scope or "final_layer" in scope}
    assert in_float32 and in_bfloat16 == {scope for scope, _ in found} - in_float32


def test_attention_without_cudnn_has_two_products_with_float32():
    """jax.nn keeps the scores in float32, so their gradients are: those of queries and of keys."""
    found = products(gradient_jaxpr(network()))
    mixed = [scope for scope, dtypes in found if dtypes == {"float32", "bfloat16"}]
    assert len(mixed) == 2 and all("attn" in scope for scope in mixed)


def test_a_block_has_seven_products_each_with_two_gradients():
    """qkv, queries with keys, weights with values, proj, fc1, fc2 and the modulation."""
    found = [scope for scope, dtypes in products(gradient_jaxpr(network())) if "bfloat16" in dtypes]
    patch_embedding = 2  # nothing asks for the gradient of its input
    assert len(found) == 3 * 7 + patch_embedding


def test_a_prepared_network_answers_the_same_bit_for_bit_and_casts_no_block():
    model = network(learn_sigma=True)
    params = random_params(model)
    denoiser = from_network(
        NetworkFunction(model, learned_variance=True), params, Linear(), num_classes=CLASSES, sample_shape=SHAPE
    )
    prepared = jax.jit(denoiser.prepare)(params)
    ask = jax.jit(lambda params: denoiser(params, *inputs()[:3]))
    for ours, expected in zip(ask(prepared), ask(params), strict=True):
        np.testing.assert_array_equal(ours, expected)

    def casts_of_blocks(params):
        leaves = {leaf.shape[1:] for leaf in jax.tree.leaves(params["blocks"])}
        casts = (e for e in equations(jax.make_jaxpr(ask)(params).jaxpr) if e.primitive.name == "convert_element_type")
        return sum(e.invars[0].aval.shape in leaves and e.invars[0].aval.ndim > 1 for e in casts)

    kernels = 5  # of qkv, proj, fc1, fc2 and the modulation
    assert casts_of_blocks(params) == kernels and casts_of_blocks(prepared) == 0


# What is computed twice


@pytest.mark.parametrize("scan_blocks", [True, False])
@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots_flash", 1), ("dots_no_batch", 2), ("full", 2)])
def test_flash_attention_is_kept_where_the_policy_says_so(traceable_flash_attention, scan_blocks, remat, times):
    model = network(attention="cudnn", scan_blocks=scan_blocks, remat=remat)
    names = [equation.primitive.name for equation in equations(gradient_jaxpr(model))]
    blocks_in_the_program = 1 if scan_blocks else HALF.depth
    forward = [name for name in names if name == "dot_product_attention_fwd_wrapper"]
    backward = [name for name in names if name == "dot_product_attention_bwd_wrapper"]
    assert len(forward) == times * blocks_in_the_program
    assert len(backward) == blocks_in_the_program


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots_flash", 1), ("dots", 2), ("full", 2)])
def test_pallas_attention_is_kept_where_the_policy_says_so(remat, times):
    """Forward once or twice, backward once; patches of one pixel, for 128 tokens."""
    model = network(attention="pallas", patch_size=1, remat=remat)
    jaxpr = gradient_jaxpr(model)
    # As the compiler does, without what nothing asks for.
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    kernels = [equation for equation in equations(used) if equation.primitive.name == "pallas_call"]
    assert len(kernels) == times + 1


@pytest.mark.parametrize(("remat", "repeated"), [("none", 0), ("dots", 0), ("dots_no_batch", 2), ("full", 7)])
def test_products_are_kept_where_the_policy_says_so(remat, repeated):
    """Of the seven products of a block "dots_no_batch" repeats those of attention."""
    plain_count, count = (len(list(products(gradient_jaxpr(network(remat=name))))) for name in ("none", remat))
    assert count - plain_count == repeated


@pytest.mark.parametrize(("remat", "repeated"), [("dots", 0), ("dots_no_batch", 0), ("full", 4)])
def test_statistics_of_norms_are_kept_unless_nothing_is(remat, repeated):
    """A block has two norms; each takes two sums over a token, for the mean and the variance."""

    def sums(name):
        found = equations(gradient_jaxpr(network(remat=name)))
        tokens = [e.invars[0].aval for e in found if e.primitive.name == "reduce_sum" and e.params["axes"] == (2,)]
        return sum(aval.shape[-1] == HALF.hidden_size for aval in tokens)

    assert sums(remat) - sums("none") == repeated


# Guided sampling


def test_guidance_multiplies_the_operations_of_a_row():
    """A program of one row, in which the network's evaluations are nearly all of the work."""
    model = network(dtype="float32", scan_blocks=False, hidden_size=128)
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    denoiser = from_network(NetworkFunction(model), shapes, Linear(), num_classes=CLASSES, sample_shape=SHAPE)
    labels, indices = (jax.ShapeDtypeStruct((4,), dtype) for dtype in (jnp.int32, jnp.uint32))

    def operations(guidance):
        sampler = Sampler(denoiser, {"mine": guidance}, stepper=Euler(), num_steps=1)
        return sampler.lower("mine", labels, indices).compile().cost_analysis()["flops"]

    unguided = operations(plain())
    for guidance, evaluations in ((cfg(1.5), 2), (nag(1.0), 2), (cfg(1.5) + nag(1.0), 3)):
        assert operations(guidance) / unguided == pytest.approx(evaluations, rel=0.01)
