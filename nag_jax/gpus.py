"""Says so when GPUs of a host stay idle, which a launcher of processes can bring about without a word.

Under SLURM and Open MPI JAX gives every process one GPU, that of its number on the host (jax/_src/clusters/cluster.py,
JAX 0.10.2), so one process for a host of eight would use an eighth of it.
"""

from __future__ import annotations

import ctypes
import socket
import sys
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from nag_jax.hosts import is_first


def warn_of_idle_gpus() -> None:
    """Prints a line if the processes of some host use fewer GPUs than CUDA shows them; all processes must call it."""
    if jax.default_backend() != "gpu":
        return
    mine = np.array([zlib.crc32(socket.gethostname().encode()), jax.local_device_count(), visible_gpus()], np.uint32)
    processes = mine[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(mine))
    used, visible = worst_host(processes)
    if used < visible and is_first():
        print(
            f"Of the {visible} GPUs of a host this job uses {used}. Under SLURM and Open MPI each process gets one: "
            "start a process for each GPU, or choose GPUs by CUDA_VISIBLE_DEVICES. On one host alone a single process "
            "with --num_processes=1 takes all.",
            file=sys.stderr,
            flush=True,
        )


def worst_host(processes: np.ndarray) -> tuple[int, int]:
    """The host on which most GPUs stay idle.

    Args:
        processes: [P, 3], of each process its host's number, the GPUs that it uses, and those that it could.

    Returns:
        (GPUs that the processes of that host use together, GPUs that one of them could at most).
    """
    hosts = [processes[processes[:, 0] == host] for host in np.unique(processes[:, 0])]
    counts = [(int(host[:, 1].sum()), int(host[:, 2].max())) for host in hosts]
    return min(counts, key=lambda count: count[0] - count[1])


def visible_gpus() -> int:
    """The GPUs that CUDA shows this process, CUDA_VISIBLE_DEVICES considered; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
