"""The network against its published counts, against torch peers, and against itself in its other layouts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu import parameter_overview

from nag_jax.errors import UserError
from nag_jax.models import dit
from nag_jax.models.dit import ModelConfig, build_model, init_params
from nag_jax.models.layers import Block, gelu, patchify, sincos_positions, time_features, unpatchify

SHAPE, CLASSES = (8, 8, 4), 5
TINY = ModelConfig(depth=2, hidden_size=32, num_heads=4, patch_size=2, learn_sigma=True, precision="highest")

# Millions of parameters without the VAE: arXiv 2212.09748, table 4.
PUBLISHED = {
    ("S", 8): 33, ("S", 4): 33, ("S", 2): 33,
    ("B", 8): 131, ("B", 4): 130, ("B", 2): 130,
    ("L", 8): 459, ("L", 4): 458, ("L", 2): 458,
    ("XL", 8): 676, ("XL", 4): 675, ("XL", 2): 675,
}  # fmt: skip


def tiny_model(shape=SHAPE, **changes):
    return build_model(dataclasses.replace(TINY, **changes), input_shape=shape, num_classes=CLASSES)


def numpy_params(model, seed=0):
    """Parameters that are random everywhere, the zero-initialised parts too, so that every path matters."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.15 * rng.standard_normal(leaf.shape, np.float32)), shapes)


@functools.cache
def random_params(scan_blocks=True):
    params = numpy_params(tiny_model())
    return params if scan_blocks else dit.unstack_blocks(params)


def inputs(batch=4, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((batch, *shape), np.float32),
        "time": np.array([0.0, 0.37, 251.5, 999.0], np.float32)[:batch],
        "labels": np.array([0, 4, 2, 3], np.int32)[:batch],
        "drop_label": np.array([False, True, False, True])[:batch],
        "drop_noise": np.zeros(batch, bool),
    }


@functools.cache
def jitted(model):
    return jax.jit(lambda params, batch: model.apply({"params": params}, **batch))


@functools.partial(jax.jit, static_argnums=1)
def value_and_grad(params, model):
    def loss(params):
        return jnp.square(model.apply({"params": params}, **inputs())).mean()

    return jax.value_and_grad(loss)(params)


def assert_close(actual, expected, tolerance):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def assert_trees_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


# Size and initialisation


@pytest.mark.parametrize(("size", "patch"), PUBLISHED)
def test_parameter_counts(size, patch):
    config = ModelConfig(size=size, patch_size=patch, learn_sigma=True)
    model = build_model(config, input_shape=(32, 32, 4), num_classes=1000)
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    null = shapes.pop("null_noise_embedding")
    count = parameter_overview.count_parameters(shapes)

    depth, hidden = {"S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}[size]
    patch_embedding = 4 * patch**2 * hidden + hidden
    time_embedding = 256 * hidden + hidden + hidden**2 + hidden
    label_embedding = 1001 * hidden
    attention = 4 * hidden**2 + 4 * hidden
    mlp = 8 * hidden**2 + 5 * hidden
    modulation = 6 * hidden**2 + 6 * hidden
    final_layer = 2 * hidden**2 + 2 * hidden + (hidden + 1) * 8 * patch**2
    blocks = depth * (attention + mlp + modulation)
    assert count == patch_embedding + time_embedding + label_embedding + blocks + final_layer
    assert round(count / 1e6) == PUBLISHED[size, patch]
    assert null.shape == (hidden,)


def test_initialisation():
    model = tiny_model(hidden_size=64)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(3))
    zero = ("adaLN_modulation", "final_layer", "bias")

    def check(path, leaf):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == jnp.float32
        if any(part in name for part in zero):
            assert not leaf.any(), name
        elif any(part in name for part in ("t_embedder", "y_embedder", "null_noise")):
            assert np.std(leaf) == pytest.approx(0.02, rel=0.3), name
        else:  # Xavier uniform: bounded by sqrt(6 / (fan_in + fan_out)), and close to the bound somewhere
            bound = np.sqrt(6 / sum(leaf.shape[-2:]))
            assert 0.95 * bound < np.abs(leaf).max() <= bound, name

    jax.tree_util.tree_map_with_path(check, params)
    kernel = params["blocks"]["attn"]["qkv"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])
    # Gates and the final layer start at zero, so the fresh network answers zero.
    assert not jitted(model)(params, inputs()).any()


# Embeddings and shapes


def test_sincos_positions_closed_form():
    height, width, hidden = 3, 5, 16
    positions = sincos_positions(height, width, hidden).reshape(height, width, hidden)
    assert positions.dtype == np.float32
    for row in range(height):
        for column in range(width):
            for i in range(hidden // 4):
                frequency = 10000.0 ** (-i / (hidden / 4))
                expected = [f(p * frequency) for p in (column, row) for f in (np.sin, np.cos)]
                np.testing.assert_allclose(positions[row, column, i :: hidden // 4], expected, atol=1e-7)


def test_time_features_closed_form():
    time = np.array([0.0, 0.25, 1.0], np.float32)
    angle = time[:, None].astype(np.float64) * np.exp(-np.log(10000.0) * np.arange(128) / 128)
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(time_features(jnp.asarray(time)), expected, atol=3e-7)


def test_patchify_order_and_inverse():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    tokens = patchify(jnp.asarray(x), 2)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[1, 4], x[1, 2:4, 2:4].ravel())  # token 4: second row, second column
    np.testing.assert_array_equal(unpatchify(tokens, 2, 4, 6), x)


def test_gelu_and_its_slope():
    """The closed form in float64; in bfloat16 one rounding is all that is lost."""
    x = np.concatenate([np.linspace(-12, 12, 2001), [-1e5, -0.0, 1e-20, 1e5]]).astype(np.float32)
    wide, scale = x.astype(np.float64), np.sqrt(2 / np.pi)
    tanh = np.tanh(scale * (wide + 0.044715 * wide**3))
    slope = (1 + tanh + wide * (1 - tanh**2) * scale * (1 + 3 * 0.044715 * wide**2)) / 2
    np.testing.assert_allclose(gelu(x), wide * (1 + tanh) / 2, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), slope, rtol=1e-6, atol=1e-6)
    half = jnp.asarray(x, jnp.bfloat16)
    assert gelu(half).dtype == jnp.bfloat16
    np.testing.assert_array_equal(gelu(half), gelu(half.astype(jnp.float32)).astype(jnp.bfloat16))


def test_non_square_input_and_channels():
    model = tiny_model(shape=(4, 8, 1), learn_sigma=False, depth=1)
    out = jitted(model)(numpy_params(model), inputs(shape=(4, 8, 1)))
    assert out.shape == (4, 4, 8, 1) and out.dtype == jnp.float32


def test_wrong_input_shape_is_explained():
    batch = inputs(shape=(8, 4, 4))
    with pytest.raises(ValueError, match=r"\(4, 8, 4, 4\).*8, 8, 4.*input_shape"):
        tiny_model().apply({"params": random_params()}, **batch)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": "XXL"}, "model.size.*'XXL'.*'XL'"),
        ({"remat": "dot"}, "model.remat.*'dot'.*'dots'"),
        ({"dtype": "float16"}, "model.dtype.*'bfloat16'"),
        ({"precision": "high"}, "model.precision.*'highest'"),
        ({"attention": "flash"}, "model.attention.*'cudnn'"),
        ({"attention": "cudnn"}, "bfloat16"),
        ({"attention": "pallas", "dtype": "bfloat16"}, "multiple of 128 tokens, not 16"),
        ({"patch_size": 3}, "patch_size = 3.*8 x 8"),
        ({"hidden_size": 36, "num_heads": 8}, "multiple"),
        ({"depth": 0}, "at least 1"),
    ],
)
def test_impossible_configurations_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        tiny_model(**changes)


def test_models_are_equal_and_hashable_by_value():
    assert tiny_model() == tiny_model() and hash(tiny_model()) == hash(tiny_model())
    assert tiny_model(shape=list(SHAPE)) == tiny_model() != tiny_model(depth=3)


# Layouts and rematerialisation


def test_scan_equals_unrolled():
    batch = inputs()
    scanned, unrolled = tiny_model(), tiny_model(scan_blocks=False)
    fresh = jax.eval_shape(functools.partial(init_params, unrolled), jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, random_params(False))
    out = jitted(scanned)(random_params(), batch)
    assert_close(jitted(unrolled)(random_params(False), batch), out, 1e-5)


def test_converters_are_inverse():
    assert_trees_equal(dit.stack_blocks(dit.unstack_blocks(random_params())), random_params())
    assert_trees_equal(dit.unstack_blocks(dit.stack_blocks(random_params(False))), random_params(False))
    many = {f"blocks_{i}": {"w": jnp.full((2,), i)} for i in (10, *range(10))}  # numeric, not text order
    np.testing.assert_array_equal(dit.stack_blocks(many)["blocks"]["w"][:, 0], np.arange(11))
    with pytest.raises(ValueError, match="stacked already"):
        dit.stack_blocks(random_params())
    with pytest.raises(ValueError, match="unstacked already"):
        dit.unstack_blocks(random_params(False))


@pytest.mark.parametrize(
    ("remat", "scan_blocks"),
    [("full", True), ("dots_no_batch", True), ("dots_flash", True), ("dots", False)],
)
def test_remat_changes_nothing(remat, scan_blocks):
    params, model = random_params(scan_blocks), tiny_model(scan_blocks=scan_blocks, remat=remat)
    plain, plain_grad = value_and_grad(random_params(), tiny_model())
    value, grad = value_and_grad(params, model)
    assert value == pytest.approx(float(plain), rel=1e-6)
    grad = grad if scan_blocks else dit.stack_blocks(grad)
    jax.tree.map(functools.partial(assert_close, tolerance=2e-5), grad, plain_grad)
    assert "policy" in str(jax.make_jaxpr(value_and_grad, static_argnums=1)(params, model))


# Conditions


def test_dropped_noise_ignores_time_and_uses_the_null_embedding():
    apply = jitted(tiny_model())
    batch = inputs()
    dropped = {**batch, "drop_noise": np.array([True, False, True, False])}
    out = apply(random_params(), dropped)
    other_time = np.array([7.0, 0.37, np.nan, 999.0], np.float32)
    np.testing.assert_array_equal(apply(random_params(), {**dropped, "time": other_time}), out)

    # The rows kept are those of the batch without drops; the rows dropped are not.
    plain = apply(random_params(), batch)
    np.testing.assert_array_equal(out[1::2], plain[1::2])
    assert np.abs(out[::2] - plain[::2]).max() > 1e-3

    # A time MLP whose output is the null embedding gives the dropped answer on every row.
    params = {**random_params()}
    mlp_2 = params["t_embedder"]["mlp_2"]
    constant = {"kernel": jnp.zeros_like(mlp_2["kernel"]), "bias": params["null_noise_embedding"]}
    params["t_embedder"] = {**params["t_embedder"], "mlp_2": constant}
    np.testing.assert_allclose(apply(params, batch)[::2], out[::2], rtol=0, atol=1e-6)


def test_null_embedding_learns_from_dropped_rows_only():
    def loss(params, drop):
        batch = {**inputs(), "drop_noise": jnp.full(4, drop)}
        return jnp.square(jitted(tiny_model())(params, batch)).mean()

    gradient = jax.jit(jax.grad(loss))
    kept, dropped = gradient(random_params(), False), gradient(random_params(), True)
    assert not kept["null_noise_embedding"].any() and dropped["null_noise_embedding"].any()
    assert kept["t_embedder"]["mlp_2"]["bias"].any() and not dropped["t_embedder"]["mlp_2"]["bias"].any()


def test_time_embedding_offset():
    apply, batch, params = jitted(tiny_model()), inputs(), random_params()
    plain = apply(params, batch)
    zero = np.zeros((4, 32), np.float32)
    np.testing.assert_array_equal(apply(params, {**batch, "time_embedding_offset": zero}), plain)
    # A common offset is the same as moving the time MLP's last bias.
    offset = np.linspace(-1, 1, 32, dtype=np.float32)
    mlp_2 = params["t_embedder"]["mlp_2"]
    t_embedder = {**params["t_embedder"], "mlp_2": {**mlp_2, "bias": mlp_2["bias"] + offset}}
    moved = apply({**params, "t_embedder": t_embedder}, batch)
    with_offset = {**batch, "time_embedding_offset": np.tile(offset, (4, 1))}
    np.testing.assert_allclose(apply(params, with_offset), moved, rtol=0, atol=1e-5)
    dropped = {"drop_noise": np.ones(4, bool)}
    np.testing.assert_array_equal(
        apply(params, {**with_offset, **dropped}), apply(params, {**batch, **dropped})
    )


def test_dropped_label_is_the_null_class():
    apply, batch = jitted(tiny_model()), inputs()
    out = apply(random_params(), batch)
    explicit = np.where(batch["drop_label"], CLASSES, batch["labels"]).astype(np.int32)
    no_drop = {**batch, "labels": explicit, "drop_label": np.zeros(4, bool)}
    np.testing.assert_array_equal(apply(random_params(), no_drop), out)
    assert np.abs(apply(random_params(), {**no_drop, "labels": batch["labels"]})[1] - out[1]).max() > 1e-3


def test_rows_are_independent():
    apply, batch, other = jitted(tiny_model()), inputs(), inputs(seed=1)
    mixed = {**batch, "x": np.concatenate([batch["x"][:1], other["x"][1:]])}
    np.testing.assert_array_equal(apply(random_params(), mixed)[0], apply(random_params(), batch)[0])


def test_bfloat16_computes_close_to_float32():
    half, batch = tiny_model(dtype="bfloat16", precision="default"), inputs()
    shapes = jax.eval_shape(functools.partial(init_params, half), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    expected = jitted(tiny_model())(random_params(), batch)
    out = jitted(half)(random_params(), batch)
    assert out.dtype == jnp.float32
    assert_close(out, expected, 0.05)
    assert np.abs(out - expected).max() > 0


def test_highest_precision_reaches_every_product():
    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.params["precision"]
            for value in equation.params.values():
                if hasattr(value, "jaxpr"):
                    yield from products(value.jaxpr)

    def precisions(model):
        jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, **inputs()))(random_params())
        return [str(precision).count("HIGHEST") for precision in products(jaxpr.jaxpr)]

    assert set(precisions(tiny_model())) == {2}
    # Otherwise only the two layers of the time MLP insist.
    assert precisions(tiny_model(precision="default")).count(2) == 2


# Parity with torch


def from_torch(state):
    """Official names and layouts to ours, scanned; values are only moved."""

    def leaf(name):
        return np.asarray(state[name].detach() if hasattr(state[name], "detach") else state[name])

    def dense(name):
        return {"kernel": leaf(f"{name}.weight").T, "bias": leaf(f"{name}.bias")}

    def block(name):
        return {
            "adaLN_modulation": dense(f"{name}.adaLN_modulation.1"),
            "attn": {part: dense(f"{name}.attn.{part}") for part in ("qkv", "proj")},
            "mlp": {part: dense(f"{name}.mlp.{part}") for part in ("fc1", "fc2")},
        }

    convolution = leaf("x_embedder.proj.weight").transpose(2, 3, 1, 0)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return dit.stack_blocks(
        {
            "x_embedder": {
                "kernel": convolution.reshape(-1, convolution.shape[-1]),
                "bias": leaf("x_embedder.proj.bias"),
            },
            "t_embedder": {f"mlp_{i}": dense(f"t_embedder.mlp.{i}") for i in (0, 2)},
            "y_embedder": {"embedding": leaf("y_embedder.embedding_table.weight")},
            "final_layer": {
                "linear": dense("final_layer.linear"),
                "adaLN_modulation": dense("final_layer.adaLN_modulation.1"),
            },
            **{f"blocks_{i}": block(f"blocks.{i}") for i in range(depth)},
        }
    )


@pytest.fixture(scope="module")
def peer(torch_dit):
    """A torch network, gates and final layer random too, and its parameters in our layout."""
    import torch

    torch.manual_seed(0)
    network = torch_dit.TorchDiT(
        size=8, channels=4, patch=2, hidden=32, depth=2, heads=4, num_classes=CLASSES
    )
    null = {"null_noise_embedding": jnp.zeros(32)}
    return network, {**from_torch(network.state_dict()), **null}


def torch_inputs(batch):
    import torch

    labels = np.where(batch["drop_label"], CLASSES, batch["labels"])
    return (
        torch.from_numpy(batch["x"].transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(batch["time"]),
        torch.from_numpy(labels).long(),
    )


@pytest.mark.parity
def test_layers_match_torch(peer):
    network, params = peer
    model, batch = tiny_model(), inputs()
    x, time, labels = torch_inputs(batch)
    c, tokens = network.conditioning(time, labels), network.tokens(x)
    block_out = network.blocks[0](tokens, c)
    final = network.final_layer(block_out, c)
    c_in, tokens_in, block_in = (jnp.asarray(v.detach().numpy()) for v in (c, tokens, block_out))

    def apply(params, batch, c, tokens, final_in):
        variables = {"params": params}
        no_blocks = {"params": {**params, "blocks": jax.tree.map(jnp.zeros_like, params["blocks"])}}
        conditions = {name: value for name, value in batch.items() if name != "x"}
        first = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
        return (
            model.apply(variables, batch["time"], method=lambda m, t: m.t_embedder(t)),
            model.apply(variables, **conditions, method=model.conditioning),
            model.apply(no_blocks, batch["x"], c, method=model.features),  # zero gates: the identity
            Block(4, "float32", "highest", "xla").apply({"params": first}, tokens, c),
            model.apply(variables, final_in, c, method=lambda m, y, c: m.final_layer(y, c)),
        )

    actual = jax.jit(apply)(params, batch, c_in, tokens_in, block_in)
    expected = (network.t_embedder(time), c, tokens, block_out, final)
    for name, ours, theirs in zip(("time", "c", "tokens", "block", "final"), actual, expected, strict=True):
        error = np.abs(ours - theirs.detach().numpy()).max() / np.abs(theirs.detach().numpy()).max()
        assert error <= 1e-5, name


@pytest.mark.parity
def test_output_and_gradients_match_torch(peer):
    import torch

    network, params = peer
    model, batch = tiny_model(), inputs()
    weight = np.random.default_rng(2).standard_normal((4, 8, 8, 8), np.float32)

    def loss(params):
        out = model.apply({"params": params}, **batch)
        return (out * weight).sum(), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected = network(*torch_inputs(batch))
    assert_close(out, expected.detach().numpy().transpose(0, 2, 3, 1), 1e-5)

    network.zero_grad()
    (expected * torch.from_numpy(weight.transpose(0, 3, 1, 2).copy())).sum().backward()
    expected_gradient = from_torch(
        {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    )
    assert not gradient.pop("null_noise_embedding").any()
    jax.tree.map(functools.partial(assert_close, tolerance=1e-4), gradient, expected_gradient)


@pytest.mark.parity
def test_output_matches_diffusers(torch_dit):
    import torch

    diffusers = pytest.importorskip("diffusers")
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=CLASSES, norm_eps=1e-6,
    ).eval()  # fmt: skip
    for block in network.transformer_blocks:
        # Their port spaces the time frequencies by 1/127; the official network, and ours, by 1/128.
        block.norm1.emb.time_proj.downscale_freq_shift = 0

    params = dit.unstack_blocks(random_params())
    state = {name: value for name, value in network.state_dict().items() if name == "pos_embed.pos_embed"}

    def put(name, layer, columns=slice(None)):
        state[f"{name}.weight"] = torch.from_numpy(np.array(layer["kernel"][:, columns].T))
        state[f"{name}.bias"] = torch.from_numpy(np.array(layer["bias"][columns]))

    kernel = np.array(params["x_embedder"]["kernel"]).reshape(2, 2, 4, 32).transpose(3, 2, 0, 1)
    state["pos_embed.proj.weight"] = torch.from_numpy(kernel.copy())
    state["pos_embed.proj.bias"] = torch.from_numpy(np.array(params["x_embedder"]["bias"]))
    put("proj_out_1", params["final_layer"]["adaLN_modulation"])
    put("proj_out_2", params["final_layer"]["linear"])
    for i in range(2):
        block, name = params[f"blocks_{i}"], f"transformer_blocks.{i}"
        table = torch.from_numpy(np.array(params["y_embedder"]["embedding"]))
        state[f"{name}.norm1.emb.class_embedder.embedding_table.weight"] = table
        put(f"{name}.norm1.emb.timestep_embedder.linear_1", params["t_embedder"]["mlp_0"])
        put(f"{name}.norm1.emb.timestep_embedder.linear_2", params["t_embedder"]["mlp_2"])
        put(f"{name}.norm1.linear", block["adaLN_modulation"])
        for part, letter in enumerate("qkv"):
            put(f"{name}.attn1.to_{letter}", block["attn"]["qkv"], slice(32 * part, 32 * part + 32))
        put(f"{name}.attn1.to_out.0", block["attn"]["proj"])
        put(f"{name}.ff.net.0.proj", block["mlp"]["fc1"])
        put(f"{name}.ff.net.2", block["mlp"]["fc2"])
    network.load_state_dict(state)

    batch = inputs()
    x, time, labels = torch_inputs(batch)
    with torch.no_grad():
        expected = network(x, timestep=time, class_labels=labels).sample
    out = jitted(tiny_model())(random_params(), batch)
    assert_close(out, expected.numpy().transpose(0, 2, 3, 1), 1e-5)


def test_three_billion_parameters():
    model = build_model(dit.ModelConfig(size="3B", learn_sigma=True), input_shape=(32, 32, 4), num_classes=1000)
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(3.0e9, rel=0.02)
