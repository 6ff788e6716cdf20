"""The commands of the application: importing this package adds them to it."""

from sitkit.cli.commands import components, exchange, plugins, results, sampling, studies, training

__all__ = ["components", "exchange", "plugins", "results", "sampling", "studies", "training"]
