"""Writers and readers of a direction: sums, plain hooks, and the planted writer."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference import record, whole_logits

from mechsafety.directions import DirectionIO, direction_io
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node


@pytest.fixture(scope="module")
def measured(directed, directed_found):
    model, pairs, metric = directed
    return direction_io(model, directed_found, pairs, metric, progress=False)


def test_the_planted_head_writes_and_reads_it(measured):
    frame = measured.to_dataframe().set_index("node")
    assert frame.index[0] == "L0.H0" and frame.writes["L0.H0"] > 0.9 and frame.cosine["L0.H0"] > 0.99
    assert frame.reads_v["L0.H0"] > 0.9 and abs(frame.reads_q["L0.H0"]) < 0.01
    assert frame.reads_mlp.notna().sum() == 3 and frame.reads_q.notna().sum() == 12


def test_the_shares_of_what_can_write_it_sum_to_one(measured, directed_found):
    assert float(measured.writes.sum(0).mean()) == pytest.approx(1.0, abs=1e-4)
    late = [k for k, node in enumerate(measured.nodes) if node.layer >= directed_found.layer]
    assert not measured.writes[late].any() and not measured.neurons_write[directed_found.layer :].any()
    k = measured.nodes.index(Node("mlp", 0))
    assert float(measured.neurons_write[0].sum()) == pytest.approx(float(measured.writes[k].mean()), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_shares_sum_on_random_models(kind, shared_model, pairs, log_odds, directed_found):
    model = shared_model(kind)
    vector = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(2))
    found = direction_io(model, replace(directed_found, vectors=vector, layer=2), pairs, log_odds, progress=False)
    assert float(found.writes.sum(0).mean()) == pytest.approx(1.0, abs=1e-3)
    mlps = torch.stack([found.writes[found.nodes.index(Node("mlp", layer))].mean() for layer in (0, 1)])
    torch.testing.assert_close(found.neurons_write.sum(1)[:2], mlps, atol=1e-4, rtol=1e-4)


def test_reading_by_plain_hooks(shared_model, pairs, log_odds, directed_found):
    """An MLP's and a value's input lose the pairs' difference along the direction, and nothing else does."""
    model = shared_model("llama")
    vector = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(2))
    direction = replace(directed_found, vectors=vector)
    unit = direction.vector / direction.vector.norm()
    found = direction_io(model, direction, pairs, log_odds, progress=False)
    tokens = model.tokenize_pairs(pairs)
    scores = [log_odds(whole_logits(model, side)) for side in (tokens.harmful, tokens.harmless)]
    gap = (scores[0] - scores[1]).mean()
    names = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out"]
    bad, good = (record(model, side, names) for side in (tokens.harmful, tokens.harmless))
    middle = [side[names[0]] + side[names[1]] for side in (bad, good)]
    delta = -((middle[0] - middle[1]) @ unit)[..., None] * unit

    with torch.no_grad():
        new = model.mlp(1, middle[0] + delta)
    lost = scores[0] - log_odds(whole_logits(model, tokens.harmful, [("blocks.1.hook_mlp_out", lambda own: new)]))
    got = found.reads[found.nodes.index(Node("mlp", 1)), 3]
    torch.testing.assert_close(got, lost / gap, atol=1e-4, rtol=1e-3)
    assert float(got.abs().max()) > 1e-3


def test_the_neurons_estimate_is_the_first_order_of_the_mlps_exact_reading(shared_model, pairs, logit_difference):
    """For a small change the neurons' estimates sum to what the MLP's reading measures."""
    from mechsafety.directions.io import _neuron_reads
    from mechsafety.patching import pair_runs
    from mechsafety.patching.receivers import live_logits, slot_edit
    from mechsafety.sites import SiteKind

    model = shared_model("llama")
    unit = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)
    runs = pair_runs(model, pairs, extra=[SiteKind.NEURONS])
    small = replace(runs.harmless, resid=runs.harmful.resid + 1e-2 * (runs.harmless.resid - runs.harmful.resid))
    acts = runs.harmful.acts[SiteKind.MLP_OUT]
    near = acts + 1e-2 * (runs.harmless.acts[SiteKind.MLP_OUT] - acts)
    small = replace(small, acts={**runs.harmless.acts, SiteKind.MLP_OUT: near})
    both = replace(runs, harmless=small)
    estimate = _neuron_reads(model, both, logit_difference, unit).sum(1)
    base, gap = runs.harmful, (logit_difference(runs.harmful.logits) - logit_difference(small.logits)).mean()
    for layer in range(3):
        middle = [run.resid[layer + 1] - run.acts[SiteKind.MLP_OUT][layer] for run in (base, small)]
        delta = -((middle[0] - middle[1]) @ unit)[..., None] * unit
        edit = slot_edit(model, base, [[(Node("mlp", layer), "mlp")]], delta[None])
        logits = live_logits(model, base, [[edit]])[0]
        exact = (logit_difference(base.logits) - logit_difference(logits)).mean() / gap
        assert float(estimate[layer]) == pytest.approx(float(exact), rel=0.05, abs=1e-5)


def test_a_circuits_nodes_alone(directed, directed_found, measured):
    model, pairs, metric = directed
    members = [SimpleNamespace(node=node) for node in (Node("head", 0, 0), Node("mlp", 1), Node("neuron", 0, 3))]
    found = direction_io(model, directed_found, pairs, metric, circuit=SimpleNamespace(nodes=members), progress=False)
    assert found.nodes == (Node("head", 0, 0), Node("mlp", 1))
    torch.testing.assert_close(found.writes[0], measured.writes[measured.nodes.index(found.nodes[0])])
    given = direction_io(model, directed_found, pairs, metric, nodes=found.nodes, progress=False)
    torch.testing.assert_close(given.reads, found.reads, equal_nan=True)
    with pytest.raises(MechsafetyError, match=r"^a circuit and nodes; expected one of them$"):
        direction_io(model, directed_found, pairs, metric, circuit=SimpleNamespace(nodes=members), nodes=found.nodes)


def test_refusals(directed, directed_found):
    model, own, metric = directed
    with pytest.raises(MechsafetyError) as caught:
        direction_io(model, directed_found, own, metric, nodes=[Node("head", 0, 7)])
    assert (
        str(caught.value)
        == f"L0.H7 does not exist in {model.name}; expected layers 0 to 2 and heads 0 to 3; the nearest is L0.H3"
    )
    with pytest.raises(MechsafetyError, match=r"^neurons among the nodes; expected heads and MLPs"):
        direction_io(model, directed_found, own, metric, nodes=[Node("neuron", 0, 7)])
    with pytest.raises(MechsafetyError, match=r"^a direction of width 31; expected this model's d_model, 32"):
        direction_io(model, replace(directed_found, vectors=directed_found.vectors[..., 1:]), own, metric)


def test_table_and_round_trip(measured, tmp_path):
    assert len(measured.to_dataframe()) == 15
    top = measured.neurons_dataframe(4)
    assert 4 <= len(top) <= 8 and set(top.columns) == {"node", "layer", "index", "writes", "reads_estimate"}
    shown = {bars.name: len(bars.x) for bars in measured.plot().data}
    assert shown == {"head": 12, "mlp": 3}
    again = DirectionIO.load(measured.save(tmp_path / "io"))
    assert again.nodes == measured.nodes and torch.equal(again.writes, measured.writes)
    assert repr(again).startswith("DirectionIO(15 nodes, written most by L0.H0")
