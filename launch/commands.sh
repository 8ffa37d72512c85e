# shellcheck shell=bash
# Sourced, after environment.sh, by the scripts that call tools of a cloud or a cluster: `run` a command, or print it
# after --dry-run, quoted so that it can be copied into a shell; and the checks of settings.

dry_run=no

# One word, as a shell reads it back.
quote() {
  local apostrophe="'" escaped="'\\''"
  if [[ "$1" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//$apostrophe/$escaped}"
  fi
}

# All words, with a space between them.
quote_all() {
  local separator="" word
  for word in "$@"; do
    printf '%s' "$separator"
    quote "$word"
    separator=" "
  done
}

run() {
  if [[ $dry_run == yes ]]; then
    quote_all "$@"
    printf '\n'
  else
    "$@"
  fi
}

# require TOOL REMEDY: the tool must be on PATH, except for a dry run.
require() {
  [[ $dry_run == yes ]] || command -v "$1" >/dev/null || fail 2 "$1 is not on PATH. $2"
}

# need FLAG VALUE REMEDY: a setting that may not be empty.
need() {
  [[ -n "$2" ]] || fail 2 "$1 is missing. $3"
}

# The comment at the head of a script: its usage.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
}

# Splits a script's arguments: into those for nag_jax.main, in `arguments`, and --dry-run; `job` is what their --mode
# mostly computes: sample, where it draws samples, and otherwise train; noise_shift trains an estimator.
# shellcheck disable=SC2034 # both are read by the scripts that source this
split_arguments() {
  local argument before="" mode=train
  arguments=()
  for argument in "$@"; do
    if [[ $argument == --dry-run ]]; then
      dry_run=yes
      continue
    fi
    # One dash or two, and the value behind "=" or in the next word.
    case $argument in --mode=* | -mode=*) mode=${argument#*=} ;; esac
    case $before in --mode | -mode) mode=$argument ;; esac
    before=$argument
    arguments+=("$argument")
  done
  case $mode in
    sample | evaluate | compare) job=sample ;;
    *) job=train ;;
  esac
}
