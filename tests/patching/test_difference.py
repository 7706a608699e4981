"""Two results of patching against each other: paired by prompt where both are of the same prompts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import mechsafety as ms
from mechsafety.intervals import ratio_intervals
from mechsafety.patching import EffectDifference, PatchMap, activation_patching, compare_effects
from mechsafety.results import Provenance

PROVENANCE = Provenance("m", "0" * 64, "float32", "cpu", "1" * 64)
QUIET = {"progress": False}


def made(changes, harmful, harmless=None, **more):
    nodes = tuple(ms.Node("mlp", layer) for layer in range(len(changes)))
    harmless = torch.zeros_like(harmful) if harmless is None else harmless
    return PatchMap(PROVENANCE, {}, nodes, changes, harmful, harmless, "noising", "all", **more)


def test_the_same_prompts_are_compared_one_by_one(llama, pairs, log_odds):
    one, two = (
        ms.activation_patching(llama, pairs, log_odds, positions=positions, **QUIET) for positions in ("all", "suffix")
    )
    found = compare_effects(one, two, ("all", "suffix"))
    assert found.paired
    torch.testing.assert_close(found.difference, two.effects - one.effects)
    gap = (one.harmful - one.harmless).double().numpy()
    assert list(found.intervals) == ratio_intervals((two.changes - one.changes).double().numpy(), gap)


def test_the_interval_of_independent_prompts_covers():
    """Nominal 95 %; the true difference is 0.2 of the gap. MOVER of two Fieller intervals is a little wide."""
    generator, covered, n = torch.Generator().manual_seed(0), 0, 400
    for k in range(n):
        results = []
        for effect, prompts in ((0.3, 12), (0.5, 20)):
            gap = 4 + torch.randn(prompts, generator=generator)
            results.append(made((effect * gap + torch.randn(prompts, generator=generator))[None], gap))
        (low, high) = compare_effects(*results, seed=k).intervals[0]
        covered += low <= 0.2 <= high
    assert 0.935 <= covered / n <= 0.99


def test_table_figure_and_file(tmp_path):
    generator = torch.Generator().manual_seed(1)
    gap = 4 + torch.rand(30, generator=generator)
    noise = 0.1 * torch.randn(3, 30, generator=generator)
    one, two = made(noise + 0.2 * gap, gap), made(noise.flip(1) + torch.tensor([[0.2], [0.6], [0.2]]) * gap, gap + 0.01)
    found = compare_effects(one, two, ("base", "aligned"))
    assert not found.paired and repr(found) == "EffectDifference(3 nodes, independent prompts, 1 intervals without 0)"
    table = found.to_dataframe()
    assert table.node[0] == "L1.MLP" and table.difference[0] == pytest.approx(0.4, abs=0.05)
    assert np.all(table.ci_low <= table.difference) and np.all(table.difference <= table.ci_high)
    figure = found.plot()
    first, second, apart = figure.data
    assert (first.name, second.name) == ("base", "aligned") and list(first.y)[-1] == "L1.MLP", "the largest on top"
    assert list(second.x) == list(table.aligned)[::-1] and list(apart.x) == list(table.difference)[::-1]
    assert list(apart.x + apart.error_x.array) == pytest.approx(list(table.ci_high)[::-1])
    assert list(found.plot(most=1).data[2].y) == ["L1.MLP"]
    again = EffectDifference.load(found.save(tmp_path / "difference.json"))
    assert again.to_dataframe().equals(table)


def test_an_interval_without_bounds_is_no_point():
    """It has no whisker, so that its mark must not look like an exact value."""
    gap = torch.tensor([2.0, 3.0, 4.0, 5.0])
    found = compare_effects(made(0.2 * gap[None], gap), made(torch.tensor([[1.0, 0.4, 2.0, 1.5]]), gap + 1))
    assert np.isfinite(found.intervals[0]).all() and not found.plot().layout.annotations[2:]
    assert list(found.plot().data[2].marker.symbol) == ["circle"]
    open_ended = replace(found, intervals=((-math.inf, math.inf),)).plot()
    assert list(open_ended.data[2].marker.symbol) == ["x-thin-open"]
    # a share of the plot's height would lie on the titles where few nodes are drawn
    assert open_ended.layout.annotations[2].yshift >= 20 and open_ended.layout.legend.yref == "container"
    assert open_ended.layout.annotations[2].text == (
        "cross: no bounded 95 % interval (one pair, or a gap that cannot be told from 0)"
    )


def test_bars_without_bounds_are_hatched(llama, pairs, log_odds):
    one = activation_patching(llama, ms.PromptPairs(pairs.pairs[:1]), log_odds, progress=False)
    figure = one.plot()
    assert [bars.name for bars in figure.data] == ["head", "mlp"]
    assert all(set(bars.marker.pattern.shape) == {"/"} for bars in figure.data)
    assert figure.layout.title.text.startswith("Noising one node, 1 pair<br>hatched: no bounded")
    gap = 4 + torch.rand(30, generator=torch.Generator().manual_seed(0))
    sure = made(0.2 * gap[None] + 0.01 * torch.randn(1, 30, generator=torch.Generator().manual_seed(1)), gap).plot()
    assert not sure.data[0].marker.pattern.shape and sure.layout.title.text == "Noising one node, 30 pairs"


def test_what_cannot_be_compared():
    gap = torch.ones(5)
    one = made(torch.ones(2, 5), gap)
    with pytest.raises(
        ms.MechsafetyError,
        match=r"^results of other nodes or positions \(only the second has L2\.MLP\); expected the same in",
    ):
        compare_effects(one, made(torch.ones(3, 5), gap))
    with pytest.raises(
        ms.MechsafetyError,
        match=r"\(only the first has L0\.MLP, L1\.MLP; only the second has L0\.MLP @ -2, L1\.MLP @ -1\)",
    ):
        compare_effects(one, made(torch.ones(2, 5), gap, row_positions=(-2, -1)))
    with pytest.raises(ms.MechsafetyError, match=r"^names \('a', 'a'\); expected two names"):
        compare_effects(one, one, ("a", "a"))
