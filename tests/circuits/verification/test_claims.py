"""Claims: what is counted, and that data which decide nothing decide none."""

import dataclasses
import math

import numpy as np
import pytest

from mechsafety.circuits.verification.claims import MOST_PAIRS, claims, decide
from mechsafety.circuits.verification.outcome import (
    Claim,
    FreshCheck,
    Independence,
    RandomControls,
    SideEffects,
    Stability,
    Verification,
)
from mechsafety.circuits.verification.statistics import independence_test, rank_p

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
        completeness_ci=(0.05, 0.15),
        minimality={"L0.H0": 0.4},
        minimality_p={"L0.H0": 0.02},
        minimality_ci={"L0.H0": (0.3, 0.5)},
        minimality_null=0.05,
        fresh=FreshCheck(40, 0.9, (0.85, 0.95)),
        necessity_controls=CONTROLS,
        independence=Independence(40, 0.02, 0.5, 0.1, (-0.2, 0.4)),
        stability=Stability((0.7, 0.75, 0.8), 0.75, (3, 4, 4)),
        side_effects=SideEffects(0.01, (0.0, 0.02), 0.02, (0.0, 0.05)),
    )


def of(check, name, **changes):
    made = claims(dataclasses.replace(check, **changes), 40, necessity_ci=(0.7, 1.1))
    return next(claim for claim in made if claim.name == name)


def test_each_number_is_claimed_once_and_construction_is_marked(check):
    made = dataclasses.replace(check, claims=claims(check, 40, necessity_ci=(0.7, 1.1)))
    assert len(made.claims) == 10 and all(claim.passed for claim in made.claims), made.claims
    assert "held-out topics" not in {claim.name for claim in made.claims}
    assert of(check, "fresh pairs").statement.endswith("in the search, of topics that it did not see")
    assert of(check, "fresh pairs", held_out_topics=()).statement.endswith("in the search")
    assert [claim.name for claim in made.claims if claim.by_construction] == ["faithfulness"]
    assert str(made.claims[0]).startswith("faithfulness: holds by construction (0.81 [0.6, 1]")
    assert [claim.name for claim in made.tested] == [claim.name for claim in made.claims[1:]]
    missed = of(check, "faithfulness", reached=False)
    assert (missed.verdict, missed.by_construction) == ("fails", False)


def test_an_older_files_claims_are_counted_the_same_way(check):
    made = claims(check, 40)
    old = (*made[:2], dataclasses.replace(made[1], name="held-out topics"), *made[2:])
    assert len(dataclasses.replace(check, claims=old).tested) == 9


def test_the_p_that_is_shown_is_the_adjusted_one(check):
    made = dataclasses.replace(check, claims=claims(check, 40, necessity_ci=(0.7, 1.1)))
    assert made.random_p == of(check, "sufficiency").p_value
    close = dataclasses.replace(CONTROLS, p_value=0.04)
    worse = dataclasses.replace(check, random_controls=close)
    worse = dataclasses.replace(worse, claims=claims(worse, 40))
    assert worse.random_p == pytest.approx(0.04) and check.random_p == CONTROLS.p_value, "raw where nothing is claimed"
    worst = dataclasses.replace(worse, necessity_controls=dataclasses.replace(CONTROLS, p_value=0.5))
    worst = dataclasses.replace(worst, claims=claims(worst, 40))
    assert worst.random_p == pytest.approx(0.08), "the first of two"


@pytest.mark.parametrize(("n", "passed"), [(39, None), (40, True)])
def test_too_few_controls_decide_nothing_where_none_equals_the_circuit(check, n, passed):
    """Adjusted together with a necessity that fails, the smallest p doubles: 0.05 with 39 controls."""
    alone, removed = RandomControls(n, 0.1, 0.3, 1 / (1 + n)), RandomControls(n, 0.9, 1.0, 0.6)
    claim = of(check, "sufficiency", random_controls=alone, necessity_controls=removed)
    assert claim.passed is passed and claim.p_value == pytest.approx(2 / (1 + n))
    if passed is None:
        assert claim.reason == "the smallest p of 39 random circuits is 0.05 after adjustment"
    beaten = dataclasses.replace(alone, p_value=2 / (1 + n))
    assert of(check, "sufficiency", random_controls=beaten, necessity_controls=removed).passed is False


@pytest.mark.parametrize(
    ("name", "changes", "reason", "needed"),
    [
        # the interval reaches 1.3 below 0.9, and the limit 0.8 lies 0.1 below it
        (
            "fresh pairs",
            {"fresh": FreshCheck(3, 0.9, (-0.4, 2.2))},
            "the interval holds the limit; about 507 pairs",
            507,
        ),
        ("fresh pairs", {"fresh": FreshCheck(4, 0.6, (-0.4, 1.0))}, "the interval holds the limit; about 16 pairs", 16),
        ("fresh pairs", {"fresh": FreshCheck(3, 0.8, (0.5, 1.2))}, "the interval holds the limit; no number", None),
        ("fresh pairs", {"fresh": FreshCheck(1, 0.9, (-math.inf, math.inf))}, "too few pairs, or too different", None),
        ("sufficiency", {"fresh": FreshCheck(3, 0.9, (-0.4, 2.2))}, "the interval holds 0, what an empty circuit", 84),
        # of a difference whose sign was turned: -0.5 is farther from -0.2 than 0.3 is from 0.2
        ("completeness", {"completeness_ci": (-0.5, 0.19)}, "the interval holds the limit; about 160 pairs", 160),
        ("completeness", {"completeness_ci": (-math.inf, math.inf)}, "too few pairs, or too different ones", None),
        ("independence", {"independence": Independence(3, 0.02, 0.5, 0.1, (-1.0, 1.0))}, "too few pairs, or", None),
        (
            "independence",
            {"independence": Independence(9, 0.02, 0.5, 0.2, (-0.5352, 0.7628))},
            "the interval holds the",
            35,
        ),
        ("stability", {"stability": Stability((0.9,), 0.9, (3,))}, "one resample decides nothing", None),
        ("stability", {"stability": Stability((0.9, 0.3), 0.6, (3, 4))}, "the interval holds the limit; about", None),
        (
            "harmless prompts",
            {"side_effects": SideEffects(0.0, (-math.inf, math.inf), 0.0, (0.0, 0.0))},
            "too few",
            None,
        ),
        ("harmless prompts", {"side_effects": SideEffects(0.2, (0.05, 0.4), 0.0, (0.0, 0.0))}, "the interval", 90),
    ],
)
def test_data_that_decide_nothing(check, name, changes, reason, needed):
    claim = of(check, name, **changes)
    assert claim.passed is None and claim.reason.startswith(reason), claim
    assert claim.verdict == "undecided" and "undecided" in str(claim)
    assert claim.pairs_needed == needed


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("fresh pairs", {"fresh": FreshCheck(9, 0.6, (0.5, 0.7))}),
        ("fresh pairs", {"fresh": FreshCheck(9, 1.5, (1.3, 1.7)), "goal": "match"}),
        ("completeness", {"completeness": 0.5, "completeness_ci": (0.3, 0.8)}),
        ("sufficiency", {"fresh": FreshCheck(40, -0.4, (-0.5, -0.3))}),
        ("independence", {"independence": Independence(40, 0.2, 0.01, 0.1, (-0.2, 0.4))}),
        ("independence", {"independence": Independence(400, 0.2, 0.3, -0.7, (-0.8, -0.6))}),
        ("stability", {"stability": Stability((0.1, 0.12, 0.11), 0.11, (3, 4, 4))}),
        ("harmless prompts", {"side_effects": SideEffects(0.4, (0.3, 0.5), 0.0, (0.0, 0.0))}),
    ],
)
def test_data_that_show_the_opposite(check, name, changes):
    assert of(check, name, **changes).verdict == "fails"


def test_more_than_the_whole_model_is_enough_unless_it_has_to_be_matched(check):
    much = FreshCheck(9, 1.5, (1.3, 1.7))
    assert of(check, "fresh pairs", fresh=much).verdict == "holds"
    assert of(check, "fresh pairs", fresh=much, goal="match").criterion == "0.8 to 1.2"
    close = FreshCheck(9, 1.15, (1.05, 1.25))
    # the interval reaches 0.1 above 1.15, and the limit 1.2 lies 0.05 above it
    assert of(check, "fresh pairs", fresh=close, goal="match").pairs_needed == 36


@pytest.mark.parametrize("value", [0.37, 0.61, 0.95, 1.33])
def test_as_many_pairs_as_are_said_to_be_needed_decide(value):
    """The interval that as many pairs give, if value and spread stay, lies on one side of the limits."""
    found = decide(value, (value - 0.5, value + 0.9), 10, 0.5, 1.2)
    assert found.passed is None and found.needed is not None
    shrunk = (10 / found.needed) ** 0.5
    ends = (value - 0.5 * shrunk, value + 0.9 * shrunk)
    assert decide(value, ends, found.needed, 0.5, 1.2).passed is (0.5 < value < 1.2)
    fewer = (10 / (found.needed - 1)) ** 0.5
    assert decide(value, (value - 0.5 * fewer, value + 0.9 * fewer), found.needed - 1, 0.5, 1.2).passed is None


def test_a_figure_at_the_limit_is_never_decided():
    assert decide(0.8, (0.7, 0.9), 10, low=0.8).needed is None
    assert decide(0.8 + 1e-9, (0.7, 0.9), 10, low=0.8).reason.endswith(
        "no number of pairs within reach would decide it"
    )
    assert MOST_PAIRS < 10 * (0.1 / 1e-9) ** 2


def test_minimality_fails_only_where_a_part_is_known_to_add_too_little(check):
    def minimality(**changes):
        ps = {"L0.H0": 0.02, "L1.H0": 0.3}
        values = {"L0.H0": 0.4, "L1.H0": changes.pop("value", 0.03)}
        intervals = {"L0.H0": (0.3, 0.5), "L1.H0": changes.pop("interval")}
        return of(check, "minimality", minimality=values, minimality_p=ps, minimality_ci=intervals, **changes)

    assert minimality(interval=(0.01, 0.04)).verdict == "fails"
    vague = minimality(interval=(-0.07, 0.13))
    # the interval reaches 0.1 above 0.03, and the null's 0.05 lies 0.02 above it; there are 40 pairs
    assert vague.verdict == "undecided" and vague.pairs_needed == 1000 and vague.value == 0.5
    assert vague.reason == "parts not told from chance: 1; about 1000 pairs would decide it"
    above = minimality(value=0.08, interval=(0.06, 0.1))
    assert above.verdict == "undecided" and above.reason.endswith("a larger n_added decides")
    assert of(check, "minimality", minimality_p={"L0.H0": 0.3}, minimality_ci=None).verdict == "fails", "older results"
    both = minimality(value=0.01, interval=(-0.4, 0.03), goal="match")
    assert both.verdict == "undecided", "a change by 0.4 is not excluded"
    assert minimality(value=-0.01, interval=(-0.04, 0.03), goal="match").verdict == "fails"
    assert minimality(value=-0.3, interval=(-0.4, -0.2), goal="match").reason.endswith("a larger n_added decides")


def test_what_was_not_measured(check):
    claim = of(check, "completeness", completeness=None)
    assert (claim.verdict, claim.passed, claim.value) == ("not measured", None, None)
    assert Claim("a", "b", 1.0, None, None, "c", False).verdict == "fails"


def test_the_correlation_of_what_does_not_vary_is_known():
    x = np.arange(9.0)
    assert independence_test(np.ones(9), x, 0).correlation == 0.0 and independence_test(x, np.ones(9), 0).ci == (
        0.0,
        0.0,
    )
    found = independence_test(x, x[::-1], 0)
    assert found.correlation == pytest.approx(-1) and found.p_value < 0.01
    assert independence_test(x[:3], x[:3], 0).ci == (-math.inf, math.inf), "three pairs bound no correlation"


def test_ranks_of_what_is_no_number():
    assert rank_p(math.nan, np.array([1.0, 2.0])) == 1.0, "it was the smallest there is"
    assert rank_p(3.0, np.array([1.0, math.nan])) == pytest.approx(2 / 3)
    assert rank_p(1.0, np.array([1.0, 1.0, 1.0])) == 1.0, "all random circuits equal it"
