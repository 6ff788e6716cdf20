"""Sets of examples.  `dataset` has the contract; each source of data has its own module."""

from sitkit.data import absent as absent
from sitkit.data import digits as digits
from sitkit.data import folder as folder
from sitkit.data import hub as hub
from sitkit.data import images as images
from sitkit.data import latents as latents
from sitkit.data import mixture as mixture
from sitkit.data import points as points
