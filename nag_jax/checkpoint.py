"""Checkpoints of a training run: asynchronous saves, exact restores onto any mesh, and errors that say what to do.

A thin layer over orbax's CheckpointManager. A step's folder holds one item per set of parameters ("params" and each
average under its name), so that sampling reads one set and no optimizer, one item "training" with the rest of the
state, and one item "extra" with JSON. When to save is the caller's affair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from nag_jax.denoiser import Params
from nag_jax.errors import NagJaxError, UserError
from nag_jax.hosts import from_first, leave
from nag_jax.parallel import path_name
from nag_jax.training.state import TrainState

PARAMS, TRAINING, EXTRA = "params", "training", "extra"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often a run saves, and how many checkpoints it keeps.

    Attributes:
        every_steps: steps between two saves; the last step is always saved.
        keep: newest checkpoints that are kept, at least 1; with 2 a damaged newest one costs one interval.
        keep_every_steps: besides these, the checkpoints at multiples of so many steps are kept; 0 for none.
    """

    every_steps: int = 1000
    keep: int = 2
    keep_every_steps: int = 0

    def __post_init__(self) -> None:
        for key in ("every_steps", "keep"):
            if getattr(self, key) < 1:
                raise UserError(f"checkpoint.{key} = {getattr(self, key)} must be at least 1.")
        if self.keep_every_steps < 0 or self.keep_every_steps % self.every_steps:
            raise UserError(
                f"checkpoint.keep_every_steps = {self.keep_every_steps} is no multiple of checkpoint.every_steps = "
                f"{self.every_steps}: nothing is saved there."
            )


class Checkpoints:
    """The checkpoints of one folder.

    Args:
        directory: local (absolute or relative) or gs:// path; made if need be, unless `read_only`.
        keep: newest checkpoints to keep.
        keep_every_steps: multiples of which are kept too; 0 for none.
        read_only: never writes or deletes anything, for reading beside a running training.

    Every process of a run makes one and calls the same methods in the same order.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 2,
        *,
        keep_every_steps: int = 0,
        read_only: bool = False,
    ) -> None:
        path = epath.Path(directory)
        self.directory = path if "://" in os.fspath(directory) else path.absolute()
        self.read_only = read_only
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
            if not self.directory.is_dir():
                raise UserError(f"There is no checkpoint folder {self.directory}. Give the folder of a training run.")
        else:
            # A save that was killed leaves a temporary folder, which is never listed as a step and is removed here.
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every_steps or None,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(barrier_sync_fn=self._wait_for_others),
            )
        with _without_warnings() if read_only else contextlib.nullcontext():
            self._manager = _Manager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps whose save is complete on disk, ascending."""
        return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.directory))

    def latest_step(self) -> int | None:
        """The newest of `steps`, or None; of several processes what the first one sees."""
        return from_first(lambda: max(self.steps(), default=None))

    def save(self, state: TrainState, extra: Mapping[str, Any] | None = None) -> None:
        """Starts to save `state` under its step; the state may be donated as soon as this returns.

        Does nothing if that step is already saved.

        Args:
            state: the state of a run.
            extra: a JSON object that is kept with it.

        Raises:
            NagJaxError: this or the save before it could not be written; earlier checkpoints are untouched.
            UserError: an average's name is that of another item.
        """
        reserved = {PARAMS, TRAINING, EXTRA} & set(state.ema)
        if reserved:
            raise UserError(f"An average of the parameters cannot be called {reserved.pop()!r}.")
        step = int(state.step)
        with self._explain_failed_write():
            if step in self._manager.all_steps():
                return
            items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
            self._manager.save(
                step, args=ocp.args.Composite(**items, **{EXTRA: ocp.args.JsonSave(dict(extra or {}))}), force=True
            )

    def wait(self) -> None:
        """Waits until everything is written. Raises NagJaxError if it could not be."""
        with self._explain_failed_write():
            self._manager.wait_until_finished()

    def restore(self, abstract_state: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """Reads a state, bit for bit, onto the devices that `abstract_state` names.

        Args:
            abstract_state: a TrainState of arrays, or of jax.ShapeDtypeStructs with shardings.
            step: which one; the newest if None.

        Returns:
            (the state, the JSON object saved with it).

        Raises:
            UserError: there is no checkpoint, it is damaged, or it is one of another network or optimizer.
        """
        step = self._existing_step(step)
        abstract = _items(jax.tree.map(_abstract, abstract_state))
        with self._explain_damage(step):
            for name, tree in abstract.items():
                self._check_item(step, name, tree)
            items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**items, **{EXTRA: ocp.args.JsonRestore()})
            )
        averages = {name: restored[name] for name in abstract_state.ema}
        state = TrainState(**restored[TRAINING], params=restored[PARAMS], ema=averages)
        return state, restored[EXTRA]

    def restore_params(self, name: str = "ema", step: int | None = None) -> Params:
        """Reads one set of parameters and nothing else.

        Args:
            name: "params", or the name of an average.
            step: which one; the newest if None.

        Returns:
            The tree of parameters as numpy arrays.

        Raises:
            UserError: there is no checkpoint, it has no such parameters, or it is damaged.
        """
        step = self._existing_step(step)
        folder = self._folder(step)
        known = sorted({path.name for path in folder.iterdir() if path.is_dir()} - {TRAINING, EXTRA})
        if name not in known:
            raise UserError(f"Checkpoint {folder} has no parameters {name!r}. It has: {', '.join(known)}.")
        with self._explain_damage(step):
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self._saved_tree(step, name))
            return ocp.PyTreeCheckpointHandler().restore(
                folder / name, args=ocp.args.PyTreeRestore(restore_args=arguments)
            )

    def restore_extra(self, step: int | None = None) -> dict[str, Any]:
        """Reads the JSON object of a step, the newest if None. Raises UserError as `restore` does."""
        step = self._existing_step(step)
        with self._explain_damage(step):
            return self._manager.restore(step, args=ocp.args.Composite(**{EXTRA: ocp.args.JsonRestore()}))[EXTRA]

    def close(self) -> None:
        """Waits for the last save and lets go of the folder. Raises NagJaxError as `wait` does."""
        with self._explain_failed_write():
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # Closing waits for all processes, and some may not have come to this error.
        if error is None or jax.process_count() == 1:
            self.close()

    def _folder(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def _existing_step(self, step: int | None) -> int:
        steps = from_first(self.steps)
        if not steps:
            raise UserError(f"No complete checkpoint in {self.directory}. Train first, or give another folder.")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(f"{self.directory} has no checkpoint of step {step}. It has: {', '.join(map(str, steps))}.")
        return step

    def _saved_tree(self, step: int, name: str) -> Any:
        """The saved item with a description (shape and dtype) in the place of each array."""
        return ocp.PyTreeCheckpointHandler().metadata(self._folder(step) / name).tree

    def _check_item(self, step: int, name: str, abstract: Any) -> None:
        """Raises UserError if the saved item has other arrays than `abstract`."""
        if not (self._folder(step) / name).is_dir():
            raise UserError(f"Checkpoint {self._folder(step)} has no {name!r}: the run was made with other settings.")
        saved, wanted = _shapes(self._saved_tree(step, name)), _shapes(abstract)
        for path in sorted(saved.keys() | wanted.keys()):
            if saved.get(path) != wanted.get(path):
                raise UserError(
                    f"Checkpoint {self._folder(step)} does not fit this configuration: {name}/{path} has shape "
                    f"{saved.get(path, 'none')} there and {wanted.get(path, 'none')} here. Use the run's own settings."
                )

    @contextlib.contextmanager
    def _explain_damage(self, step: int) -> Iterator[None]:
        try:
            yield
        except NagJaxError:
            raise
        except Exception as error:
            earlier = [other for other in self.steps() if other < step]
            kept = f"the earlier step {earlier[-1]} is kept and is used then" if earlier else "no earlier step is kept"
            raise UserError(
                f"Checkpoint {self._folder(step)} cannot be read, it seems damaged ({_first_line(error)}). "
                f"Delete that folder; {kept}."
            ) from error

    @contextlib.contextmanager
    def _explain_failed_write(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._failed_write(error) from error

    def _failed_write(self, error: BaseException) -> NagJaxError:
        kept = ", ".join(map(str, self.steps())) or "none"
        return NagJaxError(
            f"A checkpoint could not be written to {self.directory} ({_first_line(error)}). Is the disk full? "
            f"Complete checkpoints there: {kept}."
        )

    def _wait_for_others(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier between the processes of a save, for its threads; a process whose save failed leaves here.

        After an error orbax comes to its last barrier too, and would wait there for the others, who wait at an earlier
        one for this process, until its limit for a save: twenty minutes.
        """
        error = sys.exc_info()[1]
        if error is not None and jax.process_count() > 1:
            leave(self._failed_write(error))
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


class _Manager(ocp.CheckpointManager):
    """Orbax's, but for its log lines on preemption.

    For these it would ask JAX with the step's number, also from the background, and JAX knows one count of questions
    only: that of `jobs/interrupt.py`, which would then miss the moment to stop.
    """

    def reached_preemption(self, step: int) -> bool:
        """Whether JAX says to stop at `step`; it is not asked."""
        return False


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps orbax from warning that a folder which is only to be read is only read."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _items(state: TrainState) -> dict[str, Any]:
    training = {"step": state.step, "opt_state": state.opt_state, "frozen": state.frozen}
    return {PARAMS: state.params, TRAINING: training, **state.ema}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
