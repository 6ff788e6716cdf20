"""The laws that a component must obey, for its author's tests and for ours.

`laws_of(component)` lists them, those of every component and those of its kind; `parametrize_with_laws` makes each a
pytest test, `obey` checks them all at once, and each `check_...` those that need no sampling.  What is broken is an
AssertionError with the law's name, the place and the numbers; no test framework is needed:

    from sitkit.testing import check_interpolant
    check_interpolant(sitkit.interpolants.create("poly", power=3))
"""

# The order of these imports is the order in which the laws of a kind are checked: algebra first, sampling last.
# isort: off
from sitkit.testing.transport import (
    check_coupling,
    check_diffusion,
    check_elementwise,
    check_interpolant,
    check_target,
    check_timestep,
    check_weighting,
    inner_times,
)
from sitkit.testing import data as data
from sitkit.testing import models as models
from sitkit.testing.every_component import check_component
from sitkit.testing.law import Law, NotShown, close, examples_of, law, laws_of, obey, parametrize_with_laws
from sitkit.testing.models import build_network
from sitkit.testing.solvers import (
    MIDDLE,
    ORDER_TOLERANCE,
    check_guidance,
    check_order,
    check_sampler,
    flow_error,
    observed_order,
    over_the_middle,
    weak_error,
)
from sitkit.testing.truth import (
    MEAN,
    STD,
    Calls,
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
    "Calls",
    "GaussianAverage",
    "GaussianTruth",
    "Law",
    "NotShown",
    "build_network",
    "check_component",
    "check_coupling",
    "check_diffusion",
    "check_elementwise",
    "check_guidance",
    "check_interpolant",
    "check_order",
    "check_sampler",
    "check_target",
    "check_timestep",
    "check_weighting",
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
