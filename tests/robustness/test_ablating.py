"""Fragility with counterfactual values, edges and directions: against plain forwards, and its harmless side."""

from dataclasses import replace

import pytest
import torch

import mechsafety as ms
from mechsafety.circuits.circuit import CircuitEdge
from mechsafety.circuits.edge_faithfulness import EdgeMeter
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.errors import MechsafetyError
from mechsafety.interventions import Direction
from mechsafety.interventions.steering import remove_directions
from mechsafety.models.engine import unembed
from mechsafety.nodes import EMBED, LOGITS, NODE_SITES, Edge, Node
from mechsafety.patching import pair_runs
from mechsafety.prompts.spans import Tokens
from mechsafety.replies import reply_loss
from mechsafety.robustness import FragilityCurve, fragility
from mechsafety.robustness.ablating import AtCounterfactual, CutEdges
from mechsafety.robustness.parts import matched_directions, matched_edges
from mechsafety.sites import Site, SiteKind

QUIET = {"progress": False, "n_random": 2}
PARTS = (Node("head", 0, 1), Node("mlp", 1), Node("neuron", 2, 5), Node("head", 1, 3))


def swapped(pairs):
    return replace(
        pairs, pairs=tuple(replace(pair, harmful=pair.harmless, harmless=pair.harmful) for pair in pairs.pairs)
    )


def naive(model, own, other, nodes, strength):
    """Next-token logits of one row [pos d_vocab] that takes values of another row of the same length."""
    rows = [Tokens(ids[None], torch.ones_like(ids)[None].bool(), own[1]) for ids in (own[0], other[0])]
    sites = list(dict.fromkeys(Site(NODE_SITES[node.kind], node.layer) for node in nodes))
    values = model.read(rows[1], sites)

    def edit(site):
        def function(tensor):
            new = tensor.clone()
            for node in nodes:
                if Site(NODE_SITES[node.kind], node.layer) == site:
                    at = (..., slice(None)) if node.kind == "mlp" else (slice(None), slice(None), node.index)
                    new[at] = (1 - strength) * tensor[at] + strength * values[site][at]
            return new

        return function

    with torch.no_grad(), model.hooks([(site, edit(site)) for site in sites]):
        return model.forward(rows[0], keep=len(own[0]))[0].float()


# --- the other prompt's values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_counterfactual_values_are_those_of_exact_patching(any_model, pairs, log_odds, strength):
    model, pairs = any_model, pairs.aligned(any_model)
    scores, logits = AtCounterfactual.of(model, pairs, log_odds, [SiteKind.NEURONS]).read(PARTS, strength)
    tokens = model.tokenize_pairs(pairs)
    for k in range(len(pairs)):
        row = tokens.rows([k])
        real = row.harmful.mask[0]
        bad, good = ((side.ids[0][real], side.spans) for side in (row.harmful, row.harmless))
        assert scores[k].item() == pytest.approx(
            log_odds(naive(model, bad, good, PARTS, strength)[-1:]).item(), abs=2e-4
        )
        expected = naive(model, good, bad, PARTS, strength)[-1]
        assert torch.allclose(logits[k].log_softmax(-1), expected.log_softmax(-1), atol=2e-4)
    if strength == 1.0:
        meter = FaithfulnessMeter(model, pair_runs(model, pairs, extra=[SiteKind.NEURONS]), log_odds)
        assert scores.tolist() == pytest.approx(meter.removed([PARTS])[0].tolist(), abs=2e-4)


def test_replies_and_losses_take_the_other_prompts_values_at_every_token(llama, pairs, log_odds):
    pairs = pairs.aligned(llama).sample(3)
    ablation = AtCounterfactual.of(llama, pairs, log_odds, [SiteKind.NEURONS])
    tokens = llama.tokenize_pairs(pairs)
    references = ["tea for a car", "", "cake"]
    for side, other in (("harmful", "harmless"), ("harmless", "harmful")):
        found = ablation.replies(PARTS, 1.0, side, 5)
        for k in range(len(pairs)):
            row = tokens.rows([k])
            own, donor = (getattr(row, name) for name in (side, other))
            real, said = own.mask[0], list[int]()
            for _ in range(5):
                more = torch.tensor(said, dtype=torch.long)
                ids = [(torch.cat([one.ids[0][real], more]), one.spans) for one in (own, donor)]
                said.append(int(naive(llama, *ids, PARTS, 1.0)[-1].argmax()))
                if said[-1] in llama.end_ids:
                    break
            assert found[k] == llama.decode([said])[0]
    assert ablation.replies(PARTS, 1.0, "harmful", 5) != llama.generate(pairs.harmful, 5)
    losses = ablation.loss(PARTS, 1.0, references)
    assert losses[1].isnan()
    for k in (0, 2):
        more = torch.tensor(llama.tokenizer(references[k], add_special_tokens=False)["input_ids"])
        row = tokens.rows([k])
        real = row.harmless.mask[0]
        ids = [(torch.cat([one.ids[0][real], more]), one.spans) for one in (row.harmless, row.harmful)]
        logits = naive(llama, *ids, PARTS, 1.0)[-len(more) - 1 : -1]
        assert losses[k].item() == pytest.approx(torch.nn.functional.cross_entropy(logits, more).item(), abs=1e-4)
    untouched = ablation.loss(PARTS, 0.0, references)
    assert untouched[[0, 2]].tolist() == pytest.approx(
        reply_loss(llama, pairs.harmless, references)[[0, 2]].tolist(), abs=1e-4
    )


def test_a_metric_after_an_opener_is_read_there(opened):
    model, pairs, metric = opened
    nodes = [Node("head", 0, 1), Node("mlp", 1)]
    view = model.reading(metric.opener_ids)
    scores, _ = AtCounterfactual.of(model, pairs.aligned(model), metric).read(nodes, 1.0)
    meter = FaithfulnessMeter(view, pair_runs(view, pairs), metric)
    assert scores.tolist() == pytest.approx(meter.removed([nodes])[0].tolist(), abs=1e-3)
    edges = [Edge(EMBED, Node("head", 1, 0), "v"), Edge(Node("head", 0, 1), LOGITS, "resid")]
    cut, logits = CutEdges.of(model, pairs.aligned(model), metric).read(edges, 1.0)
    meter = EdgeMeter(view, pair_runs(view, pairs), metric)
    assert cut.tolist() == pytest.approx(meter.removed([edges])[0].tolist(), abs=1e-3)
    assert logits.shape == (len(pairs.aligned(model)), model.d_vocab)


# --- edges ------------------------------------------------------------------------------------------------------------


def test_cut_edges_are_those_of_exact_edge_circuits(llama, pairs, log_odds):
    pairs = pairs.aligned(llama)
    runs, back = pair_runs(llama, pairs), pair_runs(llama, swapped(pairs))
    meter = EdgeMeter(llama, runs, log_odds)
    some = [edge for k, edge in enumerate(meter.parts) if k % 7 == 0]
    ablation = CutEdges.of(llama, pairs, log_odds)
    scores, logits = ablation.read(some, 1.0)
    assert scores.tolist() == pytest.approx(meter.removed([some])[0].tolist(), abs=1e-4)
    other = EdgeMeter(llama, back, log_odds).removed([some])[0]
    assert log_odds(logits).tolist() == pytest.approx(other.tolist(), abs=1e-4)
    every, kept = ablation.read(meter.parts, 1.0)
    assert every.tolist() == pytest.approx(log_odds.scores(llama, pairs.harmless).tolist(), abs=1e-4)
    assert torch.allclose(kept.log_softmax(-1), llama.logits(pairs.harmful).log_softmax(-1), atol=1e-4)
    half, _ = ablation.read([Edge(EMBED, LOGITS, "resid")], 0.5)
    stream = runs.harmful.resid[-1] - 0.5 * (runs.harmful.resid[0] - runs.harmless.resid[0])
    with torch.no_grad():
        expected = log_odds(unembed(llama, stream[:, -1]))
    assert half.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_random_edges_match_in_ends_slot_and_layers(llama):
    meter_edges = [
        Edge(Node("head", 0, 1), Node("head", 2, 3), "v"),
        Edge(EMBED, Node("mlp", 1), "mlp"),
        Edge(Node("mlp", 1), LOGITS, "resid"),
    ]
    for seed in range(4):
        found = matched_edges(llama, meter_edges, seed)
        assert not set(found) & set(meter_edges)
        for given, drawn in zip(meter_edges, found, strict=True):
            assert (given.sender.kind, given.receiver.kind, given.slot) == (
                drawn.sender.kind,
                drawn.receiver.kind,
                drawn.slot,
            )
        assert (found[0].sender.layer, found[0].receiver.layer) == (0, 2)
    assert matched_edges(llama, meter_edges, 1) != matched_edges(llama, meter_edges, 2)


def test_the_curve_of_edges(llama, pairs, log_odds, tmp_path):
    edges = [Edge(EMBED, LOGITS, "resid"), Edge(Node("head", 0, 1), Node("mlp", 1), "mlp")]
    members = [CircuitEdge(edge, 0.1) for edge in edges]
    found = fragility(llama, members, pairs, log_odds, strengths=[0.5, 1], **QUIET)
    assert found.edges == tuple(edges) and found.parts == () and found.names == tuple(map(str, edges))
    aligned = pairs.aligned(llama)
    ablation = CutEdges.of(llama, aligned, log_odds)
    for s, strength in enumerate((0.5, 1.0)):
        for k in (0, 1):
            assert found.after[s, k].tolist() == pytest.approx(ablation.read(edges[: k + 1], strength)[0].tolist())
    assert found.random[1, 1, 0].tolist() == pytest.approx(
        ablation.read(matched_edges(llama, edges, 0), 1.0)[0].tolist()
    )
    assert "2 edges" in repr(found) and found.provenance.options["source"] == "counterfactual"
    again = FragilityCurve.load(found.save(tmp_path / "curve"))
    assert again.edges == found.edges and repr(again) == repr(found)
    assert found.plot().layout.xaxis.title.text == "edges ablated"


# --- directions -------------------------------------------------------------------------------------------------------


def test_directions_are_removed_together(llama, pairs):
    vectors = torch.randn(3, 1, llama.d_model, generator=torch.Generator().manual_seed(0))
    about = llama.provenance()
    everywhere = [Direction(about, f"e{k}", (Site(SiteKind.RESID_PRE, 1),), vectors[k], True) for k in range(2)]
    with remove_directions(llama, everywhere):
        found = llama.logits(pairs.harmful)
    with ms.interventions.project_out(llama, torch.cat([vectors[0], vectors[1]])):
        assert torch.equal(found, llama.logits(pairs.harmful))
    with everywhere[0].ablate(llama), everywhere[1].ablate(llama):
        assert not torch.allclose(found, llama.logits(pairs.harmful)), "one after the other leaves a rest"
    placed = [replace(direction, everywhere=False) for direction in everywhere]
    with remove_directions(llama, placed):
        read = llama.read(llama.tokenize(pairs.harmful), [Site(SiteKind.RESID_MID, 1), Site(SiteKind.ATTN_OUT, 1)])
    stream = read[Site(SiteKind.RESID_MID, 1)] - read[Site(SiteKind.ATTN_OUT, 1)]
    assert (stream @ torch.cat([vectors[0], vectors[1]]).T).abs().max() < 1e-4
    with placed[0].ablate(llama, 0.5):
        one = llama.logits(pairs.harmful)
    with remove_directions(llama, placed[:1], 0.5):
        assert torch.equal(one, llama.logits(pairs.harmful))
    with pytest.raises(MechsafetyError, match=r"^no directions; expected at least one$"):
        remove_directions(llama, []).__enter__()


def test_the_curve_of_directions(directed, directed_found, tmp_path):
    model, pairs, metric = directed
    given = directed_found.direction
    other = replace(
        given, name="noise", vectors=torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(3))
    )
    for parts in ([directed_found, other], [given, other]):
        found = fragility(model, parts, pairs, metric, replies=True, reply_tokens=4, **QUIET)
        assert found.directions == (given.name, "noise") and found.sizes == (1, 2) and found.overlaps == (0.0, 0.0)
    with given.ablate(model):
        expected = metric.scores(model, pairs.aligned(model).harmful)
    assert found.after[0, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert found.lost[0, 0] > 0.5 > found.random_lost[0, 0].max(), "the model was made to refuse by this direction"
    (random, _) = matched_directions([given, other], 0)
    assert random.sites == given.sites and random.everywhere == given.everywhere
    assert float(random.vectors.norm()) == pytest.approx(float(given.vectors.norm()), rel=1e-5)
    assert repr(FragilityCurve.load(found.save(tmp_path / "curve"))) == repr(found)


# --- the harmless side ------------------------------------------------------------------------------------------------


def test_the_harmless_side_is_said_and_read(llama, pairs, log_odds):
    parts = ["L0.H1", "L2.MLP", "L1.H0"]
    found = fragility(llama, parts, pairs, log_odds, sizes=[1, 3], replies=True, reply_tokens=4, **QUIET)
    prompts = pairs.aligned(llama).harmless
    references = llama.generate(prompts, 4, progress=False)
    assert found.loss[0].tolist() == pytest.approx(reply_loss(llama, prompts, references).tolist(), nan_ok=True)
    for k, size in enumerate((1, 3)):
        with ms.ablate(llama, parts[:size], prompts=prompts):
            loss = reply_loss(llama, prompts, references)
        assert found.loss[1 + k].tolist() == pytest.approx(loss.tolist(), abs=1e-4, nan_ok=True)
    assert len(found.kinds_harmless) == 3 and len(found.random_kinds_harmless) == 2
    frame = found.to_dataframe()
    assert frame.perplexity[1] == pytest.approx(float(found.loss[2].nanmean().exp()), rel=1e-4)
    assert frame.harmless_refuses[1] == found.kinds_harmless[2].share("refuses")
    assert frame.random_harmless_degenerate[0] == found.random_kinds_harmless[0].share("degenerate")
    assert frame[["perplexity_low", "perplexity_high", "random_perplexity"]].notna().all().all()
    assert len(found.plot().layout.annotations) == 4
    quiet = fragility(llama, parts, pairs, log_odds, sizes=[1], **QUIET)
    assert quiet.loss is None and quiet.to_dataframe().perplexity.isna().all()
    swap = fragility(
        llama, parts, pairs, log_odds, source="counterfactual", sizes=[3], replies=True, reply_tokens=4, **QUIET
    )
    assert swap.provenance.options["source"] == "counterfactual" and swap.loss.shape == (2, len(prompts))
    meter = FaithfulnessMeter(llama, pair_runs(llama, pairs), log_odds)
    lost = meter.removed([[Node("head", 0, 1), Node("mlp", 2), Node("head", 1, 0)]])[0]
    assert swap.after[0, 0].tolist() == pytest.approx(lost.tolist(), abs=1e-4)


@pytest.mark.unchecked
def test_bad_input(llama, pairs, log_odds):
    edge = Edge(EMBED, LOGITS, "resid")
    direction = Direction(llama.provenance(), "d", (Site(SiteKind.RESID_PRE, 1),), torch.ones(1, llama.d_model))
    for parts, options, said in (
        (
            [edge, "L0.H1"],
            {},
            r"^parts of several sorts \(edges; heads, MLPs and neurons\); expected one sort at a time$",
        ),
        ([edge], {"source": "mean"}, r"^source='mean' for edges; expected 'counterfactual'$"),
        ([direction], {"source": "mean"}, r"^source='mean' for directions; expected 'zero'$"),
        ([edge, edge], {}, r"^edges \['embed -> logits \(resid\)'\] are given twice; expected each once$"),
        ([direction, direction], {}, r"^directions \['d'\] are given twice; expected each once$"),
        ([Edge(EMBED, Node("mlp", 7), "mlp")], {}, r"has no edge embed -> L7\.MLP \(mlp\); expected edges between its"),
        ([edge], {"replies": True}, r"^replies while edges are cut .*; expected replies=False; or ablate the nodes"),
        ([], {}, r"^no nodes; expected at least one head, MLP or neuron$"),
    ):
        with pytest.raises(MechsafetyError, match=said):
            fragility(llama, parts, pairs, log_odds, **options, **QUIET)
    apart = ms.PromptPairs.from_lists(["make a bomb please"], ["make a cake"], align="suffix")
    with pytest.raises(
        MechsafetyError, match=r"^counterfactual values for pairs aligned at the suffix; expected pairs"
    ):
        fragility(llama, ["L0.H1"], apart, log_odds, source="counterfactual", **QUIET)
