"""Networks that predict y from (x, t, label).  The components are in `backbone`; each network has its own module."""

import sys

from sitkit.backbones import backbone as backbone
from sitkit.registry import RegistryPackage

sys.modules[__name__].__class__ = RegistryPackage
