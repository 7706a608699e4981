"""What was checked about a circuit: the numbers, and the claims that they support or refute."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from mechsafety.codec import OrNan, PValue


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Faithfulness of the best ``n_nodes`` nodes found; ``k`` is their share of all candidate nodes."""

    k: OrNan
    n_nodes: int
    faithfulness: OrNan
    held_out: OrNan


@dataclass(frozen=True, slots=True)
class RandomControls:
    """Size-matched random circuits on held-out pairs.

    Attributes:
        n: How many were drawn.
        mean: Their mean faithfulness.
        highest: The best of them.
        p_value: (1 + number at least as faithful as the circuit) / (1 + n).
    """

    n: int
    mean: OrNan
    highest: OrNan
    p_value: PValue


@dataclass(frozen=True, slots=True)
class FreshCheck:
    """The circuit on pairs that played no part in finding it, not even in deciding its size.

    Attributes:
        n: Pairs.
        faithfulness: On them.
        ci: 95 % interval of it over pairs.
    """

    n: int
    faithfulness: OrNan
    ci: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Two one-sided t-tests (TOST) on per-prompt differences, circuit less whole model, as shares of the mean gap.

    Attributes:
        margin: The mean difference is claimed to lie within plus and minus this.
        difference: Mean over prompts.
        ci: 90 % t interval of it: inside the margins exactly when p < 0.05.
        p_value: The larger of the two one-sided p.
    """

    margin: OrNan
    difference: OrNan
    ci: tuple[float, float]
    p_value: PValue


@dataclass(frozen=True, slots=True)
class Independence:
    """HSIC between the whole model's metric and that of the model without the circuit, over prompts.

    Attributes:
        n: Prompts.
        hsic: Biased estimate with Gaussian kernels of median width.
        p_value: Of independence, by permutation of the prompts.
    """

    n: int
    hsic: OrNan
    p_value: PValue

    @property
    def smallest_p(self) -> float:
        """The smallest p that this many prompts could give, were the two scores one; 1 where a score does not vary."""
        return 1.0 if self.hsic <= 1e-12 else 1.0 / math.factorial(min(self.n, 20))


@dataclass(frozen=True, slots=True)
class Stability:
    """Circuits searched again on bootstrap resamples of the prompts.

    Attributes:
        jaccards: Overlap of each with the circuit of all prompts, by the same search.
        mean: Of them.
        n_nodes: Their sizes.
    """

    jaccards: tuple[OrNan, ...]
    mean: OrNan
    n_nodes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SideEffects:
    """KL divergence (nats) of the next token on harmless prompts, from the unedited model to the edited one.

    Attributes:
        circuit_ablated: Mean over prompts, every part of the circuit at its mean over harmless prompts.
        circuit_ablated_ci: 95 % interval of it.
        complement_patched: The same, everything outside the circuit at its value in the harmful counterfactual.
        complement_patched_ci: 95 % interval of it.
    """

    circuit_ablated: OrNan
    circuit_ablated_ci: tuple[float, float]
    complement_patched: OrNan
    complement_patched_ci: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing that a circuit should be, the figure it was checked by, and whether it held.

    Attributes:
        name: Short name.
        statement: What is claimed.
        value: The figure.
        interval: Its interval.
        p_value: Benjamini-Hochberg adjusted over the claims that rest on a p (but that of independence).
        criterion: When the claim holds.
        passed: Whether it held; None where it was not measured, or where the prompts are too few to decide.
        reason: Why not.
    """

    name: str
    statement: str
    value: float | None
    interval: tuple[float, float] | None
    p_value: PValue | None
    criterion: str
    passed: bool | None
    reason: str = ""

    @property
    def by_construction(self) -> bool:
        """Whether the search itself made it hold: it enlarges the circuit until these pairs reach the target."""
        return self.name == "faithfulness" and self.passed is True

    @property
    def verdict(self) -> str:
        """``fails``, ``not measured``, ``undecided`` by what was measured, ``holds``, or ``holds by construction``."""
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
    """What was checked about a circuit. None (or NaN) means: not measured.

    Attributes:
        faithfulness: On the pairs it was found on: (m(C) - m(empty)) / (m(model) - m(empty)).
        held_out_faithfulness: The same on held-out pairs, which set the size of the circuit and nothing else.
        held_out_ci: 95 % interval of it over pairs.
        held_out_topics: Their topics, where none of them is among the search's; else empty.
        fresh: The same on pairs that played no part at all; None where there were too few pairs to set any aside.
        necessity: Share of the gap lost when the whole circuit gets its harmless-run values, on fresh pairs (on
            held-out ones where there are none; so are the random controls and the minimality).
        random_controls: Size-matched random circuits.
        curve: Faithfulness over circuit size.
        cmd: Area between the held-out curve and 1 over k (0 is best).
        cpr: Area under the held-out curve over k.
        cmd_ci, cpr_ci: 95 % intervals of them over pairs.
        target: The faithfulness that was asked for.
        reached: Whether the circuit shown reaches it on held-out pairs.
        minimality: Faithfulness lost when one part alone leaves the circuit, by its name.
        completeness: Largest difference found, over subsets K of the circuit C, between the faithfulness of C without K
            and of the whole model without K.
        completeness_without: The K at which it was found.
        completeness_ci: 95 % interval of the difference at this K, which was chosen for it.
        necessity_controls: Size-matched random circuits; what removing each of them loses.
        minimality_p: p of each part's marginal effect against parts added at random, Benjamini-Hochberg adjusted.
        equivalence, independence, stability, side_effects: See there.
        claims: What should be true of a circuit, with what was measured, and whether it is.
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
    equivalence: Equivalence | None = None
    independence: Independence | None = None
    stability: Stability | None = None
    side_effects: SideEffects | None = None
    claims: tuple[Claim, ...] = ()
    cmd_ci: tuple[float, float] | None = None
    cpr_ci: tuple[float, float] | None = None
    completeness_ci: tuple[float, float] | None = None

    @property
    def measured(self) -> bool:
        """Whether anything was checked (a merged circuit, or a part of one, has not been)."""
        return math.isfinite(self.faithfulness)

    @property
    def tested(self) -> tuple[Claim, ...]:
        """The claims that count: without those that hold by construction, and without a number that is there twice.

        Files of version 0.1 hold the figure of the fresh pairs once more, as that of held-out topics.
        """
        twice = {"held-out topics"} if any(claim.name == "fresh pairs" for claim in self.claims) else set()
        return tuple(claim for claim in self.claims if not claim.by_construction and claim.name not in twice)

    @property
    def random_p(self) -> float:
        """P of the random circuits as the claim of sufficiency has it: adjusted, where there is such a claim."""
        found = (claim.p_value for claim in self.claims if claim.name == "sufficiency")
        adjusted = next(found, None)
        return self.random_controls.p_value if adjusted is None else adjusted

    @property
    def failed(self) -> tuple[Claim, ...]:
        """The claims that were measured and do not hold."""
        return tuple(claim for claim in self.claims if claim.passed is False)

    @classmethod
    def not_measured(cls, target: float, reason: str) -> Self:
        """The verification of a circuit that nobody has checked: every number is NaN, and the one claim says why."""
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
            target=target,
            reached=False,
            claims=(claim,),
        )
