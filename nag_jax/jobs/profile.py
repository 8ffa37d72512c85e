"""Profiler traces of some training steps, on request by `log.profile_steps`; XProf and Perfetto read them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from nag_jax import storage
from nag_jax.hosts import is_first


class StepProfiler:
    """Traces the steps first, ..., last into WORKDIR/profile, on the first process; a context manager.

    A trace holds what devices and runtime do, not Python's calls. The profiler writes to a local folder alone, so it is
    made in a temporary one and copied when it is complete.

    Args:
        steps: (first, last), or nothing for no trace. The first step of a run compiles and is better left out.
        workdir: the work folder, local or remote.
    """

    def __init__(self, steps: tuple[int, ...], workdir: epath.Path) -> None:
        self.steps = steps if is_first() else ()
        self.folder = workdir / "profile"
        self.traced_to: Path | None = None  # while a trace is being made

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, first: int, last: int) -> None:
        """To be called before the steps first, ..., last are dispatched together."""
        if self.steps and self.traced_to is None and first <= self.steps[1] and last >= self.steps[0]:
            self.traced_to = Path(tempfile.mkdtemp(prefix="nag_jax_profile_"))
            options = jax.profiler.ProfileOptions()
            # Without Python's calls: hooks into all threads made the process crash beside a save (jax 0.10.2).
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self.traced_to), profiler_options=options)

    def after(self, last: int, results: Any) -> None:
        """To be called after the steps up to `last` were dispatched; `results` are arrays that they make."""
        if self.traced_to is not None and last >= self.steps[1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self.traced_to is None:
            return
        traced_to, self.traced_to = self.traced_to, None
        try:
            jax.profiler.stop_trace()
            for file in traced_to.rglob("*"):
                if file.is_file():
                    with file.open("rb") as source, storage.whole_file(self.folder / file.relative_to(traced_to)) as to:
                        shutil.copyfileobj(source, to)
        finally:
            shutil.rmtree(traced_to)
