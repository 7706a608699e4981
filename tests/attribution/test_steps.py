"""How many points an integral takes, and what it sums to, against other ways to the same sums."""

import numpy as np
import pytest
import torch

from mechsafety.attribution import edge_attribution, edges, node_attribution, steps
from mechsafety.attribution.gradients import integration_points, quadrature
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import masks, pair_runs
from mechsafety.patching.masks import Patch, patched_scores


@pytest.mark.parametrize("grid", ["midpoint", "left", "gauss"])
def test_the_completeness_of_eap_ig_is_what_the_embedding_sends(llama, pairs, log_odds, grid):
    found = edge_attribution(llama, pairs, log_odds, steps=3, grid=grid, progress=False)
    assert found.completeness == pytest.approx(found.node_scores()[Node("embed")], abs=1e-5)
    assert found.steps == 3 and found.provenance.options["grid"] == grid and not found.provenance.options["chosen"]
    assert repr(found).endswith(f"eap-ig, 3 steps, completeness {found.completeness:.2f})")


def test_the_completeness_of_mask_ig_is_that_of_node_attribution(any_model, pairs, log_odds):
    found = edge_attribution(any_model, pairs, log_odds, method="mask-ig", steps=2, progress=False)
    assert found.completeness == pytest.approx(
        node_attribution(any_model, pairs, log_odds, steps=2, progress=False).total, abs=1e-4
    )


def test_the_completeness_of_ig_activations_is_that_of_the_worst_sublayer(llama, pairs, log_odds):
    found = edge_attribution(llama, pairs, log_odds, method="ig-activations", steps=2, progress=False)
    groups = [[Node("head", layer, head) for head in range(4)] for layer in range(3)]
    groups += [[Node("mlp", layer)] for layer in range(3)]
    runs = pair_runs(llama, pairs)
    high, low = runs.scores(log_odds)
    patched = patched_scores(llama, runs.harmful, runs.harmless.acts, Patch.of(llama, groups), log_odds)
    exact = ((high - patched).mean(1) / (high - low).mean()).tolist()
    sent = found.node_scores()
    missed = [sum(sent[node] for node in group) - effect for group, effect in zip(groups, exact, strict=True)]
    missed.append(sent[Node("embed")] - 1)
    assert found.completeness == pytest.approx(1 + max(missed, key=abs), abs=1e-4)


def test_steps_are_chosen_by_completeness(llama, pairs, log_odds, monkeypatch, caplog):
    by_hand = {n: edge_attribution(llama, pairs, log_odds, steps=n, progress=False) for n in (5, 10)}
    errors = {n: abs(found.completeness - 1) for n, found in by_hand.items()}
    assert errors[10] < errors[5]
    monkeypatch.setattr(steps, "TOLERANCE", (errors[5] + errors[10]) / 2)
    chosen = edge_attribution(llama, pairs, log_odds, progress=False)
    assert chosen.steps == 10 and chosen.provenance.options["chosen"]
    assert torch.equal(chosen.scores, by_hand[10].scores) and chosen.completeness == by_hand[10].completeness
    monkeypatch.setattr(steps, "TOLERANCE", errors[5])
    assert edge_attribution(llama, pairs, log_odds, progress=False).steps == 5
    monkeypatch.setattr(steps, "TOLERANCE", 0.0)
    monkeypatch.setattr(steps, "SERIES", (1, 2))
    assert edge_attribution(llama, pairs, log_odds, progress=False).steps == 2
    assert "of the gap at 2 steps" in caplog.text
    assert edge_attribution(llama, pairs, log_odds, method="eap", progress=False).steps == 1


@pytest.mark.parametrize("method", ["eap", "eap-ig", "ig-activations", "mask-ig"])
def test_given_steps_need_no_pass_for_their_completeness(method, llama, pairs, log_odds, monkeypatch):
    """It comes with the gradients that the scores need, and is what passes of its own measure."""
    runs, senders = pair_runs(llama, pairs), [Node("embed"), *head_and_mlp_nodes(3, 4)]
    points = integration_points(llama, method, 1 if method == "eap" else 2, senders)
    measured = steps.completeness(llama, [lambda: runs], log_odds, points)
    monkeypatch.setattr(steps, "slope", lambda *args: pytest.fail("a pass for the completeness alone"))
    found = edge_attribution(llama, runs, log_odds, method=method, steps=2, progress=False)
    assert found.completeness == pytest.approx(measured, abs=1e-6)


@pytest.mark.parametrize(("kept", "times"), [(4, 4), (1, 1 + 3 * 3)])
def test_runs_are_made_once_for_all_numbers_of_steps_that_are_tried(kept, times, llama, pairs, log_odds, monkeypatch):
    made, make = [], masks.pair_runs
    monkeypatch.setattr(masks, "pair_runs", lambda *args, **options: made.append(1) or make(*args, **options))
    monkeypatch.setattr(edges, "BATCH_TOKENS", 1)
    monkeypatch.setattr(steps, "SERIES", (1, 2))
    monkeypatch.setattr(steps, "TOLERANCE", 0.0)
    monkeypatch.setattr(steps, "KEPT", kept)
    found = edge_attribution(llama, pairs, log_odds, progress=False)
    assert found.steps == 2 and len(made) == times, "one a pair, and for pairs that are not kept one each time"


@pytest.mark.parametrize("grid", ["midpoint", "left", "gauss"])
def test_grids_integrate(grid):
    points = quadrature(grid, 40)
    assert sum(weight for _, weight in points) == pytest.approx(1.0)
    assert sum(weight * np.exp(x) for x, weight in points) == pytest.approx(np.e - 1, abs=0.03)
    assert sum(weight * x**5 for x, weight in quadrature("gauss", 3)) == pytest.approx(1 / 6)


def test_a_live_blend_has_no_left_end(llama, pairs, log_odds):
    with pytest.raises(MechsafetyError) as caught:
        edge_attribution(llama, pairs, log_odds, method="mask-ig", grid="left", progress=False)
    assert str(caught.value) == "grid='left' with method='mask-ig'; expected one of ('midpoint', 'gauss')"
    with pytest.raises(MechsafetyError, match="steps=0; expected"):
        edge_attribution(llama, pairs, log_odds, steps=0)
