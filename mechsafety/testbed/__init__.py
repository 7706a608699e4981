"""Models whose refusal circuit is known, and the scoring of found circuits against the truth."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
