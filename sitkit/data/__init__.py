"""Sets of examples.  `dataset` has the contract; each source of data has its own module."""

from sitkit.data import absent as absent
from sitkit.data import digits as digits
from sitkit.data import images as images
from sitkit.data import mixture as mixture
from sitkit.data import points as points
