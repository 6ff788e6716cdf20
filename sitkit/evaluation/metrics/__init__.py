"""Metrics: distances between a set of samples and a reference set. One file per family."""
