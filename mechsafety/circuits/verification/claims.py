"""The claims about a circuit, and the verdict on each by what was measured; a claim that fails is shown as failed."""

import math

import numpy as np

from mechsafety.circuits.verification.outcome import Claim, RandomControls, Verification
from mechsafety.metrics import adjust_p

# fixed before anything is measured, and not moved to make a claim hold
ALPHA = 0.05
MAX_KL = 0.1
MIN_JACCARD = 0.5

UNMEASURED = "left out: not defined at this level, or no time"


def claims(check: Verification, necessity_ci: tuple[float, float] | None = None) -> tuple[Claim, ...]:
    """The claims about a circuit, each with its figure and the verdict.

    A claim stays undecided if the data cannot decide it. Then there are too few prompts for an interval or a small p,
    or the interval also holds the opposite of the claim. Such a claim has no verdict, as if not measured, and says why.

    The p of sufficiency, necessity and equivalence are adjusted together (Benjamini-Hochberg). The p of minimality are
    adjusted over the circuit's parts. Independence is claimed if its test does not reject it. Its p is therefore not
    adjusted.

    Args:
        check: Everything that was measured; its own claims are not read.
        necessity_ci: Interval of the necessity.
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
            check.random_controls,
            adjusted.get("sufficiency"),
        ),
        _against_random(
            "necessity",
            "removing the circuit loses more of the gap than removing random circuits of its size",
            check.necessity,
            necessity_ci,
            check.necessity_controls,
            adjusted.get("necessity"),
        ),
        _minimality(check),
        _completeness(check),
        _equivalence(check, adjusted.get("equivalence")),
        _independence(check),
        _stability(check),
        *_side_effects(check),
    )


def _adjusted(check: Verification) -> dict[str, float]:
    """Adjusted p of sufficiency, necessity and equivalence, where they were measured."""
    found: dict[str, float] = {}
    for name, controls in (("sufficiency", check.random_controls), ("necessity", check.necessity_controls)):
        if controls is not None and controls.n:
            found[name] = controls.p_value
    if check.equivalence is not None:
        found["equivalence"] = check.equivalence.p_value
    values = adjust_p(np.array(list(found.values())))
    return {name: float(value) for name, value in zip(found, values, strict=True)}


def _faithfulness(check: Verification) -> Claim:
    return Claim(
        "faithfulness",
        "the circuit reaches the faithfulness that was asked for, on the search's pairs and on held-out ones",
        check.held_out_faithfulness,
        check.held_out_ci,
        None,
        f"at least {check.target:g} on both",
        check.reached,
    )


def _fresh(check: Verification) -> Claim:
    """One claim for fresh pairs and held-out topics: the fresh pairs are of held-out topics, if there are any."""
    statement, criterion = (
        "the circuit does so on pairs that played no part in the search",
        f"at least {check.target:g}",
    )
    if check.held_out_topics:
        statement += ", of topics that it did not see"
    if check.fresh is None:
        return Claim("fresh pairs", statement, None, None, None, criterion, None, "too few pairs to set any aside")
    value, interval = check.fresh.faithfulness, check.fresh.ci
    reason = _undecided(interval, 0.0, f"{check.fresh.n} pairs: the interval holds 0, what an empty circuit has")
    passed = None if reason else value >= check.target
    return Claim("fresh pairs", statement, value, interval, None, criterion, passed, reason)


def _undecided(interval: tuple[float, float] | None, opposite: float, reason: str) -> str:
    """Why a figure decides nothing: its interval has no end or holds the opposite of the claim; otherwise empty."""
    if interval is None:
        return ""
    if not all(map(math.isfinite, interval)):
        return "too few pairs, or too different ones, for an interval"
    return reason if interval[0] <= opposite <= interval[1] else ""


def _against_random(
    name: str,
    statement: str,
    value: float,
    interval: tuple[float, float] | None,
    controls: RandomControls | None,
    p_value: float | None,
) -> Claim:
    criterion = f"p < {ALPHA:g}"
    if controls is None or p_value is None:
        return Claim(name, statement, value, interval, None, criterion, None, UNMEASURED)
    reason = _undecided(interval, 0.0, "the interval holds 0, what an empty circuit has")
    if reason:
        return Claim(name, statement, value, interval, p_value, criterion, None, reason)
    criterion += f" against {controls.n} random circuits"
    if 1 / (1 + controls.n) >= ALPHA:
        reason = f"{controls.n} random circuits cannot give a p below {1 / (1 + controls.n):.2g}"
        return Claim(name, statement, value, interval, p_value, criterion, None, reason)
    return Claim(name, statement, value, interval, p_value, criterion, p_value < ALPHA)


def _minimality(check: Verification) -> Claim:
    statement = "every part adds more faithfulness than parts added at random change it"
    criterion = f"p < {ALPHA:g} for all parts; the figure is the share of them that has it"
    if not check.minimality_p:
        reason = UNMEASURED if check.minimality is None else "too few parts outside the circuit for a p below 0.05"
        return Claim("minimality", statement, None, None, None, criterion, None, reason)
    values = list(check.minimality_p.values())
    share = sum(value < ALPHA for value in values) / len(values)
    return Claim("minimality", statement, share, None, max(values), criterion, share == 1.0)


def _completeness(check: Verification) -> Claim:
    statement = "what the circuit loses without some of its parts, the whole model loses without them too"
    limit = 1.0 - check.target
    criterion = f"largest difference found at most {limit:.2g}"
    if check.completeness is None:
        return Claim("completeness", statement, None, None, None, criterion, None, UNMEASURED)
    value, interval = check.completeness, check.completeness_ci
    reason = _undecided(interval, 1.0, "the interval holds 1, the whole gap")
    return Claim(
        "completeness", statement, value, interval, None, criterion, None if reason else value <= limit, reason
    )


def _equivalence(check: Verification, p_value: float | None) -> Claim:
    statement, test = "circuit and model score the same prompts alike", check.equivalence
    if test is None or p_value is None:
        return Claim("equivalence", statement, None, None, None, f"p < {ALPHA:g}", None, UNMEASURED)
    criterion = f"p < {ALPHA:g} that the mean difference is within {test.margin:g} of the gap"
    if not all(map(math.isfinite, test.ci)):
        return Claim("equivalence", statement, test.difference, None, None, criterion, None, "one pair decides nothing")
    return Claim("equivalence", statement, test.difference, test.ci, p_value, criterion, p_value < ALPHA)


def _independence(check: Verification) -> Claim:
    statement, test = "without the circuit, the model's score tells nothing of what it was with it", check.independence
    criterion = f"p >= {ALPHA:g}: not rejected, which is no proof"
    if test is None:
        return Claim("independence", statement, None, None, None, criterion, None, UNMEASURED)
    reason = ""
    if test.smallest_p >= ALPHA:
        reason = f"{test.n} pairs, or scores that do not vary, cannot give a p below {test.smallest_p:.2g}"
    passed = None if reason else test.p_value >= ALPHA
    return Claim("independence", statement, test.hsic, None, test.p_value, criterion, passed, reason)


def _stability(check: Verification) -> Claim:
    statement = "ranking and smallest prefix on resampled prompts find the same parts"
    criterion = f"mean Jaccard overlap at least {MIN_JACCARD:g}"
    found = check.stability
    if found is None or not found.jaccards or not math.isfinite(found.mean):
        return Claim("stability", statement, None, None, None, criterion, None, UNMEASURED)
    spread = (min(found.jaccards), max(found.jaccards))
    if len(found.jaccards) < 2:
        reason = "one resample decides nothing"
        return Claim("stability", statement, found.mean, None, None, criterion, None, reason)
    return Claim("stability", statement, found.mean, spread, None, criterion, found.mean >= MIN_JACCARD)


def _side_effects(check: Verification) -> tuple[Claim, Claim]:
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
            made.append(Claim(name, statement, None, None, None, criterion, None, UNMEASURED))
            continue
        value, interval = getattr(found, field), getattr(found, f"{field}_ci")
        reason = _undecided(interval, math.inf, "")
        passed = None if reason else value <= MAX_KL
        made.append(Claim(name, statement, value, interval, None, criterion, passed, reason))
    return made[0], made[1]
