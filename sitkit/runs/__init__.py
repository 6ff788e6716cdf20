"""One run on disk: its settings, weights, samples and numbers."""
