# shellcheck shell=bash
# Sourced by local.sh and test.sh in the project root, not run by itself: `prepare run` or `prepare test` finds a Python,
# makes .venv and installs the project there, and does nothing when that was done already.
#
# PYTHON         the interpreter that .venv is made with (otherwise the first that works of $python_names)
# NAG_JAX_EXTRA  cpu, gpu or tpu: which JAX to install (otherwise what the machine has)

python_names="python3 python3.13 python3.12 python3.11"

say() { printf 'nag_jax: %s\n' "$*" >&2; }

fail() {
  local code=$1
  shift
  say "$*"
  exit "$code"
}

# Names on PATH may be shims that only print an error, so a candidate counts when it runs.
python_suits() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local name
  if [[ -n "${PYTHON:-}" ]]; then
    python_suits "$PYTHON" || fail 2 "PYTHON=$PYTHON is no working Python >= 3.11 with the venv module."
    base_python=$PYTHON
    return
  fi
  for name in $python_names .venv/bin/python; do
    if python_suits "$name"; then
      base_python=$name
      return
    fi
  done
  fail 2 "no working Python >= 3.11 with the venv module found (tried: $python_names)." \
    "Install one (Debian, Ubuntu: python3 and python3-venv), or name it: PYTHON=/path/to/python $0"
}

find_extra() {
  extra=${NAG_JAX_EXTRA:-}
  if [[ -n "$extra" ]]; then
    [[ "$extra" =~ ^(cpu|gpu|tpu)$ ]] || fail 2 "NAG_JAX_EXTRA=$extra is unknown; it is one of cpu, gpu, tpu."
  elif nvidia-smi >/dev/null 2>&1; then
    extra=gpu
  elif compgen -G '/dev/accel[0-9]*' >/dev/null; then
    extra=tpu
  elif compgen -G '/dev/vfio/[0-9]*' >/dev/null && [[ -n "${TPU_NAME:-}${TPU_WORKER_ID:-}${TPU_ACCELERATOR_TYPE:-}" ]]; then
    extra=tpu
  else
    extra=cpu
  fi
}

# One script at a time may change .venv. The lock lies on this shell's descriptor 9, which Python only borrows: it works
# without the flock command, and an installer that outlives a killed script keeps it.
lock() {
  exec 9>.venv.lock
  if ! "$base_python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null; then
    say "another launch script is installing; waiting for it."
    "$base_python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  fi
}

unlock() { exec 9>&-; }

# Whether .venv is whole and works, and is of the Python that PYTHON names. An installer that was interrupted leaves
# .venv/unfinished and packages that pip would take for whole.
venv_suits() {
  local identity='import sys; print(sys.version, sys.base_prefix)'
  [[ ! -e .venv/unfinished ]] || return 1
  .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || return 1
  [[ -z "${PYTHON:-}" || "$("$PYTHON" -c "$identity")" == "$(.venv/bin/python -c "$identity")" ]]
}

# Changes with everything that decides what is installed; the folder counts because the installation points to it.
fingerprint() {
  .venv/bin/python -c '
import hashlib, pathlib, sys
files = [pathlib.Path("pyproject.toml"), *sorted(pathlib.Path("requirements").glob("*.txt"))]
parts = [sys.version, str(pathlib.Path.cwd()), *sys.argv[1:], *(file.read_text() for file in files)]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())' "$extra"
}

is_python_311() { .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; }

pip_install() {
  if ! .venv/bin/python -m pip install --no-input --disable-pip-version-check "$@" >>.venv/install.log 2>&1; then
    tail -n 60 .venv/install.log >&2
    fail 1 "the installation failed; pip's last words are above, all of them in $PWD/.venv/install.log." \
      "The next start makes .venv anew."
  fi
}

install() {
  local purpose=$1 extras=$extra
  touch .venv/unfinished
  rm -f .venv/ready-for-*
  : >.venv/install.log
  if [[ "$purpose" == test ]]; then extras=test,$extra; fi
  extras=${extras%cpu}
  extras=${extras%,}
  set -- -e ".${extras:+[$extras]}"
  if [[ "$purpose" == test ]] && is_python_311; then
    say "installing the project, the test tools, the parity peers and the TPU compiler (log: .venv/install.log) ..."
    pip_install "$@" -r requirements/parity.txt -r requirements/plan.txt
    pip_install --no-deps -r requirements/parity-no-deps.txt
  else
    say "installing the project and what it needs${extras:+, with $extras} (log: .venv/install.log) ..."
    pip_install "$@"
  fi
  say "installed in $SECONDS s."
}

# prepare run|test: afterwards .venv/bin/python has what running, or testing, needs. Testing includes running.
prepare() {
  local purpose=$1 wanted
  find_python
  find_extra
  lock
  if ! venv_suits; then
    say "making the environment $PWD/.venv with $("$base_python" --version 2>&1), about 3 minutes, once ..."
    rm -rf .venv
    mkdir .venv
    touch .venv/unfinished
    "$base_python" -m venv .venv || fail 1 "making .venv failed; see the message above."
  fi
  wanted=$(fingerprint)
  if [[ "$(cat ".venv/ready-for-$purpose" 2>/dev/null)" != "$wanted" ]]; then
    install "$purpose"
    printf '%s\n' "$wanted" >.venv/ready-for-run
    if [[ "$purpose" == test ]]; then printf '%s\n' "$wanted" >.venv/ready-for-test; fi
    rm .venv/unfinished
  fi
  unlock
}
