"""Checks of the fields of components."""


def require_at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError unless value >= least."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least:g}; got {value:g}.")


def require_positive(**values: float) -> None:
    """Raise ValueError unless each value, given by its name, is above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value:g}.")
