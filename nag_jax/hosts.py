"""The processes of one job, one on each host: how they start, wait for each other, agree on something, and fail.

Which arrays lie where is `parallel.py`'s affair. On a lone machine there is one process, and every function here is
free. All processes see one file system; the first one alone writes what belongs to the whole job.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from nag_jax.errors import NagJaxError, UserError, first_line

# Seconds. Hosts of a large job come up minutes apart; a host that fails ends the others after at most
# HEARTBEAT_TIMEOUT where it died, and LEAVING_TIMEOUT where it raised an error that the others did not.
START_TIMEOUT = 300
HEARTBEAT_TIMEOUT = 60
LEAVING_TIMEOUT = 30


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    stops_at_one_step: bool = False,
    timeout: int = START_TIMEOUT,
) -> None:
    """Joins the processes of a job by `jax.distributed`; must come before anything that uses a device.

    Without arguments the environment says what there is: TPU pods, GKE and Kubernetes jobs, SLURM and Open MPI are
    known to JAX. On a lone machine nothing is started.

    Args:
        coordinator_address: HOST:PORT of process 0, with a port that is free there.
        num_processes: how many there are; 1 alone makes this process a job of its own, whatever the environment says.
        process_id: which of them this one is, from 0.
        stops_at_one_step: let JAX take SIGTERM, so that all processes stop after the same step (`jobs/interrupt.py`);
            otherwise it ends the process that gets it at once.
        timeout: seconds to wait for the others, after which the process leaves with a message and exit code 2.

    Raises:
        UserError: the arguments are wrong or incomplete, or the environment names a job whose other processes cannot
            be found.
    """
    given: dict[str, Any] = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    check_arguments(given)
    if num_processes == 1:
        return
    jax.config.update("jax_enable_preemption_service", stops_at_one_step)
    is_by_hand = coordinator_address is not None
    waited_for = f"process 0 at {coordinator_address}" if process_id else "the other processes"
    # JAX itself would abort with a stack trace of C++ at its own limit.
    limit = threading.Timer(timeout, _give_up, [waited_for, timeout])
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            **given,
            cluster_detection_method="deactivate" if is_by_hand else None,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=LEAVING_TIMEOUT,
        )
    except Exception as error:  # each environment's detection raises its own
        if not is_by_hand and isinstance(error, ValueError) and "coordinator_address" in str(error):
            return  # JAX knows no job around this process
        raise UserError(
            f"The processes of this job could not be joined ({first_line(error)}). On several hosts give each "
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=I; on one alone --num_processes=1."
        ) from error
    finally:
        limit.cancel()
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not JAX's: there is nobody to agree with


def check_arguments(given: dict[str, Any]) -> None:
    """Raises UserError unless `given`, the arguments of `start` by name, is empty, complete or a lone process."""
    address, count, which = given["coordinator_address"], given["num_processes"], given["process_id"]
    if count is not None and count < 1:
        raise UserError(f"--num_processes={count} must be at least 1.")
    if count == 1 and address is None and which in (None, 0):
        return
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            f"{' and '.join(missing)} must be given too: --coordinator_address=HOST:PORT --num_processes=N "
            "--process_id=I, or none of them on a TPU pod or under SLURM."
        )
    if missing:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator_address={address!r} is not HOST:PORT, the host of process 0 and a free port.")
    if not 0 <= which < count:
        raise UserError(
            f"--process_id={which} is not one of 0 to {count - 1}: each of the --num_processes={count} processes has "
            "its own."
        )


def _give_up(waited_for: str, timeout: int) -> None:
    leave(
        UserError(
            f"{waited_for} did not answer within {timeout} s. Start all processes at about the same time, each with "
            "another --process_id and with the same --coordinator_address, which every host must reach."
        )
    )


def is_first() -> bool:
    """Whether this is the process that writes what belongs to the whole job."""
    return jax.process_index() == 0


def wait_for_all(point: str) -> None:
    """Returns when every process has come to `point`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)


def from_first(function: Callable[[], Any]) -> Any:
    """Calls `function` on the first process and gives all what it returned.

    For decisions that read files: hosts may see a shared folder change at different times, and must not part ways.

    Args:
        function: returns what JSON can hold.

    Returns:
        What it returned there.

    Raises:
        NagJaxError: on all processes, what `function` raised of this kind.
    """
    if jax.process_count() == 1:
        return function()
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome = {"value": function()}
        except NagJaxError as error:
            outcome = {"error": str(error), "is_users": isinstance(error, UserError)}
    content = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    # Every process must know the length, for a broadcast has one shape.
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    if not is_first():
        content = np.zeros(length, np.uint8)
    outcome = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes())
    if "error" in outcome:
        raise (UserError if outcome["is_users"] else NagJaxError)(outcome["error"])
    return outcome["value"]


def check_shared(path: epath.Path) -> None:
    """Raises UserError, on all processes, unless all see the file at `path`, which the first one has written."""
    if jax.process_count() == 1:
        return
    wait_for_all(f"written {path.name}")
    seen = np.asarray(multihost_utils.process_allgather(np.asarray(path.exists())))
    if not seen.all():
        blind = ", ".join(map(str, np.flatnonzero(~seen)))
        raise UserError(
            f"Process(es) {blind} do not see {path}, which process 0 wrote. All hosts must share that folder: "
            "put it on a file system that they all mount, or on gs://."
        )


def check_same(what: str, text: str) -> None:
    """Raises UserError, on all processes, unless `text` is the same on all of them."""
    expected = from_first(lambda: text)
    if jax.process_count() == 1:
        return
    alike = np.asarray(multihost_utils.process_allgather(np.asarray(text == expected)))
    if not alike.all():
        other = ", ".join(map(str, np.flatnonzero(~alike)))
        raise UserError(
            f"Process(es) {other} have another {what} than process 0. Start all with the same command, on folders "
            "that they share."
        )


def is_loss_of_a_process(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, came of another process having ended."""
    marks = ("Gloo", "UNAVAILABLE", "coordination service", "heartbeat", "Connection reset by peer")
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return False
    while error is not None and not any(mark in str(error) for mark in marks):
        error = error.__cause__ or error.__context__
    return error is not None


def leave_after_loss(error: BaseException) -> NoReturn:
    """Leaves with a message that says so: the others cannot be waited for."""
    leave(
        NagJaxError(
            f"another process of this job has ended ({first_line(error)}); see its own messages. "
            "Start all processes again: the same command goes on from what is saved."
        )
    )


def leave(error: NagJaxError) -> NoReturn:
    """Ends this process at once with the error's message, from any thread, whatever the others wait for."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)
