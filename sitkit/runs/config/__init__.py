"""The settings of a run: their schema, their sources, and the identities that follow from them."""
