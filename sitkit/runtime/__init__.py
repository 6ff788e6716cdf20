"""Code that every room uses and that knows nothing of diffusion: errors, files, locks, random numbers, processes."""
