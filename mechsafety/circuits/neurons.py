"""Neuron-level circuits: the MLPs of a circuit taken apart into the neurons that carry it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mechsafety.attribution.nodes import NodeAttribution, node_attribution
from mechsafety.circuits.backups import knocked_out
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.circuit import Backup
from mechsafety.circuits.faithfulness import FaithfulnessMeter, in_order
from mechsafety.circuits.goal import Goal
from mechsafety.circuits.masks import train_masks
from mechsafety.circuits.options import MapOptions
from mechsafety.circuits.search import CURVE_SHARES, MAX_EXACT, SearchResult, ranked, search_parts
from mechsafety.nodes import Node, Part, head_and_mlp_nodes


@dataclass(frozen=True, slots=True)
class NeuronMeter(FaithfulnessMeter):
    """`FaithfulnessMeter` whose parts are heads, the neurons of some MLPs, and the other MLPs whole.

    Attributes:
        layers: Layers whose MLP is taken apart; the runs must hold neurons.

    Example:
        >>> apart = ms.patching.pair_runs(model, pairs, extra=[ms.sites.SiteKind.NEURONS])
        >>> meter = ms.circuits.NeuronMeter(model, apart, metric, layers=(3,))
        >>> sum(part.kind == "neuron" for part in meter.parts)
        30
    """

    layers: tuple[int, ...] = ()

    @classmethod
    def of(cls, meter: FaithfulnessMeter, layers: tuple[int, ...]) -> "NeuronMeter":
        """The same pairs with the MLPs of these layers taken apart."""
        return cls(meter.model, meter.runs, meter.metric, meter.groups, meter.progress, layers)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Everything that a circuit can be made of, in the order of computation."""
        found: list[Part] = []
        for node in head_and_mlp_nodes(self.model.n_layers, self.model.n_heads):
            if node.kind == "mlp" and node.layer in self.layers:
                found += [Node("neuron", node.layer, index) for index in range(self.model.d_mlp)]
            else:
                found.append(node)
        return tuple(found)


def refine(
    found_on: FaithfulnessMeter,
    held_out: FaithfulnessMeter,
    result: SearchResult,
    backups: Sequence[Backup],
    options: MapOptions,
    budget: Budget,
) -> tuple[SearchResult, tuple[NeuronMeter, NeuronMeter], NodeAttribution]:
    """A circuit of heads and neurons from one of heads and MLPs.

    Every neuron of the circuit's MLPs is attributed (integrated gradients over neuron masks); the parts of the circuit
    are ranked, the smallest prefix that meets the goal found, and exact removal follows, as in `search_parts`. The
    rest of the model comes after them in the ranking, so that a circuit whose neurons do not meet the goal grows.
    A backup MLP keeps its smallest prefix of neurons that meets the goal without its primary node.

    Args:
        found_on: Meter on the search's pairs; its runs must hold neurons.
        held_out: The same on the pairs that set the size.
        result: The circuit of heads and MLPs, with backups added.
        backups: Its backups.
        options: Which faithfulness is good enough, and how parts are ranked. Masks are trained for all parts at once.
        budget: Time to keep.

    Returns:
        The circuit found, meters for it, and the attribution with neurons.
    """
    nodes, goal = result.nodes, options.aim
    layers = tuple(node.layer or 0 for node in nodes if node.kind == "mlp")
    here, there = (NeuronMeter.of(meter, layers) for meter in (found_on, held_out))
    attribution = node_attribution(here.model, here.runs, here.metric, neurons=True, progress=here.progress)
    core = {node for node in nodes if node not in result.added}
    first = [part for part in here.parts if isinstance(part, Node) and part.home in core]
    rest = [part for part in here.parts if isinstance(part, Node) and part.home not in core]
    # a backup's neurons would replace what removal takes away, so they come last and are added by themselves
    late = {node for node in rest if node.home in set(result.added)}
    if options.search == "masks":
        ranking = [part for part in train_masks(here, goal.kind, options.training).ranking if isinstance(part, Node)]
        ranking = [node for node in ranking if node not in late] + [node for node in ranking if node in late]
    else:
        ranking = ranked(first, attribution, goal) + ranked([n for n in rest if n not in late], attribution, goal)
        ranking += ranked(sorted(late, key=lambda node: node.order), attribution, goal)
    found = search_parts(here, there, ranking, goal, rounds=8, budget=budget, shares=CURVE_SHARES, max_exact=MAX_EXACT)
    circuit: list[Part] = list(found.circuit)
    added: list[Part] = []
    for backup in backups:
        if backup.node not in result.added or backup.node in circuit:
            continue
        if backup.node.kind == "head":
            added.append(backup.node)
            continue
        gone = [node for node in {backup.primary, *backup.group} if node != backup.node]
        added += _stand_in(here, there, backup, gone, circuit, added, goal)
    return replace(found, circuit=in_order([*circuit, *added]), added=tuple(added)), (here, there), attribution


def _stand_in(
    here: NeuronMeter,
    there: NeuronMeter,
    backup: Backup,
    gone: Sequence[Node],
    circuit: Sequence[Part],
    added: Sequence[Part],
    goal: Goal,
) -> list[Part]:
    """The fewest neurons of a backup MLP with which the circuit meets the goal without the MLP's primary node."""
    runs = knocked_out(here.model, here.runs, sorted(gone, key=lambda node: node.order))
    attribution = node_attribution(here.model, runs, here.metric, neurons=True, progress=here.progress)
    own = [Node("neuron", backup.node.layer, index) for index in range(here.model.d_mlp)]
    ranking = ranked(own, attribution, goal)
    base = [part for part in (*circuit, *added) if isinstance(part, Node) and part.home not in gone]

    def reaches(size: int) -> bool:
        parts = [*base, *ranking[:size]]
        return goal.met(*(meter.faithfulness([parts])[0] for meter in (here, there)))

    low, high = 0, len(ranking)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return [part for part in ranking[:high] if part not in circuit]
