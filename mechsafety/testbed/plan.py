"""A random plan of where the parts of a planted circuit lie in a model, and the truth that follows from the plan."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from mechsafety.errors import MechsafetyError
from mechsafety.nodes import EMBED, LOGITS, Edge, Node
from mechsafety.testbed.truth import Truth

STAGES = ("detection", "evaluation", "decision", "production")
# the stages that can be doubled, by the number of doubled stages
DOUBLED: tuple[tuple[tuple[str, ...], ...], ...] = (
    ((),),
    (("detection",), ("evaluation",), ("decision",)),
    (("detection", "evaluation"), ("detection", "decision")),
)
# production neurons that write against refusal, and what share of the others' writing they take back
AGAINST, OPPOSED = "production against", 0.5
# number of neurons of an MLP without a function
IDLE_NEURONS = 24


@dataclass(frozen=True, slots=True)
class Write:
    """One thing that a part writes.

    Attributes:
        read: Direction that the part reads.
        written: Direction that it writes.
        side: Prompts on which the gain is set, ``harmful`` or ``harmless``.
        sign: 1, or -1 to write the opposite.
    """

    read: str
    written: str
    side: str = "harmful"
    sign: float = 1.0


@dataclass(frozen=True, slots=True)
class Work:
    """What a head or a neuron does.

    Attributes:
        at: Position at which it writes.
        writes: What it writes. A neuron fires where all that it reads is there, and writes once.
        looks_at: Position that a head attends to; empty for a neuron, which reads at its own position.
        asks: Direction at ``at`` that makes a head's query; by default the position's own.
        falls_back: Whether a head attends to the start token where it finds nothing.
    """

    at: str
    writes: tuple[Write, ...]
    looks_at: str = ""
    asks: str = ""
    falls_back: bool = True


@dataclass(frozen=True, slots=True)
class PlantedPart:
    """One head or neuron that is planted.

    Attributes:
        node: Where the part lies.
        kind: The group of parts that do the same. Its first word is the role, or ``decoy``.
        work: What the part reads and writes.
        length: Share of its group's output that the part writes; below 0 if it writes the opposite. 2 for a decoy
            neuron, because the embedding holds the neuron's vector with the other sign.
        doubled: Whether two parts write what this part reads. It must then work with half of its input.
        number: Number of the decoy.
    """

    node: Node
    kind: str
    work: Work
    length: float = 1.0
    doubled: bool = False
    number: int = 0

    @property
    def role(self) -> str:
        """The role, or ``decoy``."""
        return self.kind.split()[0]


# what the parts of a circuit of four stages do
WORK = {
    "detection": Work("end", (Write("harm", "detected"), Write("benign", "cleared", "harmless")), "topic"),
    "evaluation": Work("end", (Write("detected", "verdict"),)),
    "decision": Work("assistant", (Write("verdict", "decision"),), "end"),
    "production": Work("assistant", (Write("decision", "refuse"),)),
}
# a decoy head looks from every later position, because all hold the constant
DECOY_HEAD = Work(
    "end", (Write("harm", "decoy"), Write("benign", "decoy", "harmless", -1.0)), "topic", "constant", falls_back=False
)
DECOY_NEURON = Work("topic", (Write("harm", "decoy"),))
# directions that no part has to itself; and the positions that heads can look at, the slowest rotary dimension first
DIRECTIONS = ("constant", "topic", "end", "start", "assistant", "harm", "benign")
KEYS = ("topic", "end", "start")
WIRES = tuple(zip(("embed", *STAGES), (*STAGES, "logits"), strict=True))


@dataclass(frozen=True, slots=True)
class Plan:
    """All parts of a planted model.

    Attributes:
        parts: Parts of the circuit, and decoys.
        doubled: Stages that are doubled.
        d_mlp: Number of neurons of every MLP.
        wires: Which group of parts reads which; ``embed`` and ``logits`` are groups too.
        directions: Directions of the residual stream besides those of words and decoys.
        values: Directions that key-value heads carry.
        keys: Positions that heads can look at.
        two_words: Whether two words of a prompt are harmful, and neither alone.
    """

    parts: tuple[PlantedPart, ...]
    doubled: tuple[str, ...]
    d_mlp: int
    wires: tuple[tuple[str, str], ...] = WIRES
    directions: tuple[str, ...] = (*DIRECTIONS, "detected", "cleared", "verdict", "decision", "refuse")
    values: tuple[str, ...] = ("harm", "benign", "verdict")
    keys: tuple[str, ...] = KEYS
    two_words: bool = False

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
        members = [part for part in self.parts if part.role != "decoy"]
        kinds = dict.fromkeys(part.kind for part in sorted(members, key=lambda part: STAGES_FIRST.index(part.role)))
        groups = {kind: _coarse([part.node for part in members if part.kind == kind]) for kind in kinds}
        roles = {node: kind.split()[0] for kind in kinds for node in groups[kind]}
        neurons = {part.node: part.role for part in members if part.node.kind == "neuron"}
        ends = {**groups, "embed": [EMBED], "logits": [LOGITS]}
        edges = [
            Edge(sender, receiver, {"head": "v", "mlp": "mlp", "logits": "resid"}[receiver.kind])
            for before, after in self.wires
            for sender, receiver in product(ends[before], ends[after])
        ]
        decoys = [part.node for part in self.parts if part.role == "decoy"]
        decoys += [node for node in _coarse(decoys) if node.kind == "mlp" and node not in roles]
        return Truth(
            _ordered(roles),
            _ordered(neurons),
            tuple(edges),
            {node: role for group in (roles, neurons) for node, role in group.items()},
            _ordered(decoys),
            tuple(tuple(groups[stage]) for stage in self.doubled),
        )


# the order in which roles are listed
STAGES_FIRST = (*STAGES, "relay")


def make_plan(
    rng: random.Random, layers: int, heads: int, decoys: int, backups: int, neurons: int, opposing: bool = False
) -> Plan:
    """Draw the place of every part.

    Raises:
        MechsafetyError: Numbers out of range, or parts that do not fit into the model.
    """
    if layers < 2 or heads < 1 or decoys < 0 or neurons < 1 or backups not in (0, 1, 2):
        raise MechsafetyError(
            f"layers={layers}, heads={heads}, decoys={decoys}, backups={backups}, neurons={neurons}",
            expected="at least 2 layers, 1 head, 0 decoys, 1 neuron, and 0 to 2 backups",
        )
    fitting = {}
    for doubled in DOUBLED[backups]:
        found = [one for one in _layouts(layers, heads, doubled) if not opposing or _spare(one, layers)]
        if found:
            fitting[doubled] = found
    if not fitting:
        more = " and opposing parts" if opposing else ""
        raise MechsafetyError(
            f"{backups} backups{more} do not fit into {layers} layers of {heads} heads", hint="a larger model"
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
                parts.append(PlantedPart(Node("head", layer, free_heads[layer].pop()), stage, WORK[stage], length))
                continue
            alone = stage == "evaluation" and bool({"evaluation", "decision"} & set(doubled))
            count = 1 if alone else neurons
            length = 1.0 / count / len(layout[stage])
            # production neurons read the decision, which is doubled where the evaluation is
            sources = {before, "evaluation"} if stage == "production" else {before}
            content = bool(sources & set(doubled))
            parts += [
                PlantedPart(Node("neuron", layer, free_neurons[layer].pop()), stage, WORK[stage], length, content)
                for _ in range(count)
            ]
    wires = WIRES
    if opposing:
        produced = [part for part in parts if part.kind == "production"]
        layer = rng.choice(_spare(tuple(layout[stage] for stage in STAGES), layers))
        against = [
            replace(
                part, node=Node("neuron", layer, free_neurons[layer].pop()), kind=AGAINST, length=-OPPOSED * part.length
            )
            for part in produced
        ]
        # together they write what production alone writes otherwise
        stronger = [replace(part, length=(1 + OPPOSED) * part.length) for part in produced]
        parts = [part for part in parts if part.kind != "production"] + stronger + against
        wires = (*WIRES, ("decision", AGAINST), (AGAINST, "logits"))
    parts += decoy_parts(rng, decoys, parts, free_heads, free_neurons)
    return Plan(tuple(parts), doubled, d_mlp, wires)


def _spare(layout: Sequence[tuple[int, ...]], layers: int) -> list[int]:
    """Layers whose MLP has no stage and comes after the decision."""
    _, evaluate, decide, produce = layout
    return [layer for layer in range(max(decide), layers) if layer not in (*evaluate, *produce)]


def decoy_parts(
    rng: random.Random,
    decoys: int,
    parts: Sequence[PlantedPart],
    free_heads: Mapping[int, list[int]],
    free_neurons: Mapping[int, list[int]],
) -> list[PlantedPart]:
    """Decoys in places that the circuit's parts leave free, heads and neurons by turns."""
    layers, made = len(free_heads), list[PlantedPart]()
    circuit_mlps = {part.node.layer for part in parts if part.node.kind == "neuron"}
    outside = [layer for layer in range(layers) if layer not in circuit_mlps]
    for number in range(decoys):
        spare = [layer for layer in range(layers) if len(free_heads[layer]) > 0]
        if number % 2 == 0 and spare:
            layer = rng.choice(spare)
            node = Node("head", layer, free_heads[layer].pop())
            made.append(PlantedPart(node, "decoy", DECOY_HEAD, number=number))
            continue
        # decoy neurons alternate between an MLP outside the circuit and any MLP
        layer = rng.choice(outside if outside and number % 4 == 1 else range(layers))
        # length 2, because the embedding holds the decoy's vector with the other sign
        node = Node("neuron", layer, free_neurons[layer].pop())
        made.append(PlantedPart(node, "decoy", DECOY_NEURON, 2.0, number=number))
    return made


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
