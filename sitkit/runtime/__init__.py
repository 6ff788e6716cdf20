"""What every room uses and what knows nothing of diffusion: errors, files, locks, random numbers, processes."""
