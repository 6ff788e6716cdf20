"""The commands of the application: importing this package adds them to it."""

from sitkit.cli.app import app
from sitkit.cli.commands import components, exchange, plugins, results, sampling, studies, training

__all__ = ["app", "components", "exchange", "plugins", "results", "sampling", "studies", "training"]
