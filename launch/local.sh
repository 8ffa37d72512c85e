#!/usr/bin/env bash
# Trains, samples, measures and writes a report, on this machine; the last line says where the report is.
#
#   ./launch/local.sh                                    the digits example
#   ./launch/local.sh --config=configs/NAME.py:OPTIONS   another configuration
#   ./launch/local.sh --help                             all flags; every argument goes to nag_jax.main
#
# Makes .venv in the project root the first time. PYTHON and NAG_JAX_EXTRA: see environment.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

prepare run

has_config=no
for argument in "$@"; do
  case $argument in
    --config | --config=* | -config | -config=*) has_config=yes ;;
  esac
done
if [[ $has_config == no ]]; then set -- --config=configs/digits.py "$@"; fi

# exec, so that Ctrl-C and SIGTERM reach the training itself.
exec .venv/bin/python -m nag_jax.main "$@"
