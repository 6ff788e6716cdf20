"""Feature extractors: the networks in whose feature space samples are compared."""
