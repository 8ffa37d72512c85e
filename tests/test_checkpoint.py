import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nag_jax.checkpoint import CheckpointConfig, Checkpoints
from nag_jax.errors import NagJaxError, UserError
from nag_jax.training.state import init_state


def state_at(step, size=4, optimizer=None):
    rng = np.random.default_rng(step)
    params = {"layer": {"kernel": jnp.asarray(rng.normal(size=(3, size)), jnp.float32)}, "bias": jnp.ones(size)}
    state = init_state(params, optimizer or optax.adam(1e-3), ["ema", "slow"], {"other": {"w": jnp.arange(3)}})
    noise = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    return state.replace(step=jnp.int32(step), ema={**state.ema, "ema": noise})


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def folder(tmp_path):
    """A folder with the steps 3 and 5."""
    with Checkpoints(tmp_path / "run") as checkpoints:
        for step in (3, 5):
            checkpoints.save(state_at(step), {"step": step, "note": "x"})
    return tmp_path / "run"


def test_what_is_saved_is_restored_bit_for_bit(folder):
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [3, 5] and checkpoints.latest_step() == 5
        state, extra = checkpoints.restore(state_at(0))
        assert_same(state, state_at(5))
        assert extra == {"step": 5, "note": "x"} == checkpoints.restore_extra()
        assert_same(checkpoints.restore(state_at(0), 3)[0], state_at(3))


def test_one_set_of_parameters_is_read_alone(folder):
    shutil.rmtree(folder / "5" / "training")
    with Checkpoints(folder, read_only=True) as checkpoints:
        saved = state_at(5)
        for name, want in (("ema", saved.ema["ema"]), ("slow", saved.params), ("params", saved.params)):
            params = checkpoints.restore_params(name)
            assert_same(params, want)
            assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
        with pytest.raises(UserError, match="'fast'. It has: ema, params, slow"):
            checkpoints.restore_params("fast")


def test_the_newest_are_kept_and_a_step_is_saved_once(folder):
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (5, 7, 7, 9):
            checkpoints.save(state_at(step))
        checkpoints.wait()
        assert checkpoints.steps() == [7, 9]


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run/checkpoints") as checkpoints:
        checkpoints.save(state_at(1))
    monkeypatch.chdir("/")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [1]


def test_the_state_may_be_donated_after_a_save_was_started(tmp_path):
    state = state_at(2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)(state)
        checkpoints.wait()
        assert_same(checkpoints.restore(state_at(0))[0], state_at(2))


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no checkpoint folder"):
        Checkpoints(tmp_path / "nowhere", read_only=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        for read in (checkpoints.restore_params, checkpoints.restore_extra, lambda: checkpoints.restore(state_at(0))):
            with pytest.raises(UserError, match="No complete checkpoint"):
                read()


def test_a_step_that_is_not_there(folder):
    with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match="no checkpoint of step 4. It has: 3, 5"):
        checkpoints.restore(state_at(0), 4)


def test_an_unfinished_save_is_ignored_and_removed_by_the_next_training(folder):
    unfinished = folder / "8.orbax-checkpoint-tmp"
    shutil.copytree(folder / "5", unfinished)
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 5
        assert unfinished.exists()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == 5
        checkpoints.save(state_at(8))
        checkpoints.wait()
        assert checkpoints.steps() == [5, 8] and not unfinished.exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("item", ["params", "training", "ema", "extra"])
def test_a_truncated_file_names_the_folder_and_the_remedy(folder, item):
    files = [folder / "5" / "extra" / "metadata"] if item == "extra" else (folder / "5" / item / "d").iterdir()
    for path in files:
        truncate(path)
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(UserError, match=f"{folder / '5'} cannot be read.*Delete that folder; the earlier step 3"):
            checkpoints.restore(state_at(0))
        if item == "ema":
            with pytest.raises(UserError, match="cannot be read"):
                checkpoints.restore_params("ema")
    # The remedy works.
    shutil.rmtree(folder / "5")
    with Checkpoints(folder) as checkpoints:
        assert_same(checkpoints.restore(state_at(0))[0], state_at(3))


def test_a_damaged_only_checkpoint_says_that_none_is_left(folder):
    shutil.rmtree(folder / "3")
    truncate(folder / "5" / "params" / "manifest.ocdbt")
    with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match="no earlier step is kept"):
        checkpoints.restore(state_at(0))


def test_another_network_or_optimizer_is_named(folder):
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(UserError, match=r"params/bias has shape \(4,\) there and \(6,\) here"):
            checkpoints.restore(state_at(0, size=6))
        with pytest.raises(UserError, match=r"training/opt_state/0/.* and none here"):
            checkpoints.restore(state_at(0, optimizer=optax.sgd(1e-3)))
        with pytest.raises(UserError, match="has no 'third'"):
            state = state_at(0)
            checkpoints.restore(state.replace(ema={"third": state.params}))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
    try:
        with pytest.raises(NagJaxError, match=f"could not be written to {folder}.*there: 3, 5"):
            checkpoints.save(state_at(9))
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Checkpoints(folder) as again:
        assert_same(again.restore(state_at(0))[0], state_at(5))


def test_impossible_settings(tmp_path):
    for change in ({"every_steps": 0}, {"keep": 0}):
        with pytest.raises(UserError, match=f"checkpoint.{next(iter(change))}"):
            CheckpointConfig(**change)
    state = state_at(1)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="'params'"):
        checkpoints.save(state.replace(ema={"params": state.params}))
