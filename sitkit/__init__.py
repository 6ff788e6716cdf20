"""sitkit: which combination of interpolant, target, weight, backbone, sampler and diffusion is best, and by how much.

Every public name is stated in `__init__.pyi` and imported when it is first used, so that `import sitkit` is quick.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
