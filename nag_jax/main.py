"""Train, sample, evaluate and measure the noise shift of diffusion models with Noise Awareness Guidance.

    python -m nag_jax.main                                       the digits example: train, evaluate, write a report
    python -m nag_jax.main --config=configs/imagenet256.py:sit_xl2,nag --workdir=DIR
    python -m nag_jax.main --mode=sample --checkpoint=runs/digits --config.sampling.nag_scale=2
    python -m nag_jax.main --mode=compare --checkpoint=runs/digits
    python -m nag_jax.main --mode=evaluate --samples=A.npz --reference=B.npz --config.eval.feature_net=FOLDER
    python -m nag_jax.main --mode=encode --config=FILE --config.data.vae=FOLDER --config.data.latents=FOLDER
    python -m nag_jax.main --mode=plan --topology=v5e:4x4 --config=configs/imagenet256.py:sit_xl2,nag

A config file names what a run fixes; --config.a.b=VALUE changes a key, and --dry_run prints every key with its value.
--config.eval.methods names what is compared: plain, cfg, nag, cfg+nag, joint, class_free, nested, domain,
domain+nag, classifier_nag.
--config.sampling.cfg_scale is off at 1, nag_scale is off at 0. --config.sampling.stepper is euler, heun,
euler_maruyama, ddim, ddpm, ddpm_learned or dpm_solver_pp_2m.

Running the same command again goes on where the work folder stands, or rebuilds the report of a finished one. Encode
makes the latents that training reads. Plan compiles a config for a TPU that need not be there (v4, v5e, v5p, v6e,
tpu7x; or local, for this machine) and says what fits, what devices exchange and how long it takes at best. The other
modes work on a trained network, by default under the settings that it was trained with.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from nag_jax.errors import NagJaxError, UserError

if TYPE_CHECKING:
    from nag_jax.config import Config

STARTED = time.perf_counter()  # of this process, up to some imports
DEFAULT_CONFIG = "configs/digits.py"
MODES = ("train", "sample", "evaluate", "noise_shift", "compare", "plan", "encode")

# No default here: ml_collections would read the default's file, and any wrong key, before errors can be explained.
CONFIG = config_flags.DEFINE_config_file(
    "config", None, f"Config file, with options behind a colon: NAME.py:OPTIONS. Default: {DEFAULT_CONFIG}."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Work folder. Default: runs/NAME-OPTIONS of the config, or the --checkpoint where one is given."
)
MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do; train also evaluates and writes the report.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Folder of a trained or converted network, for every mode but train, plan and encode. Default: the work folder.",
)
SAMPLES = flags.DEFINE_string(
    "samples", None, "With --mode=evaluate: judge these images (.npz of ADM's layout, or a folder) and no network."
)
REFERENCE = flags.DEFINE_string(
    "reference", None, "With --samples: what they are compared with, images or an .npz of statistics."
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "With --mode=plan: the machine to compile for, such as v5e:4x4 or v4-8; local for this one."
)
COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0 of a job of several processes, see docs/hosts.md. Not needed on a TPU pod or under SLURM.",
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes the job has; 1 runs this one alone, whatever the environment says."
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Check everything, print the settings and what would run; no work folder is written."
)
DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise UserError(f"Unknown argument {arguments[1]!r}. Flags look like --workdir=DIR; see --help.")
    if CHECKPOINT.value and MODE.value == "train":
        raise UserError("--checkpoint is for other modes. To train from a network, set --config.init_from=FOLDER.")
    if TOPOLOGY.value or MODE.value == "plan":
        if MODE.value != "plan" or not TOPOLOGY.value:
            raise UserError("--mode=plan and --topology go together, such as --mode=plan --topology=v5e:4x4.")
        if CHECKPOINT.value or SAMPLES.value or REFERENCE.value:
            raise UserError("--mode=plan has no --checkpoint, --samples or --reference; it works on --config alone.")
        plan_devices(TOPOLOGY.value)
        return

    from nag_jax import compilation_cache, gpus, hosts

    hosts.start(
        COORDINATOR_ADDRESS.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        stops_at_one_step=MODE.value == "train",
    )
    gpus.warn_of_idle_gpus()
    compilation_cache.use()
    if MODE.value == "encode":
        if CHECKPOINT.value or WORKDIR.value:
            raise UserError("--mode=encode has no --checkpoint and no --workdir; it writes to --config.data.latents.")
        encode_data()
        return

    if SAMPLES.value or REFERENCE.value:
        if MODE.value != "evaluate" or CHECKPOINT.value or not (SAMPLES.value and REFERENCE.value):
            raise UserError("--samples and --reference go together, with --mode=evaluate and without --checkpoint.")
        evaluate_images(SAMPLES.value, REFERENCE.value)
        return

    # Imported late, so that --help and a wrong flag answer at once.
    from nag_jax.config import from_config_dict, to_dict
    from nag_jax.jobs import compare, evaluate, noise_shift, sample, train
    from nag_jax.jobs.experiment import check_sampling, describe_experiment, open_experiment
    from nag_jax.jobs.results import check_judge

    default = CHECKPOINT.value or default_workdir(config_flags.get_config_filename(flags.FLAGS["config"]))
    workdir = epath.Path(WORKDIR.value or default)
    checkpoint = epath.Path(CHECKPOINT.value) if CHECKPOINT.value else workdir
    is_training = MODE.value == "train"
    config = from_config_dict(CONFIG.value) if is_training else config_of_trained(checkpoint)
    check_same_command(config, workdir, checkpoint)
    if DRY_RUN.value:
        methods = (compare if MODE.value == "compare" else evaluate).make_methods(config)
        needs_data = evaluate.needs_data(config) if MODE.value in ("train", "evaluate") else MODE.value != "sample"
        if is_training:
            experiment = train.open_run(config, workdir)
        else:
            experiment = open_experiment(config, workdir, checkpoint)
            check_sampling(experiment, methods, needs_data=needs_data)
            if MODE.value in ("evaluate", "compare"):
                check_judge(config)
        print(json.dumps(to_dict(config), indent=2))
        print(describe_experiment(experiment, MODE.value, methods, needs_data=needs_data))
    elif is_training:
        print(f"report: {train.run(config, workdir, STARTED)}", flush=True)
    elif MODE.value == "evaluate":
        print(f"report: {evaluate.run(config, workdir, checkpoint)}", flush=True)
    else:
        job = {"sample": sample, "noise_shift": noise_shift, "compare": compare}[MODE.value]
        print(f"written: {job.run(config, workdir, checkpoint)}", flush=True)


def evaluate_images(samples: str, reference: str) -> None:
    """--mode=evaluate --samples=A --reference=B: works on images alone, on the config as --config gives it."""
    from nag_jax.config import from_config_dict, to_dict
    from nag_jax.jobs import evaluate_samples

    config = from_config_dict(CONFIG.value)
    workdir = epath.Path(WORKDIR.value or f"runs/{Path(samples).stem}")
    check_same_command(config, workdir, samples, reference)
    if DRY_RUN.value:
        print(json.dumps(to_dict(config), indent=2))
        print(evaluate_samples.describe(config, samples, reference, workdir))
    else:
        print(f"written: {evaluate_samples.run(config, samples, reference, workdir)}", flush=True)


def encode_data() -> None:
    """--mode=encode: works on data alone, so on the config as --config gives it."""
    from nag_jax.config import from_config_dict, to_dict
    from nag_jax.jobs import encode

    config = from_config_dict(CONFIG.value)
    check_same_command(config)
    if DRY_RUN.value:
        print(json.dumps(to_dict(config), indent=2))
        print(encode.describe(config))
    else:
        print(f"written: {encode.run(config)}", flush=True)


def plan_devices(topology: str) -> None:
    """--mode=plan: works on no data and no network, so on the config as --config gives it."""
    from nag_jax.config import from_config_dict, to_dict
    from nag_jax.jobs import plan

    config = from_config_dict(CONFIG.value)
    workdir = epath.Path(WORKDIR.value or default_workdir(config_flags.get_config_filename(flags.FLAGS["config"])))
    if DRY_RUN.value:
        print(json.dumps(to_dict(config), indent=2))
        print(plan.describe_plan(config, topology, workdir))
    else:
        print(f"written: {plan.run(config, topology, workdir)}", flush=True)


def check_same_command(config: Config, *folders: epath.PathLike) -> None:
    """Raises UserError, on all processes of a job, if they were started with different settings."""
    from nag_jax import hosts, storage
    from nag_jax.config import to_dict

    command = [MODE.value, DRY_RUN.value, [str(folder) for folder in folders], to_dict(config)]
    hosts.check_same("--mode, folder or setting", storage.digest(command))


def config_of_trained(checkpoint: epath.Path) -> Config:
    """The settings of a job on the network trained in `checkpoint`.

    What concerns training is as it was trained. The rest is that of --config, or without --config that of the training
    too; either way with the keys that the command line changes.
    """
    from nag_jax import storage
    from nag_jax.config import from_config_dict, to_dict, with_training_of

    path = checkpoint / "config.json"
    if not path.exists() and (checkpoint / "model.json").exists():
        return config_of_converted(checkpoint)
    if not path.exists():
        raise UserError(
            f"{checkpoint} is no folder of a network: it has no config.json. Give a training folder, or one that "
            "python -m nag_jax.convert made of public weights."
        )
    stored = from_config_dict(storage.read_json(path))
    if is_config_given(sys.argv[1:]):
        return with_training_of(from_config_dict(CONFIG.value), stored)
    changed = ConfigDict(to_dict(stored))
    changed.update_from_flattened_dict(config_flags.get_override_values(flags.FLAGS["config"]))
    return with_training_of(from_config_dict(changed), stored)


def config_of_converted(checkpoint: epath.Path) -> Config:
    """The settings of a job on the converted network in `checkpoint`: --config, with what `model.json` says of it."""
    import dataclasses
    from typing import Any

    from nag_jax.config import from_config_dict
    from nag_jax.denoiser import predicted
    from nag_jax.loading import computed_as, read_description

    if not is_config_given(sys.argv[1:]):
        raise UserError(
            f"{checkpoint} holds a converted network, which says nothing of how to sample it. Give --config, such as "
            "--config=configs/imagenet256.py:sit_xl2."
        )
    config, description = from_config_dict(CONFIG.value), read_description(checkpoint)
    prediction: Any = predicted(description.output)
    noise_dropout = config.objective.noise_dropout if description.has_null_noise else 0.0
    objective = dataclasses.replace(config.objective, prediction=prediction, noise_dropout=noise_dropout)
    model = computed_as(description.model, config.model)
    return dataclasses.replace(config, model=model, process=description.process, objective=objective)


def is_config_given(arguments: list[str]) -> bool:
    """Whether the command line names a config file."""
    return any(re.match(r"--?config(=|$)", argument) for argument in arguments)


def default_workdir(config_path: str) -> str:
    """runs/NAME, or runs/NAME-OPTIONS for configs/NAME.py:OPTIONS."""
    path, _, options = config_path.partition(":")
    return "runs/" + "-".join([Path(path).stem, *re.findall(r"[\w.+]+", options)])


def find_config(argument: str) -> str:
    """The config file that `argument` names; one that is not found from here is looked for in the project's root.

    Raises:
        UserError: there is no such file; names those in the project's folder.
    """
    path, colon, options = argument.partition(":")
    project = Path(__file__).resolve().parent.parent
    for candidate in (Path(path), project / path):
        if candidate.is_file():
            return f"{candidate}{colon}{options}"
    known = sorted(f"configs/{file.name}" for file in (project / "configs").glob("*.py"))
    raise UserError(f"There is no config file {path}. Known: {', '.join(known)}.")


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line; unknown config keys and flags are refused with the nearest known name."""
    located = [arguments[0]]
    rest = iter(arguments[1:])
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            argument = f"--config={find_config(value if equals else next(rest, ''))}"
        located.append(argument)
    if not is_config_given(located):
        located.insert(1, f"--config={find_config(DEFAULT_CONFIG)}")
    try:
        return flags.FLAGS(located)
    except flags.UnrecognizedFlagError as error:
        known = [name for name in flags.FLAGS if not name.startswith("test_")]
        if error.flagname.startswith("config."):
            raise UserError(unknown_config_flag(error.flagname)) from error
        nearest = difflib.get_close_matches(error.flagname, known, n=3)
        hint = f" Nearest: {', '.join('--' + name for name in nearest)}." if nearest else " See --help."
        raise UserError(f"Unknown flag --{error.flagname}.{hint}") from error
    except (AttributeError, KeyError) as error:
        wrong = [a.lstrip("-").partition("=")[0] for a in located if re.match(r"--?config\.", a)]
        for name in wrong:
            if name not in config_keys():
                raise UserError(unknown_config_flag(name)) from error
        raise
    except flags.Error as error:
        raise UserError(str(error)) from error


def config_keys() -> list[str]:
    """Every key that --config.KEY=VALUE can change, as "config.a.b"."""
    from nag_jax.config import defaults, key_paths

    return [f"config.{key}" for key, _ in key_paths(defaults().to_dict())]


def unknown_config_flag(name: str) -> str:
    """The message for --config.KEY with a key that does not exist."""
    from nag_jax.config import unknown_key

    return unknown_key(name, config_keys())


def exit_code(error: BaseException) -> int:
    """Prints an error that was raised on purpose and returns its exit code; raises any other."""
    from nag_jax.jobs.interrupt import Stopped

    if isinstance(error, Stopped):
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    if isinstance(error, ImportError) and "gcsfs" in str(error):
        error = UserError("gs:// folders need the package gcsfs: pip install -e '.[gcs]' (the extra tpu has it).")
    if isinstance(error, NagJaxError):
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    raise error


def run_main(arguments: list[str]) -> None:
    from nag_jax import hosts

    logging.set_verbosity(logging.WARNING)
    try:
        main(arguments)
        hosts.wait_for_all("the end")
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from what is saved.", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        if hosts.is_loss_of_a_process(error):
            hosts.leave_after_loss(error)
        if DEBUG.value:
            raise
        sys.exit(exit_code(error))


def parse_or_exit(arguments: list[str]) -> list[str]:
    try:
        return parse_flags(arguments)
    except NagJaxError as error:
        sys.exit(exit_code(error))


if __name__ == "__main__":
    app.run(run_main, flags_parser=parse_or_exit)
