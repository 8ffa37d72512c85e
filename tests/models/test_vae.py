"""The autoencoder against diffusers' on the same random weights; its table, scale, batches and refusals."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from nag_jax.errors import UserError
from nag_jax.models.vae import DownBlock, MidBlock, UpBlock, Vae, VaeConfig, decode_latents, param_shapes, sample_latent
from nag_jax.models.vae_table import (
    OLD_ATTENTION_NAMES,
    config_from_diffusers,
    config_from_state_dict,
    from_torch_state_dict,
    to_torch_state_dict,
    vae_table,
)

TINY = VaeConfig(block_out_channels=(8, 16), layers_per_block=1, norm_groups=4)
SMALL = {
    "two levels": (VaeConfig(block_out_channels=(32, 64), layers_per_block=1, norm_groups=8), (32, 32)),
    "three levels, not square": (VaeConfig(block_out_channels=(32, 32, 64), norm_groups=32), (32, 16)),
}
SD_CONFIG_JSON = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def random_state(config, prefix=""):
    """Tensors in PyTorch's layout that are random everywhere, norms and biases too; those that start with `prefix`."""
    rng = np.random.default_rng(0)
    state = {}
    for name, entry in vae_table(config).items():
        if not name.startswith(prefix):
            continue
        values = rng.standard_normal(entry.shape, np.float32)
        if len(entry.shape) == 1:
            state[name] = 0.2 * values + np.float32("norm" in name and name.endswith("weight"))
        else:
            state[name] = values * np.float32(np.prod(entry.shape[1:]) ** -0.5)
        if "conv_in" in name:
            state[name] *= np.float32(0.1)  # a small variance at the first norms shows their epsilon
    return state


@functools.cache
def tiny():
    state = random_state(TINY)
    return state, from_torch_state_dict(state, TINY)


@functools.partial(jax.jit, static_argnums=0)
def encode(config, params, x):
    return Vae(config).apply({"params": params}, x, method=Vae.encode_moments)


@functools.partial(jax.jit, static_argnums=0)
def decode(config, params, z):
    return Vae(config).apply({"params": params}, z, method=Vae.decode)


batched = jax.jit(decode_latents, static_argnums=(0, 3))


def to_nchw(x):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def to_nhwc(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def assert_close(ours, theirs, tolerance=1e-5, what=""):
    assert ours.shape == theirs.shape, what
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), what


def diffusers_vae(config):
    diffusers = pytest.importorskip("diffusers")
    levels = len(config.block_out_channels)
    return diffusers.AutoencoderKL(
        in_channels=config.channels,
        out_channels=config.channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    ).eval()


def load(module, state):
    torch = pytest.importorskip("torch")
    module.load_state_dict({name: torch.from_numpy(tensor.copy()) for name, tensor in state.items()}, strict=True)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=SMALL)
def twins(request):
    config, size = SMALL[request.param]
    state = random_state(config)
    image = np.clip(0.5 * normal(2, *size, 3, seed=1), -1, 1)
    latent = normal(2, size[0] // config.downsampling, size[1] // config.downsampling, 4, seed=2)
    theirs, params = load(diffusers_vae(config), state), from_torch_state_dict(state, config)
    return SimpleNamespace(config=config, params=params, theirs=theirs, image=image, latent=latent)


@pytest.mark.parity
def test_moments_are_diffusers(twins):
    theirs = twins.theirs.encode(to_nchw(twins.image)).latent_dist
    mean, log_variance = encode(twins.config, twins.params, twins.image)
    assert_close(mean, to_nhwc(theirs.mean))
    assert_close(log_variance, to_nhwc(theirs.logvar))


@pytest.mark.parity
def test_decoded_images_and_their_gradient_are_diffusers(twins):
    z = to_nchw(twins.latent).requires_grad_()
    theirs = twins.theirs.decode(z).sample
    ours, pull_back = jax.vjp(functools.partial(decode, twins.config, twins.params), twins.latent)
    assert_close(ours, to_nhwc(theirs))
    weights = normal(*ours.shape, seed=3)
    theirs.backward(to_nchw(weights))
    assert_close(pull_back(weights)[0], to_nhwc(z.grad), 1e-4)


@pytest.mark.parity
def test_every_layer_is_diffusers(twins):
    theirs = {}
    for name, module in twins.theirs.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: theirs.update({name: output}))
    twins.theirs.decode(twins.theirs.encode(to_nchw(twins.image)).latent_dist.mean)

    _, variables = jax.jit(
        lambda x: Vae(twins.config).apply({"params": twins.params}, x, capture_intermediates=True, mutable=True)
    )(twins.image)
    ours = traverse_util.flatten_dict(variables["intermediates"])
    modules = {entry.path[:-1]: name.rpartition(".")[0] for name, entry in vae_table(twins.config).items()}
    layers = {path[:-1]: value[0] for path, value in ours.items() if path[-1] == "__call__"}
    assert modules.keys() <= layers.keys()
    for path, name in modules.items():
        expected = theirs[name].numpy()
        if not name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            expected = np.moveaxis(expected, 1, -1)
        assert_close(np.asarray(layers[path]).reshape(expected.shape), expected, what=name)


def full_width_twins():
    blocks = pytest.importorskip("diffusers.models.unets.unet_2d_blocks")
    down = {"resnet_eps": 1e-6, "downsample_padding": 0}
    return {
        "decoder.mid_block.": (MidBlock(32), 512, blocks.UNetMidBlock2D(512, None, attention_head_dim=512)),
        "encoder.down_blocks.2.": (
            DownBlock(512, 2, 32, True), 256, blocks.DownEncoderBlock2D(256, 512, num_layers=2, **down)
        ),
        "decoder.up_blocks.2.": (UpBlock(256, 3, 32, True), 512, blocks.UpDecoderBlock2D(512, 256, num_layers=3)),
    }  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("prefix", ["decoder.mid_block.", "encoder.down_blocks.2.", "decoder.up_blocks.2."])
def test_blocks_of_full_width_are_diffusers(prefix):
    block, width, theirs = full_width_twins()[prefix]
    state, table = random_state(VaeConfig(), prefix), vae_table(VaeConfig())
    params = {table[name].path[2:]: tensor.transpose(table[name].axes) for name, tensor in state.items()}
    theirs = load(theirs, {name.removeprefix(prefix): tensor for name, tensor in state.items()})
    x = normal(1, 8, 8, width)
    ours = jax.jit(block.apply)({"params": traverse_util.unflatten_dict(params)}, x)
    assert_close(ours, to_nhwc(theirs(to_nchw(x))))


@pytest.mark.parity
def test_the_table_of_the_full_size_is_diffusers():
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        theirs = diffusers_vae(VaeConfig())
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert {name: entry.shape for name, entry in vae_table(VaeConfig()).items()} == expected
    assert config_from_diffusers(dict(theirs.config)) == VaeConfig()


@pytest.mark.parity
@pytest.mark.slow
def test_the_full_size_is_diffusers():
    config = VaeConfig()
    state = random_state(config)
    assert config_from_state_dict(state) == config
    theirs, params = load(diffusers_vae(config), state), from_torch_state_dict(state, config)
    image = np.clip(0.5 * normal(1, 64, 64, 3), -1, 1)
    expected = theirs.encode(to_nchw(image)).latent_dist
    mean, log_variance = encode(config, params, image)
    assert_close(mean, to_nhwc(expected.mean))
    assert_close(log_variance, to_nhwc(expected.logvar))
    assert_close(decode(config, params, to_nhwc(expected.mean)), to_nhwc(theirs.decode(expected.mean).sample))
    exported = to_torch_state_dict(params, config)
    assert all(exported[name].tobytes() == state[name].tobytes() for name in state)


def test_parameters_of_the_full_size():
    """The count of the published network, which has 83.65 million parameters."""
    assert sum(leaf.size for leaf in jax.tree.leaves(param_shapes(VaeConfig()))) == 83_653_863


def test_every_product_is_in_float32_at_the_highest_precision():
    """Half-precision images are taken to float32 before the first product."""
    _, params = tiny()
    apply = functools.partial(Vae(TINY).apply, {"params": params})
    equations = jax.make_jaxpr(apply)(jnp.zeros((1, 4, 4, 3), "bfloat16")).eqns
    products = [eqn for eqn in equations if eqn.primitive.name in ("conv_general_dilated", "dot_general")]
    kernels = sum(path[-1] == "kernel" for path in traverse_util.flatten_dict(params))
    assert len(products) == kernels + 2 * 2  # two more in either attention
    assert all(set(eqn.params["precision"]) == {jax.lax.Precision.HIGHEST} for eqn in products)
    assert all(variable.aval.dtype == jnp.float32 for eqn in products for variable in eqn.invars)


def test_round_trip_of_the_table_keeps_every_bit():
    state, params = tiny()
    exported = to_torch_state_dict(params, TINY)
    assert exported.keys() == state.keys()
    for name, tensor in state.items():
        assert exported[name].dtype == np.float32 and exported[name].flags.c_contiguous
        assert exported[name].shape == tensor.shape and exported[name].tobytes() == tensor.tobytes()
    jax.tree.map(np.testing.assert_array_equal, from_torch_state_dict(exported, TINY), params)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, param_shapes(TINY))


def with_old_names(state):
    old = {new: old for old, new in OLD_ATTENTION_NAMES.items()}
    renamed = {}
    for name, tensor in state.items():
        for new in old:
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old[new]}.")
        renamed[name] = tensor
    return renamed


def test_old_attention_names_are_accepted():
    state, params = tiny()
    old = with_old_names(state)
    assert len(old.keys() - state.keys()) == 16
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in old
    jax.tree.map(np.testing.assert_array_equal, from_torch_state_dict(old, TINY), params)
    both = state | {"encoder.mid_block.attentions.0.query.bias": state["quant_conv.bias"]}
    with pytest.raises(UserError, match=r"twice.*encoder\.mid_block\.attentions\.0\.to_q\.bias"):
        from_torch_state_dict(both, TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("encoder.conv_out.bias"), r"lack encoder\.conv_out\.bias"),
        (lambda state: state.update(x_embedder=np.zeros(3, np.float32)), "unexpected x_embedder"),
        (
            lambda state: state.update({"quant_conv.weight": np.zeros((8, 4, 1, 1), np.float32)}),
            r"quant_conv\.weight \[8, 4, 1, 1\], expected \[8, 8, 1, 1\]",
        ),
        (lambda state: state.update({"quant_conv.bias": np.zeros(8, np.float16)}), r"quant_conv\.bias \(float16\)"),
    ],
)
def test_wrong_tensors_are_named(change, message):
    state = dict(tiny()[0])
    change(state)
    with pytest.raises(UserError, match=message):
        from_torch_state_dict(state, TINY)


def test_wrong_parameters_are_named():
    _, params = tiny()
    lacking = {name: tree for name, tree in params.items() if name != "quant_conv"}
    with pytest.raises(UserError, match="lack quant_conv/bias, quant_conv/kernel"):
        to_torch_state_dict(lacking, TINY)
    with pytest.raises(UserError, match="unexpected head/bias"):
        to_torch_state_dict(params | {"head": {"bias": np.zeros(2)}}, TINY)
    with pytest.raises(UserError, match=r"another shape at quant_conv/bias \[3\]"):
        changed = params | {"quant_conv": params["quant_conv"] | {"bias": np.zeros(3, np.float32)}}
        to_torch_state_dict(changed, TINY)


@pytest.mark.parametrize("config", [TINY, *(config for config, _ in SMALL.values())])
def test_config_is_read_from_shapes(config):
    for state in (random_state(config), with_old_names(random_state(config))):
        assert config_from_state_dict(state, norm_groups=config.norm_groups) == config


def test_another_networks_tensors_are_refused():
    with pytest.raises(UserError, match="AutoencoderKL"):
        config_from_state_dict({"blocks.0.attn.qkv.weight": np.zeros((3, 1), np.float32)})


def test_config_is_read_from_diffusers():
    assert config_from_diffusers(SD_CONFIG_JSON) == VaeConfig()
    assert config_from_diffusers(SD_CONFIG_JSON | {"scaling_factor": 0.13025}).scaling_factor == 0.13025


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "VQModel"}, "VQModel"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"shift_factor": 0.1}, "shift_factor=0.1"),
        ({"out_channels": 6}, "out_channels=6"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"norm_num_groups": 3}, "norm_groups=3"),
    ],
)
def test_config_that_asks_for_more_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        config_from_diffusers(SD_CONFIG_JSON | change)


def test_config_that_lacks_a_key_is_refused():
    with pytest.raises(UserError, match="lacks latent_channels"):
        config_from_diffusers({key: value for key, value in SD_CONFIG_JSON.items() if key != "latent_channels"})


@pytest.mark.parametrize("change", [{"block_out_channels": ()}, {"layers_per_block": 0}, {"scaling_factor": 0.0}])
def test_sizes_must_be_positive(change):
    with pytest.raises(UserError, match="positive"):
        VaeConfig(**change)


def test_log_variance_is_clipped():
    _, params = tiny()
    bias = np.array([0, 0, 0, 0, 1e4, -1e4, 1e4, -1e4], np.float32)
    extreme = params | {"quant_conv": params["quant_conv"] | {"bias": bias}}
    _, log_variance = encode(TINY, extreme, normal(1, 8, 8, 3))
    np.testing.assert_array_equal(log_variance, np.broadcast_to(np.float32([20, -30, 20, -30]), (1, 4, 4, 4)))


def test_latents_have_their_scaled_moments():
    mean, log_variance, noise = normal(3, 2, 2, 4), normal(3, 2, 2, 4, seed=1), normal(3, 2, 2, 4, seed=2)
    expected = 0.18215 * (mean + np.sqrt(np.exp(log_variance)) * noise)
    np.testing.assert_allclose(sample_latent(0.18215, mean, log_variance, noise), expected, rtol=1e-5, atol=1e-6)
    halves = sample_latent(0.18215, mean.astype(np.float16), log_variance.astype(np.float16), 0 * noise)
    assert halves.dtype == jnp.float32
    np.testing.assert_array_equal(halves, jnp.float32(0.18215) * mean.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("images_at_once", [1, 2, 5, 8])
def test_batched_decode_is_the_whole_decode_of_the_unscaled_latents(images_at_once):
    _, params = tiny()
    latents = normal(5, 2, 3, 4)
    images = batched(TINY, params, latents, images_at_once)
    assert images.shape == (5, 4, 6, 3)
    assert_close(images, decode(TINY, params, latents / np.float32(TINY.scaling_factor)))


def test_memory_of_a_batched_decode_does_not_grow_with_the_batch():
    _, params = tiny()

    def scratch(batch, images_at_once):
        compiled = batched.lower(TINY, params, np.zeros((batch, 16, 16, 4), np.float32), images_at_once).compile()
        image_bytes = batch * 32 * 32 * 3 * 4  # the result and the padded one may both be alive
        return compiled.memory_analysis().temp_size_in_bytes - image_bytes

    assert scratch(32, 2) <= 1.1 * scratch(8, 2) < 0.5 * scratch(8, 8)


def test_wrong_shapes_are_refused():
    _, params = tiny()
    with pytest.raises(UserError, match=r"\[1, 5, 4, 3\].*multiples of 2"):
        encode(TINY, params, np.zeros((1, 5, 4, 3), np.float32))
    with pytest.raises(UserError, match=r"\[1, 4, 4, 1\]"):
        encode(TINY, params, np.zeros((1, 4, 4, 1), np.float32))
    with pytest.raises(UserError, match=r"\[1, 4, 4, 3\].*\[B, h, w, 4\]"):
        batched(TINY, params, np.zeros((1, 4, 4, 3), np.float32), 8)
    with pytest.raises(UserError, match="images_at_once"):
        batched(TINY, params, np.zeros((1, 4, 4, 4), np.float32), 0)
