"""DiT and SiT: one transformer over patches, conditioned on the noise level and the class by adaLN-Zero.

The mathematics is that of Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748,
section 3 and appendix A), which SiT (arXiv 2401.08740) shares; parameters carry the names of the official
state dict, so that conversion changes layout only. One vector is added: the null noise embedding of Noise
Awareness Guidance (arXiv 2510.12497). The module draws nothing and knows neither process nor prediction type:
what its time input and its output mean is the denoiser's affair.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from nag_jax.errors import UserError
from nag_jax.models.attention import (
    AUTO,
    PALLAS_RESIDUALS,
    AttentionChoice,
    AttentionName,
    AttentionShape,
    candidates,
    check_attention,
)
from nag_jax.models.layers import (
    NORM_STATISTICS,
    PRECISIONS,
    Block,
    FinalLayer,
    TimeEmbedding,
    linear,
    normal_init,
    patchify,
    sincos_positions,
    unpatchify,
)
from nag_jax.parallel import keep_rows_apart

Params = dict[str, Any]

SIZES = {  # name: (depth, hidden_size, num_heads), arXiv 2212.09748, table 1
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "3B": (40, 2048, 16),  # ours: 3 billion parameters, for meshes to prove themselves on
}


def _is_flash_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    # By its name: cuDNN's attention in `jax.nn` offers no other handle, and its softmax statistics cannot be tagged.
    return primitive.name.startswith("dot_product_attention_fwd")


_policies = jax.checkpoint_policies
_keep_both = _policies.save_from_both_policies
# Of statistics, two numbers a token: without them a norm's whole output is computed once more for the gradient of its
# modulation.
_keep_statistics = _policies.save_only_these_names(NORM_STATISTICS)
_keep_flash_attention = _keep_both(_is_flash_attention, _policies.save_only_these_names(PALLAS_RESIDUALS))
_keep_dots_no_batch = _keep_both(_policies.dots_with_no_batch_dims_saveable, _keep_statistics)
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": _policies.nothing_saveable,
    "dots": _keep_both(_policies.dots_saveable, _keep_statistics),
    "dots_no_batch": _keep_dots_no_batch,
    "dots_flash": _keep_both(_keep_dots_no_batch, _keep_flash_attention),
}
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a configuration may say about the network; the defaults of the project live here.

    Attributes:
        size: "S", "B", "L", "XL" or "3B", which overrides depth, hidden_size and num_heads; "" leaves those three.
        depth: number of blocks.
        hidden_size: width of a token, a multiple of 4 and of num_heads.
        num_heads: attention heads.
        patch_size: side of a square patch, in pixels of the network's input.
        learn_sigma: also predict a variance; doubles the output channels.
        dtype: "float32" or "bfloat16", of the computation; parameters, norms and softmax are always float32.
        precision: "default" (the platform's) or "highest", of matrix products in float32.
        remat: what the backward pass keeps of a block: "none" (no rematerialisation), "full" (keep nothing),
            "dots" (keep matrix products), "dots_no_batch" (keep those without a batch dimension: all but attention's)
            or "dots_flash" (these, and the output of a fused attention, cuDNN's or Pallas'). The last three keep the
            means and variances of norms too.
        scan_blocks: one compiled block scanned over stacked parameters, or `depth` unrolled blocks.
        attention: what computes it: "xla", "cudnn" or "pallas" (see `models/attention.py` for what they need; Pallas'
            compiles for TPUs and was never run on one), or "auto": the fastest on the device, which jobs measure.
    """

    size: str = ""
    depth: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    patch_size: int = 2
    learn_sigma: bool = False
    dtype: str = "float32"
    precision: str = "default"
    remat: str = "none"
    scan_blocks: bool = True
    attention: AttentionChoice = "auto"


def dimensions(config: ModelConfig) -> tuple[int, int, int]:
    """(depth, hidden_size, num_heads), those of `config.size` if it is given."""
    return SIZES[config.size] if config.size else (config.depth, config.hidden_size, config.num_heads)


class DiT(nn.Module):
    """The denoising transformer; build it with `build_model`, which checks the fields.

    Attributes:
        input_shape: (H, W, C) of one input; H and W are multiples of patch_size and need not be equal.
        num_classes: classes without the null class, which is row `num_classes` of the label embedding.
        depth, hidden_size, num_heads, patch_size, learn_sigma, dtype, precision, remat and scan_blocks: as in
            `ModelConfig`.
        attention: as there, and never "auto".
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    learn_sigma: bool = False
    dtype: str = "float32"
    precision: str = "default"
    remat: str = "none"
    scan_blocks: bool = True
    attention: AttentionName = "xla"

    def setup(self) -> None:
        out_channels = self.input_shape[2] * (2 if self.learn_sigma else 1)
        self.x_embedder = linear(self.hidden_size, self.dtype, self.precision)
        self.t_embedder = TimeEmbedding(self.hidden_size)
        self.y_embedder = nn.Embed(self.num_classes + 1, self.hidden_size, embedding_init=normal_init)
        self.null_noise_embedding = self.param("null_noise_embedding", normal_init, (self.hidden_size,))
        block = (self.num_heads, self.dtype, self.precision, self.attention)
        self.blocks: Any = Block(*block) if self.scan_blocks else [Block(*block) for _ in range(self.depth)]
        self.final_layer = FinalLayer(self.patch_size**2 * out_channels, self.precision)

    def __call__(
        self,
        x: jax.Array,
        time: jax.Array,
        labels: jax.Array,
        drop_label: jax.Array,
        drop_noise: jax.Array,
        time_embedding_offset: jax.Array | None = None,
    ) -> jax.Array:
        """The network's raw output.

        Args:
            x: [B, H, W, C].
            time: [B], in the network's own unit (the denoiser converts).
            labels: int32 [B] in [0, num_classes).
            drop_label: bool [B]; True puts the null class in the place of the label.
            drop_noise: bool [B]; True puts the null noise embedding in the place of the time embedding.
            time_embedding_offset: [B, hidden_size] added to the time embedding; dropped rows ignore it.

        Returns:
            float32 [B, H, W, C], or [B, H, W, 2 C] with `learn_sigma` (prediction, then raw variance).

        Raises:
            ValueError: x has another shape than input_shape.
        """
        conditioning = self.conditioning(time, labels, drop_label, drop_noise, time_embedding_offset)
        tokens = self.final_layer(self.features(x, conditioning), conditioning)
        return unpatchify(tokens, self.patch_size, *self.input_shape[:2]).astype(jnp.float32)

    def conditioning(
        self,
        time: jax.Array,
        labels: jax.Array,
        drop_label: jax.Array,
        drop_noise: jax.Array,
        time_embedding_offset: jax.Array | None = None,
    ) -> jax.Array:
        """Noise-level plus class embedding, float32 [B, hidden_size]; arguments as in `__call__`."""
        noise = self.t_embedder(time)
        if time_embedding_offset is not None:
            noise = noise + time_embedding_offset
        noise = jnp.where(drop_noise[:, None], self.null_noise_embedding, noise)
        return keep_rows_apart(noise + self.y_embedder(jnp.where(drop_label, self.num_classes, labels)))

    def null_conditioning(self, batch: int) -> jax.Array:
        """`conditioning` of `batch` rows with both conditions dropped; the time embedding is never called."""
        label = self.y_embedder(jnp.full((batch,), self.num_classes, jnp.int32))
        return self.null_noise_embedding + label

    def features(self, x: jax.Array, conditioning: jax.Array) -> jax.Array:
        """The trunk: everything before the final layer.

        Args:
            x: [B, H, W, C].
            conditioning: [B, hidden_size].

        Returns:
            Tokens [B, (H/p)(W/p), hidden_size] in the compute dtype, row-major.

        Raises:
            ValueError: x has another shape than input_shape.
        """
        if x.ndim != 4 or x.shape[1:] != tuple(self.input_shape):
            raise ValueError(
                f"DiT: input of shape {x.shape}, expected [batch, H, W, C] = [batch, "
                f"{', '.join(map(str, self.input_shape))}]; build the model with the data's input_shape."
            )
        p, (height, width, _) = self.patch_size, self.input_shape
        positions = sincos_positions(height // p, width // p, self.hidden_size)
        tokens = keep_rows_apart((self.x_embedder(patchify(x, p)) + positions).astype(self.dtype))
        return self._run_blocks(tokens, conditioning)

    def in_compute_dtype(self, params: Params) -> Params:
        """The parameters with those cast to `dtype` that every call casts: the patch embedding's and the blocks'.

        The network answers the same bit for bit. A program that calls it many times spares the casts.
        """
        cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(self.dtype))
        return {
            name: cast(value) if name == "x_embedder" or name.startswith("blocks") else value
            for name, value in params.items()
        }

    def _run_blocks(self, tokens: jax.Array, conditioning: jax.Array) -> jax.Array:
        def run(block: Block, x: jax.Array, c: jax.Array) -> jax.Array:
            return keep_rows_apart(block(x, c))

        if self.remat != "none":
            # Inside a scan XLA cannot merge the recomputation with the forward pass: no need to hinder it.
            run = nn.remat(run, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan_blocks)
        if not self.scan_blocks:
            for block in self.blocks:
                tokens = run(block, tokens, conditioning)
            return tokens
        scan = nn.scan(
            lambda block, x, c: (run(block, x, c), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        tokens, _ = scan(self.blocks, tokens, conditioning)
        return tokens


def attention_shape(config: ModelConfig, input_shape: tuple[int, ...]) -> AttentionShape:
    """What the attention of `config`'s network is asked for on inputs of `input_shape`, (H, W, C)."""
    _, hidden_size, num_heads = dimensions(config)
    tokens = (input_shape[0] // config.patch_size) * (input_shape[1] // config.patch_size)
    return AttentionShape(tokens, num_heads, hidden_size // num_heads, config.dtype)


def build_model(config: ModelConfig, *, input_shape: tuple[int, int, int], num_classes: int) -> DiT:
    """The network that a configuration describes.

    Args:
        config: see `ModelConfig`. Nothing is measured here: attention "auto" is the first of the default device's
            `candidates`.
        input_shape: (H, W, C) of one input of the network (pixels or latents).
        num_classes: classes without the null class, at least 1.

    Returns:
        An unbound, hashable Linen module.

    Raises:
        UserError: an unknown name, sizes that do not divide, or an attention that does not take them.
    """
    choices: dict[str, tuple[str, ...]] = {
        "size": ("", *SIZES),
        "dtype": DTYPES,
        "precision": tuple(PRECISIONS),
        "remat": tuple(REMAT_POLICIES),
        "attention": get_args(AttentionChoice),
    }
    for field, known in choices.items():
        value = getattr(config, field)
        if value not in known:
            names = ", ".join(map(repr, known))
            raise UserError(f"model.{field} = {value!r} is unknown; choose one of {names}.")
    depth, hidden_size, num_heads = dimensions(config)
    height, width, channels = (int(n) for n in input_shape)
    if min(depth, hidden_size, num_heads, config.patch_size, height, width, channels, num_classes) < 1:
        raise UserError(
            f"model: depth {depth}, hidden_size {hidden_size}, num_heads {num_heads}, patch_size "
            f"{config.patch_size}, input shape {height, width, channels} and num_classes {num_classes} must "
            "all be at least 1."
        )
    if hidden_size % num_heads or hidden_size % 4:
        raise UserError(
            f"model.hidden_size = {hidden_size} must be a multiple of 4 and of model.num_heads = {num_heads}."
        )
    if height % config.patch_size or width % config.patch_size:
        raise UserError(
            f"model.patch_size = {config.patch_size} does not divide the input of {height} x {width}: "
            "choose another patch or image size."
        )
    shape = attention_shape(config, (height, width, channels))
    attention: AttentionName
    if config.attention == AUTO:
        attention = candidates(shape, jax.devices()[0])[0]
    else:
        attention = config.attention
        check_attention(attention, shape)
    return DiT(
        input_shape=(height, width, channels),
        num_classes=num_classes,
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        patch_size=config.patch_size,
        learn_sigma=config.learn_sigma,
        dtype=config.dtype,
        precision=config.precision,
        remat=config.remat,
        scan_blocks=config.scan_blocks,
        attention=attention,
    )


def init_params(model: DiT, key: jax.Array) -> Params:
    """Fresh parameters of every branch, `null_noise_embedding` included; fit for `jit` and `jax.eval_shape`.

    Args:
        model: from `build_model`.
        key: a PRNG key.

    Returns:
        A plain nested dict of float32 arrays; blocks under "blocks" with a leading axis of `depth`, or under
        "blocks_0", "blocks_1", ... when `scan_blocks` is off.
    """
    no, zero = jnp.zeros((1,), bool), jnp.zeros((1,), jnp.int32)
    # Parameters do not depend on the attention, and a fused one need not take a single row.
    model = model.clone(attention="xla")
    return model.init(key, jnp.zeros((1, *model.input_shape)), zero, zero, no, no)["params"]


def stack_blocks(params: Params) -> Params:
    """The unrolled layout ("blocks_0", ...) to the scanned layout ("blocks"); values are untouched.

    Raises:
        ValueError: there are no unrolled blocks.
    """
    names = sorted((name for name in params if re.fullmatch(r"blocks_\d+", name)), key=lambda n: int(n[7:]))
    if not names:
        raise ValueError(f"stack_blocks: no 'blocks_0' among {sorted(params)}; stacked already?")
    rest = {name: value for name, value in params.items() if name not in names}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return {**rest, "blocks": stacked}


def unstack_blocks(params: Params) -> Params:
    """The inverse of `stack_blocks`.

    Raises:
        ValueError: there are no scanned blocks.
    """
    if "blocks" not in params:
        raise ValueError(f"unstack_blocks: no 'blocks' among {sorted(params)}; unstacked already?")
    rest = {name: value for name, value in params.items() if name != "blocks"}
    depth = jax.tree.leaves(params["blocks"])[0].shape[0]
    return {
        **rest,
        **{f"blocks_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(depth)},
    }
