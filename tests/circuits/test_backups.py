"""The search for backups: on circuits that are formulas, and its runs on real models."""

import numpy as np
import pytest
import torch
from reference import hook_count
from whole_forwards import patched_whole

import mechsafety as ms
from mechsafety.attribution.nodes import node_attribution
from mechsafety.circuits import backups as module
from mechsafety.circuits.backups import find_backups, knocked_out
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import activation_patching, pair_runs

A, B, C, D, E = (Node("head", 1, k) if k < 4 else Node("mlp", 1) for k in range(5))
ALL = head_and_mlp_nodes(3, 4)
NOISE = np.linspace(0.97, 1.03, 8)


class Formula(FaithfulnessMeter):
    """A meter of a model whose metric on eight prompts is a formula of which nodes are alive."""

    def __init__(self, formula):
        object.__setattr__(self, "formula", formula)
        object.__setattr__(self, "model", type("Sizes", (), {"n_layers": 3, "n_heads": 4})())
        object.__setattr__(self, "progress", False)

    def ends(self):
        return self.removed([[]])[0], self.removed([ALL])[0]

    def removed(self, circuits):
        return np.array([self.formula(lambda node, gone=gone: node not in gone) * NOISE for gone in circuits])


def integrated(meter, gone, steps):
    """Shapley-like credit of every node by averaging over orders: what an attribution would show, by brute force."""
    rng, credit = np.random.default_rng(0), np.zeros(len(ALL))
    for _ in range(40):
        alive = set()
        before = meter.removed([ALL])[0].mean()
        for k in rng.permutation(len(ALL)):
            alive.add(ALL[k])
            after = meter.removed([[n for n in ALL if n not in alive or n == gone]])[0].mean()
            credit[k] += (after - before) / 40
            before = after
    return torch.tensor(credit)


@pytest.fixture(autouse=True)
def by_brute_force(request, monkeypatch):
    if "formula" in request.node.name:
        monkeypatch.setattr(module, "_attribution", integrated)


def search(formula, circuit, suspicion=None, **options):
    found = find_backups(
        Formula(formula), circuit, dict.fromkeys(circuit, 1.0) if suspicion is None else suspicion, **options
    )
    return {backup.node: backup for backup in found}


def test_formula_of_two_that_do_the_same():
    found = search(lambda on: 2.0 * ((on(A) or on(B)) and on(C)), [A, C])
    assert set(found) == {B}
    backup = found[B]
    assert (backup.primary, backup.group) == (A, (A, B))
    assert (backup.single, backup.primary_effect, backup.joint) == pytest.approx((0.0, 0.0, 1.0))
    assert 0.9 < backup.ci[0] <= backup.ci[1] < 1.1 and backup.p_value < 0.02


def test_formula_of_three_that_do_the_same():
    """No two of them show anything: only the group does."""
    found = search(lambda on: 1.0 * (on(A) or on(B) or on(D)), [A])
    assert set(found) == {B, D} and found[B].group == (A, B, D)
    assert found[B].joint == pytest.approx(1.0)


def test_formula_with_a_second_way_of_two_steps():
    """B then D stand in for A: each alone takes the second way away, so both are backups."""
    found = search(lambda on: 1.0 * (on(A) or (on(B) and on(D))), [A])
    assert set(found) == {B, D} and all(backup.joint == pytest.approx(1.0) for backup in found.values())


def test_formula_in_series_or_that_adds_up_has_no_backups():
    assert search(lambda on: 1.0 * (on(A) and on(B) and on(C)), [A, B, C]) == {}
    assert search(lambda on: 0.5 * on(A) + 0.3 * on(B) + 0.2 * on(C), [A, B, C]) == {}


def test_formula_where_the_second_way_is_weak():
    assert search(lambda on: 1.0 if on(A) else 0.05 * on(B), [A]) == {}, "less than a tenth"
    assert set(search(lambda on: 1.0 if on(A) else 0.6 * on(B), [A])) == {B}


def test_formula_nothing_suspicious_is_not_examined():
    formula = lambda on: 1.0 * (on(A) or on(B))  # noqa: E731
    assert search(formula, [A], {A: 0.09}) == {}
    assert search(formula, [A], {}) == {}


def test_formula_limits_and_time():
    def formula(on):
        return 0.5 * (on(A) or on(B)) + 0.5 * (on(C) or on(D))

    assert set(search(formula, [A, C])) == {B, D}
    assert set(search(formula, [A, C], {A: 0.2, C: 0.3}, n_parts=1)) == {D}, "the most suspicious first"
    budget = Budget(1e-9, clock=iter(range(100)).__next__)
    assert search(formula, [A, C], budget=budget) == {}
    assert budget.cut == ("backups of the circuit's nodes: 0 of 2 done",)


def test_attribution_with_a_node_gone(llama, pairs, log_odds):
    runs = pair_runs(llama, pairs)
    meter = FaithfulnessMeter(llama, runs, log_odds)
    whole = module._attribution(meter, None, 4)
    expected = node_attribution(llama, runs, log_odds, steps=4)
    torch.testing.assert_close(whole, torch.tensor([expected.of(node) for node in ALL]), atol=1e-4, rtol=1e-4)
    gone = Node("head", 0, 2)
    rest = module._attribution(meter, gone, 48)
    assert float(rest[ALL.index(gone)]) == 0.0
    harmful, harmless = meter.ends()
    left = (meter.removed([[gone]])[0] - harmless).mean() / (harmful - harmless).mean()
    assert float(rest.sum()) == pytest.approx(left, abs=0.03), "the others carry what is left"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_knocked_out(kind, shared_model, pairs, log_odds):
    model = shared_model(kind)
    clean, runs, gone = hook_count(model), pair_runs(model, pairs), [Node("head", 0, 1), Node("mlp", 1)]
    tokens = model.tokenize_pairs(pairs)
    here = knocked_out(model, runs, gone)
    expected = patched_whole(model, tokens.harmful, tokens.harmless, gone)
    torch.testing.assert_close(here.harmful.logits, expected, atol=1e-4, rtol=1e-4)
    assert here.harmless.logits is runs.harmless.logits and here.harmless.fixed == here.harmful.fixed
    for node in (Node("head", 0, 0), Node("head", 2, 3), Node("mlp", 2)):
        found = activation_patching(model, here, log_odds, nodes=[node], progress=False).changes[0]
        both = patched_whole(model, tokens.harmful, tokens.harmless, [*gone, node])
        torch.testing.assert_close(found, log_odds(expected) - log_odds(both), atol=1e-3, rtol=1e-3)
    assert hook_count(model) == clean and not model.edited
    torch.testing.assert_close(model.logits(tokens.harmful), runs.harmful.logits, atol=1e-4, rtol=1e-4)


def test_more_pairs_than_are_attributed_at_once(llama, pairs, log_odds):
    """What is knocked out stays so where pairs are run again a few at a time, and where columns are left out."""
    many = ms.PromptPairs(pairs.pairs * 12)
    gone = [Node("head", 0, 1), Node("mlp", 1)]
    few, all_of_them = (knocked_out(llama, pair_runs(llama, some), gone) for some in (pairs, many))
    columns = 12 * len(pairs) * few.harmful.n_pos
    assert columns > 256, "or nothing is run again"
    for neurons in (False, True):
        found = [node_attribution(llama, runs, log_odds, steps=2, neurons=neurons) for runs in (few, all_of_them)]
        torch.testing.assert_close(found[1].heads, found[0].heads, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1].mlps, found[0].mlps, atol=1e-4, rtol=1e-4)
        assert float(found[0].mlps[1].abs()) < 1e-6 and float(found[0].heads[0, 1].abs()) < 1e-6
    scores = [ms.edge_attribution(llama, runs, log_odds, steps=1, progress=False).scores for runs in (few, all_of_them)]
    torch.testing.assert_close(scores[1], scores[0], atol=1e-4, rtol=1e-4)
    each = [
        ms.activation_patching(llama, runs, log_odds, nodes=[Node("mlp", 2)], positions="each", progress=False).changes
        for runs in (few, all_of_them)
    ]
    torch.testing.assert_close(each[1][:, : len(pairs)], each[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("single", "backup"), [(0.01, True), (-0.28, False), (0.09, False)])
def test_what_works_against_the_behaviour_alone_is_no_backup(single, backup):
    """Its effect makes the group's excess large without any second way: a late MLP of a real model did so."""
    first, node = Node("mlp", 1), Node("mlp", 2)
    noise = 0.01 * np.random.default_rng(0).standard_normal(12)
    effects = object.__new__(module._Effects)
    effects.known = {
        frozenset([first]): 0.16 + noise,
        frozenset([node]): single + noise,
        frozenset([first, node]): 0.3 + noise,
    }
    found = module._confirmed(effects, [(first, (node,), ())], seed=0)
    assert [one.node for one in found] == [node] * backup
