"""Examples: the contract of a data set, its sources, and batches by seed and step."""
