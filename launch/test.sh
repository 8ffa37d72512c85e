#!/usr/bin/env bash
# Checks the project: ruff, mypy and the tests that are not slow.
#
#   ./launch/test.sh                              everything
#   ./launch/test.sh tests/diffusion -k order     one pytest run with these arguments, no linters
#
# Makes .venv in the project root the first time. PYTHON and NAG_JAX_EXTRA: see environment.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

prepare test

# One thread a process: two workers would otherwise fight for the cores. NPROC is what XLA sizes its CPU pool by.
export OMP_NUM_THREADS=1 NPROC=1
export XLA_FLAGS="${XLA_FLAGS:-} --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

if [[ $# -gt 0 ]]; then exec .venv/bin/python -m pytest "$@"; fi

failed=()
trap 'exit 130' INT
trap 'exit 143' TERM

check() {
  local title=$1
  shift
  say "$title ..."
  .venv/bin/python -m "$@" || failed+=("$title")
}

# Tests that use several devices or processes. That there is none of them is no failure: pytest says so with 5.
serial_tests() {
  local which="serial and not slow" code=0
  if [[ -n "${CI:-}" ]]; then which="($which) or slow_sample"; fi
  say "tests, one after another ..."
  .venv/bin/python -m pytest -n 0 --durations=15 -m "$which" || code=$?
  if [[ $code -ne 0 && $code -ne 5 ]]; then failed+=("tests, one after another"); fi
}

check "ruff" ruff check
check "mypy" mypy
check "tests, two at a time" pytest -n 2 --durations=15 -m "not slow and not serial"
serial_tests

if [[ ${#failed[@]} -gt 0 ]]; then
  fail 1 "failed: $(printf '%s; ' "${failed[@]}" | sed 's/; $//')."
fi
say "all checks passed."
