"""Searches over edges: on the planted model, and ACDC against a plain loop."""

import numpy as np
import pytest

import mechsafety as ms
from mechsafety.circuits import edge_search
from mechsafety.circuits.edge_faithfulness import EdgeMeter, all_edges, edge_circuit_logits, prune
from mechsafety.circuits.edge_search import EdgeCircuit, acdc, discover_edges
from mechsafety.circuits.faithfulness import in_order
from mechsafety.errors import MechsafetyError
from mechsafety.patching import pair_runs


@pytest.fixture(scope="module")
def metric(planted):
    return ms.RefusalLogOdds.of(planted[0], ["sorry"], ["sure"])


@pytest.fixture(scope="module")
def few(planted):
    return ms.PromptPairs(planted[1].pairs[:1], "few")


@pytest.fixture(scope="module")
def found(planted, metric):
    return discover_edges(*planted, metric, progress=False)


def test_the_smallest_set_of_edges(planted, metric, found):
    model, pairs = planted
    assert (
        found.reached and found.n_candidates == 262 and len(found.edges) < 60 and len(found.scores) == len(found.edges)
    )
    meters = [EdgeMeter(model, pair_runs(model, part), metric) for part in pairs.halves()]
    values = [meter.faithfulness([found.edges])[0] for meter in meters]
    assert values == pytest.approx([found.faithfulness, found.held_out_faithfulness], abs=1e-5) and min(values) >= 0.8
    assert set(prune(found.edges)) == set(found.edges), "every edge lies on a path from embed to logits"
    without = [[edge for edge in found.edges if edge != gone] for gone in found.edges]
    lowest = np.minimum(*(meter.faithfulness(without) for meter in meters))
    assert lowest.max() < 0.8, "no edge less does"
    assert [point.n_nodes for point in found.curve] == [0, 1, 3, 5, 10, 13, 26, 52, 131, 262]
    assert found.curve[-1].faithfulness == pytest.approx(1.0, abs=1e-3)


def test_from_disk_and_as_a_table(found, tmp_path):
    back = EdgeCircuit.load(found.save(tmp_path / "edges"))
    assert (back.edges, back.scores, back.curve, back.reached) == (found.edges, found.scores, found.curve, True)
    assert back.provenance == found.provenance
    assert repr(found).startswith(
        f"EdgeCircuit(eap-ig: {len(found.edges)} of 262 edges, {len(found.nodes)} nodes, faith"
    )
    frame = found.to_dataframe()
    assert len(frame) == len(found.edges) and set(frame.columns) == {"sender", "receiver", "slot", "score"}
    assert len(found.plot().data[0].x) == min(30, len(frame))


def test_a_largest_number_of_edges(planted, metric):
    small = discover_edges(*planted, metric, max_edges=4, progress=False)
    assert len(small.edges) <= 4 and not small.reached


def test_many_edges_are_not_measured_one_by_one(planted, metric, monkeypatch):
    monkeypatch.setattr(edge_search, "MAX_EXACT", 5)
    found = discover_edges(*planted, metric, progress=False)
    assert found.reached and found.cut[0].endswith("are too many to measure one by one")


def plain_acdc(meter, threshold, measure):
    """Conmy et al.'s algorithm 1 as it is written: one edge, one run."""
    every = all_edges(2, 4, False)
    target = meter.runs.harmful.logits.log_softmax(-1)

    def value(kept):
        if measure == "metric":
            return meter.faithfulness([kept])[0]
        logits = edge_circuit_logits(meter.model, meter.runs, [kept])[0].log_softmax(-1)
        return float((target.exp() * (target - logits)).sum(-1).mean())

    kept = list(every)
    now = value(kept)
    for receiver in sorted({edge.receiver for edge in every}, key=lambda node: node.order, reverse=True):
        for slot in ("v", "resid", "q", "mlp", "k"):
            into = [edge for edge in every if edge.receiver == receiver and edge.slot == slot]
            for edge in sorted(into, key=lambda edge: edge.sender.order, reverse=True):
                smaller = [other for other in kept if other != edge]
                after = value(smaller)
                change = after - now
                if (change if measure == "kl" else abs(change)) < threshold:
                    kept, now = smaller, after
    return in_order(prune(kept))


@pytest.mark.parametrize(("measure", "threshold"), [("kl", 0.01), ("metric", 0.03)])
def test_acdc_equals_the_plain_loop(make_hf_model, make_tokenizer, few, measure, threshold):
    """Two layers, since the plain loop runs the model once per edge."""
    model = ms.load_model((make_hf_model("llama", seed=3, layers=2), make_tokenizer()))
    change = (model.logits(few.harmful) - model.logits(few.harmless))[0]
    metric = ms.RefusalLogOdds((int(change.argmax()),), ("x",), (int(change.argmin()),), ("y",))
    found = acdc(model, few, metric, threshold=threshold, measure=measure)
    meter = EdgeMeter(model, pair_runs(model, few), metric)
    assert found.edges == plain_acdc(meter, threshold, measure)
    assert 10 < len(found.edges) < found.n_candidates / 2 and all(score >= threshold for score in found.scores)
    assert found.faithfulness == pytest.approx(meter.faithfulness([found.edges])[0], abs=1e-5)
    assert (found.method, found.reached, found.curve, found.held_out_faithfulness) == ("acdc", None, (), None)


def test_a_higher_threshold_keeps_fewer_edges(planted, metric, few):
    sizes = [len(acdc(planted[0], few, metric, threshold=t, measure="metric").edges) for t in (0.02, 0.2)]
    assert sizes[1] < sizes[0]


def test_batches_do_not_change_acdc(planted, metric, few, monkeypatch):
    whole = acdc(planted[0], few, metric, threshold=0.1, measure="metric")
    monkeypatch.setattr(edge_search, "max_variants", lambda base: 40)
    assert acdc(planted[0], few, metric, threshold=0.1, measure="metric").edges == whole.edges


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "loss"}, r"^measure='loss'; expected one of \('kl', 'metric'\)$"),
        ({"threshold": 0.0}, r"^threshold 0.0; expected above 0$"),
    ],
)
def test_options(planted, metric, few, options, message):
    with pytest.raises(MechsafetyError, match=message):
        acdc(planted[0], few, metric, **options)
