"""The attentions: which of them suit what, that they compute the same, and Pallas' on a CPU by its interpreter."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nag_jax.errors import UserError
from nag_jax.models import attention as module
from nag_jax.models.attention import AttentionShape, attention, candidates, check_attention, obstacle
from nag_jax.models.dit import ModelConfig, build_model, init_params

XL = AttentionShape(tokens=256, heads=16, head_dim=72, dtype="bfloat16")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
V100, A100, H100 = (
    SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    for kind, capability in (("V100", "7.0"), ("A100", "8.0"), ("H100", "9.0"))
)
MI300 = SimpleNamespace(platform="gpu", device_kind="MI300", compute_capability="gfx942")


@pytest.fixture
def pallas_on_cpu(monkeypatch):
    kernels = module.splash_attention_kernel
    interpreted = functools.partial(kernels.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(kernels, "make_splash_mha_single_device", interpreted)


def arrays(*size, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(size, np.float32)) for _ in range(4))


# What suits what


@pytest.mark.parametrize(
    ("device", "shape", "expected"),
    [
        (CPU, XL, ("xla",)),
        (TPU, XL, ("xla",)),
        (A100, XL, ("cudnn", "xla")),
        (H100, XL, ("cudnn", "xla")),
        (V100, XL, ("xla",)),
        (MI300, XL, ("xla",)),
        (H100, XL._replace(dtype="float32"), ("xla",)),
        (H100, XL._replace(head_dim=36), ("xla",)),
        (A100, XL._replace(head_dim=256), ("xla",)),
        (H100, XL._replace(head_dim=256), ("cudnn", "xla")),
        (H100, XL._replace(head_dim=264), ("xla",)),
    ],
)
def test_what_may_be_chosen_without_being_named(device, shape, expected):
    assert candidates(shape, device) == expected


@pytest.mark.parametrize(
    ("name", "device", "shape", "words"),
    [
        ("cudnn", CPU, XL, "an NVIDIA GPU.*not cpu"),
        ("cudnn", V100, XL, "an NVIDIA GPU.*8.0 or later, not V100"),
        ("cudnn", None, XL._replace(head_dim=36), "heads of a multiple of 8.*not 36"),
        ("cudnn", None, XL._replace(dtype="float32"), "model.dtype = 'bfloat16'"),
        ("pallas", H100, XL, "a TPU, not H100"),
        ("pallas", None, XL._replace(tokens=64), "a multiple of 128 tokens, not 64"),
        ("pallas", TPU, XL._replace(dtype="float32"), "model.dtype = 'bfloat16'"),
    ],
)
def test_what_is_named_and_not_there_is_refused_with_a_remedy(name, device, shape, words):
    with pytest.raises(UserError, match=f"model.attention = '{name}' needs {words}.*Set model.attention = 'auto'"):
        check_attention(name, shape, device)


def test_what_is_there_is_not_refused():
    assert not obstacle("pallas", XL, TPU) and not obstacle("cudnn", XL, A100) and not obstacle("xla", XL, CPU)
    assert not obstacle("pallas", XL) and not obstacle("cudnn", XL)


def test_auto_is_settled_for_the_default_device(monkeypatch):
    half = ModelConfig(depth=1, hidden_size=64, num_heads=2, dtype="bfloat16")
    build = functools.partial(build_model, input_shape=(8, 8, 4), num_classes=2)
    assert build(half).attention == "xla"
    monkeypatch.setattr(jax, "devices", lambda: [H100])
    assert build(half).attention == "cudnn"
    assert build(dataclasses.replace(half, attention="xla")).attention == "xla"
    assert build(dataclasses.replace(half, dtype="float32")).attention == "xla"


# What they compute


def test_attention_is_the_softmax_average_of_values():
    q, k, v, _ = arrays(2, 5, 3, 4)
    scores = np.einsum("bthd,bshd->bhts", *(np.asarray(x, np.float64) for x in (q, k))) / np.sqrt(4)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, np.asarray(v, np.float64))
    np.testing.assert_allclose(attention("xla", q, k, v), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("tokens", "head_dim"), [(128, 24), (256, 72), (640, 8)])
def test_pallas_computes_values_and_gradients_of_xla(pallas_on_cpu, tokens, head_dim):
    """640 tokens are five blocks."""

    @functools.partial(jax.jit, static_argnums=0)
    def both(name, q, k, v, cotangent):
        out, gradients = jax.vjp(functools.partial(attention, name), q, k, v)
        return out, *gradients(cotangent)

    given = arrays(2, tokens, 2, head_dim)
    for ours, expected in zip(both("pallas", *given), both("xla", *given), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_pallas_in_half_precision_is_as_close_to_the_truth_as_xla(pallas_on_cpu):
    q, k, v, _ = arrays(1, 128, 2, 72)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    truth = attention("xla", *(x.astype(jnp.float32) for x in half))
    errors = {name: np.abs(attention(name, *half).astype(jnp.float32) - truth).max() for name in ("pallas", "xla")}
    assert errors["pallas"] < 2 * errors["xla"]


@pytest.mark.parametrize(("scan_blocks", "remat"), [(True, "dots_flash"), (False, "none")])
def test_a_network_computes_the_same_by_pallas(pallas_on_cpu, scan_blocks, remat):
    config = ModelConfig(depth=1, hidden_size=32, num_heads=2, scan_blocks=scan_blocks, remat=remat, attention="xla")
    by_xla = build_model(config, input_shape=(16, 32, 1), num_classes=2)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(init_params, by_xla), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape, np.float32)), shapes)
    x, no = jnp.asarray(rng.standard_normal((2, 16, 32, 1), np.float32)), jnp.zeros(2, bool)

    def loss(params, model):
        return jnp.square(model.apply({"params": params}, x, jnp.array([0.2, 0.7]), jnp.arange(2), no, no)).mean()

    value_and_gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected, expected_gradient = value_and_gradient(params, by_xla)
    value, gradient = value_and_gradient(params, by_xla.clone(attention="pallas"))
    assert value == pytest.approx(float(expected), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
