"""The commands of the application: importing this package adds them to it, in the order of its help."""

from sitkit.cli.app import app

from sitkit.cli.commands import training, sampling, studies, results, components, exchange, plugins  # isort: skip

__all__ = ["app", "components", "exchange", "plugins", "results", "sampling", "studies", "training"]
