"""What an interactive page knows of each node beyond its place: numbers, evidence, tokens, attention, ablations."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mechsafety.circuits.circuit import Ablation, AttentionExample, CircuitNode, Notes, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node
from mechsafety.results import visible
from mechsafety.viz.look import Look
from mechsafety.viz.marks import blend, effect_fill, grey, magnitude, node_strength
from mechsafety.viz.style import Style
from mechsafety.viz.words import (
    EDGE_TITLE,
    ESTIMATE_TITLE,
    EVIDENCE_WORDS,
    LINKING_TITLE,
    STATUS_WORDS,
    SUM_TITLES,
    evidence_values,
    interval,
    number,
    p_value,
    percent,
    replies_changed,
)

TOKENS_SHOWN = 12
ROWS = ("effect, of the gap", "95 % interval", "p, adjusted", "role", "status")


def card_words(look: Look) -> dict[str, Any]:
    """The words that all cards and tooltips share, so that a page holds them once."""
    return {
        "labels": {str(node): text for node, text in look.labels.items()},
        "roles": dict(look.role_names),
        "rows": list(ROWS),
        "status": list(STATUS_WORDS.values()),
        "evidence": list(EVIDENCE_WORDS.values()),
        "edge": EDGE_TITLE,
        "estimate": ESTIMATE_TITLE,
        "linking": LINKING_TITLE,
        "sums": list(SUM_TITLES),
    }


def node_cards(circuit: RefusalCircuit, notes: Mapping[Node, Notes], look: Look) -> dict[str, dict[str, Any]]:
    """The card of each node, ready for JSON."""
    return {str(member.node): _card(member, notes.get(member.node, Notes()), look) for member in circuit.by_mlp().nodes}


def ablation_data(ablations: Sequence[Ablation]) -> list[dict[str, Any]]:
    """Ablations, ready for JSON."""
    rows = []
    for one in ablations:
        text = f"metric {number(one.score[0], 2)} before, {number(one.score[1], 2)} after"
        said = replies_changed(one)
        text += f"; {said}" if said else ""
        rows.append(
            {
                "name": one.name,
                "text": text,
                "nodes": [str(node) for node in one.nodes],
                "effects": {str(node): float(f"{value:.6g}") for node, value in one.effects.items()},
            }
        )
    return rows


def ablations_on(circuit: RefusalCircuit, ablations: Sequence[Ablation], style: Style) -> list[dict[str, Any]]:
    """The same with ``fills``: the colour that each node with an effect then gets in the picture of the circuit."""
    drawn_as = {str(member.node): str(member.node.home) for member in circuit.nodes if member.evidence.together}
    circuit = circuit.by_mlp()
    largest = max((magnitude(member.effect) for member in circuit.nodes), default=0.0) or 1.0
    roles = {member.node: member.role for member in circuit.nodes}
    tone = grey if style.grayscale else str

    def fill(node: Node, effect: float) -> str:
        if not effect:
            return blend(style.look.colour(roles[node]), 0.0)
        return tone(effect_fill(style.look.colour(roles[node]), node_strength(effect, largest)))

    rows = ablation_data(ablations)
    for row, one in zip(rows, ablations, strict=True):
        known = {node: effect for node, effect in one.effects.items() if node in roles and node not in one.nodes}
        row["nodes"] = list(dict.fromkeys(drawn_as.get(name, name) for name in row["nodes"]))
        row["fills"] = {str(node): fill(node, effect) for node, effect in known.items()}
    return rows


def attention_data(examples: Sequence[AttentionExample]) -> list[dict[str, Any]]:
    """Attention patterns as bytes (255 stands for 1), one base64 text per head.

    Raises:
        MechsafetyError: A pattern's shape does not fit its heads and tokens.
    """
    rows = []
    for example in examples:
        values = check_pattern(example)
        packed = np.round(255 * np.clip(np.nan_to_num(values), 0, 1)).astype(np.uint8)
        rows.append(
            {
                "prompt": " ".join(example.prompt.split()),
                "tokens": [visible(token) for token in example.tokens],
                "heads": {
                    str(head): base64.b64encode(pattern.tobytes()).decode()
                    for head, pattern in zip(example.heads, packed, strict=True)
                },
            }
        )
    return rows


def check_pattern(example: AttentionExample) -> np.ndarray:
    """The patterns ``[head query key]`` as floats.

    Raises:
        MechsafetyError: Their shape does not fit the heads and tokens.
    """
    values = np.array(example.patterns.tolist(), dtype=float)
    shape = (len(example.heads), len(example.tokens), len(example.tokens))
    if values.shape != shape or 0 in shape:
        raise MechsafetyError(
            f"attention patterns of shape {tuple(example.patterns.shape)}",
            expected=f"[head query key] = {shape}, none of them 0",
        )
    return values


def _card(member: CircuitNode, notes: Notes, look: Look) -> dict[str, Any]:
    card: dict[str, Any] = {
        "rows": [
            f"{number(member.effect)} ({percent(member.effect)})",
            interval(member.ci) if member.ci else "not measured",
            p_value(member.p_value).removeprefix("p "),
            look.role(member.role),
            list(STATUS_WORDS).index(member.status),
        ],
        "evidence": evidence_values(member),
    }
    for name in ("promotes", "suppresses"):
        tokens = getattr(notes, name)[:TOKENS_SHOWN]
        if tokens:
            card[name] = [visible(token) for token in tokens]
    if notes.spans:
        card["spans"] = [[name, round(value, 4)] for name, value in notes.spans.items()]
    if notes.texts:
        card["texts"] = [
            [[visible(token) for token in tokens], [round(value, 4) for value in values]]
            for tokens, values in notes.texts
        ]
    return card
