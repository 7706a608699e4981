"""A random plan of where the parts of a planted circuit lie in a model, and the truth that follows from the plan."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge, Node
from mechsafety.testbed.truth import Truth

STAGES = ("detection", "evaluation", "decision", "production")
# the stages that can be doubled, by the number of doubled stages
DOUBLED: tuple[tuple[tuple[str, ...], ...], ...] = (
    ((),),
    (("detection",), ("evaluation",), ("decision",)),
    (("detection", "evaluation"), ("detection", "decision")),
)
# number of neurons of an MLP without a function
IDLE_NEURONS = 24


@dataclass(frozen=True, slots=True)
class PlantedPart:
    """One head or neuron that is planted.

    Attributes:
        node: Where the part lies.
        kind: A stage of the circuit, or ``decoy``.
        length: Share of its stage's output that the part writes. 2 for a decoy neuron, because the embedding holds the
            neuron's vector with the other sign.
        doubled: Whether two parts write what this part reads. It must then work with half of its input.
        number: Number of the decoy.
    """

    node: Node
    kind: str
    length: float = 1.0
    doubled: bool = False
    number: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """All parts of a planted model.

    Attributes:
        parts: Parts of the circuit, and decoys.
        doubled: Stages that are doubled.
        d_mlp: Number of neurons of every MLP.
    """

    parts: tuple[PlantedPart, ...]
    doubled: tuple[str, ...]
    d_mlp: int

    def part(self, node: Node) -> PlantedPart:
        """The part at a node."""
        return next(part for part in self.parts if part.node == node)

    def heads_of(self, layer: int) -> list[int]:
        """Planted heads of a layer."""
        return sorted(p.node.index or 0 for p in self.parts if p.node.kind == "head" and p.node.layer == layer)

    def neurons_of(self, layer: int) -> list[int]:
        """Planted neurons of a layer."""
        return sorted(p.node.index or 0 for p in self.parts if p.node.kind == "neuron" and p.node.layer == layer)

    def truth(self) -> Truth:
        """Nodes, edges, roles, decoys and backups."""
        stages = {stage: _coarse([p.node for p in self.parts if p.kind == stage]) for stage in STAGES}
        roles = {node: stage for stage in STAGES for node in stages[stage]}
        neurons = {p.node: p.kind for p in self.parts if p.node.kind == "neuron" and p.kind != "decoy"}
        slots = ("v", "mlp", "v", "mlp")
        edges = [
            Edge(sender, receiver, slot)
            for before, after, slot in zip(("embed", *STAGES), STAGES, slots, strict=False)
            for sender, receiver in product([Node("embed")] if before == "embed" else stages[before], stages[after])
        ]
        edges += [Edge(sender, Node("logits"), "resid") for sender in stages["production"]]
        decoys = [p.node for p in self.parts if p.kind == "decoy"]
        decoys += [node for node in _coarse(decoys) if node.kind == "mlp" and node not in roles]
        return Truth(
            _ordered(roles),
            _ordered(neurons),
            tuple(edges),
            {node: role for group in (roles, neurons) for node, role in group.items()},
            _ordered(decoys),
            tuple(tuple(stages[stage]) for stage in self.doubled),
        )


def make_plan(rng: random.Random, layers: int, heads: int, decoys: int, backups: int, neurons: int) -> Plan:
    """Draw the place of every part.

    Raises:
        MechsafetyError: Numbers out of range, or parts that do not fit into the model.
    """
    if layers < 2 or heads < 1 or decoys < 0 or neurons < 1 or backups not in (0, 1, 2):
        raise MechsafetyError(
            f"layers={layers}, heads={heads}, decoys={decoys}, backups={backups}, neurons={neurons}",
            expected="at least 2 layers, 1 head, 0 decoys, 1 neuron, and 0 to 2 backups",
        )
    fitting = {doubled: found for doubled in DOUBLED[backups] if (found := _layouts(layers, heads, doubled))}
    if not fitting:
        raise MechsafetyError(
            f"{backups} backups do not fit into {layers} layers of {heads} heads", hint="a larger model"
        )
    doubled = rng.choice(sorted(fitting))
    layout = dict(zip(STAGES, rng.choice(fitting[doubled]), strict=True))
    d_mlp = IDLE_NEURONS + 2 * neurons + decoys
    free_heads = {layer: rng.sample(range(heads), heads) for layer in range(layers)}
    free_neurons = {layer: rng.sample(range(d_mlp), d_mlp) for layer in range(layers)}
    parts = []
    for before, stage in zip(("", *STAGES), STAGES, strict=False):
        for layer in layout[stage]:
            if stage in ("detection", "decision"):
                length = 1.0 / len(layout[stage])
                parts.append(PlantedPart(Node("head", layer, free_heads[layer].pop()), stage, length))
                continue
            alone = stage == "evaluation" and bool({"evaluation", "decision"} & set(doubled))
            count = 1 if alone else neurons
            length = 1.0 / count / len(layout[stage])
            # production neurons read the decision, which is doubled where the evaluation is
            sources = {before, "evaluation"} if stage == "production" else {before}
            content = bool(sources & set(doubled))
            parts += [
                PlantedPart(Node("neuron", layer, free_neurons[layer].pop()), stage, length, content)
                for _ in range(count)
            ]
    circuit_mlps = {layer for stage in ("evaluation", "production") for layer in layout[stage]}
    outside = [layer for layer in range(layers) if layer not in circuit_mlps]
    for number in range(decoys):
        spare = [layer for layer in range(layers) if len(free_heads[layer]) > 0]
        if number % 2 == 0 and spare:
            layer = rng.choice(spare)
            parts.append(PlantedPart(Node("head", layer, free_heads[layer].pop()), "decoy", number=number))
            continue
        # decoy neurons alternate between an MLP outside the circuit and any MLP
        layer = rng.choice(outside if outside and number % 4 == 1 else range(layers))
        # length 2, because the embedding holds the decoy's vector with the other sign
        parts.append(PlantedPart(Node("neuron", layer, free_neurons[layer].pop()), "decoy", 2.0, number=number))
    return Plan(tuple(parts), doubled, d_mlp)


def _layouts(layers: int, heads: int, doubled: Sequence[str]) -> list[tuple[tuple[int, ...], ...]]:
    """All choices of layers for the four stages; a doubled stage has two."""
    every = range(layers)

    def choices(stage: str) -> list[tuple[int, ...]]:
        if stage not in doubled:
            return [(layer,) for layer in every]
        # two MLPs lie in two layers; two heads may lie in one layer
        return [(a, b) for a, b in product(every, every) if a < b or (a == b and stage != "evaluation")]

    found: list[tuple[tuple[int, ...], ...]] = []
    for detect, evaluate, decide, produce in product(*map(choices, STAGES)):
        in_order = max(detect) <= min(evaluate) and max(evaluate) < min(decide) and max(decide) <= min(produce)
        together = [*detect, *decide]
        if in_order and all(together.count(layer) <= heads for layer in together):
            found.append((detect, evaluate, decide, produce))
    return found


def _coarse(nodes: Sequence[Node]) -> list[Node]:
    """The nodes, with each neuron replaced by its MLP; each node once."""
    return list(dict.fromkeys(Node("mlp", node.layer) if node.kind == "neuron" else node for node in nodes))


def _ordered(nodes: Iterable[Node]) -> tuple[Node, ...]:
    return tuple(sorted(nodes, key=lambda node: node.order))
