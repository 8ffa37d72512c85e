# shellcheck shell=bash
# Sourced by the launch scripts: compiler flags for GPUs and TPUs. Few, each with its reason and with what is known of
# it; flags of your own (XLA_FLAGS, LIBTPU_INIT_ARGS) come after these and win. Every run records both variables.

# gpu_flags train|sample
gpu_flags() {
  # Collectives while products run; of use with several GPUs only. Not measured here.
  local flags="--xla_gpu_enable_latency_hiding_scheduler=true"
  # Products go to cuBLAS as they stand. Measured on one H100 (results/step_gpu.json, XL/2, batch 64, two calls):
  # CFG + NAG 4 % faster, and compiled in 7 s instead of 19. Not for
  # training: on a few blocks of a step it was slower, on a whole one it was not measured.
  if [[ "$1" == sample ]]; then flags+=" --xla_gpu_enable_triton_gemm=false"; fi
  export XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}"
}

# The TPU compiler reads flags of its own from LIBTPU_INIT_ARGS; in XLA_FLAGS they would end the process.
tpu_flags() {
  # Gathers of parameters (parallel.fsdp) and sums of gradients while products run. libtpu 0.0.42 takes these flags;
  # what they do was not measured, for no TPU was at hand.
  local flags="--xla_enable_async_all_gather=true"
  flags+=" --xla_tpu_enable_async_collective_fusion=true"
  flags+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
  flags+=" --xla_tpu_overlap_compute_collective_tc=true"
  export LIBTPU_INIT_ARGS="$flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
}
