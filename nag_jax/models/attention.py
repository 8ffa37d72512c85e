"""Attention by several programs that compute the same: what each needs, and which of them suit a device.

XLA's is plain matrix products. cuDNN's and Pallas' are fused: they never hold the tokens x tokens scores. Which of
several suitable ones is the fastest is measured elsewhere (`jobs/attention_choice.py`).
"""

from __future__ import annotations

import math
import re
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from nag_jax.errors import UserError
from nag_jax.parallel import on_own_rows_and_heads

AttentionName = Literal["xla", "cudnn", "pallas"]
AttentionChoice = Literal["auto", "xla", "cudnn", "pallas"]
AUTO: Final = "auto"

# In the order of preference without a measurement. "pallas" was never run on a TPU, so it is taken by name only.
AUTOMATIC: tuple[AttentionName, ...] = ("cudnn", "xla")

CUDNN_CAPABILITY = (8, 0)  # the least that cuDNN's fused attention runs on, with heads of up to 128
CUDNN_CAPABILITY_OF_WIDE_HEADS = (9, 0)  # up to 256
PALLAS_TOKENS = 128  # the kernel's blocks are made of so many
PALLAS_LARGEST_BLOCK = 512
PALLAS_RESIDUALS = "pallas_attention"  # name of what its backward pass needs, for rematerialisation policies


class AttentionShape(NamedTuple):
    """What a network's attention is asked for.

    Attributes:
        tokens: of a row.
        heads: of the network.
        head_dim: numbers of a head.
        dtype: of queries, keys and values, by name.
    """

    tokens: int
    heads: int
    head_dim: int
    dtype: str


def attention(name: AttentionName, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q kᵀ / sqrt(head_dim)) v of every row and head, in the softmax's float32.

    Args:
        name: the program that computes it; see `obstacle` for what it needs.
        q: [B, tokens, heads, head_dim].
        k: the same.
        v: the same.

    Returns:
        [B, tokens, heads, head_dim] in the dtype of q.
    """
    if name == "pallas":
        return on_own_rows_and_heads(_pallas_attention)(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation=name)


def obstacle(name: AttentionName, shape: AttentionShape, device: Any = None) -> str:
    """What keeps `name` from computing an attention, as the end of a sentence that begins with it; "" if nothing does.

    Args:
        name: the program.
        shape: what it is asked for.
        device: where; None looks at the shape alone.
    """
    if name == "xla":
        return ""
    if shape.dtype != "bfloat16":
        return "needs model.dtype = 'bfloat16'"
    if name == "pallas":
        if shape.tokens % PALLAS_TOKENS:
            return f"needs a multiple of {PALLAS_TOKENS} tokens, not {shape.tokens}"
        return "" if device is None or device.platform == "tpu" else f"needs a TPU, not {device.device_kind}"
    widest, capability = 256, _compute_capability(device)
    if device is not None and capability < CUDNN_CAPABILITY:
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, not {device.device_kind}"
    if device is not None and capability < CUDNN_CAPABILITY_OF_WIDE_HEADS:
        widest = 128
    if shape.head_dim % 8 or shape.head_dim > widest:
        return f"needs heads of a multiple of 8 and at most {widest} numbers, not {shape.head_dim}"
    return ""


def check_attention(name: AttentionName, shape: AttentionShape, device: Any = None) -> None:
    """Raises UserError if there is an `obstacle`."""
    if found := obstacle(name, shape, device):
        raise UserError(f"model.attention = {name!r} {found}. Set model.attention = 'auto', or 'xla'.")


def candidates(shape: AttentionShape, device: Any) -> tuple[AttentionName, ...]:
    """What "auto" may take on a device, the presumably fastest first; never empty."""
    return tuple(name for name in AUTOMATIC if not obstacle(name, shape, device))


def _compute_capability(device: Any) -> tuple[int, int]:
    """(major, minor) of an NVIDIA GPU; (0, 0) of any other device, such as an AMD GPU, which has a name there."""
    number = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(number[1]), int(number[2])) if number and device.platform == "gpu" else (0, 0)


def _pallas_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """JAX's splash attention without a mask, of one device's rows and heads."""
    _, tokens, heads, head_dim = q.shape
    kernel = jax.vmap(_pallas_kernel(tokens, heads))
    # The kernel does not scale. One rounding, of the product.
    scaled = (q.astype(jnp.float32) / math.sqrt(head_dim)).astype(q.dtype)
    return jnp.swapaxes(kernel(*(jnp.swapaxes(x, 1, 2) for x in (scaled, k, v))), 1, 2)


def _pallas_kernel(tokens: int, heads: int) -> Any:
    block = max(size for size in range(PALLAS_TOKENS, PALLAS_LARGEST_BLOCK + 1, PALLAS_TOKENS) if tokens % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    everything = splash_attention_mask.FullMask((tokens, tokens))
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([everything] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=PALLAS_RESIDUALS,
    )
