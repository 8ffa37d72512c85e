"""The converted network against its torch twin, layer by layer, in float32 at the highest precision.

Both are called as users call them: ours through its Denoiser, in our time and sign, the twin in its own.
"""

import dataclasses

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest

from nag_jax.convert import tables
from nag_jax.models.dit import unstack_blocks
from nag_jax.models.layers import Block

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-5  # of a tensor's largest entry


def official_name(path: str) -> str:
    """A submodule of ours by its name in the official network."""
    name = path.replace("blocks_", "blocks.").replace("mlp_", "mlp.").replace("/", ".")
    return name + ".1" if name.endswith("adaLN_modulation") else name


@pytest.mark.parametrize("kind", tables.KINDS)
def test_every_layer_gets_and_gives_what_its_twin_does(random_network, twin_of, error, kind):
    twin = twin_of(random_network(), kind)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 8, 8, 4), np.float32)
    t = np.array([0.001, 0.25, 0.5, 1.0], np.float32)
    labels, drop_label = np.array([0, 4, 2, 3], np.int32), np.array([False, True, False, False])

    theirs = {}
    for name, module in twin.network.named_modules():
        module.register_forward_hook(lambda _, args, output, name=name: theirs.update({name: (args, output)}))
    # DiT counts its steps from 0, SiT's time runs from noise to data.
    network_time = 1000 * t - 1 if kind == "dit" else 1 - t
    with torch.no_grad():
        output = twin.network(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(network_time),
            torch.from_numpy(np.where(drop_label, twin.description.num_classes, labels)).long(),
        )

    ours = {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            ours["/".join(context.module.path)] = (args, output)
        return output

    # Unrolled, so that every block is a module of its own.
    unrolled = dataclasses.replace(twin.description.model, scan_blocks=False)
    denoiser = dataclasses.replace(twin.description, model=unrolled).denoiser()
    with nn.intercept_methods(record):
        prediction = denoiser(unstack_blocks(twin.denoiser.params), x, t, labels, drop_label=drop_label)

    # The modules that own a tensor; two of them are the inner parts of an embedder.
    owners = {name.rpartition(".")[0] for name in twin.network.state_dict() if "." in name}
    assert owners - {"x_embedder.proj", "y_embedder.embedding_table"} <= {official_name(path) for path in ours}
    for path, (inputs, result) in ours.items():
        if path == "":
            continue
        their_inputs, their_result = theirs[official_name(path)]
        assert error(result, their_result) <= TOLERANCE, path
        if path == "x_embedder":  # It gets an image there, its patches here.
            continue
        # Sines and cosines of time times frequency: neither knows its angle closer than a rounding or two.
        rounding = 2 * np.spacing(network_time.max()) if path == "t_embedder/mlp_0" else 0.0
        for actual, expected in zip(inputs, their_inputs, strict=True):
            assert error(actual, expected) <= max(TOLERANCE, rounding), f"input of {path}"

    value, variance = np.split(output.numpy().transpose(0, 2, 3, 1), 2, axis=-1)
    assert error(prediction.value, value if kind == "dit" else -value) <= TOLERANCE
    assert error(prediction.variance, variance) <= TOLERANCE


def test_a_block_of_full_width(torch_dit, error):
    hidden, heads = 1152, 16  # the XL network's
    block = torch_dit.Block(hidden, heads)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    state = block.state_dict()
    leaves = {path: layout.to_ours(state[name].numpy()) for name, (path, layout) in tables.BLOCK.items()}
    params = flax.traverse_util.unflatten_dict(leaves, sep="/")

    tokens = torch.randn(1, 16, hidden, generator=generator)
    conditioning = torch.randn(1, hidden, generator=generator)
    with torch.no_grad():
        expected = block(tokens, conditioning)
    ours = jax.jit(Block(heads, "float32", "highest", "xla").apply)
    assert error(ours({"params": params}, tokens.numpy(), conditioning.numpy()), expected) <= TOLERANCE
