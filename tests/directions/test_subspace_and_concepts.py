"""Subspaces, representation reading and inference-time intervention on a model whose truth is known."""

from dataclasses import replace

import pytest
import torch
from planted_direction import directed_pairs

from mechsafety.directions import RefusalSubspace, iti_direction, refusal_subspace, repe_direction
from mechsafety.errors import MechsafetyError
from mechsafety.prompts import PromptPairs
from mechsafety.sites import Site, SiteKind


@pytest.fixture(scope="module")
def fresh():
    return directed_pairs("poison", "bread")


def test_one_direction_is_all_there_is(directed, directed_found, fresh, tmp_path):
    model, pairs, metric = directed
    found = refusal_subspace(model, directed_found, pairs, metric, fresh, progress=False)
    assert found.dimension == 1 and found.causal == (True,) and found.layers == (1,)
    assert found.bypass.shape == (1, 6) and found.induce.shape == (1, 12)  # half of the harmful prompts judge
    again = RefusalSubspace.load(found.save(tmp_path / "subspace"))
    assert repr(again) == "RefusalSubspace(1 directions, 1 of them causal)"
    assert again.to_dataframe().change[0] < -20


def test_going_on_when_the_mean_says_that_no_refusal_is_left(directed, directed_found, fresh):
    """By default a mean below 0 ends the search, so that a second direction is never looked at."""
    model, pairs, metric = directed
    options = {"n_directions": 6, "progress": False}
    found = refusal_subspace(model, directed_found, pairs, metric, fresh, stop_below=None, **options)
    assert 1 < len(found.layers) < 6 and found.causal == (True,) * found.dimension + (False,)
    assert float(found.before[1].mean()) < 0, "nothing was left by the mean"
    changes = found.to_dataframe().change.abs()
    assert changes[1:].max() < 0.1 * changes[0], "sure, but next to nothing: one direction was planted"
    stopped = refusal_subspace(model, directed_found, pairs, metric, fresh, stop_below=-18.5, **options)
    assert len(stopped.layers) == 2, "the second brings the mean below that"


def test_what_a_bad_first_direction_misses_is_found_next(directed, directed_found, fresh):
    """A vector that holds half of the refusal direction: a second, orthogonal one holds the rest."""
    model, pairs, metric = directed
    noise = torch.randn(32, generator=torch.Generator().manual_seed(3))
    unit = directed_found.vector / directed_found.vector.norm()
    noise = noise - (noise @ unit) * unit
    half = (0.5 * unit + 0.87 * noise / noise.norm()) * 2 * directed_found.vector.norm()
    vectors = directed_found.vectors.clone()
    vectors[directed_found._cell] = half
    found = refusal_subspace(model, replace(directed_found, vectors=vectors), pairs, metric, fresh, progress=False)
    assert found.causal == (True, True)
    rows = found.vectors / found.vectors.norm(dim=1, keepdim=True)
    assert abs(float(rows[0] @ rows[1])) < 1e-4
    basis = torch.linalg.qr(rows.T)[0]
    assert float((basis.T @ unit).norm()) > 0.98
    with found.ablate(model):
        assert model.generate(fresh.harmful[:2], 3) == ["sure"] * 2


def test_a_direction_that_does_nothing_ends_the_search(directed, directed_found, fresh):
    model, pairs, metric = directed
    vectors = directed_found.vectors.clone()
    vectors[directed_found._cell] = torch.eye(32)[20]
    found = refusal_subspace(model, replace(directed_found, vectors=vectors), pairs, metric, fresh, progress=False)
    assert found.causal == (False,) and found.dimension == 0
    with pytest.raises(MechsafetyError, match=r"^no direction of the subspace is causal"), found.ablate(model):
        pass


def test_subspace_refusals(directed, directed_found, fresh):
    model, pairs, metric = directed
    with pytest.raises(MechsafetyError, match=r"^n_directions=0; expected at least 1$"):
        refusal_subspace(model, directed_found, pairs, metric, fresh, n_directions=0)
    with pytest.raises(MechsafetyError, match=r"^layers \[2\]; expected some below 2$"):
        refusal_subspace(model, directed_found, pairs, metric, fresh, layers=[2])
    few = PromptPairs(fresh.pairs[:3])
    with pytest.raises(MechsafetyError, match=r"^3 refused validation prompts; expected at least 4"):
        refusal_subspace(model, directed_found, pairs, metric, few)


def test_representation_reading(directed):
    model, pairs, _ = directed
    found = repe_direction(model, pairs)
    assert [site.layer for site in found.sites] == [1, 2] and not found.everywhere
    assert float(found.unit[:, 0].min()) > 0.99  # turned towards the harmful side
    with found.ablate(model):
        assert model.generate(pairs.harmful[:2], 3) == ["sure"] * 2
    with repe_direction(model, pairs, layers=[1]).add(model):
        assert model.generate(pairs.harmless[:2], 3) == ["sorry"] * 2
    # the published way, pairs shuffled and centred: by any shuffle nearly the same direction
    sites = [site.layer for site in found.sites]
    rows = model.cache([*pairs.harmful, *pairs.harmless], ["resid"]).resid[sites, :, -1].double()
    signs = torch.tensor([1.0, -1.0]).double().repeat(6)[:, None]
    for vector, (bad, good) in zip(found.unit, rows.unflatten(1, (2, 12)).unbind(0), strict=True):
        whole = torch.linalg.svd(bad - good, full_matrices=False).Vh[0]
        assert abs(float(vector.double() @ whole)) == pytest.approx(1.0, abs=1e-6)
        shuffled = (bad - good) * signs
        centred = torch.linalg.svd(shuffled - shuffled.mean(0), full_matrices=False).Vh[0]
        assert abs(float(vector.double() @ centred)) > 0.99
    turned = repe_direction(model, PromptPairs.from_lists(pairs.harmless, pairs.harmful))
    torch.testing.assert_close(turned.vectors, -found.vectors, atol=1e-4, rtol=1e-4)
    with pytest.raises(MechsafetyError, match=r"^the pairs do not differ at L0.resid_pre; expected a later layer$"):
        repe_direction(model, pairs, layers=[0])
    with pytest.raises(MechsafetyError, match=r"^3 pairs; expected at least 4$"):
        repe_direction(model, PromptPairs(pairs.pairs[:3]))


def test_inference_time_intervention(directed):
    model, pairs, metric = directed
    found = iti_direction(model, pairs, n_heads=1)
    assert str(found.sites[0]) == "L0.z.0" and found.provenance.options["accuracy"] == [1.0]
    z = model.cache([*pairs.harmful, *pairs.harmless], ["z"]).z[0, 0, :, -1].double()
    shift = z[:12].mean(0) - z[12:].mean(0)
    unit = shift / shift.norm()
    torch.testing.assert_close(found.vectors[0], (unit * (z @ unit).std()).float(), atol=1e-5, rtol=1e-4)
    before = metric(model.logits(pairs.harmless))
    with found.add(model, 4.0):
        assert bool((metric(model.logits(pairs.harmless)) > before + 5).all())
    with found.ablate(model):
        assert model.generate(pairs.harmful[:2], 3) == ["sure"] * 2
    many = iti_direction(model, pairs, n_heads=8)  # more heads than layers
    assert len({site.layer for site in many.sites}) < len(many.sites) == 8

    def by_hand(edit):
        """Logits with an edit of every chosen head's output."""
        hooks = []
        for site, vector, unit in zip(many.sites, many.vectors, many.unit, strict=True):

            def hook(tensor, index=site.index, vector=vector, unit=unit):
                out = tensor.clone()
                out[:, :, index] = edit(tensor[:, :, index], vector, unit)
                return out

            hooks.append((Site(SiteKind.Z, site.layer), hook))
        with model.hooks(hooks):
            return model.logits(pairs.harmful)

    added = by_hand(lambda own, vector, unit: own + 2.0 * vector)
    removed = by_hand(lambda own, vector, unit: own - (own @ unit)[..., None] * unit)
    with many.add(model, 2.0):
        torch.testing.assert_close(model.logits(pairs.harmful), added, atol=1e-4, rtol=1e-4)
    with many.ablate(model):
        torch.testing.assert_close(model.logits(pairs.harmful), removed, atol=1e-4, rtol=1e-4)
    assert many.project(model, pairs.harmful).shape == (8, len(pairs))
    with pytest.raises(MechsafetyError, match=r"^sites \['L0.z.0'\] are given twice; expected each once$"):
        replace(found, sites=found.sites * 2, vectors=found.vectors.repeat(2, 1))
    with pytest.raises(MechsafetyError, match=r"^n_heads=13; expected 1 to 1[0-2], the heads that differ$"):
        iti_direction(model, pairs, n_heads=13)
