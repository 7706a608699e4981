"""mechsafety: which parts of a chat model make it refuse, how they work together, and how fragile that is.

What most users need stands here; the rest is in its room, such as ``mechsafety.neurons`` or ``mechsafety.monitors``.
"""

import lazy_loader

# torch and TransformerLens load on first use, so that importing the package is fast; names are those of __init__.pyi
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
