"""mechsafety: which parts of a chat model make it refuse, how they work together, and how fragile that is.

What most users need stands here; the rest is in its room, such as ``mechsafety.neurons`` or ``mechsafety.monitors``.
"""

from typing import Any

import lazy_loader

# torch and TransformerLens load on first use, so that importing the package is fast; names are those of __init__.pyi
_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """A public name of the package; of another name the error says where it stands."""
    if name in __all__ or name.startswith("_"):
        return _attribute(name)
    from mechsafety.names import missing

    raise AttributeError(missing(name))
