"""The claims about a circuit, and the verdict on each by what was measured; a claim that fails is shown as failed."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mechsafety.circuits.verification.outcome import Claim, Independence, RandomControls, Verification
from mechsafety.metrics import adjust_p

# fixed before anything is measured, and not moved to make a claim hold
ALPHA = 0.05
MAX_KL = 0.1
MIN_JACCARD = 0.5
MAX_CORRELATION = 0.5
# more pairs than this are as good as none that would decide
MOST_PAIRS = 100_000

UNMEASURED = "left out: not defined at this level, or no time"
NO_INTERVAL = "too few pairs, or too different ones, for an interval"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a claim holds, why it may be undecided, and how many pairs (or resamples) would decide it."""

    passed: bool | None
    reason: str = ""
    needed: int | None = None


Counted = Literal["pairs", "resamples"]


def decide(
    value: float,
    interval: tuple[float, float],
    n: int,
    low: float = -math.inf,
    high: float = math.inf,
    of: Counted = "pairs",
) -> Verdict:
    """Whether a figure is known to lie between two limits, known to lie outside them, or neither.

    It is known if its whole interval lies on one side of the limit. Otherwise the claim is undecided. An interval
    narrows with the square root of the number of pairs. As many pairs would decide the claim as make the interval end
    at the limit, if the figure and the spread stay as they are.

    Args:
        value: The figure.
        interval: Its interval.
        n: Number of pairs that the interval is over.
        low: Lower limit.
        high: Upper limit.
        of: What ``n`` counts.

    Example:
        >>> decide(0.9, (0.5, 1.3), 7, low=0.8).needed  # the interval reaches 0.4 below 0.9, the limit is 0.1 below it
        112
    """
    if not all(map(math.isfinite, (value, *interval))):
        return Verdict(None, NO_INTERVAL)
    if low <= interval[0] and interval[1] <= high:
        return Verdict(True)
    if interval[1] < low or interval[0] > high:
        return Verdict(False)
    if value < low:
        ends = [(interval[1], low)]
    elif value > high:
        ends = [(interval[0], high)]
    else:
        ends = [(interval[0], low)] * (interval[0] < low) + [(interval[1], high)] * (interval[1] > high)
    ratio = max(abs(end - value) / abs(limit - value) if limit != value else math.inf for end, limit in ends)
    return _undecided(n * ratio**2, of)


def _undecided(needed: float, of: Counted = "pairs") -> Verdict:
    what = "the interval holds the limit"
    if not needed <= MOST_PAIRS:
        return Verdict(None, f"{what}; no number of {of} within reach would decide it")
    whole = math.ceil(needed * (1 - 1e-9))  # 507 and not 508 because of rounding errors
    return Verdict(None, f"{what}; about {whole} {of} would decide it", whole)


def claims(
    check: Verification,
    n_pairs: int,
    necessity_ci: tuple[float, float] | None = None,
    *,
    n_parts: int | None = None,
) -> tuple[Claim, ...]:
    """The claims about a circuit, each with its figure and the verdict.

    A claim holds if its test says so: its p is small, or its whole interval lies on the right side of the limit. It
    fails if the data show the opposite. Otherwise it is undecided, and says how many pairs would decide it. See
    docs/methods/verification.md for each claim.

    The p of sufficiency and necessity are adjusted together (Benjamini-Hochberg). The p of minimality are adjusted over
    the circuit's parts. Independence is claimed if its test does not reject it. Its p is therefore not adjusted.

    Args:
        check: Everything that was measured; its own claims are not read.
        n_pairs: Number of pairs that it was measured on.
        necessity_ci: Interval of the necessity.
        n_parts: Number of parts that minimality is claimed of; None if each of them was measured.
    """
    adjusted = _adjusted(check)
    return (
        _faithfulness(check),
        _fresh(check),
        _against_random(
            "sufficiency",
            "kept alone, the circuit is more faithful than random circuits of its size",
            check.held_out_faithfulness if check.fresh is None else check.fresh.faithfulness,
            check.held_out_ci if check.fresh is None else check.fresh.ci,
            n_pairs,
            check.random_controls,
            adjusted.get("sufficiency"),
        ),
        _against_random(
            "necessity",
            "removing the circuit loses more of the gap than removing random circuits of its size",
            check.necessity,
            necessity_ci,
            n_pairs,
            check.necessity_controls,
            adjusted.get("necessity"),
        ),
        _minimality(check, n_pairs, n_parts),
        _completeness(check, n_pairs),
        _independence(check.independence),
        _stability(check),
        *_side_effects(check, n_pairs),
    )


def _adjusted(check: Verification) -> dict[str, float]:
    """Adjusted p of sufficiency and necessity, where they were measured."""
    found: dict[str, float] = {}
    for name, controls in (("sufficiency", check.random_controls), ("necessity", check.necessity_controls)):
        if controls is not None and controls.n:
            found[name] = controls.p_value
    values = adjust_p(np.array(list(found.values())))
    return {name: float(value) for name, value in zip(found, values, strict=True)}


def _claim(
    name: str,
    statement: str,
    value: float | None,
    interval: tuple[float, float] | None,
    criterion: str,
    verdict: Verdict,
    p_value: float | None = None,
) -> Claim:
    return Claim(name, statement, value, interval, p_value, criterion, verdict.passed, verdict.reason, verdict.needed)


def _faithfulness(check: Verification) -> Claim:
    return _claim(
        "faithfulness",
        "the circuit reaches the faithfulness that was asked for, on the search's pairs and on held-out ones",
        check.held_out_faithfulness,
        check.held_out_ci,
        f"{check.aim.words} on both",
        Verdict(check.reached),
    )


def _fresh(check: Verification) -> Claim:
    """One claim for fresh pairs and held-out topics: the fresh pairs are of held-out topics, if there are any."""
    goal = check.aim
    statement = "the circuit does so on pairs that played no part in the search"
    if check.held_out_topics:
        statement += ", of topics that it did not see"
    if check.fresh is None:
        reason = Verdict(None, "too few pairs to set any aside")
        return _claim("fresh pairs", statement, None, None, goal.words, reason)
    value, interval, n = check.fresh.faithfulness, check.fresh.ci, check.fresh.n
    verdict = decide(value, interval, n, goal.target, goal.most)
    return _claim("fresh pairs", statement, value, interval, goal.words, verdict)


def _against_random(
    name: str,
    statement: str,
    value: float,
    interval: tuple[float, float] | None,
    n_pairs: int,
    controls: RandomControls | None,
    p_value: float | None,
) -> Claim:
    criterion = f"p < {ALPHA:g}"
    if controls is None or p_value is None:
        return _claim(name, statement, value, interval, criterion, Verdict(None, UNMEASURED))
    criterion += f" against {controls.n} random circuits"
    if controls.n_pairs is not None and controls.n_pairs < n_pairs:
        criterion += f", on {controls.n_pairs} of the pairs"
    least = 1 / (1 + controls.n)
    if least >= ALPHA:
        verdict = Verdict(None, f"{controls.n} random circuits cannot give a p below {least:.2g}")
    elif p_value >= ALPHA and controls.p_value <= least:
        # no random circuit equals it, and more of them could have shown that
        verdict = Verdict(None, f"the smallest p of {controls.n} random circuits is {p_value:.2g} after adjustment")
    else:
        verdict = Verdict(p_value < ALPHA)
        from_empty = Verdict(True) if interval is None else decide(value, interval, n_pairs, low=0.0)
        if from_empty.passed is False:
            verdict = Verdict(False)
        elif from_empty.passed is None:
            reason = from_empty.reason.replace("the limit", "0, what an empty circuit has")
            verdict = Verdict(None, reason, from_empty.needed)
    return _claim(name, statement, value, interval, criterion, verdict, p_value)


def _minimality(check: Verification, n_pairs: int, n_parts: int | None) -> Claim:
    """A part that chance equals, and that more pairs would not save, refutes the claim."""
    does = "adds more faithfulness" if check.goal == "reach" else "changes the faithfulness more"
    measured = len(check.minimality or ())
    sample = f"each of {measured} of the {n_parts} parts, drawn at random,"
    statement = f"{'every part' if n_parts in (None, measured) else sample} {does} than parts added at random do"
    criterion = f"p < {ALPHA:g} for all parts; the figure is the share of them that has it"
    if check.random_controls.n_pairs is not None and check.random_controls.n_pairs < n_pairs:
        n_pairs = check.random_controls.n_pairs
        criterion += f"; on {n_pairs} of the pairs"
    if not check.minimality_p:
        reason = UNMEASURED if check.minimality is None else "too few parts outside the circuit for a p below 0.05"
        return _claim("minimality", statement, None, None, criterion, Verdict(None, reason))
    below = {part: p for part, p in check.minimality_p.items() if p >= ALPHA}
    share = 1 - len(below) / len(check.minimality_p)
    verdict = Verdict(not below)
    if below and check.minimality_ci and check.minimality_null is not None:
        verdict = _told_from_chance(check, tuple(below), n_pairs)
        if verdict.needed is not None and "of the pairs" in criterion:
            verdict = replace(verdict, reason=verdict.reason.replace(" pairs would", " pairs (n_control_pairs) would"))
    return _claim("minimality", statement, share, None, criterion, verdict, max(check.minimality_p.values()))


def _told_from_chance(check: Verification, parts: tuple[str, ...], n_pairs: int) -> Verdict:
    """The verdict on minimality where these parts have no small p: fails if one of them is known to add too little."""
    values, intervals, limit = check.minimality or {}, check.minimality_ci or {}, check.minimality_null or 0.0
    verdicts = []
    for part in parts:
        if check.goal == "reach":
            verdicts.append(decide(values[part], intervals[part], n_pairs, low=limit))
            continue
        # a part counts by what it changes: it is known to change too little if its whole interval lies within the limit
        within = decide(values[part], intervals[part], n_pairs, -limit, limit)
        verdicts.append(replace(within, passed=None if within.passed is None else not within.passed))
    if any(found.passed is False for found in verdicts):
        return Verdict(False)
    open_still = [found.needed for found in verdicts if found.passed is None]
    if not open_still:
        return Verdict(None, f"parts that add more than chance one by one: {len(parts)}; a larger n_added decides")
    most = max((MOST_PAIRS + 1 if needed is None else needed) for needed in open_still)
    found = _undecided(most)
    reason = found.reason.replace("the interval holds the limit", f"parts not told from chance: {len(open_still)}")
    return Verdict(None, reason, found.needed)


def _completeness(check: Verification, n_pairs: int) -> Claim:
    statement = "what the circuit loses without some of its parts, the whole model loses without them too"
    limit = 1.0 - check.target
    criterion = f"largest difference found at most {limit:.2g}"
    value, interval = check.completeness, check.completeness_ci
    if value is None or interval is None:
        return _claim("completeness", statement, value, interval, criterion, Verdict(None, UNMEASURED))
    # the interval is that of a difference whose sign was turned; the claim is about its size
    verdict = decide(value, interval, n_pairs, -limit, limit)
    return _claim("completeness", statement, value, interval, criterion, verdict)


def _independence(test: Independence | None) -> Claim:
    statement = "without the circuit, the model's score tells nothing of what it was with it"
    criterion = f"p >= {ALPHA:g}, and a correlation within ±{MAX_CORRELATION:g}"
    if test is None or test.correlation is None or test.ci is None:
        return _claim("independence", statement, None, None, criterion, Verdict(None, UNMEASURED))
    value, interval = test.correlation, test.ci
    verdict = Verdict(False) if test.p_value < ALPHA else decide_correlation(value, interval, test.n)
    return _claim("independence", statement, value, interval, criterion, verdict, test.p_value)


def decide_correlation(value: float, interval: tuple[float, float], n: int) -> Verdict:
    """The verdict on a correlation, whose interval narrows on Fisher's scale with the number of pairs less 3."""
    if n < 4:
        return Verdict(None, NO_INTERVAL)
    # a correlation may round to ±1, whose arctanh is infinite
    middle, low, high = np.arctanh(np.clip((value, *interval), -1 + 1e-12, 1 - 1e-12)).tolist()
    limit = math.atanh(MAX_CORRELATION)
    found = decide(middle, (low, high), n - 3, -limit, limit)
    return found if found.needed is None else _undecided(found.needed + 3)


def _stability(check: Verification) -> Claim:
    statement = "ranking and smallest prefix on resampled prompts find the same parts"
    criterion = f"mean Jaccard overlap at least {MIN_JACCARD:g}"
    found = check.stability
    if found is None or not found.jaccards or not math.isfinite(found.mean):
        return _claim("stability", statement, None, None, criterion, Verdict(None, UNMEASURED))
    if len(found.jaccards) < 2:
        return _claim(
            "stability", statement, found.mean, None, criterion, Verdict(None, "one resample decides nothing")
        )
    verdict = decide(found.mean, found.interval, len(found.jaccards), low=MIN_JACCARD, of="resamples")
    return _claim(
        "stability", statement, found.mean, found.interval, criterion, Verdict(verdict.passed, verdict.reason)
    )


def _side_effects(check: Verification, n_pairs: int) -> tuple[Claim, Claim]:
    criterion, found = f"KL at most {MAX_KL:g} nats", check.side_effects
    rows = (
        ("harmless prompts", "ablating the circuit leaves the next token of harmless prompts alone", "circuit_ablated"),
        (
            "complement",
            "what is outside the circuit carries nothing from a harmful prompt",
            "complement_patched",
        ),
    )
    made = []
    for name, statement, field in rows:
        if found is None:
            made.append(_claim(name, statement, None, None, criterion, Verdict(None, UNMEASURED)))
            continue
        value, interval = getattr(found, field), getattr(found, f"{field}_ci")
        made.append(_claim(name, statement, value, interval, criterion, decide(value, interval, n_pairs, high=MAX_KL)))
    return made[0], made[1]
