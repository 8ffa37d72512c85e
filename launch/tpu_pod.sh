#!/usr/bin/env bash
# One run on a Cloud TPU slice with all its workers: from asking for it to deleting it, and back after a preemption.
#
#   ./launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [SETTING ...] [-- ARGUMENTS OF nag_jax.main]
#
#   create    makes the slice now, or fails where there is none
#   queue     asks for the slice in the queue, and waits until it is there
#   install   brings the last commit of this checkout to every worker and makes the environment there; with --data also
#             the training data
#   start     starts nag_jax.main on every worker, in the background; its output goes to ~/nag_jax.log
#   follow    shows the output of worker 0 as it comes; Ctrl-C ends the showing, not the run
#   resume    after a preemption: delete, create or queue, install, start; the run goes on from its last checkpoint.
#             It ends there: follow shows the output
#   delete    deletes the slice. The work folder stays.
#   all       create or queue, install, start, follow
#
# Settings, each with the variable that stands in for it:
#   --name=NAME        TPU_POD_NAME            of the slice
#   --zone=ZONE        CLOUDSDK_COMPUTE_ZONE   such as us-west4-a
#   --project=PROJECT  CLOUDSDK_CORE_PROJECT   otherwise that of gcloud's settings
#   --type=TYPE        TPU_POD_TYPE            such as v5e-16 (v5litepod-16), v6e-16, v4-32
#   --version=VERSION  TPU_POD_VERSION         of the workers' software; otherwise the usual one of the type
#   --workdir=FOLDER   TPU_POD_WORKDIR         gs://BUCKET/FOLDER, or a folder that all workers have mounted
#   --config=CONFIG    TPU_POD_CONFIG          config file with options
#   --data=FOLDER      TPU_POD_DATA            gs:// folder that install copies to ~/data, which is ../data for the run
#   --cache=FOLDER     JAX_COMPILATION_CACHE_DIR  gs:// folder that keeps compiled programs; otherwise each worker's home
#   --spot             TPU_POD_SPOT=yes        cheaper, and may be taken away at any time
#   --queued           TPU_POD_QUEUED=yes      all, resume and delete go through the queue
#   --dry-run                                  print every command and run none
#
# After `queue` give --queued to delete too. Several slices as one: gke_xpk.sh.

# Nothing here has been run against a cloud: the commands are those of gcloud's reference pages (compute tpus tpu-vm,
# compute tpus queued-resources) and of Google's table of TPU software versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
source launch/commands.sh

POLL_SECONDS=30

create_slice() {
  need_type
  run gcloud compute tpus tpu-vm create "$name" "${place[@]}" \
    --accelerator-type="$type" --version="$version" ${spot_flag:+"$spot_flag"}
}

queue_slice() {
  need_type
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$version" ${spot_flag:+"$spot_flag"}
  await_slice
}

await_slice() {
  local ask=(gcloud compute tpus queued-resources describe "$name" "${place[@]}" "--format=value(state.state)") state
  if [[ $dry_run == yes ]]; then
    echo "# every $POLL_SECONDS s until it prints ACTIVE:"
    run "${ask[@]}"
    return
  fi
  while true; do
    state=$("${ask[@]}")
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED)
        fail 1 "the request for $name is $state; see: gcloud compute tpus queued-resources describe $name" \
          "--zone=$zone. Delete it (delete --queued) and ask again."
        ;;
    esac
    say "the request for $name is $state; asking again in $POLL_SECONDS s ..."
    sleep "$POLL_SECONDS"
  done
}

make_slice() {
  if [[ $queued == yes ]]; then queue_slice; else create_slice; fi
}

on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

install_project() {
  local bundle=nag_jax.bundle
  if [[ $dry_run == no && -n "$(git status --porcelain -uno)" ]]; then
    say "the last commit is installed, without the changes that are not committed."
  fi
  # A bundle and not an archive: the workers get a checkout, so that every result names its commit.
  run git bundle create --quiet "$bundle" HEAD
  run gcloud compute tpus tpu-vm scp "$bundle" "$name:$bundle" "${place[@]}" --worker=all
  run rm "$bundle"
  # The workers' own Python is older than 3.11.
  on_workers all "set -e; rm -rf nag_jax; git clone --quiet $bundle nag_jax; cd nag_jax; \
python3 -m pip install --user --quiet uv; python3 -m uv python install --quiet 3.12; \
export PYTHON=\$(python3 -m uv python find --managed-python 3.12) NAG_JAX_EXTRA=tpu; \
. launch/environment.sh; prepare run"
  if [[ -n "$data" ]]; then
    on_workers all "mkdir -p data && gcloud storage rsync --recursive $(quote "$data") data"
  fi
}

start_run() {
  need --config "$config" "Give the config file, such as --config=configs/imagenet256.py:sit_xl2,nag."
  need --workdir "$workdir" "Give the work folder, such as --workdir=gs://BUCKET/runs/nag."
  [[ $workdir == gs://* || $workdir == /* ]] ||
    fail 2 "--workdir=$workdir is no folder that all workers see. Give gs://BUCKET/FOLDER, or a mounted one from / on."
  local cache_variable=""
  if [[ -n "$cache" ]]; then cache_variable=" JAX_COMPILATION_CACHE_DIR=$(quote "$cache")"; fi
  on_workers all "set -e; if kill -0 \$(cat nag_jax.pid 2>/dev/null) 2>/dev/null; \
then echo 'nag_jax runs here already' >&2; exit 1; fi; \
cd nag_jax; . launch/flags.sh; tpu_flags; export NAG_JAX_EXTRA=tpu$cache_variable; \
nohup ./launch/local.sh $(quote_all "--config=$config" "--workdir=$workdir" ${arguments[@]+"${arguments[@]}"}) \
>../nag_jax.log 2>&1 </dev/null & echo \$! >~/nag_jax.pid"
}

follow_run() { on_workers 0 "tail -n +1 -F nag_jax.log"; }

delete_slice() {
  if [[ $queued == yes ]]; then
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

resume_run() {
  delete_slice || say "there was nothing to delete."
  make_slice
  install_project
  start_run
}

need_type() {
  need --type "$type" "Give the type of the slice, such as --type=v5e-16."
  need --version "$version" "The software version of $type is not known here. Give --version, from Google's list."
}

software_version() {
  case $1 in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

command=${1:-}
case $command in
  create | queue | install | start | follow | resume | delete | all) shift ;;
  -h | --help | help)
    usage launch/tpu_pod.sh
    exit 0
    ;;
  *) fail 2 "'$command' is none of create, queue, install, start, follow, resume, delete, all; see --help." ;;
esac

name=${TPU_POD_NAME:-}
zone=${CLOUDSDK_COMPUTE_ZONE:-}
project=${CLOUDSDK_CORE_PROJECT:-}
type=${TPU_POD_TYPE:-}
version=${TPU_POD_VERSION:-}
workdir=${TPU_POD_WORKDIR:-}
config=${TPU_POD_CONFIG:-}
data=${TPU_POD_DATA:-}
cache=${JAX_COMPILATION_CACHE_DIR:-}
spot=${TPU_POD_SPOT:-no}
queued=${TPU_POD_QUEUED:-no}
arguments=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --data=*) data=${1#*=} ;;
    --cache=*) cache=${1#*=} ;;
    --spot) spot=yes ;;
    --queued) queued=yes ;;
    --dry-run) dry_run=yes ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) fail 2 "$1 is no setting of this script; see --help. What is for nag_jax.main comes after --." ;;
  esac
  shift
done

need --name "$name" "Name the slice, such as --name=nag."
need --zone "$zone" "Give the zone, such as --zone=us-west4-a."
require gcloud "Install the Google Cloud CLI and sign in: gcloud auth login."
type=${type/#v5e-/v5litepod-}
version=${version:-$(software_version "$type")}
place=(--zone="$zone" ${project:+"--project=$project"})
spot_flag=""
if [[ $spot == yes ]]; then spot_flag=--spot; fi

case $command in
  create) create_slice ;;
  queue) queue_slice ;;
  install) install_project ;;
  start) start_run ;;
  follow) follow_run ;;
  resume) resume_run ;;
  delete) delete_slice ;;
  all)
    make_slice
    install_project
    start_run
    follow_run
    ;;
esac
