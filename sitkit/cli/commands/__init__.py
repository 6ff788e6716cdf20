"""The commands of the application: importing this package adds them to it, in the order of its help."""

from sitkit.cli.app import app

# isort: off
from sitkit.cli.commands import training
from sitkit.cli.commands import sampling
from sitkit.cli.commands import studies
from sitkit.cli.commands import results
from sitkit.cli.commands import components
from sitkit.cli.commands import exchange
from sitkit.cli.commands import plugins
# isort: on

__all__ = ["app", "components", "exchange", "plugins", "results", "sampling", "studies", "training"]
