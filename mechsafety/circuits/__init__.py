"""Circuits: what they are made of, how they are found, and how they are checked."""

from typing import TYPE_CHECKING

import lazy_loader

# the dataclasses of `circuit` are read by viz, which must not load torch
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "circuit": ["Behaviour", "CircuitEdge", "CircuitNode", "RefusalCircuit", "RoleEvidence"],
        "ablations": ["measure_ablation"],
        "search": ["SearchResult", "search_nodes"],
        "draw": ["Draw", "draw_pairs"],
        "comparison": ["CircuitComparison", "compare_circuits"],
        "edge_faithfulness": ["EdgeMeter"],
        "edge_search": ["EdgeCircuit", "acdc", "discover_edges"],
        "faithfulness": ["FaithfulnessMeter"],
        "neurons": ["NeuronMeter"],
        "edges": ["estimate_edges", "measure_edges"],
        "behaviour": ["check_behaviour"],
        "map": [
            "assemble_circuit",
            "map_refusal_circuit",
            "measure_parts",
            "rank_parts",
            "search_circuit",
            "split_pairs",
            "verify_circuit",
            "wire_circuit",
        ],
        "options": ["MapOptions"],
        "roles": ["assign_roles", "role_evidence"],
        "verification.outcome": ["Verification"],
        "verification.verify": ["verify"],
    },
)

if TYPE_CHECKING:
    from mechsafety.circuits.ablations import measure_ablation
    from mechsafety.circuits.behaviour import check_behaviour
    from mechsafety.circuits.circuit import (
        Behaviour,
        CircuitEdge,
        CircuitNode,
        RefusalCircuit,
        RoleEvidence,
    )
    from mechsafety.circuits.comparison import CircuitComparison, compare_circuits
    from mechsafety.circuits.draw import Draw, draw_pairs
    from mechsafety.circuits.edge_faithfulness import EdgeMeter
    from mechsafety.circuits.edge_search import EdgeCircuit, acdc, discover_edges
    from mechsafety.circuits.edges import estimate_edges, measure_edges
    from mechsafety.circuits.faithfulness import FaithfulnessMeter
    from mechsafety.circuits.map import (
        assemble_circuit,
        map_refusal_circuit,
        measure_parts,
        rank_parts,
        search_circuit,
        split_pairs,
        verify_circuit,
        wire_circuit,
    )
    from mechsafety.circuits.neurons import NeuronMeter
    from mechsafety.circuits.options import MapOptions
    from mechsafety.circuits.roles import assign_roles, role_evidence
    from mechsafety.circuits.search import SearchResult, search_nodes
    from mechsafety.circuits.verification.outcome import Verification
    from mechsafety.circuits.verification.verify import verify
