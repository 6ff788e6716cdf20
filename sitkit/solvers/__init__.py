"""From noise to data: samplers, guidance, Brownian paths, log p."""
