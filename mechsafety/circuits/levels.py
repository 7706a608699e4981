"""What a circuit is made of: heads and MLPs, neurons, or edges. Everything that differs between the three is here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mechsafety.attribution import NodeAttribution
from mechsafety.circuits.backups import stand_in_neurons, with_backups
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.circuit import Backup, CircuitEdge
from mechsafety.circuits.edge_backups import with_backup_edges
from mechsafety.circuits.edge_faithfulness import EdgeMeter
from mechsafety.circuits.edge_search import edge_scores, search_edges
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.masks import train_masks
from mechsafety.circuits.neurons import NeuronMeter, refine
from mechsafety.circuits.options import MapOptions
from mechsafety.circuits.search import SearchResult, ranked, search_parts
from mechsafety.circuits.wiring import Wiring
from mechsafety.errors import MechsafetyError
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import Edge, Node, Part, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.prompts import PromptPairs
from mechsafety.sites import SiteKind


@dataclass(frozen=True, slots=True)
class Meters:
    """Faithfulness on sets of pairs. Only ``controls`` shares pairs with another, ``fresh``.

    Attributes:
        found_on: On the pairs that parts are ranked on.
        held_out: On the pairs that set the circuit's size.
        fresh: On pairs that the search never sees; None where there are too few pairs.
        controls: On some of the fresh pairs, for checks that take many runs; None where there are no fresh pairs.
    """

    found_on: FaithfulnessMeter
    held_out: FaithfulnessMeter
    fresh: FaithfulnessMeter | None = None
    controls: FaithfulnessMeter | None = None

    @property
    def judges(self) -> tuple[FaithfulnessMeter, ...]:
        """On all pairs that the ranking does not see."""
        return (self.held_out,) if self.fresh is None else (self.held_out, self.fresh)

    def each(self, make: Callable[[FaithfulnessMeter], FaithfulnessMeter]) -> "Meters":
        """Meters made of each of these."""
        fresh = None if self.fresh is None else make(self.fresh)
        controls = fresh if self.controls is None or self.controls is self.fresh else make(self.controls)
        return Meters(make(self.found_on), make(self.held_out), fresh, controls)


@dataclass(frozen=True, slots=True)
class Refined:
    """A circuit of the parts that its level asks for.

    Attributes:
        result: The circuit.
        meters: Faithfulness of circuits of such parts.
        attribution: Estimate of every part.
        backups: Backups in the circuit.
    """

    result: SearchResult
    meters: Meters
    attribution: NodeAttribution
    backups: tuple[Backup, ...]


class NodeLevel:
    """Circuits of heads and MLPs."""

    # what stored runs must hold beside heads and MLPs
    sites: tuple[SiteKind, ...] = ()
    # how pairs may be aligned
    aligns: tuple[str, ...] = ("tokens", "suffix")
    # whether its own meter patches single nodes, and the search is repeated on resamples of the prompts
    of_nodes = True

    def check(self, model: LensModel, align: str) -> None:
        """Refuse a model without such parts, and pairs whose alignment is not enough.

        Raises:
            MechsafetyError: There is no circuit of this level.
        """
        self.check_align(align)
        if SiteKind.NEURONS in self.sites:
            model.check_neurons()

    def check_align(self, align: str) -> None:
        """Refuse pairs whose alignment is not enough; no model is needed.

        Raises:
            MechsafetyError: There is no circuit of this level on such pairs.
        """
        if align not in self.aligns:
            raise MechsafetyError("level 'edge' on pairs aligned at the suffix", expected="'node' or 'neuron'")

    def alone(self, model: LensModel, pairs: PromptPairs, metric: RefusalLogOdds, progress: bool) -> FaithfulnessMeter:
        """A meter that patches single nodes."""
        runs = pair_runs(model, pairs, extra=list(self.sites))
        return FaithfulnessMeter(model, runs, metric, progress=progress).grouped()

    def meter(self, model: LensModel, pairs: PromptPairs, metric: RefusalLogOdds, progress: bool) -> FaithfulnessMeter:
        """A meter of circuits of this level's parts, before they are refined."""
        return self.alone(model, pairs, metric, progress)

    def nodes(self, meters: Meters) -> tuple[Node, ...]:
        """Every node that a circuit of this level can hold, or run between."""
        return tuple(part for part in meters.held_out.parts if isinstance(part, Node))

    def ranking(
        self,
        meters: Meters,
        attribution: NodeAttribution,
        options: MapOptions,
        weights: Sequence[int] | None = None,
    ) -> list[Part]:
        """All parts, the most wanted first.

        Args:
            meters: Pairs and parts.
            attribution: Gradient estimates of nodes, on pairs that count as ``weights`` says.
            options: Which search, and its goal.
            weights: How often each pair counts; once by default.
        """
        if options.search == "masks":
            return list(train_masks(meters.found_on, options.goal, options.training, weights=weights).ranking)
        nodes = [part for part in meters.found_on.parts if isinstance(part, Node)]
        return list(ranked(nodes, attribution, options.aim))

    def search(self, meters: Meters, attribution: NodeAttribution, options: MapOptions, budget: Budget) -> SearchResult:
        """The smallest circuit found."""
        ranking = self.ranking(meters, attribution, options)
        pairs = meters.found_on, meters.held_out
        return search_parts(*pairs, ranking, options.aim, max_parts=options.max_nodes, budget=budget)

    def with_backups(
        self,
        result: SearchResult,
        backups: Sequence[Backup],
        meters: Meters,
        options: MapOptions,
        budget: Budget,  # noqa: ARG002 (edges need it)
    ) -> SearchResult:
        """The circuit with the backups that it lacks."""
        return with_backups(result, backups, options.max_nodes, (meters.found_on, meters.held_out), options.aim)

    def refined(self, coarse: Refined, options: MapOptions, budget: Budget) -> Refined:  # noqa: ARG002 (for neurons)
        """The circuit of this level's parts, from one of heads and MLPs."""
        return coarse

    def own_edges(self, result: SearchResult) -> list[CircuitEdge] | None:  # noqa: ARG002 (edges need it)
        """The circuit's own edges with their estimates, the strongest first; None if it is made of nodes."""
        return None

    def wired(self, wiring: Wiring, result: SearchResult) -> Wiring:  # noqa: ARG002 (edges need it)
        """The wiring, with the edges that this level keeps."""
        return wiring


class NeuronLevel(NodeLevel):
    """Circuits of heads and neurons: the MLPs of a circuit of nodes are taken apart."""

    sites = (SiteKind.NEURONS,)

    def refined(self, coarse: Refined, options: MapOptions, budget: Budget) -> Refined:
        """The same circuit with every MLP's neurons ranked, and those that do not matter removed."""
        if budget.skips("neurons", 0.5):
            return coarse
        meters = coarse.meters
        result, (found_on, _), attribution = refine(
            meters.found_on, meters.held_out, coarse.result, coarse.backups, options, budget
        )
        backups = stand_in_neurons(coarse.backups, result)
        refined = meters.each(lambda meter: NeuronMeter.of(meter, found_on.layers))
        return Refined(result, refined, attribution, tuple(backups))


class EdgeLevel(NodeLevel):
    """Circuits of edges; every edge outside is cut."""

    # edges carry what the instruction says, so its tokens must correspond
    aligns = ("tokens",)
    of_nodes = False

    def meter(self, model: LensModel, pairs: PromptPairs, metric: RefusalLogOdds, progress: bool) -> FaithfulnessMeter:
        """A meter of sets of edges."""
        return EdgeMeter(model, pair_runs(model, pairs), metric, progress=progress)

    def nodes(self, meters: Meters) -> tuple[Node, ...]:
        """Heads and MLPs."""
        return head_and_mlp_nodes(meters.held_out.model.n_layers, meters.held_out.model.n_heads)

    def search(
        self,
        meters: Meters,
        attribution: NodeAttribution,
        options: MapOptions,
        budget: Budget,
    ) -> SearchResult:
        """The smallest set of edges found; each has its EAP-IG estimate, whatever ranks it."""
        scores = edge_scores(meters.found_on)
        trained = options.search == "masks"
        return search_edges(
            meters.found_on,
            meters.held_out,
            scores,
            options.aim,
            ranking=self.ranking(meters, attribution, options) if trained else None,
            max_edges=options.max_nodes,
            budget=budget,
        )

    def with_backups(
        self,
        result: SearchResult,
        backups: Sequence[Backup],
        meters: Meters,
        options: MapOptions,
        budget: Budget,
    ) -> SearchResult:
        """The circuit with the edges of the backups that it lacks."""
        pairs = meters.found_on, meters.held_out
        return with_backup_edges(result, backups, options.max_nodes, pairs, options.aim, budget)

    def own_edges(self, result: SearchResult) -> list[CircuitEdge]:
        """The circuit's edges, with their EAP-IG scores."""
        own, scores = [edge for edge in result.circuit if isinstance(edge, Edge)], result.scores
        edges = [CircuitEdge(edge, scores[edge], "estimated", scores[edge]) for edge in own]
        return sorted(edges, key=lambda member: -abs(member.effect))

    def wired(self, wiring: Wiring, result: SearchResult) -> Wiring:
        """The circuit's own edges alone, measured where the wiring measured them."""
        edges = [wiring.measured.get(member.edge, member) for member in self.own_edges(result)]
        return replace(wiring, edges=tuple(sorted(edges, key=lambda m: -abs(m.effect))), linked=(), dropped=())


LEVELS = {"node": NodeLevel(), "neuron": NeuronLevel(), "edge": EdgeLevel()}
