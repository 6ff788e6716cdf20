"""How good a set of samples is: metrics, feature extractors, reference sets; pictures."""
