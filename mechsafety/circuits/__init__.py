"""Circuits: what they are made of, how they are found, and how they are checked."""

import lazy_loader

# the dataclasses of `circuit` are read by viz, which must not load torch
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
