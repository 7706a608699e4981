"""mechsafety: which parts of a chat model make it refuse, how they work together, and how fragile that is."""

from typing import TYPE_CHECKING

import lazy_loader

from mechsafety.version import __version__

# torch and TransformerLens load on first use, so that importing the package is fast
__getattr__, _, _names = lazy_loader.attach(
    __name__,
    submodules=["testbed"],
    submod_attrs={
        "attribution": [
            "EdgeScores",
            "HeadAttribution",
            "NodeAttribution",
            "edge_attribution",
            "head_attribution",
            "node_attribution",
        ],
        "cache": ["ActivationCache"],
        "circuits.circuit": ["RefusalCircuit"],
        "circuits.refusal": ["map_refusal_circuit"],
        "nodes": ["Edge", "Node"],
        "errors": ["MechsafetyError", "NoRefusal"],
        "metrics": ["RefusalLogOdds", "is_refusal"],
        "models": ["LensModel", "load_model"],
        "patching": ["PatchMap", "PathMap", "activation_patching", "path_patching"],
        "prompts": ["PromptPair", "PromptPairs", "builtin_prompts", "load_instructions"],
        "sites": ["Site", "SiteKind"],
    },
)
__all__ = ["__version__", *_names]


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from mechsafety import testbed
    from mechsafety.attribution import (
        EdgeScores,
        HeadAttribution,
        NodeAttribution,
        edge_attribution,
        head_attribution,
        node_attribution,
    )
    from mechsafety.cache import ActivationCache
    from mechsafety.circuits import RefusalCircuit, map_refusal_circuit
    from mechsafety.errors import MechsafetyError, NoRefusal
    from mechsafety.metrics import RefusalLogOdds, is_refusal
    from mechsafety.models import LensModel, load_model
    from mechsafety.nodes import Edge, Node
    from mechsafety.patching import PatchMap, PathMap, activation_patching, path_patching
    from mechsafety.prompts import (
        PromptPair,
        PromptPairs,
        builtin_prompts,
        load_instructions,
    )
    from mechsafety.sites import Site, SiteKind
