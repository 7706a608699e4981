"""The edges of backups: what a circuit of edges needs so that it holds every way, and not only one of them."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import combinations

from mechsafety.circuits.budget import Budget
from mechsafety.circuits.circuit import Backup
from mechsafety.circuits.edge_faithfulness import all_edges, prune
from mechsafety.circuits.faithfulness import FaithfulnessMeter, in_order
from mechsafety.circuits.goal import Goal
from mechsafety.circuits.search import MAX_EXACT, SearchResult, meets, without_free
from mechsafety.nodes import EMBED, LOGITS, Edge, Node, nodes_of


def with_backup_edges(
    result: SearchResult,
    backups: Sequence[Backup],
    max_edges: int | None,
    meters: Sequence[FaithfulnessMeter],
    goal: Goal,
    budget: Budget | None = None,
) -> SearchResult:
    """The circuit with the edges of backups: those that carry it when the node that they back up has no edge.

    For each node that has backups, and then for each two of them:

    1. All its edges leave the smallest set. All edges that its backups could have among the set's nodes come in.
    2. Where the set does not meet the goal this way, the backups are no second way along these nodes. They stay
       listed, and no edge is added.
    3. Otherwise the backups' edges are removed one by one as long as the goal is met. What is left is added.

    An addition that would make the circuit miss its goal, or larger than ``max_edges``, is left out.

    Args:
        result: The smallest set of edges.
        backups: Backups of its nodes.
        max_edges: Largest size of the circuit.
        meters: Meters of edges, on each set of pairs on which the goal must be met.
        goal: The goal.
        budget: Time to keep.
    """
    budget, ways = budget or Budget(), dict[Node, set[Node]]()
    for backup in backups:
        ways.setdefault(backup.primary, set()).add(backup.node)
    smallest = [part for part in result.circuit if isinstance(part, Edge)]
    circuit = smallest
    for primaries in (some for n in (1, 2) for some in combinations(ways, n)):
        if budget.skips("edges of backups", 0.6):
            break
        others = set[Node]().union(*(ways[node] for node in primaries)) - set(primaries)
        # in the smallest set: beside other nodes' backups, an edge that is needed may seem superfluous
        found = _second_way(smallest, set(primaries), others, meters, goal, budget)
        larger = in_order(prune({*circuit, *found}))
        fits = max_edges is None or len(larger) <= max_edges
        if set(larger) - set(circuit) and fits and (not result.reached or meets(goal, meters, larger)):
            circuit = [part for part in larger if isinstance(part, Edge)]
    whole = in_order(circuit)
    return replace(result, circuit=whole, added=tuple(edge for edge in whole if edge not in result.circuit))


def _second_way(
    circuit: Sequence[Edge],
    gone: Collection[Node],
    others: Collection[Node],
    meters: Sequence[FaithfulnessMeter],
    goal: Goal,
    budget: Budget,
) -> list[Edge]:
    """Edges of some nodes that carry the circuit when others have none; nothing where they do not carry it."""
    model = meters[0].model
    rest = [edge for edge in circuit if edge.sender not in gone and edge.receiver not in gone]
    ends = {EMBED, LOGITS, *nodes_of(circuit), *others} - set(gone)
    every = all_edges(model.n_layers, model.n_heads, model.parallel)
    near = [edge for edge in every if edge.sender in ends and edge.receiver in ends]
    new = [edge for edge in near if edge.sender in others or edge.receiver in others]
    whole = prune({*rest, *new})
    new = [edge for edge in new if edge in set(whole)]
    if len(new) > MAX_EXACT:
        budget.left_out(
            f"edges of the backups {', '.join(map(str, in_order(list(others))))}: {len(new)} are too many to measure"
        )
        return []
    if not whole or not meets(goal, meters, whole):
        return []
    left = {edge for edge in without_free(meters, whole, new, goal) if isinstance(edge, Edge)}
    return [edge for edge in prune(left) if edge in set(new)]
