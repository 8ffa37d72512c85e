"""Gives the tests an official state dict of random numbers."""

import numpy as np
import pytest

from nag_jax.models.layers import sincos_positions

SIZE, CHANNELS, PATCH, HIDDEN, DEPTH, HEADS, CLASSES = 8, 4, 2, 32, 2, 4, 5


@pytest.fixture
def official() -> dict[str, np.ndarray]:
    """A tiny official state dict with learned variance: names and shapes as published, numbers random everywhere."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (HIDDEN, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (HIDDEN,),
        "t_embedder.mlp.0.weight": (HIDDEN, 256),
        "t_embedder.mlp.0.bias": (HIDDEN,),
        "t_embedder.mlp.2.weight": (HIDDEN, HIDDEN),
        "t_embedder.mlp.2.bias": (HIDDEN,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, HIDDEN),
    }
    for i in range(DEPTH):
        for name, (outputs, inputs) in {
            "attn.qkv": (3 * HIDDEN, HIDDEN),
            "attn.proj": (HIDDEN, HIDDEN),
            "mlp.fc1": (4 * HIDDEN, HIDDEN),
            "mlp.fc2": (HIDDEN, 4 * HIDDEN),
            "adaLN_modulation.1": (6 * HIDDEN, HIDDEN),
        }.items():
            shapes |= {f"blocks.{i}.{name}.weight": (outputs, inputs), f"blocks.{i}.{name}.bias": (outputs,)}
    shapes |= {
        "final_layer.linear.weight": (PATCH**2 * 2 * CHANNELS, HIDDEN),
        "final_layer.linear.bias": (PATCH**2 * 2 * CHANNELS,),
        "final_layer.adaLN_modulation.1.weight": (2 * HIDDEN, HIDDEN),
        "final_layer.adaLN_modulation.1.bias": (2 * HIDDEN,),
    }
    rng = np.random.default_rng(0)
    grid = SIZE // PATCH
    tensors = {"pos_embed": sincos_positions(grid, grid, HIDDEN)[None]}
    return tensors | {name: 0.15 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
