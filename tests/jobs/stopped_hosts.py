"""Run by test_hosts.py in each of two processes: a job that saves, and gets SIGTERM before its loop's first round.

Arguments: the coordinator's address, which process this is, a shared folder. Output: the round in which it stopped, of
at most ROUNDS, and the signal that it was told of.
"""

import os
import signal
import sys
import time

import jax.numpy as jnp
import numpy as np
import optax

from nag_jax import hosts
from nag_jax.checkpoint import Checkpoints
from nag_jax.jobs.interrupt import stop_on_signals
from nag_jax.parallel import ParallelConfig, make_mesh, place, replicated
from nag_jax.training.state import init_state

ROUNDS = 100
UNTIL_SEEN = 2.5  # seconds; JAX looks for SIGTERM once a second


def main(address, which, folder):
    hosts.start(address, 2, which, stops_at_one_step=True)
    state = init_state({"w": jnp.zeros(3)}, optax.sgd(0.1), ()).replace(step=np.int32(1000))
    with Checkpoints(folder) as checkpoints, stop_on_signals(at_one_step=True) as stop:
        checkpoints.save(place(state, replicated(make_mesh(ParallelConfig()))))
        checkpoints.wait()
        if which == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        hosts.wait_for_all("signalled")
        time.sleep(UNTIL_SEEN)
        number = next((number for number in range(1, ROUNDS + 1) if stop.is_due()), None)
    print(number, stop.signal)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
