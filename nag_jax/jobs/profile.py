"""Profiler traces of some training steps, on request by `log.profile_steps`; XProf and Perfetto read them."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath

from nag_jax.errors import UserError
from nag_jax.hosts import is_first


class StepProfiler:
    """Traces the steps first, ..., last into WORKDIR/profile, on the first process.

    Args:
        steps: (first, last), or nothing for no trace. The first step of a run compiles and is better left out.
        workdir: the work folder, a local one.

    Raises:
        UserError: the folder is on an object store, where the profiler does not write.
    """

    def __init__(self, steps: tuple[int, ...], workdir: epath.Path) -> None:
        self.steps = steps if is_first() else ()
        self.folder = workdir / "profile"
        self.is_tracing = False
        if steps and "://" in str(workdir):
            raise UserError(f"log.profile_steps writes a trace, and {workdir} is no local folder. Leave it empty.")

    def before(self, step: int) -> None:
        """To be called before `step` begins."""
        if self.steps and not self.is_tracing and self.steps[0] <= step <= self.steps[1]:
            jax.profiler.start_trace(str(self.folder))
            self.is_tracing = True

    def after(self, step: int, results: Any) -> None:
        """To be called after `step` was dispatched; `results` are arrays that it makes."""
        if self.is_tracing and step >= self.steps[1]:
            self.stop(results)

    def stop(self, results: Any = None) -> None:
        """Ends a trace that is being made, once `results` are there."""
        if self.is_tracing:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self.is_tracing = False
