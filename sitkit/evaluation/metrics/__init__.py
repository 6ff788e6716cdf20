"""Metrics: how far a set of samples is from a reference set.  One file a family."""
