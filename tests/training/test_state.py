import jax
import jax.numpy as jnp
import numpy as np
import optax

from nag_jax.training.state import init_state


def test_averages_start_as_copies_of_the_parameters():
    params = {"w": jnp.arange(4.0)}
    state = init_state(params, optax.adam(1e-3), ["fast", "slow"], {"other": {"v": jnp.ones(2)}})
    assert state.step == 0 and state.step.dtype == jnp.int32
    assert list(state.ema) == ["fast", "slow"] and list(state.frozen) == ["other"]
    for average in state.ema.values():
        np.testing.assert_array_equal(average["w"], params["w"])
    # No two leaves share memory, so the whole state can be donated.
    jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
