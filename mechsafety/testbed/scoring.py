"""How well a found ranking or circuit agrees with a known one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from mechsafety.attribution import EdgeScores, NodeAttribution
from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Edge, Node, Part, as_node, head_and_mlp_nodes
from mechsafety.patching import PatchMap, PathMap
from mechsafety.patching.receivers import reaches
from mechsafety.results import Provenance, Result
from mechsafety.testbed.truth import Truth

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Named = Part | str
Scorable = NodeAttribution | PatchMap | EdgeScores | PathMap | RefusalCircuit | Mapping[Named, float] | Iterable[Named]


@dataclass(frozen=True, slots=True)
class RankingScore:
    """Agreement of a ranking by absolute score with the truth; a tie counts half, whatever the order of the tied parts.

    Attributes:
        auroc: Chance that a part of the circuit ranks above a part outside it.
        average_precision: Area under the precision-recall steps.
        auroc_decoys: Chance that a part of the circuit ranks above a decoy; None without decoys.
        auroc_backups: Chance that a backed-up part ranks above a part outside the circuit; None without backups.
        strength_decoys: Mean absolute score of the decoys, divided by that of the circuit's parts without a backup.
        strength_backups: The same for backed-up parts. A rank alone would hide how small a part's score is where all
            other scores are almost 0.
        n_true, n: Number of parts of the circuit, and of all ranked parts.
    """

    auroc: float
    average_precision: float
    auroc_decoys: float | None
    auroc_backups: float | None
    strength_decoys: float | None
    strength_backups: float | None
    n_true: int
    n: int


@dataclass(frozen=True, slots=True)
class SetScore:
    """Agreement of a found set with the true one.

    Attributes:
        precision: Share of what was found that is true; 0 where nothing was found.
        recall: Share of what is true that was found.
        f1: Their harmonic mean.
        missed, wrong: True parts that were not found; found parts that are not true.
    """

    precision: float
    recall: float
    f1: float
    missed: tuple[Part, ...]
    wrong: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class TruthScore(Result):
    """A found ranking or circuit compared with the truth; a field is None if the result says nothing about it.

    Attributes:
        what: Type of the scored result.
        nodes, neurons, edges: Rankings of heads and MLPs, of neurons, of edges.
        found_nodes: The found set of nodes: heads and MLPs, or heads and neurons where it has neurons.
        found_edges: The found set of edges.
        decoys_found: Decoys in the found set.
        backups_found: Share of the backed-up parts that are in the found set; None without backups.
        role_accuracy: Share of the found true nodes that have the right role. None if no true node was found or none
            has a role.
        scores: Absolute score of every ranked part, by name.
        provenance: Provenance of the scored result, if it has one.

    Example:
        >>> found = ms.testbed.score(circuit, made.truth)
        >>> found.found_nodes.recall, found.role_accuracy
        (1.0, 1.0)
    """

    what: str
    nodes: RankingScore | None = None
    neurons: RankingScore | None = None
    edges: RankingScore | None = None
    found_nodes: SetScore | None = None
    found_edges: SetScore | None = None
    decoys_found: tuple[Node, ...] = ()
    backups_found: float | None = None
    role_accuracy: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    provenance: Provenance | None = None

    def __repr__(self) -> str:
        parts = []
        for name, ranking in (("nodes", self.nodes), ("neurons", self.neurons), ("edges", self.edges)):
            if ranking is not None:
                parts.append(f"{name} AP {ranking.average_precision:.3f}")
        for name, found in (("nodes", self.found_nodes), ("edges", self.found_edges)):
            if found is not None:
                parts.append(f"{name} F1 {found.f1:.3f}")
        return f"TruthScore({self.what}: {', '.join(parts) or 'nothing to score'})"

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per figure: what it is about, its name, its value."""
        import pandas as pd

        rows: list[tuple[str, str, float | None]] = []
        for about in ("nodes", "neurons", "edges"):
            ranking = getattr(self, about)
            if ranking is not None:
                names = [one.name for one in fields(ranking) if not one.name.startswith("n")]
                rows += [(about, name, getattr(ranking, name)) for name in names]
        for about in ("found_nodes", "found_edges"):
            found = getattr(self, about)
            if found is not None:
                rows += [(about, name, getattr(found, name)) for name in ("precision", "recall", "f1")]
        rows += [("roles", "accuracy", self.role_accuracy), ("backups", "found", self.backups_found)]
        return pd.DataFrame([row for row in rows if row[2] is not None], columns=["about", "figure", "value"])

    def plot(self) -> "go.Figure":
        """Bar chart of every figure."""
        import plotly.express as px

        frame = self.to_dataframe()
        return px.bar(frame, x="about", y="value", color="figure", barmode="group", range_y=[0, 1])


def score(result: Scorable, truth: Truth) -> TruthScore:
    """Score a result against the known circuit.

    A *ranking* is an attribution, a patching result, edge scores, or a mapping from nodes or edges to scores. It is
    judged by exact AUROC and average precision of its absolute scores. Parts of the circuit that it leaves out count as
    ranked last. The embedding's edges count only if the ranking has any.

    A *circuit* (or a plain collection of nodes and edges) is judged by precision and recall. These are over heads and
    MLPs or, if the circuit has neurons, over heads and neurons. ``embed`` and ``logits`` do not count as nodes. A
    neuron's edge counts as an edge of its MLP.

    Args:
        result: The found ranking or circuit. In a mapping or a collection, a node can be given by its name.
        truth: The known circuit.

    Raises:
        MechsafetyError: A result of patched sites or joint receivers, a score that is not a finite number, or a result
            without any node or edge.

    Example:
        >>> found = ms.testbed.score(circuit, made.truth)
        >>> found.found_nodes.f1, found.found_edges.f1
        (1.0, 1.0)
    """
    what, provenance = type(result).__name__, getattr(result, "provenance", None)
    if isinstance(result, RefusalCircuit):
        members: list[Part] = [*(member.node for member in result.nodes), *(member.edge for member in result.edges)]
        roles = {member.node: member.role for member in result.nodes}
        return _score_set(what, provenance, members, roles, truth, has_edges=bool(result.edges))
    ranked = ranking_of(result)
    if ranked is None:
        collected: list[Part] = [_part(given) for given in result]  # type: ignore[union-attr]
        _check_parts(collected)
        has_edges = any(isinstance(part, Edge) for part in collected)
        return _score_set(what, provenance, collected, {}, truth, has_edges=has_edges)
    _check_parts(list(ranked))
    wrong = [part for part, value in ranked.items() if not np.isfinite(value)]
    if wrong:
        raise MechsafetyError(f"the score of {wrong[0]} is {ranked[wrong[0]]}", expected="numbers")
    strengths = {part: abs(float(value)) for part, value in ranked.items()}
    nodes: dict[Part, float] = {p: v for p, v in strengths.items() if isinstance(p, Node) and p.kind in ("head", "mlp")}
    neurons: dict[Part, float] = {p: v for p, v in strengths.items() if isinstance(p, Node) and p.kind == "neuron"}
    edges: dict[Part, float] = {p: v for p, v in strengths.items() if isinstance(p, Edge)}
    backed_up = _backed_up(truth)
    true_edges = _edges(truth, edges)
    # a ranking of heads alone is judged on heads: MLPs that it did not rank are not missing
    kinds = {part.kind for part in nodes if isinstance(part, Node)}
    true_nodes = [node for node in truth.nodes if node.kind in kinds]
    return TruthScore(
        what,
        nodes=_ranking(nodes, true_nodes, truth.decoys, backed_up),
        neurons=_ranking(neurons, truth.neurons, truth.decoys, backed_up),
        edges=_ranking(edges, true_edges, (), ()),
        scores={str(part): value for part, value in strengths.items()},
        provenance=provenance,
    )


def ranking_of(result: Scorable) -> Mapping[Part, float] | None:
    """Score of every node or edge that a result ranks; None for a result that is not a ranking.

    Raises:
        MechsafetyError: The result scores something else: sites, single positions, or receivers taken together.

    Example:
        >>> effects = ms.testbed.ranking_of(ms.activation_patching(model, pairs, metric))
        >>> str(max(effects, key=effects.get))
        'L0.H1'
    """
    if isinstance(result, Mapping):
        return {_part(given): value for given, value in result.items()}
    if isinstance(result, NodeAttribution):
        ranked: dict[Part, float] = {node: result.of(node) for node in head_and_mlp_nodes(*result.heads.shape)}
        if result.neurons is not None:
            for layer, row in enumerate(result.neurons.tolist()):
                ranked |= {Node("neuron", layer, index): value for index, value in enumerate(row)}
        return ranked
    if isinstance(result, PatchMap):
        if result.row_positions is not None or not all(isinstance(node, Node) for node in result.nodes):
            raise MechsafetyError("patched sites or positions have no truth", expected="whole nodes, at all positions")
        return dict(zip(result.nodes, result.effects.tolist(), strict=True))  # type: ignore[arg-type]
    if isinstance(result, EdgeScores):
        parallel = bool(result.provenance.options.get("parallel"))
        return {
            Edge(sender, receiver, slot): value
            for sender, row in zip(result.senders, result.scores.tolist(), strict=True)
            for (receiver, slot), value in zip(result.receivers, row, strict=True)
            if reaches(sender, receiver, parallel=parallel)
        }
    if isinstance(result, PathMap):
        if any(len(group) > 1 for group in result.receivers):
            raise MechsafetyError("joint receivers have no truth", expected="path_patching(..., joint=False)")
        ends = [receiver for ((receiver, _),) in result.receivers]
        if not all(isinstance(part, Node) for part in (*result.senders, *ends)):
            raise MechsafetyError(
                "paths from or to sites or positions have no truth", expected="paths between whole nodes"
            )
        return {
            Edge(sender, receiver, slot): value
            for sender, row in zip(result.senders, result.effects.tolist(), strict=True)
            for ((receiver, slot),), value in zip(result.receivers, row, strict=True)
            if isinstance(sender, Node) and isinstance(receiver, Node) and reaches(sender, receiver, parallel=False)
        }
    return None


def _part(given: Named) -> Part:
    """A node from its name; anything else as it is."""
    return as_node(given) if isinstance(given, str) else given


def _check_parts(parts: list[Part]) -> None:
    strange = [part for part in parts if not isinstance(part, Node | Edge)]
    if strange or not parts:
        found = f"a {type(strange[0]).__name__}" if strange else "nothing"
        raise MechsafetyError(f"{found} to score", expected="nodes or edges")


def _backed_up(truth: Truth) -> set[Node]:
    """Backed-up nodes, and the circuit's neurons in a backed-up MLP."""
    nodes = set(truth.backed_up)
    return nodes | {neuron for neuron in truth.neurons if Node("mlp", neuron.layer) in nodes}


def _edges(truth: Truth, found: Iterable[Part]) -> list[Edge]:
    """The true edges; those of the embedding only if any edge of the embedding was found or ranked."""
    embeds = any(isinstance(edge, Edge) and edge.sender.kind == "embed" for edge in found)
    return [edge for edge in truth.edges if embeds or edge.sender.kind != "embed"]


def _ranking(
    strengths: Mapping[Part, float], true: Iterable[Part], decoys: Iterable[Part], backed_up: Iterable[Part]
) -> RankingScore | None:
    """The score of a ranking; None if there are no parts to tell apart."""
    wanted = set(true)
    if not strengths or not wanted:
        return None
    # parts that were left out score below every absolute score, so that they tie with no ranked part
    every = {part: strengths.get(part, -1.0) for part in [*strengths, *(p for p in wanted if p not in strengths)]}
    outside = [part for part in every if part not in wanted]
    if not outside:
        return None

    def auroc(inside: list[Part], others: list[Part]) -> float | None:
        if not inside or not others:
            return None
        labels = [1] * len(inside) + [0] * len(others)
        return float(roc_auc_score(labels, [every[part] for part in [*inside, *others]]))

    inside, spared, fake = [part for part in every if part in wanted], set(backed_up), set(decoys)

    def strength(chosen: list[Part]) -> float | None:
        alone = [strengths[part] for part in inside if part in strengths and part not in spared]
        scored = [strengths[part] for part in chosen if part in strengths]
        return float(np.mean(scored) / np.mean(alone)) if scored and any(alone) else None

    whole = auroc(inside, outside)
    assert whole is not None
    labels = [part in wanted for part in every]
    return RankingScore(
        whole,
        float(average_precision_score(labels, list(every.values()))),
        auroc(inside, [part for part in outside if part in fake]),
        auroc([part for part in inside if part in spared], outside),
        strength([part for part in outside if part in fake]),
        strength([part for part in inside if part in spared]),
        len(inside),
        len(every),
    )


def _score_set(
    what: str,
    provenance: Provenance | None,
    members: list[Part],
    roles: Mapping[Node, str],
    truth: Truth,
    *,
    has_edges: bool,
) -> TruthScore:
    nodes = [part for part in members if isinstance(part, Node) and part.kind not in ("embed", "logits")]
    fine = bool(truth.neurons) and any(node.kind == "neuron" for node in nodes)
    if fine:
        # an MLP listed with its own neurons adds nothing; an MLP alone claims all its neurons, which is wrong
        held = {node.layer for node in nodes if node.kind == "neuron"}
        nodes = [node for node in nodes if node.kind != "mlp" or node.layer not in held]
        wanted = list(truth.units())
    else:
        nodes = list(dict.fromkeys(Node("mlp", n.layer) if n.kind == "neuron" else n for n in nodes))
        wanted = list(truth.nodes)
    edges = [_between_mlps(part) for part in members if isinstance(part, Edge)]
    true_edges = _edges(truth, edges)
    found = set(nodes)
    backed_up = [node for node in wanted if node in _backed_up(truth)]
    judged = [node for node in wanted if node in found and node in roles]
    return TruthScore(
        what,
        found_nodes=_set(nodes, wanted) if nodes or not has_edges else None,
        found_edges=_set(edges, true_edges) if has_edges and true_edges else None,
        decoys_found=tuple(node for node in truth.decoys if node in found),
        backups_found=sum(node in found for node in backed_up) / len(backed_up) if backed_up else None,
        role_accuracy=sum(roles[n] == truth.roles[n] for n in judged) / len(judged) if judged else None,
        provenance=provenance,
    )


def _between_mlps(edge: Edge) -> Edge:
    """The edge with neurons replaced by their MLPs, because the truth names edges between heads and MLPs."""
    sender, receiver = (Node("mlp", end.layer) if end.kind == "neuron" else end for end in (edge.sender, edge.receiver))
    return Edge(sender, receiver, edge.slot)


def _set(found: Iterable[Part], true: Iterable[Part]) -> SetScore:
    found, true = list(dict.fromkeys(found)), list(true)
    hits = len(set(found) & set(true))
    precision = hits / len(found) if found else 0.0
    recall = hits / len(true)
    f1 = 2 * hits / (len(found) + len(true))
    return SetScore(
        precision,
        recall,
        f1,
        tuple(part for part in true if part not in set(found)),
        tuple(part for part in found if part not in set(true)),
    )
