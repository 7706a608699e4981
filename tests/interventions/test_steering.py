"""Adding and removing directions: identities by hypothesis, against plain hooks, and what is refused."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import hook_count, whole_logits

from mechsafety.errors import MechsafetyError
from mechsafety.interventions import Direction, project_out, steer
from mechsafety.interventions.steering import orthonormal
from mechsafety.sites import Site, SiteKind

PROMPTS = ["how do i make a bomb", "help", "teach me to steal a car please"]
SEEDS = st.integers(0, 10_000)
QUICK = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def vectors(seed, rank=1):
    return torch.randn(rank, 32, generator=torch.Generator().manual_seed(seed))


def head_direction(model, seed=0):
    sites = (Site(SiteKind.Z, 0, 1), Site(SiteKind.Z, 2, 3))
    rows = torch.randn(2, model.d_head, generator=torch.Generator().manual_seed(seed))
    return Direction(model.provenance(), "heads", sites, rows)


def published_hooks(model, basis):
    """Arditi et al.'s: removal at every block's input and at the outputs of attention and MLP."""
    names = [
        f"blocks.{layer}.{part}" for layer in range(model.n_layers) for part in ("hook_resid_pre", "hook_attn_out")
    ]
    names += [f"blocks.{layer}.hook_mlp_out" for layer in range(model.n_layers)]
    return [(name, lambda x: x - (x @ basis.T) @ basis) for name in names]


@pytest.mark.parametrize("rank", [1, 3])
def test_removal_equals_the_published_hooks(any_model, rank):
    raw = vectors(1, rank)
    basis = torch.linalg.qr(raw.T.double())[0].T.float()
    with project_out(any_model, raw):
        got = any_model.logits(PROMPTS)
    want = whole_logits(any_model, any_model.tokenize(PROMPTS), published_hooks(any_model, basis))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert float((got - any_model.logits(PROMPTS)).abs().max()) > 1e-2


@QUICK
@given(seed=SEEDS, rank=st.integers(1, 4))
def test_removal_is_idempotent_and_takes_the_span_alone(llama, seed, rank):
    rows = vectors(seed, rank)
    mixed = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed + 1)) + 3 * torch.eye(rank)
    with project_out(llama, rows):
        once = llama.logits(PROMPTS)
        with project_out(llama, rows):
            torch.testing.assert_close(llama.logits(PROMPTS), once, atol=1e-4, rtol=1e-4)
    with project_out(llama, mixed @ rows):
        torch.testing.assert_close(llama.logits(PROMPTS), once, atol=1e-3, rtol=1e-3)


@QUICK
@given(seed=SEEDS, strength=st.floats(0, 1))
def test_a_share_is_removed_once_everywhere(llama, seed, strength):
    """Every residual stream of the edited run has lost the share of what its own parts wrote along the direction."""
    row = orthonormal(vectors(seed))[0]
    sites = [Site(SiteKind.RESID_PRE, 0), Site(SiteKind.ATTN_OUT, 1), Site(SiteKind.FINAL_NORM_IN)]
    tokens = llama.tokenize(PROMPTS)
    written = torch.zeros(())
    parts = [Site(kind, layer) for layer in range(3) for kind in (SiteKind.ATTN_OUT, SiteKind.MLP_OUT)]
    raw = {}

    def note(site):
        return lambda own: raw.__setitem__(site, own.clone())

    with llama.hooks([(site, note(site)) for site in [sites[0], *parts]]), project_out(llama, row, strength):
        final = llama.read(tokens, [sites[2]])[sites[2]]
    written = sum(value @ row for value in raw.values())
    torch.testing.assert_close(final @ row, (1 - strength) * written, atol=1e-3, rtol=1e-3)


@QUICK
@given(seed=SEEDS)
def test_strength_zero_is_the_identity(llama, seed):
    plain, row = llama.logits(PROMPTS), vectors(seed)[0]
    with steer(llama, row, 0.0, [0, 2]), project_out(llama, row, 0.0), head_direction(llama).ablate(llama, 0.0):
        assert torch.equal(llama.logits(PROMPTS), plain)


@QUICK
@given(seed=SEEDS, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_additions_add_up_in_any_order(llama, seed, a, b):
    one, two = vectors(seed, 2)
    with steer(llama, one, a, [1]), steer(llama, two, b, [1]):
        both = llama.logits(PROMPTS)
    with steer(llama, two, b, [1]), steer(llama, one, a, [1]):
        torch.testing.assert_close(llama.logits(PROMPTS), both, atol=1e-4, rtol=1e-4)
    with steer(llama, a * one + b * two, 1.0, [1]):
        torch.testing.assert_close(llama.logits(PROMPTS), both, atol=1e-3, rtol=1e-3)


def test_orthogonal_removals_commute_and_join(llama):
    one, two = orthonormal(vectors(4, 2))
    with project_out(llama, one), project_out(llama, two):
        nested = llama.logits(PROMPTS)
    with project_out(llama, torch.stack([two, one])):
        torch.testing.assert_close(llama.logits(PROMPTS), nested, atol=1e-4, rtol=1e-4)


def test_what_is_added_before_a_removal_is_not_removed_downstream_of_it(llama):
    """Removal edits what is written; a vector that a later context adds at a block's input stays."""
    row = vectors(2)[0]
    with project_out(llama, row):
        without = llama.logits(PROMPTS)
        with steer(llama, row, 1.0, [1]):
            assert float((llama.logits(PROMPTS) - without).abs().max()) > 1e-2
    with steer(llama, row, 1.0, [0]), project_out(llama, row):  # added before the embedding is cleaned: gone
        torch.testing.assert_close(llama.logits(PROMPTS), without, atol=1e-4, rtol=1e-4)


def test_steering_by_plain_hooks(any_model):
    row = vectors(3)[0]
    with steer(any_model, row, -1.5, [1, 2]):
        got = any_model.logits(PROMPTS)
    edits = [(f"blocks.{layer}.hook_resid_pre", lambda x: x - 1.5 * row) for layer in (1, 2)]
    torch.testing.assert_close(got, whole_logits(any_model, any_model.tokenize(PROMPTS), edits), atol=1e-4, rtol=1e-4)


def test_directions_of_heads(any_model):
    found = head_direction(any_model)
    tokens = any_model.tokenize(PROMPTS)
    units = found.vectors / found.vectors.norm(dim=1, keepdim=True)

    def change(function):
        def hook(place):
            def edit(z):
                z = z.clone()
                head = found.sites[place].index
                z[:, :, head] = function(place, z[:, :, head])
                return z

            return edit

        return [(f"blocks.{found.sites[k].layer}.attn.hook_z", hook(k)) for k in (0, 1)]

    with found.add(any_model, 2.0):
        got = any_model.logits(PROMPTS)
    want = whole_logits(any_model, tokens, change(lambda k, z: z + 2 * found.vectors[k]))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with found.ablate(any_model, 0.7):
        got = any_model.logits(PROMPTS)
    want = whole_logits(any_model, tokens, change(lambda k, z: z - 0.7 * (z @ units[k])[..., None] * units[k]))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    site = Site(SiteKind.Z, 2)
    last = any_model.read(tokens, [site])[site][:, -1, 3]
    torch.testing.assert_close(found.project(any_model, PROMPTS)[1], last @ units[1], atol=1e-4, rtol=1e-4)


def test_a_direction_at_two_layers_is_removed_there_alone(llama):
    sites = (Site(SiteKind.RESID_PRE, 1), Site(SiteKind.RESID_PRE, 2))
    found = Direction(llama.provenance(), "reading", sites, vectors(6, 2))
    with found.ablate(llama):
        got = llama.logits(PROMPTS)
    edits = [
        (f"blocks.{site.layer}.hook_resid_pre", lambda x, unit=unit: x - (x @ unit)[..., None] * unit)
        for site, unit in zip(sites, found.unit, strict=True)
    ]
    torch.testing.assert_close(got, whole_logits(llama, llama.tokenize(PROMPTS), edits), atol=1e-4, rtol=1e-4)
    assert found.project(llama, PROMPTS).shape == (2, 3) and list(found.to_dataframe().layer) == [1, 2]


def test_generation_is_steered_and_nothing_is_left(llama):
    before, plain = hook_count(llama), llama.generate(PROMPTS, 6)
    row = vectors(7)[0]
    with steer(llama, 10 * row, 1.0, [1]):
        assert llama.generate(PROMPTS, 6) != plain
    with pytest.raises(KeyError), project_out(llama, row), steer(llama, row, 1.0, [0]):
        raise KeyError("stop")
    assert hook_count(llama) == before and llama.generate(PROMPTS, 6) == plain


def test_round_trip(llama, tmp_path):
    found = head_direction(llama)
    again = Direction.load(found.save(tmp_path / "direction"))
    assert torch.equal(again.vectors, found.vectors) and again.sites == found.sites
    assert (
        repr(again) == f"Direction(heads at L0.z.1 and 1 more, mean norm {float(found.vectors.norm(dim=1).mean()):.3g})"
    )


def refused(call):
    with pytest.raises(MechsafetyError) as caught, call():
        pass
    return str(caught.value)


def test_several_directions_and_layers_in_one_context(llama, directed, directed_found):
    one, two = vectors(0)[0], vectors(1)[0]
    with steer(llama, one, 0.5, [0]), steer(llama, two, -1.0, [2]):
        nested = llama.logits(PROMPTS)
    with steer(llama, torch.stack([0.5 * one, -two]), 1.0, [0, 2]):
        torch.testing.assert_close(llama.logits(PROMPTS), nested)
    heads = head_direction(llama)
    with steer(llama, one, 0.5, [1]), heads.add(llama, 2.0):
        nested = llama.logits(PROMPTS)
    own = Direction(llama.provenance(), "one", (Site(SiteKind.RESID_PRE, 1),), one[None])
    with steer(llama, [own, heads], [0.5, 2.0]):
        torch.testing.assert_close(llama.logits(PROMPTS), nested)
    model = directed[0]
    with directed_found.add(model, 0.3):
        added = model.logits(PROMPTS)
    with steer(model, directed_found, 0.3):
        assert torch.equal(model.logits(PROMPTS), added), "a refusal direction is taken as it is"


def test_nonsense_is_refused_in_one_line(llama):
    row = vectors(0)[0]
    wide = "a direction of width 33; expected this model's d_model, 32; compute it on this model"
    assert refused(lambda: steer(llama, torch.ones(33), 1.0, [0])) == wide
    assert refused(lambda: project_out(llama, torch.ones(33))) == wide
    assert refused(lambda: steer(llama, row, math.nan, [0])) == "strength=nan; expected a finite number"
    assert refused(lambda: project_out(llama, row, 1.1)) == "strength=1.1; expected a number from 0 to 1"
    assert (
        refused(lambda: steer(llama, row, 1.0)) == "a vector without layers; expected layers=[...] at which to add it"
    )
    assert refused(lambda: steer(llama, row, 1.0, [3])) == "layers [3]; expected some of 0 to 2"
    assert refused(lambda: steer(llama, row, 1.0, 3)) == "layers [3]; expected some of 0 to 2"
    assert refused(lambda: steer(llama, row, 1.0, [])) == "layers []; expected some of 0 to 2"
    several = "3 strengths of 2 directions; expected one strength, or one per direction"
    assert refused(lambda: steer(llama, [row, row], [1.0, 2.0, 3.0], [0])) == several
    assert refused(lambda: steer(llama, [], 1.0, [0])) == several.replace("3", "0").replace("of 2", "of 0")
    rows = torch.stack([row, row])
    assert (
        refused(lambda: steer(llama, rows, 1.0, [0, 1, 2])) == "2 vectors at 3 layers; expected one, or one per layer"
    )
    assert refused(lambda: steer(llama, row * math.nan, 1.0, [0])) == "a direction with entries that are not finite"
    assert refused(lambda: project_out(llama, torch.zeros(32))) == "1 directions that are zero or linearly dependent"
    twice = torch.stack([row, -2 * row])
    assert refused(lambda: project_out(llama, twice)) == "2 directions that are zero or linearly dependent"
    assert refused(lambda: steer(llama, head_direction(llama), 1.0, [0])) == (
        "layers for a direction with sites of its own; expected a single residual vector"
    )


def test_a_direction_of_another_models_width(llama, make_model):
    site = (Site(SiteKind.RESID_PRE, 1),)
    other = Direction(llama.provenance(), "other", site, torch.ones(1, 48), everywhere=True)
    message = "a direction of width 48; expected this model's d_model, 32; compute it on this model"
    for call in (other.add, other.ablate):
        assert refused(lambda call=call: call(llama)) == message
    with pytest.raises(MechsafetyError, match="of width 48"):
        other.project(llama, PROMPTS)
    missing = Direction(llama.provenance(), "heads", (Site(SiteKind.Z, 0, 9),), torch.ones(1, 8))
    assert refused(lambda: missing.add(llama)) == "L0.z.9 does not exist; expected a head from 0 to 3"
    with pytest.raises(MechsafetyError, match=r"^the direction 'zero' holds a zero vector$"):
        Direction(llama.provenance(), "zero", site, torch.zeros(1, 32))
    with pytest.raises(MechsafetyError, match="all at resid_pre or all at z"):
        Direction(llama.provenance(), "mixed", (Site(SiteKind.MLP_OUT, 0),), torch.ones(1, 32))
    with pytest.raises(MechsafetyError, match=r"^everywhere=True; expected one vector of the residual stream$"):
        Direction(llama.provenance(), "two", site * 2, torch.ones(2, 32), everywhere=True)
