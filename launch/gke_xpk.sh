#!/usr/bin/env bash
# One run as a workload of a GKE cluster with TPUs, through Google's xpk; one slice, or several as one.
#
#   ./launch/gke_xpk.sh COMMAND --cluster=CLUSTER --name=NAME [SETTING ...] [-- ARGUMENTS OF nag_jax.main]
#
#   create    submits the run. A workload that is interrupted starts again and goes on from its last checkpoint
#   list      shows the cluster's workloads
#   delete    deletes the workload. The work folder stays.
#
# Settings, each with the variable that stands in for it:
#   --cluster=CLUSTER  XPK_CLUSTER             made before, with xpk cluster create
#   --name=NAME        XPK_WORKLOAD            of the workload
#   --zone=ZONE        CLOUDSDK_COMPUTE_ZONE   of the cluster
#   --project=PROJECT  CLOUDSDK_CORE_PROJECT   otherwise that of gcloud's settings
#   --type=TYPE        XPK_TPU_TYPE            of each slice, such as v5e-256 (v5litepod-256), v6e-16
#   --slices=COUNT     XPK_SLICES              default 1; parallel.fsdp x parallel.tensor must divide a slice's chips
#   --image=IMAGE      XPK_IMAGE               whose folder at start is a checkout of this project; otherwise this
#                                              folder is laid into python:3.12, without what .dockerignore leaves out,
#                                              and packages are installed at each start
#   --workdir=FOLDER   XPK_WORKDIR             gs://BUCKET/FOLDER
#   --config=CONFIG    XPK_CONFIG              config file with options
#   --cache=FOLDER     JAX_COMPILATION_CACHE_DIR  gs:// folder that keeps compiled programs, for a container keeps none
#   --restarts=COUNT   XPK_RESTARTS            how often it may start again; default 50
#   --dry-run                                  print the command and run none

# Nothing here has been run against a cloud: the commands are those of xpk's own documentation (docs/usage/workloads.md
# and docker.md of AI-Hypercomputer/xpk).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
source launch/commands.sh

create_workload() {
  local run_line source_flags=() cache_variable=""
  need --type "$type" "Give the type of a slice, such as --type=v5e-16."
  need --config "$config" "Give the config file, such as --config=configs/imagenet256.py:sit_xl2,nag."
  need --workdir "$workdir" "Give the work folder, such as --workdir=gs://BUCKET/runs/nag."
  [[ $workdir == gs://* ]] || fail 2 "--workdir=$workdir ends with the container. Give gs://BUCKET/FOLDER."
  [[ $slices =~ ^[1-9][0-9]*$ ]] || fail 2 "--slices=$slices is no number of slices."
  if [[ -n "$image" ]]; then
    source_flags=(--docker-image="$image")
  else
    source_flags=(--base-docker-image=python:3.12 --script-dir=.)
  fi
  run_line=$(quote_all ./launch/local.sh "--config=$config" "--workdir=$workdir" ${arguments[@]+"${arguments[@]}"})
  # Without bash of its own the line would be read by the container's sh.
  if [[ -n "$cache" ]]; then cache_variable=" JAX_COMPILATION_CACHE_DIR=$(quote "$cache")"; fi
  run_line="bash -c $(quote ". launch/flags.sh; tpu_flags; export NAG_JAX_EXTRA=tpu$cache_variable; exec $run_line")"
  run xpk workload create --cluster="$cluster" --workload="$name" "${place[@]}" --tpu-type="$type" \
    --num-slices="$slices" --max-restarts="$restarts" "${source_flags[@]}" --command="$run_line"
}

command=${1:-}
case $command in
  create | list | delete) shift ;;
  -h | --help | help)
    usage launch/gke_xpk.sh
    exit 0
    ;;
  *) fail 2 "'$command' is none of create, list, delete; see --help." ;;
esac

cluster=${XPK_CLUSTER:-}
name=${XPK_WORKLOAD:-}
zone=${CLOUDSDK_COMPUTE_ZONE:-}
project=${CLOUDSDK_CORE_PROJECT:-}
type=${XPK_TPU_TYPE:-}
slices=${XPK_SLICES:-1}
image=${XPK_IMAGE:-}
workdir=${XPK_WORKDIR:-}
config=${XPK_CONFIG:-}
cache=${JAX_COMPILATION_CACHE_DIR:-}
restarts=${XPK_RESTARTS:-50}
arguments=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --cache=*) cache=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
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

need --cluster "$cluster" "Name the cluster, such as --cluster=tpus; xpk cluster create makes one."
need --zone "$zone" "Give the cluster's zone, such as --zone=us-west4-a."
if [[ $command != list ]]; then need --name "$name" "Name the workload, such as --name=nag."; fi
require xpk "Install it: pip install xpk; and the Google Cloud CLI with kubectl."
type=${type/#v5e-/v5litepod-}
place=(--zone="$zone" ${project:+"--project=$project"})

case $command in
  create) create_workload ;;
  list) run xpk workload list --cluster="$cluster" "${place[@]}" ;;
  delete) run xpk workload delete --workload="$name" --cluster="$cluster" "${place[@]}" ;;
esac
