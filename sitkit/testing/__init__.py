"""The laws that a component must obey, for tests of plugins and of sitkit itself.

`laws_of(component)` lists the laws of every component and those of its kind.  `obey` checks all of them, or those of the
given names; `parametrize_with_laws` makes each of them a pytest test.  A broken law is an AssertionError with the law's
name, the place and the numbers.  No test framework is needed:

    from sitkit.testing import obey
    obey(sitkit.interpolants.create("poly", power=3))
"""

# The order of these imports is the order in which the laws of a kind are checked: algebra first, sampling last.
# isort: off
from sitkit.testing.transport import inner_times
from sitkit.testing import data as data
from sitkit.testing import every_component as every_component
from sitkit.testing import models as models
from sitkit.testing.law import Law, NotShown, close, examples_of, law, laws_of, obey, parametrize_with_laws
from sitkit.testing.models import build_network
from sitkit.testing.solvers import MIDDLE, ORDER_TOLERANCE, flow_error, observed_order, over_the_middle, weak_error
from sitkit.testing.truth import (
    MEAN,
    STD,
    GaussianAverage,
    GaussianTruth,
    gaussian_field,
    gaussian_moments,
    gaussian_network,
)
# isort: on

__all__ = [
    "MEAN",
    "MIDDLE",
    "ORDER_TOLERANCE",
    "STD",
    "GaussianAverage",
    "GaussianTruth",
    "Law",
    "NotShown",
    "build_network",
    "close",
    "examples_of",
    "flow_error",
    "gaussian_field",
    "gaussian_moments",
    "gaussian_network",
    "inner_times",
    "law",
    "laws_of",
    "obey",
    "observed_order",
    "over_the_middle",
    "parametrize_with_laws",
    "weak_error",
]
