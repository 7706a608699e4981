"""Claims: what is counted, and that data which decide nothing decide none."""

import dataclasses
import math

import numpy as np
import pytest

from mechsafety.circuits.verification.claims import claims
from mechsafety.circuits.verification.outcome import (
    Claim,
    FreshCheck,
    Independence,
    RandomControls,
    SideEffects,
    Stability,
    Verification,
)
from mechsafety.circuits.verification.statistics import equivalence_test, independence_test, rank_p

CONTROLS = RandomControls(100, 0.1, 0.3, 1 / 101)


@pytest.fixture
def check():
    """Every check there is, all of them passed."""
    return Verification(
        faithfulness=0.85,
        held_out_faithfulness=0.81,
        held_out_ci=(0.6, 1.0),
        held_out_topics=("fraud",),
        necessity=0.9,
        random_controls=CONTROLS,
        curve=(),
        cmd=0.2,
        cpr=0.8,
        target=0.8,
        reached=True,
        completeness=0.1,
        completeness_ci=(-0.2, 0.4),
        minimality={"L0.H0": 0.4},
        minimality_p={"L0.H0": 0.02},
        fresh=FreshCheck(7, 0.9, (0.5, 1.3)),
        necessity_controls=CONTROLS,
        equivalence=equivalence_test(np.array([0.01, -0.02, 0.03, 0.0]), 0.2),
        independence=Independence(7, 0.02, 0.5),
        stability=Stability((0.7, 0.8), 0.75, (3, 4)),
        side_effects=SideEffects(0.01, (0.0, 0.02), 0.02, (0.0, 0.05)),
    )


def of(check, name, **changes):
    made = claims(dataclasses.replace(check, **changes), necessity_ci=(0.7, 1.1))
    return next(claim for claim in made if claim.name == name)


def test_each_number_is_claimed_once_and_construction_is_marked(check):
    made = dataclasses.replace(check, claims=claims(check, necessity_ci=(0.7, 1.1)))
    assert len(made.claims) == 11 and all(claim.passed for claim in made.claims), made.claims
    assert "held-out topics" not in {claim.name for claim in made.claims}
    assert of(check, "fresh pairs").statement.endswith("in the search, of topics that it did not see")
    assert of(check, "fresh pairs", held_out_topics=()).statement.endswith("in the search")
    assert [claim.name for claim in made.claims if claim.by_construction] == ["faithfulness"]
    assert str(made.claims[0]).startswith("faithfulness: holds by construction (0.81 [0.6, 1]")
    assert [claim.name for claim in made.tested] == [claim.name for claim in made.claims[1:]]
    missed = of(check, "faithfulness", reached=False)
    assert (missed.verdict, missed.by_construction) == ("fails", False)


def test_an_older_files_claims_are_counted_the_same_way(check):
    made = claims(check)
    old = (*made[:2], dataclasses.replace(made[1], name="held-out topics"), *made[2:])
    assert len(dataclasses.replace(check, claims=old).tested) == 10


def test_the_p_that_is_shown_is_the_adjusted_one(check):
    made = dataclasses.replace(check, claims=claims(check, necessity_ci=(0.7, 1.1)))
    assert made.random_p == of(check, "sufficiency").p_value
    close = dataclasses.replace(CONTROLS, p_value=0.04)
    worse = dataclasses.replace(check, random_controls=close)
    worse = dataclasses.replace(worse, claims=claims(worse))
    assert worse.random_p == pytest.approx(0.04) and check.random_p == CONTROLS.p_value, "raw where nothing is claimed"
    worst = dataclasses.replace(worse, necessity_controls=dataclasses.replace(CONTROLS, p_value=0.5))
    worst = dataclasses.replace(worst, claims=claims(worst))
    assert worst.random_p == pytest.approx(0.06), "the second of three"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("fresh pairs", {"fresh": FreshCheck(3, 0.9, (-0.4, 2.2))}, "3 pairs: the interval holds 0, what an empty"),
        ("fresh pairs", {"fresh": FreshCheck(3, 0.2, (-0.4, 0.8))}, "3 pairs: the interval holds 0, what an empty"),
        ("fresh pairs", {"fresh": FreshCheck(1, 0.9, (-math.inf, math.inf))}, "too few pairs, or too different ones"),
        ("sufficiency", {"fresh": FreshCheck(3, 0.9, (-0.4, 2.2))}, "the interval holds 0, what an empty circuit has"),
        ("completeness", {"completeness_ci": (-0.5, 1.2)}, "the interval holds 1, the whole gap"),
        ("completeness", {"completeness_ci": (-math.inf, math.inf)}, "too few pairs, or too different ones"),
        ("equivalence", {"equivalence": equivalence_test(np.array([0.01]), 0.2)}, "one pair decides nothing"),
        ("independence", {"independence": Independence(3, 0.02, 0.5)}, "3 pairs, or scores that do not vary, cannot"),
        ("independence", {"independence": Independence(9, 0.0, 1.0)}, "9 pairs, or scores that do not vary, cannot"),
        ("stability", {"stability": Stability((0.9,), 0.9, (3,))}, "one resample decides nothing"),
        ("harmless prompts", {"side_effects": SideEffects(0.0, (-math.inf, math.inf), 0.0, (0.0, 0.0))}, "too few"),
    ],
)
def test_data_that_decide_nothing(check, name, changes, reason):
    claim = of(check, name, **changes)
    assert claim.passed is None and claim.reason.startswith(reason), claim
    assert claim.verdict == "undecided" and "undecided" in str(claim)


def test_what_was_not_measured(check):
    claim = of(check, "completeness", completeness=None)
    assert (claim.verdict, claim.passed, claim.value) == ("not measured", None, None)
    assert Claim("a", "b", 1.0, None, None, "c", False).verdict == "fails"


def test_the_smallest_p_of_independence():
    """Three orders of pairs cannot be rarer than one in six; four can be one in 24."""
    x = np.array([0.0, 1.0, 5.0])
    assert independence_test(x, x, 0).p_value > 0.1 and independence_test(x, x, 0).smallest_p == pytest.approx(1 / 6)
    assert independence_test(np.ones(9), np.arange(9.0), 0).smallest_p == 1.0
    assert independence_test(np.arange(9.0), np.arange(9.0), 0).smallest_p < 1e-5


def test_ranks_of_what_is_no_number():
    assert rank_p(math.nan, np.array([1.0, 2.0])) == 1.0, "it was the smallest there is"
    assert rank_p(3.0, np.array([1.0, math.nan])) == pytest.approx(2 / 3)
    assert rank_p(1.0, np.array([1.0, 1.0, 1.0])) == 1.0, "all random circuits equal it"


def test_one_difference_is_not_equivalence():
    found = equivalence_test(np.array([0.0]), 0.2)
    assert found.p_value == 1.0 and found.ci == (-math.inf, math.inf)
