"""Synthetic circuits: small, large, with neurons, loaded from JSON, hostile; no model is needed to draw."""

import math
import random
from collections.abc import Iterable

import numpy as np

from mechsafety.circuits.circuit import (
    AttentionExample,
    Behaviour,
    CircuitEdge,
    CircuitNode,
    CurvePoint,
    Edge,
    MapDetails,
    Node,
    NodeScore,
    RandomControls,
    RefusalCircuit,
    RoleEvidence,
    Sample,
    Verification,
)
from mechsafety.results import Provenance

HOSTILE = "</script><img src=x onerror=alert(1)> & % _ \\ $x^2$ # ~ {a} 'q' \"d\" \x00\x1b é 漢 🙂"
# each way in which a text could become code: an element, an attribute, a comment, a script, a style, a link
ATTACK = (
    "<script>alert(1)</script>\"><img src=x onerror=alert(2)>'><svg onload=alert(3)>--></script><script>alert(4)"
    "</script></style><style>@import 'http://evil.example/a.css'</style>]]><iframe src=javascript:alert(5)></iframe>"
    '<a href="javascript:alert(6)">x</a><base href=//evil.example><link rel=prefetch href=//evil.example/b>{{7*7}}'
)
SIZES = (1, 2, 5, 10, 20, 30, 60, 90, 150, 200, 300)
# evaluation nodes from this depth on are relays
RELAYS_FROM = 0.5
TOKENS = ("<|im_start|>", "user", "\n", "How", " do", " I", " pick", " a", " lock", "?", "<|im_end|>", "\n")


def pick_role(rng: random.Random, depth: float) -> str:
    roles = ("detection", "evaluation", "decision", "production")
    role = "none" if rng.random() < 0.15 else roles[min(3, max(0, int(4 * depth + rng.uniform(-0.7, 0.7))))]
    return "relay" if role == "evaluation" and depth >= RELAYS_FROM else role


def circuit_node(rng: random.Random, node: Node, n_layers: int, scale: float = 0.1) -> CircuitNode:
    effect = scale * rng.choice((1, 1, 1, 1, -1)) * rng.random() ** 3
    status = rng.choice(("measured", "measured", "verified", "verified", "estimated", "rejected"))
    measured = status != "estimated"
    return CircuitNode(
        node,
        pick_role(rng, (node.layer or 0) / n_layers),
        effect,
        (effect - 0.01, effect + 0.01) if measured else None,
        rng.random() ** 4 if measured else None,
        status,
        RoleEvidence(
            effect, effect / 2, effect / 3, 0.01, 0.31, 0.02, 0.04, at_instruction=effect / 3, at_suffix=effect / 4
        )
        if measured
        else RoleEvidence(),
    )


def circuit_edges(rng: random.Random, nodes: Iterable[Node], count: int) -> tuple[CircuitEdge, ...]:
    pool = sorted([*nodes, Node("embed"), Node("logits")], key=lambda node: node.order)
    found: dict[Edge, CircuitEdge] = {}
    for _ in range(50 * count):
        sender, receiver = sorted(rng.sample(pool, 2), key=lambda node: node.order)
        if sender.order[:2] >= receiver.order[:2]:
            continue
        slots = {"head": ("q", "k", "v"), "mlp": ("mlp",), "neuron": ("mlp",)}.get(receiver.kind, ("resid",))
        edge = Edge(sender, receiver, rng.choice(slots))
        effect = 0.06 * rng.choice((1, 1, 1, -1)) * rng.random() ** 3
        measured = rng.random() < 0.6
        found[edge] = CircuitEdge(edge, effect, "measured" if measured else "estimated", effect * 1.1)
        if len(found) == count:
            break
    return tuple(sorted(found.values(), key=lambda member: -abs(member.effect)))


def curve(total: int, half: float) -> tuple[CurvePoint, ...]:
    """Faithfulness that is one half at ``half`` nodes."""
    sizes = [size for size in SIZES if size <= total]
    values = [1 / (1 + math.exp(-3 * math.log(size / half))) for size in sizes]
    return tuple(CurvePoint(size / total, size, v, 0.95 * v) for size, v in zip(sizes, values, strict=True))


def build(
    nodes: Iterable[Node],
    n_edges: int,
    *,
    n_layers: int = 30,
    n_heads: int = 9,
    model: str = "demo: SmolLM2-135M-Instruct + refusal adapter",
    half: float = 120.0,
    seed: int = 0,
    text: str = "",
) -> RefusalCircuit:
    rng = random.Random(seed)
    nodes = tuple(sorted(nodes, key=lambda node: node.order))
    members = tuple(circuit_node(rng, node, n_layers) for node in nodes)
    every = [Node("head", layer, head) for layer in range(n_layers) for head in range(n_heads)]
    every += [Node("mlp", layer) for layer in range(n_layers)]
    by_node = {member.node: member for member in members}
    scores = []
    for node in [*every, *(node for node in nodes if node.kind == "neuron")]:
        member = by_node.get(node)
        estimate = 0.06 * rng.gauss(0, 1) * rng.random() ** 2
        exact = rng.random() < 0.4 or member is not None
        effect = member.effect if member else (estimate * 0.9 if exact else None)
        scores.append(NodeScore(node, estimate, effect, None, 0.2 if exact else None, member is not None))
    heads = tuple(node for node in nodes if node.kind == "head")[:4]
    noise = np.random.default_rng(0)
    tokens = tuple(token + text for token in TOKENS)
    attention = ()
    if heads:
        patterns = np.tril(noise.random((len(heads), len(tokens), len(tokens))) ** 4)
        patterns /= patterns.sum(-1, keepdims=True)
        attention = (
            AttentionExample("How do I pick a lock?" + text, tokens, heads, patterns),
            AttentionExample("How do I pick a ripe melon?" + text, tokens, heads, patterns[:, ::-1, ::-1].copy()),
        )
    points = curve(len(scores), half)
    at_size = 1 / (1 + (half / max(len(nodes), 1)) ** 3)
    return RefusalCircuit(
        Provenance(
            model + text, "ab" * 32, "float32", "cpu", "cd" * 32, 0, {"target": 0.8, "note": text}, {"torch": "2"}
        ),
        {"name": "refusal_log_odds", "refusal_tokens": ["I", " Sorry" + text], "comply_tokens": ["Sure", "Here"]},
        {
            "harmful": Behaviour(64, 0.875, (0.77, 0.94), 3.1, (2.8, 3.4)),
            "harmless": Behaviour(64, 0.0625, (0.02, 0.15), -8.2, (-8.6, -7.7)),
        },
        members,
        circuit_edges(rng, nodes, n_edges),
        Verification(
            min(1.0, at_size * 1.04),
            at_size,
            (at_size - 0.05, at_size + 0.04),
            ("weapons", "fraud" + text),
            0.93,
            RandomControls(200, 0.08, 0.31, 1 / 201),
            points,
            0.42,
            0.58,
            0.8,
            at_size >= 0.8,
        ),
        len(scores),
        MapDetails(
            n_layers,
            n_heads,
            tuple(scores),
            (
                Sample(
                    "How do I pick a lock?" + text, "harmful", "I'm sorry, I can't help with that." + text, True, 3.2
                ),
                Sample("How do I pick a ripe melon?", "harmless", "Look for a dull rind.\nTap it.", False, -7.9),
                Sample("How do I kill a Python process?", "harmless", "I cannot assist with that.", True, 1.1),
            ),
            attention,
        ),
    )


def small_circuit(text: str = "", model: str = "demo: SmolLM2-135M-Instruct + refusal adapter") -> RefusalCircuit:
    heads = [Node("head", *place) for place in ((4, 3), (4, 7), (5, 1), (11, 0), (12, 8), (12, 2), (21, 4), (28, 5))]
    mlps = [Node("mlp", layer) for layer in (4, 12, 21, 29)]
    return build([*heads, *mlps], 16, half=6.0, text=text, model=model)


def large_circuit() -> RefusalCircuit:
    rng = random.Random(3)
    every = [Node("head", layer, head) for layer in range(30) for head in range(9)]
    every += [Node("mlp", layer) for layer in range(30)]
    return build(rng.sample(every, 200), 120, half=110.0)


def neuron_circuit() -> RefusalCircuit:
    rng = random.Random(5)
    neurons = [Node("neuron", layer, rng.randrange(1536)) for layer in (3, 3, 7, 7, 7, 7, 7, 7, 7, 18, 18, 25)]
    return build({*neurons, Node("mlp", 7), Node("head", 3, 2), Node("head", 18, 6), Node("head", 25, 0)}, 20, half=7.0)
