"""Networks that predict y from (x, t, label).  The components are in `backbone`; each network has its own module."""

from sitkit.backbones import backbone as backbone
