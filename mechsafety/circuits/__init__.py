"""Circuits: what they are made of, how they are found, and how they are checked."""

from mechsafety.circuits.circuit import (
    Behaviour,
    CircuitEdge,
    CircuitNode,
    RefusalCircuit,
    RoleEvidence,
    Verification,
)
from mechsafety.circuits.discover import FaithfulnessMeter, discover
from mechsafety.circuits.refusal import check_behaviour, map_refusal_circuit
from mechsafety.circuits.roles import assign_roles, role_evidence
from mechsafety.circuits.verify import verify
from mechsafety.nodes import Edge, Node

__all__ = [
    "Behaviour",
    "CircuitEdge",
    "CircuitNode",
    "Edge",
    "FaithfulnessMeter",
    "Node",
    "RefusalCircuit",
    "RoleEvidence",
    "Verification",
    "assign_roles",
    "check_behaviour",
    "discover",
    "map_refusal_circuit",
    "role_evidence",
    "verify",
]
