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
            "DirectAttribution",
            "EdgeScores",
            "HeadAttribution",
            "LogitLens",
            "NodeAttribution",
            "direct_logit_attribution",
            "edge_attribution",
            "head_attribution",
            "logit_lens",
            "node_attribution",
        ],
        "cache": ["ActivationCache"],
        "circuits.circuit": ["RefusalCircuit"],
        "circuits.comparison": ["CircuitComparison", "compare_circuits"],
        "circuits.edge_search": ["EdgeCircuit", "acdc", "discover_edges"],
        "circuits.map": ["map_refusal_circuit"],
        "circuits.options": ["MapOptions"],
        "directions": [
            "DirectionIO",
            "RefusalDirection",
            "RefusalSubspace",
            "direction_io",
            "iti_direction",
            "refusal_direction",
            "refusal_subspace",
            "repe_direction",
        ],
        "interventions": [
            "Direction",
            "StrengthSweep",
            "ablate",
            "strength_sweep",
            "orthogonalized",
            "project_out",
            "steer",
        ],
        "nodes": ["Edge", "Node"],
        "errors": ["MechsafetyError", "NoRefusal"],
        "metrics": ["RefusalLogOdds"],
        "models": ["LensModel", "load_model"],
        "monitors": ["GuardReport", "LabelledPrompts", "SafetyGuard", "compare_guards"],
        "neurons": [
            "AlignmentTax",
            "CausalCurve",
            "NeuronAgreement",
            "NeuronCards",
            "NeuronContrast",
            "NeuronScores",
            "PatchedReplies",
            "ReplyLikelihood",
            "alignment_tax",
            "causal_effect_curve",
            "compare_neurons",
            "contrast_neurons",
            "describe_neurons",
            "dynamic_patching",
            "safety_neurons",
        ],
        "patching": [
            "At",
            "PatchMap",
            "PathMap",
            "PathMatrix",
            "Projection",
            "activation_patching",
            "path_matrix",
            "path_patching",
            "path_projection",
        ],
        "probes": ["ProbeReport", "probe_layers"],
        "prompts": ["PromptPair", "PromptPairs", "builtin_prompts", "load_instructions"],
        "replies": [
            "JudgeAgreement",
            "JudgedReplies",
            "TextClassifier",
            "is_refusal",
            "judge_agreement",
            "judge_replies",
        ],
        "sites": ["Site", "SiteKind"],
    },
)
__all__ = ["__version__", *_names]


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from mechsafety import testbed
    from mechsafety.attribution import (
        DirectAttribution,
        EdgeScores,
        HeadAttribution,
        LogitLens,
        NodeAttribution,
        direct_logit_attribution,
        edge_attribution,
        head_attribution,
        logit_lens,
        node_attribution,
    )
    from mechsafety.cache import ActivationCache
    from mechsafety.circuits import (
        CircuitComparison,
        EdgeCircuit,
        MapOptions,
        RefusalCircuit,
        acdc,
        compare_circuits,
        discover_edges,
        map_refusal_circuit,
    )
    from mechsafety.directions import (
        DirectionIO,
        RefusalDirection,
        RefusalSubspace,
        direction_io,
        iti_direction,
        refusal_direction,
        refusal_subspace,
        repe_direction,
    )
    from mechsafety.errors import MechsafetyError, NoRefusal
    from mechsafety.interventions import (
        Direction,
        StrengthSweep,
        ablate,
        orthogonalized,
        project_out,
        steer,
        strength_sweep,
    )
    from mechsafety.metrics import RefusalLogOdds
    from mechsafety.models import LensModel, load_model
    from mechsafety.monitors import GuardReport, LabelledPrompts, SafetyGuard, compare_guards
    from mechsafety.neurons import (
        AlignmentTax,
        CausalCurve,
        NeuronAgreement,
        NeuronCards,
        NeuronContrast,
        NeuronScores,
        PatchedReplies,
        ReplyLikelihood,
        alignment_tax,
        causal_effect_curve,
        compare_neurons,
        contrast_neurons,
        describe_neurons,
        dynamic_patching,
        safety_neurons,
    )
    from mechsafety.nodes import Edge, Node
    from mechsafety.patching import (
        At,
        PatchMap,
        PathMap,
        PathMatrix,
        Projection,
        activation_patching,
        path_matrix,
        path_patching,
        path_projection,
    )
    from mechsafety.probes import ProbeReport, probe_layers
    from mechsafety.prompts import (
        PromptPair,
        PromptPairs,
        builtin_prompts,
        load_instructions,
    )
    from mechsafety.replies import (
        JudgeAgreement,
        JudgedReplies,
        TextClassifier,
        is_refusal,
        judge_agreement,
        judge_replies,
    )
    from mechsafety.sites import Site, SiteKind
