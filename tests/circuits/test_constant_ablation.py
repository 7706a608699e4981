"""Circuits in which everything outside takes constants: its mean over the harmless prompts, or learned ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mechsafety as ms
from mechsafety.attribution.nodes import node_attribution
from mechsafety.circuits import EdgeMeter, FaithfulnessMeter, NeuronMeter
from mechsafety.circuits.masks import Training, train_masks
from mechsafety.circuits.optimal import optimal_constants
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.patching.masks import Patch, patched_logits
from mechsafety.sites import Site, SiteKind
from mechsafety.viz import words

KINDS = ("llama", "gpt2", "qwen2")


@pytest.fixture(params=KINDS)
def measured(request, shared_model, ragged, log_odds):
    model = shared_model(request.param)
    runs = pair_runs(model, ragged, extra=[SiteKind.NEURONS])
    return FaithfulnessMeter(model, runs, log_odds).at_mean()


def by_hooks(meter, circuit):
    """Metric of each harmful prompt with everything outside the circuit at its mean, by hooks on whole forwards."""
    model, tokens = meter.model, meter.runs.tokens
    cache = model.cache(tokens.harmless, ["z", "mlp_out"])
    real, kept = tokens.harmless.mask, set(circuit)
    differs = (tokens.harmful.ids != tokens.harmless.ids).int().cummax(1).values.bool()  # from the first difference on
    hooks = []
    for node in head_and_mlp_nodes(model.n_layers, model.n_heads):
        if node in kept:
            continue
        head = node.kind == "head"
        values = cache.z[node.layer, node.index] if head else cache.mlp_out[node.layer]
        weight = real[..., None].to(values)
        mean = (values * weight).sum(0) / weight.sum(0).clamp(min=1)

        def edit(tensor, node=node, mean=mean, head=head):
            out = tensor.clone()
            own = out[:, :, node.index] if head else out
            own[differs] = mean.expand_as(own)[differs]
            return out

        hooks.append((Site(SiteKind.Z if head else SiteKind.MLP_OUT, node.layer), edit))
    with model.hooks(hooks):
        return meter.metric(model.logits(tokens.harmful))


def test_circuits_are_those_of_hooks(measured):
    nodes = head_and_mlp_nodes(measured.model.n_layers, measured.model.n_heads)
    circuits = [nodes[::2], nodes[1::3], [], nodes]
    found = measured.kept(circuits)
    for circuit, scores in zip(circuits, found, strict=True):
        assert scores == pytest.approx(by_hooks(measured, circuit).tolist(), abs=1e-3)
    harmful, empty = measured.ends()
    assert found[3] == pytest.approx(harmful, abs=1e-4) and found[2] == pytest.approx(empty, abs=1e-4)
    assert measured.faithfulness([[], nodes]) == pytest.approx([0, 1], abs=1e-4)
    harmless = measured.metric(measured.runs.harmless.logits).numpy()
    assert abs(harmless - empty).max() > 1e-3  # it is another ablation


def test_other_analyses_of_such_runs_stay_counterfactual(measured):
    """They patch in the harmless run, so that their gap is to the harmless prompts."""
    plain = replace(measured.runs, constants=None, replaced=None, empty=None)
    both = [
        ms.activation_patching(measured.model, runs, measured.metric, nodes=["L1.MLP"], progress=False)
        for runs in (measured.runs, plain)
    ]
    assert both[0].effects.tolist() == both[1].effects.tolist()
    edges = EdgeMeter(measured.model, plain, measured.metric)
    with pytest.raises(MechsafetyError, match="edges at the mean; expected"):
        edges.at_mean()
    wide = pair_runs(measured.model, measured.runs.tokens, start=0)
    with pytest.raises(MechsafetyError, match="constants without z in all"):
        measured.runs.constants.of(wide.harmful)


def test_groups_share_one_mean(measured, monkeypatch):
    monkeypatch.setattr("mechsafety.circuits.faithfulness.SMALL_BATCH", 0)
    whole = FaithfulnessMeter(measured.model, pair_runs(measured.model, measured.runs.tokens), measured.metric)
    grouped = whole.grouped().at_mean()
    assert len(grouped.groups) > 1
    nodes = head_and_mlp_nodes(measured.model.n_layers, measured.model.n_heads)
    # grouped again after the mean was taken, as before
    for meter in (grouped, whole.at_mean().grouped()):
        assert meter.kept([nodes[::2]]) == pytest.approx(measured.kept([nodes[::2]]), abs=1e-3)


def test_the_ranking_is_of_the_same_ablation(measured):
    found = node_attribution(measured.model, measured.runs, measured.metric, steps=32, progress=False)
    assert found.total == pytest.approx(1.0, abs=0.05)
    neurons = NeuronMeter.of(measured, (1,))
    weights = torch.ones(len(neurons.parts))
    assert neurons.soft(neurons.runs, 0 * weights).tolist() == pytest.approx(neurons.ends()[1].tolist(), abs=1e-3)
    trained = train_masks(measured, "match", Training(steps=3))
    assert set(trained.ranking) == set(measured.parts)


def test_a_map_by_means(planted):
    options = ms.MapOptions(limit=8, n_random=20, n_resamples=1, ablation="mean")
    circuit = ms.map_refusal_circuit(*planted, options=options, progress=False)
    check = circuit.verification
    assert circuit.ablation == "mean" and check.reached and check.held_out_faithfulness >= 0.8
    assert set(circuit.claims_dataframe()["ablation"]) == {"mean"}
    assert ms.RefusalCircuit.from_json(circuit.to_json()).ablation == "mean"
    nodes = {member.node for member in circuit.nodes}
    split = ms.circuits.split_pairs(planted[0], ms.circuits.draw_pairs(*planted, limit=8, progress=False), options)
    again = split.meters.held_out.faithfulness([sorted(nodes, key=lambda node: node.order)])[0]
    assert check.held_out_faithfulness == pytest.approx(again, abs=1e-4)
    # single nodes are patched from the counterfactual prompt all the same
    usual = replace(options, ablation="counterfactual")
    other = ms.circuits.split_pairs(planted[0], split.drawn, usual)
    some = [[node] for node in sorted(nodes, key=lambda node: node.order)]
    np.testing.assert_allclose(split.alone[0].removed(some), other.alone[0].removed(some), atol=1e-5)


def squared_change(meter, circuits):
    """Mean squared change of the metric on harmful and harmless prompts, by hooks, as a share of the mean gap."""
    model, metric, runs = meter.model, meter.metric, meter.runs
    every, changes = head_and_mlp_nodes(model.n_layers, model.n_heads), []
    first = runs.tokens.first_differences
    for run in (runs.harmful, runs.harmless):
        values = runs.constants.of(run, first)
        for circuit in circuits:
            outside = [node for node in every if node not in set(circuit)]
            changed = patched_logits(model, run, values, Patch.of(model, [outside]))[0]
            changes.append((metric(changed) - metric(run.logits)).square())
    harmful, harmless = runs.scores(metric)
    return float(torch.stack(changes).mean() / (harmful.mean() - harmless.mean()) ** 2)


def test_optimal_constants_disturb_less_than_means(planted_split):
    """On pairs that they were not learned on, and the constants of the empty circuit lie between the two prompts."""
    here, there = planted_split.meters.found_on, planted_split.meters.held_out
    columns = max(meter.runs.harmful.n_pos for meter in (here, there))
    constants = optimal_constants(here, columns=columns)
    again = optimal_constants(here, columns=columns)
    assert all(torch.equal(values, again.acts[kind]) for kind, values in constants.acts.items())
    nodes, rng = list(here.parts), np.random.default_rng(1)
    circuits = [[node for node in nodes if rng.random() < share] for share in rng.random(30)]
    optimal, mean = there.at_constants(constants), there.at_mean()
    assert squared_change(optimal, circuits) < 0.7 * squared_change(mean, circuits)
    (harmful, empty), (_, harmless) = optimal.ends(), there.ends()
    middle = (harmful.mean() + harmless.mean()) / 2
    assert abs(empty.mean() - middle) < 0.3 * (harmful.mean() - harmless.mean())
    assert optimal.faithfulness([[], nodes]) == pytest.approx([0, 1], abs=1e-4)


def test_constants_of_more_columns_repeat_their_mean(measured):
    constants = measured.runs.constants
    wide = constants.padded(40)
    for kind, values in constants.acts.items():
        n = values.shape[2]
        assert wide.acts[kind].shape[2] == 40 and torch.equal(wide.acts[kind][:, :, -n:], values)
        expected = values.mean(2, keepdim=True).expand_as(wide.acts[kind][:, :, :-n])
        assert torch.allclose(wide.acts[kind][:, :, :-n], expected, atol=1e-6)
    assert constants.padded(1).acts[SiteKind.Z].shape == constants.acts[SiteKind.Z].shape


@pytest.mark.parametrize("level", ["node", "neuron"])
def test_a_map_by_optimal_constants(planted, level):
    options = ms.MapOptions(limit=8, level=level, n_random=20, n_resamples=1, ablation="optimal")
    circuit = ms.map_refusal_circuit(*planted, options=options, progress=False)
    check = circuit.verification
    assert circuit.ablation == "optimal" and check.reached and check.held_out_faithfulness >= 0.8
    assert set(circuit.claims_dataframe()["ablation"]) == {"optimal"}
    assert "learned on the discovery pairs" in words.ablation(circuit)


@pytest.mark.parametrize("wrong", [{"ablation": "zero"}, {"ablation": "mean", "level": "edge"}])
def test_other_ablations_are_refused(wrong):
    with pytest.raises(
        MechsafetyError, match=r"ablation='zero'; expected one of|ablation 'mean' at level 'edge'; expected"
    ):
        ms.MapOptions(**wrong)


@pytest.fixture(scope="module")
def built():
    made = ms.testbed.planted()
    return ms.load_model((made.model, made.tokenizer)), made.pairs


@pytest.fixture(scope="module")
def planted_split(built):
    drawn = ms.circuits.draw_pairs(*built, limit=32, progress=False)
    return ms.circuits.split_pairs(built[0], drawn, progress=False)


@pytest.mark.parametrize("level", ["node", "neuron"])
@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "optimal"])
def test_controls_are_some_of_the_fresh_pairs(built, level, ablation):
    options = ms.MapOptions(level=level, ablation=ablation, n_control_pairs=2, n_role_pairs=3)
    split = ms.circuits.split_pairs(built[0], ms.circuits.draw_pairs(*built, limit=32, progress=False), options)
    assert len(split.fresh) > 2 and len(split.meters.controls.runs.harmful) == 2
    assert [len(meter.runs.harmful) for meter in split.alone] == [3, 2]
    at_constants = [split.meters.controls.runs.constants is not None, split.meters.fresh.runs.constants is not None]
    assert at_constants == [ablation != "counterfactual"] * 2 and all(
        meter.runs.constants is None for meter in split.alone
    )
    texts = set(split.fresh.harmful)
    assert texts >= set(split.fresh.sample(2, options.seed).harmful) and not texts & set(split.held.harmful)
