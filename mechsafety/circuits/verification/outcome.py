"""What was checked about a circuit: the numbers, and the claims that they support or refute."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from mechsafety.circuits.goal import ROUNDING, Goal, GoalKind
from mechsafety.codec import SPARSE, OrNan, PValue
from mechsafety.intervals import mean_interval


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Faithfulness of the best ``n_nodes`` nodes found; ``k`` is their share of all candidate nodes."""

    k: OrNan
    n_nodes: int
    faithfulness: OrNan
    held_out: OrNan


@dataclass(frozen=True, slots=True)
class RandomControls:
    """Size-matched random circuits on some of the fresh pairs, or on held-out pairs where there are no fresh ones.

    Attributes:
        n: Number of random circuits.
        mean: Mean of their values.
        highest: Highest of their values.
        p_value: (1 + number of values at least as large as the circuit's on the same pairs) / (1 + n).
        n_pairs: Number of pairs; None in older files, which used all of them.
        observed: The circuit's own value on these pairs; None in older files.
    """

    n: int
    mean: OrNan
    highest: OrNan
    p_value: PValue
    n_pairs: int | None = field(default=None, metadata=SPARSE)
    observed: OrNan | None = field(default=None, metadata=SPARSE)


@dataclass(frozen=True, slots=True)
class FreshCheck:
    """The circuit on pairs that played no part in finding it, not even in deciding its size.

    Attributes:
        n: Number of pairs.
        faithfulness: Faithfulness on these pairs.
        ci: 95 % interval of the faithfulness, over pairs.
    """

    n: int
    faithfulness: OrNan
    ci: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Independence:
    """How far the score of the model without the circuit still follows that of the whole model, over prompts.

    Attributes:
        n: Number of prompts.
        hsic: Biased HSIC estimate with Gaussian kernels of median width.
        p_value: p of independence, by permutation of the prompts.
        correlation: Pearson's correlation; 0 if a score does not vary. None in older files.
        ci: 95 % interval of the correlation, by Fisher's transformation.
    """

    n: int
    hsic: OrNan
    p_value: PValue
    correlation: OrNan | None = None
    ci: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Stability:
    """First parts of the ranking on bootstrap resamples of the prompts, as many as the goal needs.

    Attributes:
        jaccards: Overlap of each resample's parts with those of all prompts.
        mean: Mean of the overlaps.
        n_nodes: How many parts each resample needs.
    """

    jaccards: tuple[OrNan, ...]
    mean: OrNan
    n_nodes: tuple[int, ...]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean overlap, over resamples; overlaps lie between 0 and 1."""
        low, high = mean_interval(self.jaccards)
        return max(low, 0.0), min(high, 1.0)


@dataclass(frozen=True, slots=True)
class SideEffects:
    """KL divergence (nats) of the next token on harmless prompts, from the unedited model to the edited one.

    Attributes:
        circuit_ablated: Mean over prompts, with every part of the circuit at its mean over harmless prompts.
        circuit_ablated_ci: 95 % interval of ``circuit_ablated``.
        complement_patched: The same, with everything outside the circuit at its value in the harmful counterfactual
            prompt.
        complement_patched_ci: 95 % interval of ``complement_patched``.
    """

    circuit_ablated: OrNan
    circuit_ablated_ci: tuple[float, float]
    complement_patched: OrNan
    complement_patched_ci: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim about a circuit, the figure that checks it, and whether it holds.

    Attributes:
        name: Short name.
        statement: What is claimed.
        value: The figure.
        interval: Interval of the figure.
        p_value: p, Benjamini-Hochberg adjusted over the claims that rest on a p (except independence).
        criterion: When the claim holds.
        passed: Whether the claim holds; None if it was not measured, or if the data do not decide it.
        reason: Why the claim was not measured or not decided.
        pairs_needed: Number of pairs that would decide an undecided claim, at the measured figure and spread; None if
            no number would, or if the number of pairs is not what is missing.
    """

    name: str
    statement: str
    value: float | None
    interval: tuple[float, float] | None
    p_value: PValue | None
    criterion: str
    passed: bool | None
    reason: str = ""
    pairs_needed: int | None = None

    @property
    def by_construction(self) -> bool:
        """Whether the search itself made the claim hold: it enlarges the circuit until these pairs reach the target."""
        return self.name == "faithfulness" and self.passed is True

    @property
    def verdict(self) -> str:
        """One of ``fails``, ``not measured``, ``undecided``, ``holds`` and ``holds by construction``.

        ``undecided`` means that the claim was measured, but that the data do not decide it.
        """
        if self.passed is None:
            return "not measured" if self.value is None else "undecided"
        if self.by_construction:
            return "holds by construction"
        return "holds" if self.passed else "fails"

    def __str__(self) -> str:
        word = self.verdict.replace("fails", "FAILS")
        shown = [] if self.value is None else [f"{self.value:.3g}"]
        shown += [] if self.interval is None else [f"[{self.interval[0]:.3g}, {self.interval[1]:.3g}]"]
        shown += [] if self.p_value is None else [f"p = {self.p_value:.2g}"]
        return f"{self.name}: {word} ({self.reason or ' '.join(shown)}; {self.criterion})"


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked about a circuit; None or NaN means that it was not measured.

    Attributes:
        faithfulness: Faithfulness on the pairs that the circuit was found on: (m(C) - m(empty)) / (m(model) -
            m(empty)).
        held_out_faithfulness: Faithfulness on held-out pairs, which set the size of the circuit and nothing else.
        held_out_ci: 95 % interval of ``held_out_faithfulness``, over pairs.
        held_out_topics: Topics of the held-out pairs, if the search saw none of them; otherwise empty.
        fresh: Faithfulness on pairs that played no part at all; None if there were too few pairs to set any aside.
        necessity: Share of the gap that is lost when the whole circuit gets its values from the harmless run. It is
            measured on fresh pairs, or on held-out pairs if there are none. The random controls and minimality are
            measured on some of these pairs (``n_control_pairs`` of `MapOptions`).
        random_controls: Size-matched random circuits, kept alone.
        curve: Faithfulness over circuit size.
        cmd: Area between the held-out curve and 1 over k (0 is best).
        cpr: Area under the held-out curve over k.
        cmd_ci, cpr_ci: 95 % intervals of ``cmd`` and ``cpr``, over pairs.
        target: The target faithfulness.
        goal: ``reach`` if the circuit had to reach the target, ``match`` if it also had to match the whole model.
        reached: Whether the circuit meets the goal, on the search's pairs and on held-out ones.
        minimality: Faithfulness lost when one part alone leaves the circuit, by the part's name.
        minimality_ci: 95 % interval of each of these, over pairs.
        minimality_null: What 95 % of the parts outside stay below, when each is added to the circuit alone.
        completeness: Largest difference found, over subsets K of the circuit C, between the faithfulness of C without K
            and of the whole model without K.
        completeness_without: The subset K with this difference.
        completeness_ci: 95 % interval of the difference at this K. K was chosen because its difference is the largest.
        necessity_controls: Size-matched random circuits, each removed: the share of the gap that is lost.
        minimality_p: p of each part's marginal effect against that of parts added at random, Benjamini-Hochberg
            adjusted.
        independence, stability, side_effects: See `Independence`, `Stability` and `SideEffects`.
        claims: The claims about the circuit, each with its figure and verdict.

    Example:
        >>> circuit.verification.by_verdict["holds"]
        ('completeness', 'harmless prompts', 'complement')
        >>> circuit.verification.held_out_faithfulness > 0.9
        True
    """

    faithfulness: OrNan
    held_out_faithfulness: OrNan = field(metadata={"name": "held_out.faithfulness"})
    held_out_ci: tuple[float, float] = field(metadata={"name": "held_out.ci"})
    held_out_topics: tuple[str, ...] = field(metadata={"name": "held_out.topics"})
    necessity: OrNan
    random_controls: RandomControls
    curve: tuple[CurvePoint, ...]
    cmd: OrNan
    cpr: OrNan
    target: OrNan
    reached: bool
    completeness: float | None = None
    minimality: Mapping[str, OrNan] | None = None
    fresh: FreshCheck | None = None
    completeness_without: tuple[str, ...] | None = None
    necessity_controls: RandomControls | None = None
    minimality_p: Mapping[str, PValue] | None = None
    independence: Independence | None = None
    stability: Stability | None = None
    side_effects: SideEffects | None = None
    claims: tuple[Claim, ...] = ()
    cmd_ci: tuple[float, float] | None = None
    cpr_ci: tuple[float, float] | None = None
    completeness_ci: tuple[float, float] | None = None
    goal: GoalKind = "reach"
    minimality_ci: Mapping[str, tuple[float, float]] | None = None
    minimality_null: float | None = None

    @property
    def aim(self) -> Goal:
        """Which faithfulness was good enough."""
        return Goal(self.target, self.goal)

    @property
    def overshoots(self) -> tuple[str, ...]:
        """On which pairs the whole interval of the faithfulness lies above what the goal ``match`` allows.

        Such a circuit leaves out parts that work against the behaviour. Only one that was searched for with the goal
        ``reach`` counts.
        """
        most = Goal(self.target, "match").most + ROUNDING
        intervals = {"held-out pairs": self.held_out_ci}
        intervals |= {} if self.fresh is None else {"fresh pairs": self.fresh.ci}
        return tuple(name for name, (low, _) in intervals.items() if self.goal == "reach" and low > most)

    @property
    def measured(self) -> bool:
        """Whether anything was checked; a merged circuit, or a part of a circuit, has no checks."""
        return math.isfinite(self.faithfulness)

    @property
    def tested(self) -> tuple[Claim, ...]:
        """The claims that count: without those that hold by construction, and without duplicates of a figure.

        Files of version 0.1 hold the figure of the fresh pairs a second time, as that of held-out topics.
        """
        twice = {"held-out topics"} if any(claim.name == "fresh pairs" for claim in self.claims) else set()
        return tuple(claim for claim in self.claims if not claim.by_construction and claim.name not in twice)

    @property
    def random_p(self) -> float:
        """The p of the random circuits: that of the sufficiency claim, which is adjusted; otherwise their own."""
        found = (claim.p_value for claim in self.claims if claim.name == "sufficiency")
        adjusted = next(found, None)
        return self.random_controls.p_value if adjusted is None else adjusted

    @property
    def by_verdict(self) -> dict[str, tuple[str, ...]]:
        """Names of the claims with each verdict that occurs; the worst verdict first."""
        order = ("fails", "undecided", "not measured", "holds", "holds by construction")
        found = {verdict: tuple(claim.name for claim in self.claims if claim.verdict == verdict) for verdict in order}
        return {verdict: names for verdict, names in found.items() if names}

    @property
    def tally(self) -> str:
        """How many of the claims that count hold, in words, such as ``8 of 9``."""
        return f"{len(self.by_verdict.get('holds', ()))} of {len(self.tested)}"

    @property
    def failed(self) -> tuple[Claim, ...]:
        """The claims that were measured and do not hold."""
        return tuple(claim for claim in self.claims if claim.passed is False)

    @classmethod
    def not_measured(cls, aim: Goal, reason: str) -> Self:
        """The verification of a circuit that was not checked: every number is NaN, and the only claim says why."""
        nan = math.nan
        claim = Claim("verification", "the circuit was checked", None, None, None, "measured", None, reason)
        return cls(
            faithfulness=nan,
            held_out_faithfulness=nan,
            held_out_ci=(nan, nan),
            held_out_topics=(),
            necessity=nan,
            random_controls=RandomControls(0, nan, nan, nan),
            curve=(),
            cmd=nan,
            cpr=nan,
            target=aim.target,
            goal=aim.kind,
            reached=False,
            claims=(claim,),
        )
