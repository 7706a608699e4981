"""What can be chosen of a map."""

import dataclasses
import math
from typing import Any, Literal, Self

from mechsafety.circuits.circuit import Level
from mechsafety.circuits.draw import check_limit
from mechsafety.circuits.goal import Goal, GoalKind
from mechsafety.circuits.masks import Training
from mechsafety.circuits.search import SearchKind, check_search
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, check_fields

AblationKind = Literal["counterfactual", "mean", "optimal"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MapOptions:
    """Options of `mechsafety.map_refusal_circuit`, checked when they are made.

    Attributes:
        level: What a circuit is made of. ``node``: heads and MLPs. ``neuron``: heads and MLPs first, then the MLPs of
            that circuit are taken apart into neurons. ``edge``: edges, everything else cut (as `discover_edges`), and
            the nodes that they connect.
        limit: Pairs to try, seven eighths of them held out (see `draw_pairs`). Pairs that the model does not treat as
            expected (harmful refused, harmless answered) drop out. Where fewer than half of those to search on, or of
            those to hold out, are left, more are tried until half as many are there. A model that refuses a third of
            the prompts is therefore mapped on that third; ``speaks_for`` of the circuit says how many of how many.
        target: Smallest faithfulness that is good enough, in (0, 1].
        goal: ``reach``: the circuit restores at least the target. Parts that work against refusal stay out, so that it
            may restore more than the whole model does. ``match``: its faithfulness is at most ``1 - target`` away from
            1, on either side. Such a circuit holds the parts that work against refusal too.
        search: How parts are ranked before the search measures anything. ``gradient``: by integrated gradients, EAP-IG
            for edges. ``masks``: by masks that are trained together (`train_masks`), which takes longer. Everything
            after the ranking is the same.
        ablation: What everything outside a circuit takes while its faithfulness is measured, in the search and in the
            claims. ``counterfactual``: its value in the pair's harmless prompt. ``mean``: its mean over the harmless
            prompts, per position counted from the end; discovery, held-out and fresh pairs have means of their own.
            ``optimal``: constants that change the metric least, learned on the discovery pairs (`optimal_constants`),
            which takes longer. The effects of single nodes, edges, roles and backups are counterfactual in any case.
            Not for level ``edge``.
        max_nodes: Largest circuit, in edges at level ``edge``. Where the goal needs more, the circuit misses the goal
            and says so.
        n_random: Random circuits to compare with. The smallest possible p is 1 / (1 + n_random), and twice that after
            the p of sufficiency and necessity are adjusted together. With fewer than 40, a claim may be undecided
            though no random circuit equals the circuit.
        n_added: Parts outside the circuit that are added to it at random. Minimality is measured against them.
        n_resamples: Bootstrap resamples of the prompts on which the ranking is repeated. By default 100, or 5 where
            each of them has masks of its own to train.
        n_backup_parts: Nodes of the circuit whose backups are looked for, the most suspicious first. At level ``edge``
            the edges of the backups are added.
        n_edges: Edges between nodes to measure, those with the largest estimates first. Those that carry something are
            kept. Edges that a node needs to be connected come on top.
        n_role_pairs: Held-out pairs on which roles, edges, backups and single nodes are measured. With fewer than four,
            hardly any edge can be told from 0.
        n_control_pairs: Fresh pairs on which random circuits, minimality and the subsets of completeness are measured,
            which takes many runs each. Single nodes are measured on these pairs and on those of ``n_role_pairs``. All
            other checks use all fresh pairs.
        shortlist: Nodes outside the circuit to measure as well, those with the largest estimates first.
        budget_seconds: Time to keep. Later stages are cut short, and ``search.cut`` of the circuit says which. The
            behaviour check, the attribution and the curve are always run. Only without a budget does the same seed
            give the same bytes.
        seed: Of sampling, bootstrap and random circuits.
        preliminary: Whether the map is only a first look (see `quick`). The picture, the report and the command's
            summary then say so.

    Raises:
        MechsafetyError: An option that makes no sense, by its name.

    Example:
        >>> MapOptions(target=1.2)
        Traceback (most recent call last):
        mechsafety.errors.MechsafetyError: target 1.2; expected a faithfulness in (0, 1]
    """

    level: Level = "node"
    limit: Count = 110
    target: float = 0.8
    goal: GoalKind = "reach"
    search: SearchKind = "gradient"
    ablation: AblationKind = "counterfactual"
    max_nodes: Count | None = None
    n_random: Amount = 40
    n_added: Amount = 40
    n_resamples: Amount | None = None
    n_backup_parts: Amount = 4
    n_edges: Amount = 60
    n_role_pairs: Count = 8
    n_control_pairs: Count = 12
    shortlist: Amount = 30
    budget_seconds: float | None = None
    seed: Amount = 0
    preliminary: bool = False

    @classmethod
    def quick(cls, **options: Any) -> Self:
        """Options of a first look, which takes less than half of the time of a whole map.

        It tries 16 pairs in place of 110, and measures roles on four. It looks for no backups, measures no nodes
        outside the circuit, and trains no masks again on resampled pairs. Most claims are therefore undecided.

        Args:
            options: Options to choose otherwise.

        Example:
            >>> MapOptions.quick(goal="match").limit
            16
        """
        small: dict[str, Any] = {"limit": 16, "n_added": 20, "n_backup_parts": 0}
        small |= {"n_edges": 40, "n_role_pairs": 4, "shortlist": 0, "preliminary": True}
        if options.get("search") == "masks":
            small["n_resamples"] = 0
        return cls(**{**small, **options})

    def __post_init__(self) -> None:
        check_fields(self)
        check_search(self.target, self.max_nodes)
        if self.ablation != "counterfactual" and self.level == "edge":
            raise MechsafetyError(f"ablation {self.ablation!r} at level 'edge'", expected="'counterfactual'")
        check_limit(self.limit)
        if self.seed >= 2**63:
            raise MechsafetyError(f"seed {self.seed}", expected="below 2**63")
        if self.budget_seconds is not None and not 0 < self.budget_seconds < math.inf:
            raise MechsafetyError(f"budget_seconds {self.budget_seconds}", expected="a number above 0, or none")

    @property
    def resamples(self) -> int:
        """How many resamples of the prompts are ranked."""
        if self.n_resamples is not None:
            return self.n_resamples
        return 5 if self.search == "masks" else 100

    @property
    def training(self) -> Training:
        """How masks are trained, where the search asks for them."""
        return Training(seed=self.seed)

    @property
    def aim(self) -> Goal:
        """Which faithfulness is good enough."""
        return Goal(self.target, self.goal)
