"""Expected work of a map: each stage grows with what it measures, and a larger circuit makes later stages longer."""

from dataclasses import replace

import pytest

import mechsafety as ms
from mechsafety.circuits.costs import Sizes, expected_work

SIZES = Sizes(here=20, held=18, fresh=38, few=8, controls=12, parts=300)
OPTIONS = ms.MapOptions()
RANK, SEARCH, ALONE, WIRE, CHECK = range(5)


@pytest.mark.parametrize(
    ("changed", "stages"),
    [
        ({"n_random": 120}, {CHECK}),
        ({"n_added": 160}, {CHECK}),
        ({"n_edges": 120}, {WIRE}),
        ({"n_resamples": 10}, {ALONE}),
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
    more = expected_work(replace(SIZES, here=40, held=36, fresh=76, few=16, controls=24), OPTIONS)
    assert more == pytest.approx([2 * work for work in base])
    found = expected_work(replace(SIZES, circuit=120), OPTIONS)
    assert found[RANK] == base[RANK] and all(found[k] > base[k] for k in (SEARCH, ALONE, WIRE, CHECK))
    quick = expected_work(SIZES, ms.MapOptions.quick())
    assert sum(quick) < sum(base)
