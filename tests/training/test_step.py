import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nag_jax.checkpoint import Checkpoints
from nag_jax.denoiser import LatentSpace, from_function
from nag_jax.diffusion import objective as objective_lib
from nag_jax.diffusion.objective import Objective
from nag_jax.diffusion.process import Linear
from nag_jax.errors import UserError
from nag_jax.parallel import ParallelConfig, batch_sharding, make_mesh, param_shardings, shard_batch, split_batch
from nag_jax.training.optimizer import OptimizerConfig, make_optimizer
from nag_jax.training.state import init_state
from nag_jax.training.step import batch_states, jit_train_step, make_train_step, pmap_train_step

KEY = jax.random.key(11)
OBJECTIVE = Objective(label_dropout=0.25, noise_dropout=0.25, num_buckets=3)
DECAYS = {"ema": 0.9, "slow": 0.99}
ADAMW = make_optimizer(OptimizerConfig(learning_rate=1e-2), 100)


def new_state(denoiser, optimizer=ADAMW):
    params = jax.tree.map(jnp.copy, denoiser.params)
    return init_state(params, optimizer, DECAYS, {"other": {"w": jnp.arange(3.0)}})


def assert_trees(compare, one, other, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        compare(np.asarray(a), np.asarray(b), **tolerance)


@pytest.fixture(scope="module")
def train_step(tiny_denoiser):
    return jax.jit(make_train_step(tiny_denoiser, OBJECTIVE, ADAMW, DECAYS))


@pytest.fixture(scope="module")
def sgd_step(tiny_denoiser):
    return jax.jit(make_train_step(tiny_denoiser, OBJECTIVE, optax.sgd(0.1), DECAYS))


def test_one_step_is_the_definition(tiny_denoiser, sgd_step, batch_of):
    state, batch = new_state(tiny_denoiser, optax.sgd(0.1)), batch_of(0)
    after, metrics = sgd_step(state, batch, KEY)

    @jax.jit
    def mean_loss(params):
        draws = objective_lib.draw(OBJECTIVE, Linear(), KEY, 0, jnp.arange(12), (2, 2, 1))
        losses = objective_lib.loss(OBJECTIVE, tiny_denoiser, params, batch, draws)
        return losses.total.mean(), objective_lib.bucket_metrics(OBJECTIVE, losses, draws)

    (total, buckets), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    want = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
    assert_trees(np.testing.assert_allclose, after.params, want, rtol=1e-5, atol=1e-6)
    assert_trees(np.testing.assert_allclose, metrics["buckets"], buckets, rtol=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(total), rel=1e-5)
    for name, tree in (("grad_norm", gradients), ("param_norm", after.params)):
        norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(tree)))
        assert float(metrics[name]) == pytest.approx(norm, rel=1e-5)
    for name, decay in DECAYS.items():
        average = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, state.params, after.params)
        assert_trees(np.testing.assert_allclose, after.ema[name], average, rtol=1e-5, atol=1e-6)
    assert after.step == 1
    assert_trees(np.testing.assert_array_equal, after.frozen, state.frozen)


def test_steps_draw_differently(tiny_denoiser, sgd_step, batch_of):
    state = new_state(tiny_denoiser, optax.sgd(0.1))
    losses = {float(sgd_step(state.replace(step=jnp.int32(s)), batch_of(0), KEY)[1]["loss"]) for s in range(3)}
    assert len(losses) == 3


def test_latents_are_drawn_by_step_and_position(tiny_denoiser, sgd_step, batch_of):
    batch = batch_of(0)
    space = LatentSpace(scaling_factor=0.5)
    moments = np.concatenate([2.0 * batch["image"], np.full_like(batch["image"], -1.0)], axis=-1).astype(np.float16)
    latents = {"moments": moments, "label": batch["label"]}

    # Mean and variance of the states are those of the moments, scaled; another step draws others.
    states = np.stack([batch_states(latents, space, KEY, step) for step in range(400)])
    np.testing.assert_allclose(states.mean(0), 0.5 * moments[..., :1], atol=5 * 0.5 * np.exp(-0.5) / 20)
    np.testing.assert_allclose(states.std(0), 0.5 * np.exp(-0.5), rtol=0.2)

    # The step trains on exactly these states, in micro-batches too.
    state = new_state(tiny_denoiser, optax.sgd(0.1))
    want, _ = sgd_step(state, {"image": states[0], "label": batch["label"]}, KEY)
    denoiser = dataclasses.replace(tiny_denoiser, latent=space)
    for accumulation_steps in (1, 3):
        step = make_train_step(denoiser, OBJECTIVE, optax.sgd(0.1), DECAYS, accumulation_steps=accumulation_steps)
        after, _ = jax.jit(step)(state, latents, KEY)
        assert_trees(np.testing.assert_allclose, after.params, want.params, rtol=1e-5, atol=1e-6)


def test_accumulation_equals_the_large_batch(tiny_denoiser, sgd_step, batch_of):
    step = jax.jit(make_train_step(tiny_denoiser, OBJECTIVE, optax.sgd(0.1), DECAYS, accumulation_steps=3))
    one = other = new_state(tiny_denoiser, optax.sgd(0.1))
    for s in range(3):
        one, large = sgd_step(one, batch_of(s), KEY)
        other, accumulated = step(other, batch_of(s), KEY)
        np.testing.assert_array_equal(large["buckets"]["count"], accumulated["buckets"]["count"])
        assert_trees(np.testing.assert_allclose, large, accumulated, rtol=1e-5)
    assert_trees(np.testing.assert_allclose, one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_mapped_step_equals_the_large_batch(tiny_denoiser, sgd_step, batch_of, accumulation_steps):
    # vmap with a named axis runs the same collectives as pmap, on one device.
    mapped = make_train_step(
        tiny_denoiser, OBJECTIVE, optax.sgd(0.1), DECAYS, accumulation_steps=accumulation_steps, axis_name="devices"
    )
    batch = batch_of(0)
    parts = {name: value.reshape(3, 4, *value.shape[1:]) for name, value in batch.items()}
    state = new_state(tiny_denoiser, optax.sgd(0.1))
    got = jax.jit(jax.vmap(mapped, in_axes=(None, 0, None), axis_name="devices"))(state, parts, KEY)
    want = sgd_step(state, batch, KEY)
    for device in range(3):
        assert_trees(
            np.testing.assert_allclose, jax.tree.map(lambda x, d=device: x[d], got), want, rtol=1e-5, atol=1e-6
        )


def test_resume_is_bitwise(tiny_denoiser, train_step, batch_of, tmp_path):
    whole = new_state(tiny_denoiser)
    metrics = {}
    for s in range(6):
        whole, metrics[s] = train_step(whole, batch_of(s), KEY)

    state = new_state(tiny_denoiser)
    for s in range(4):
        state, _ = train_step(state, batch_of(s), KEY)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    with Checkpoints(tmp_path) as checkpoints:
        state, _ = checkpoints.restore(new_state(tiny_denoiser))
    for s in range(int(state.step), 6):
        state, again = train_step(state, batch_of(s), KEY)
        assert_trees(np.testing.assert_array_equal, again, metrics[s])
    assert_trees(np.testing.assert_array_equal, state, whole)


def test_only_the_null_embedding_is_trained(tiny_denoiser, batch_of):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, trainable="null_noise_embedding"), 10)
    step = jax.jit(make_train_step(tiny_denoiser, OBJECTIVE, optimizer, DECAYS))
    state = start = new_state(tiny_denoiser, optimizer)
    for s in range(3):
        state, _ = step(state, batch_of(s), KEY)
    for after, before in ((state.params, start.params), (state.ema["ema"], start.ema["ema"])):
        after, before = dict(after), dict(before)
        assert not np.array_equal(after.pop("null_noise_embedding"), before.pop("null_noise_embedding"))
        assert_trees(np.testing.assert_array_equal, after, before)


def test_training_learns(tiny_denoiser, train_step, batch_of):
    # Data of three nearly fixed images: the loss falls well below that of answering with the mean velocity.
    state, losses = new_state(tiny_denoiser), []
    for s in range(400):
        state, metrics = train_step(state, batch_of(s), KEY)
        losses.append(metrics["loss"])
    assert np.mean(losses[-50:]) < 0.6 * np.mean(losses[:10])


def test_jit_on_a_mesh_donates_the_state_and_agrees(tiny_denoiser, train_step, batch_of):
    mesh = make_mesh(ParallelConfig())
    step = make_train_step(tiny_denoiser, OBJECTIVE, ADAMW, DECAYS)
    state = new_state(tiny_denoiser)
    want = train_step(state, batch_of(0), KEY)
    shardings = param_shardings(mesh, state)
    state = jax.device_put(state, shardings)
    compiled = jit_train_step(step, mesh, shardings, batch_sharding(mesh))
    got = compiled(state, shard_batch(mesh, batch_of(0)), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert_trees(np.testing.assert_allclose, got, want, rtol=1e-5, atol=1e-6)


def test_the_compiled_step_writes_the_new_state_over_the_old_one(tiny_denoiser, batch_of):
    mesh = make_mesh(ParallelConfig())
    state = new_state(tiny_denoiser)
    shardings = param_shardings(mesh, state)
    step = make_train_step(tiny_denoiser, OBJECTIVE, ADAMW, DECAYS)
    lowered = jit_train_step(step, mesh, shardings, batch_sharding(mesh)).lower(state, batch_of(0), KEY)
    memory = lowered.compile().memory_analysis()
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == state_bytes


def test_pmap_on_one_device_agrees(tiny_denoiser, train_step, batch_of):
    step = pmap_train_step(
        make_train_step(tiny_denoiser, OBJECTIVE, ADAMW, DECAYS, axis_name="devices"), "devices"
    )
    want = train_step(new_state(tiny_denoiser), batch_of(0), KEY)
    state = new_state(tiny_denoiser)
    got = step(state, split_batch(batch_of(0)), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state)), "all of it is donated"
    assert_trees(np.testing.assert_allclose, got, want, rtol=1e-5, atol=1e-6)


def test_mistakes(tiny_denoiser, batch_of):
    step = make_train_step(tiny_denoiser, OBJECTIVE, ADAMW, DECAYS, accumulation_steps=5)
    with pytest.raises(UserError, match="accumulation_steps"):
        step(new_state(tiny_denoiser), batch_of(0), KEY)
    plain = from_function(lambda x, t, y: x, Linear(), "velocity", num_classes=3, sample_shape=(2, 2, 1))
    with pytest.raises(UserError, match="no null"):
        make_train_step(plain, OBJECTIVE, ADAMW, DECAYS)
