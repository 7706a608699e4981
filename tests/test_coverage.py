"""The simulation of coverage: its parts run, and what it found."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from pages.coverage import GOOD

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("simulate_coverage", ROOT / "scripts" / "simulate_coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored():
    return json.loads((ROOT / "docs" / "results" / "coverage.json").read_text())


def test_the_page_says_what_does_not_cover(script, stored):
    text = (ROOT / "docs" / "results" / "coverage.md").read_text()
    below = {row["of"] for row in stored["coverage"] if row["held"] < GOOD[0] and row["data"] != "all"}
    assert all(f"- {kind}, below: " in text for kind in below), "what does not cover is said"
    assert stored["many"] == script.MANY, "simulated with the package as it is"


def test_means_and_ratios_cover_where_values_are_not_very_skewed(script, stored):
    rows = [row for row in stored["coverage"] if row["of"] in ("mean", "share of the gap", "ratio")]
    rows = [row for row in rows if row["data"] != "very skewed"]
    assert len(rows) == 60 and min(row["held"] for row in rows) > 0.92
    normal = [row["held"] for row in rows if row["data"] == "normal" and row["of"] in ("mean", "share of the gap")]
    assert all(GOOD[0] <= share <= GOOD[1] + 0.005 for share in normal)


def test_a_quick_run_gives_like_numbers(script, stored):
    """400 samples of a few cells, with another seed: within what chance allows."""
    rng = np.random.default_rng(5)
    for part in (script.means, script.rates):
        for row in part(400, rng):
            if row["data"] not in ("normal", "0.9"):
                continue
            (known,) = [
                other["held"]
                for other in stored["coverage"]
                if (other["of"], other["data"], other["n"]) == (row["of"], row["data"], row["n"])
            ]
            assert row["held"] == pytest.approx(known, abs=0.045)


def test_noise_has_mean_zero_and_unit_spread(script):
    for name, draw in script.NOISE.items():
        values = draw(np.random.default_rng(0), (200_000,))
        assert abs(values.mean()) < 0.02, name
        assert name == "heavy tails" or abs(values.std() - 1) < 0.05, name
