"""Circuits: what they are made of, how they are found, and how they are checked."""

from typing import TYPE_CHECKING

import lazy_loader

# the dataclasses of `circuit` are read by viz, which must not load torch
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "circuit": ["Behaviour", "CircuitEdge", "CircuitNode", "RefusalCircuit", "RoleEvidence", "Verification"],
        "ablations": ["measure_ablation"],
        "discover": ["discover"],
        "draw": ["Draw", "draw_pairs"],
        "compare": ["CircuitComparison", "compare_circuits"],
        "edge_meter": ["EdgeMeter"],
        "edge_search": ["EdgeCircuit", "acdc", "discover_edges"],
        "meters": ["FaithfulnessMeter"],
        "neurons": ["NeuronMeter"],
        "edges": ["estimate_edges", "measure_edges"],
        "behaviour": ["check_behaviour"],
        "refusal": ["map_refusal_circuit"],
        "roles": ["assign_roles", "role_evidence"],
        "verify": ["verify"],
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
        Verification,
    )
    from mechsafety.circuits.compare import CircuitComparison, compare_circuits
    from mechsafety.circuits.discover import discover
    from mechsafety.circuits.draw import Draw, draw_pairs
    from mechsafety.circuits.edge_meter import EdgeMeter
    from mechsafety.circuits.edge_search import EdgeCircuit, acdc, discover_edges
    from mechsafety.circuits.edges import estimate_edges, measure_edges
    from mechsafety.circuits.meters import FaithfulnessMeter
    from mechsafety.circuits.neurons import NeuronMeter
    from mechsafety.circuits.refusal import map_refusal_circuit
    from mechsafety.circuits.roles import assign_roles, role_evidence
    from mechsafety.circuits.verify import verify
