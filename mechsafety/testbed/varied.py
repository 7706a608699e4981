"""Random plans that differ in whatever a rule for roles might lean on: places, kinds of parts, lengths of routes."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node
from mechsafety.testbed.plan import DIRECTIONS, IDLE_NEURONS, KEYS, Plan, PlantedPart, Work, Write, decoy_parts

# positions at which parts may work, in the order of the prompt
PLACES = ("topic", "last", "end", "assistant")
# largest number of heads that share a role, and number of plans that are drawn before a model is called too small
MOST_HEADS, TRIES = 3, 400
SEEN = (Write("harm", "detected"), Write("benign", "cleared", "harmless"))
SEEN_TOO = (Write("harm too", "detected too"), Write("benign too", "cleared too", "harmless"))


@dataclass(frozen=True, slots=True)
class Group:
    """Parts that do the same: heads, or neurons of one layer.

    Attributes:
        kind: Its name; the first word is the role.
        work: What each of its parts does.
        count: Number of parts.
        after: Groups that it reads.
        share: Share of what its readers read that comes from this group.
    """

    kind: str
    work: Work
    count: int
    after: tuple[str, ...]
    share: float = 1.0

    @property
    def of_heads(self) -> bool:
        """Whether its parts are heads."""
        return bool(self.work.looks_at)


def varied_plan(rng: random.Random, layers: int, heads: int, decoys: int, neurons: int) -> Plan:
    """Draw a circuit and the place of every part.

    Raises:
        MechsafetyError: No circuit that was drawn fits into the model.
    """
    if layers < 2 or heads < 1 or decoys < 0 or neurons < 1:
        raise MechsafetyError(
            f"layers={layers}, heads={heads}, decoys={decoys}, neurons={neurons}",
            expected="at least 2 layers, 1 head, 0 decoys and 1 neuron",
        )
    for _ in range(TRIES):
        groups, two_words = _draw(rng, heads, neurons)
        placed = _place(rng, groups, layers, heads)
        if placed is None:
            continue
        d_mlp = IDLE_NEURONS + 2 * neurons + decoys
        free_heads = {layer: rng.sample(range(heads), heads) for layer in range(layers)}
        free_neurons = {layer: rng.sample(range(d_mlp), d_mlp) for layer in range(layers)}
        parts = []
        for group in groups:
            for layer in placed[group.kind]:
                free = free_heads if group.of_heads else free_neurons
                node = Node("head" if group.of_heads else "neuron", layer, free[layer].pop())
                parts.append(PlantedPart(node, group.kind, group.work, group.share / group.count))
        parts += decoy_parts(rng, decoys, parts, free_heads, free_neurons)
        works = [part.work for part in parts]
        values = tuple(dict.fromkeys(w.read for work in works if work.looks_at for w in work.writes))
        written = dict.fromkeys(w.written for group in groups for w in group.work.writes)
        directions = (*DIRECTIONS, "last", *(("qualifier", "harm too", "benign too") if two_words else ()), *written)
        return Plan(
            tuple(parts),
            (),
            d_mlp,
            _wires(groups),
            directions,
            values,
            (*KEYS, "assistant", "last", *(("qualifier",) if two_words else ())),
            two_words,
        )
    raise MechsafetyError(f"no varied circuit fits into {layers} layers of {heads} heads", hint="a larger model")


def _draw(rng: random.Random, heads: int, neurons: int) -> tuple[list[Group], bool]:
    """The groups of a circuit, in the order of computation, and whether two words are harmful."""
    most = min(MOST_HEADS, heads)
    groups: list[Group] = []
    by_heads = rng.random() < 0.6
    two_words = by_heads and heads > 1 and rng.random() < 0.3
    place = rng.choice(PLACES) if by_heads else "topic"
    if two_words:
        groups = [
            Group("detection", Work(place, SEEN, "topic"), 1, ("embed",)),
            Group("detection too", Work(place, SEEN_TOO, "qualifier"), 1, ("embed",)),
        ]
    else:
        groups = [Group("detection", Work(place, SEEN, "topic" if by_heads else ""), 1, ("embed",))]
        if not by_heads:
            groups = [replace(groups[0], work=Work("topic", SEEN[:1]))]
        groups = [replace(groups[0], count=rng.randint(1, most if by_heads else neurons))]
    later = PLACES[PLACES.index(place) + 1 :]
    carried = SEEN if by_heads else SEEN[:1]
    if later and not two_words and rng.random() < 0.4:
        there = rng.choice(later)
        passed = tuple(Write(write.written, write.written, write.side) for write in carried)
        relay = Group("relay", Work(there, passed, place), rng.randint(1, most), ("detection",))
        if by_heads and rng.random() < 0.5:  # two routes: one by way of the relay, one straight
            far = replace(groups[0], kind="detection far", share=0.5)
            near = Group("detection", Work(there, SEEN, "topic"), rng.randint(1, most), ("embed",), 0.5)
            groups = [far, near, replace(relay, after=("detection far",), share=0.5)]
        else:
            groups.append(relay)
        place = there
    before = tuple(group.kind for group in groups if group.work.at == place and group.kind != "detection far")
    evaluates = not two_words and rng.random() < 0.4
    reads = [Write("detected", "verdict")] + [Write("detected too", "verdict")] * two_words
    there = rng.choice(PLACES[PLACES.index(place) :]) if evaluates else place
    count = rng.randint(1, most if evaluates else neurons)
    groups.append(Group("evaluation", Work(there, tuple(reads), place if evaluates else ""), count, before))
    place, before = there, ("evaluation",)
    later = PLACES[PLACES.index(place) + 1 :]
    if later and rng.random() < 0.3:
        there = rng.choice(later)
        work = Work(there, (Write("verdict", "verdict"),), place)
        groups.append(Group("relay on", work, rng.randint(1, most), before))
        place, before = there, ("relay on",)
    decides = rng.random() < 0.6
    there = rng.choice(PLACES[PLACES.index(place) :]) if decides else place
    work = Work(there, (Write("verdict", "decision"),), place if decides else "")
    groups.append(Group("decision", work, rng.randint(1, most if decides else neurons), before))
    produces = there != "assistant" or rng.random() < 0.4
    work = Work("assistant", (Write("decision", "refuse"),), there if produces else "")
    groups.append(Group("production", work, rng.randint(1, most if produces else neurons), ("decision",)))
    return groups, two_words


def _place(rng: random.Random, groups: list[Group], layers: int, heads: int) -> Mapping[str, list[int]] | None:
    """Layers of each group's parts; None if the groups do not fit into the model.

    Heads of a group may lie in several layers. Neurons of a group lie in one layer, since two MLPs would count as two
    nodes; no two groups share an MLP.
    """
    # the moments of a model: heads of layer 0, its MLP, heads of layer 1, ...
    free = {2 * layer: heads for layer in range(layers)} | {2 * layer + 1: 1 for layer in range(layers)}
    done: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        after = max((max(done[kind]) for kind in group.after if kind != "embed"), default=-1)
        rest = [one for one in groups[number + 1 :] if group.kind in one.after]
        # leave room for those that follow one another
        room = 2 * layers - 1 - 2 * _depth(groups, group.kind)
        moments = [m for m in range(after + 1, room + 1) if m % 2 != group.of_heads and free[m] > 0]
        if not moments or (not rest and group.kind != "production"):
            return None
        chosen = []
        for _ in range(group.count if group.of_heads else 1):
            open_still = [m for m in moments if free[m] > 0]
            if not open_still:
                return None
            chosen.append(rng.choice(open_still))
            free[chosen[-1]] -= 1
        done[group.kind] = chosen if group.of_heads else chosen * group.count
    return {kind: [moment // 2 for moment in moments] for kind, moments in done.items()}


def _depth(groups: list[Group], kind: str) -> int:
    """Largest number of groups that follow one another after a group, less one if its reader may share its layer."""
    after = [group for group in groups if kind in group.after]
    return max((_depth(groups, group.kind) + group.of_heads for group in after), default=0)


def _wires(groups: list[Group]) -> tuple[tuple[str, str], ...]:
    wires = [(before, group.kind) for group in groups for before in group.after]
    return (*wires, ("production", "logits"))
