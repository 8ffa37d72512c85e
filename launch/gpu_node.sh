#!/usr/bin/env bash
# Runs the main command on this machine's GPUs, all of them, in one process.
#
#   ./launch/gpu_node.sh --config=configs/imagenet256.py:sit_xl2,nag --workdir=runs/nag
#   ./launch/gpu_node.sh --dry-run ...    prints what it would run
#
# Every other argument goes to nag_jax.main. Makes .venv with JAX for CUDA the first time (PYTHON: see environment.sh)
# and sets the compiler flags of flags.sh. CUDA_VISIBLE_DEVICES chooses among the GPUs. Several machines: slurm.sbatch.
# --num_processes=1 is for an allocation of SLURM, whose variables would make JAX take one GPU alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
source launch/commands.sh
source launch/flags.sh

split_arguments "$@"
[[ ${#arguments[@]} -gt 0 ]] ||
  fail 2 "no arguments for nag_jax.main. Give at least --config=FILE or --mode; --help lists them."

require nvidia-smi "Install the NVIDIA driver, or take launch/local.sh."
if [[ $dry_run == no ]]; then
  nvidia-smi --list-gpus >&2 ||
    fail 2 "nvidia-smi finds no GPU here. Install the NVIDIA driver, or take launch/local.sh."
fi

run export NAG_JAX_EXTRA=gpu
run source launch/environment.sh
run prepare run
run source launch/flags.sh
run gpu_flags "$job"
# exec, so that Ctrl-C and SIGTERM reach the run itself.
run exec .venv/bin/python -m nag_jax.main --num_processes=1 "${arguments[@]}"
