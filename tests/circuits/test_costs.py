"""Expected work of a map: each stage grows with what it measures, and a larger circuit makes later stages longer."""

from dataclasses import replace

import pytest

import mechsafety as ms
from mechsafety.circuits.costs import Sizes, expected_work

SIZES = Sizes(here=20, held=18, few=8, controls=12, parts=300)
OPTIONS = ms.MapOptions()
RANK, SEARCH, ALONE, WIRE, CHECK = range(5)


@pytest.mark.parametrize(
    ("changed", "stages"),
    [
        ({"n_random": 120}, {CHECK}),
        ({"n_added": 160}, {CHECK}),
        ({"n_edges": 120}, {WIRE}),
        ({"n_backup_parts": 8}, {ALONE}),
        ({"shortlist": 60}, {ALONE}),
        ({"target": 0.9}, set()),
    ],
)
def test_an_option_makes_its_own_stage_longer(changed, stages):
    before, after = (expected_work(SIZES, options) for options in (OPTIONS, replace(OPTIONS, **changed)))
    assert {k for k in range(5) if after[k] > before[k]} == stages
    assert all(after[k] >= before[k] for k in range(5))


def test_pairs_and_parts_make_stages_longer():
    base = expected_work(SIZES, OPTIONS)
    more = expected_work(replace(SIZES, here=40, held=36, few=16, controls=24), OPTIONS)
    assert more[:CHECK] == pytest.approx([2 * work for work in base[:CHECK]]) and more[CHECK] > 1.8 * base[CHECK]
    found = expected_work(replace(SIZES, circuit=120), OPTIONS)
    assert found[RANK] == base[RANK] and all(found[k] > base[k] for k in (SEARCH, ALONE, WIRE, CHECK))
    quick = expected_work(SIZES, ms.MapOptions.quick())
    assert sum(quick) < sum(base)


def test_masks_are_trained_for_the_search_and_for_each_resample():
    once, each = (expected_work(SIZES, ms.MapOptions(search="masks", n_resamples=n)) for n in (0, 3))
    plain = expected_work(SIZES, OPTIONS)
    training = once[SEARCH] - plain[SEARCH]
    assert training > 0 and each[ALONE] - once[ALONE] == 3 * training and once[ALONE] == plain[ALONE]
    masks, quick = ms.MapOptions(search="masks"), ms.MapOptions.quick(search="masks")
    assert (OPTIONS.resamples, masks.resamples, quick.resamples, ms.MapOptions.quick().resamples) == (100, 5, 0, 100)


def test_the_demo_models_maps_took_about_as_long_as_expected():
    """Seconds measured on two cores of an AMD EPYC: a whole map of 58 nodes and a first look of 63."""
    whole = replace(SIZES, here=14, held=8, circuit=58)
    first = replace(SIZES, here=8, held=5, few=4, controls=4, circuit=63)
    for sizes, options, took in (
        (whole, OPTIONS, (7.1, 41.6, 20.0, 64.5, 52.9)),
        (first, ms.MapOptions.quick(), (3.0, 25.1, 2.7, 37.8, 18.4)),
    ):
        work = expected_work(sizes, options)
        left = [sum(took[k:]) for k in range(5)]
        said = [sum(work[k:]) * sum(took[:k]) / sum(work[:k]) for k in range(1, 5)]
        assert said == pytest.approx(left[1:], rel=0.3)
