"""mechsafety: which parts of a chat model make it refuse, how they work together, and how fragile that is."""

import importlib
from typing import TYPE_CHECKING, Any

from mechsafety.version import __version__

# public name -> module; torch and TransformerLens load on first use, so that importing the package is fast
_HOMES = {
    "MechsafetyError": "mechsafety.errors",
    "NoRefusal": "mechsafety.errors",
    "Site": "mechsafety.sites",
    "SiteKind": "mechsafety.sites",
    "PromptPair": "mechsafety.prompts",
    "PromptPairs": "mechsafety.prompts",
    "builtin_prompts": "mechsafety.prompts",
    "load_instructions": "mechsafety.prompts",
    "load_model": "mechsafety.models",
    "LensModel": "mechsafety.models",
    "ActivationCache": "mechsafety.cache",
    "RefusalLogOdds": "mechsafety.metrics",
    "is_refusal": "mechsafety.metrics",
    "activation_patching": "mechsafety.patching",
    "PatchMap": "mechsafety.patching",
    "path_patching": "mechsafety.patching",
    "PathMap": "mechsafety.patching",
    "edge_attribution": "mechsafety.attribution",
    "EdgeScores": "mechsafety.attribution",
    "head_attribution": "mechsafety.attribution",
    "HeadAttribution": "mechsafety.attribution",
    "node_attribution": "mechsafety.attribution",
    "NodeAttribution": "mechsafety.attribution",
    "Node": "mechsafety.circuits",
    "Edge": "mechsafety.circuits",
    "RefusalCircuit": "mechsafety.circuits",
    "map_refusal_circuit": "mechsafety.circuits",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from mechsafety.attribution import (
        EdgeScores,
        HeadAttribution,
        NodeAttribution,
        edge_attribution,
        head_attribution,
        node_attribution,
    )
    from mechsafety.cache import ActivationCache
    from mechsafety.circuits import Edge, Node, RefusalCircuit, map_refusal_circuit
    from mechsafety.errors import MechsafetyError, NoRefusal
    from mechsafety.metrics import RefusalLogOdds, is_refusal
    from mechsafety.models import LensModel, load_model
    from mechsafety.patching import PatchMap, PathMap, activation_patching, path_patching
    from mechsafety.prompts import (
        PromptPair,
        PromptPairs,
        builtin_prompts,
        load_instructions,
    )
    from mechsafety.sites import Site, SiteKind


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mechsafety' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
