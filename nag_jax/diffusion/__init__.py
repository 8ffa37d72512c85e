"""The mathematics of diffusion: processes, guidance, steppers, the sampler and an exact oracle. No files."""
