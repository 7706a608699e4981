"""Fragility, redundancy, entanglement, concentration and depth: against definitions, and on models of known circuit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom

import mechsafety as ms
from mechsafety import testbed
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.replies import ReplyKinds
from mechsafety.robustness import (
    Concentration,
    Entanglement,
    FragilityCurve,
    Redundancy,
    RefusalDepth,
    concentration,
    entanglement,
    fragility,
    matched_ranking,
    redundancy,
    refusal_depth,
)

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def backed_up():
    """A planted model with one backup, its pairs and its metric."""
    made = testbed.planted(seed=5, layers=4, heads=4, decoys=2, backups=1)
    model = ms.load_model((made.model, made.tokenizer))
    pairs = made.pairs.sample(8)
    return made, model, pairs, ms.RefusalLogOdds.detect(model, pairs)


# --- random parts ---------------------------------------------------------------------------------------------------


def test_random_parts_match_in_kind_and_layer(llama):
    parts = [Node("head", 0, 1), Node("neuron", 1, 7), Node("head", 0, 2), Node("mlp", 2), Node("neuron", 1, 8)]
    for seed in range(5):
        found = matched_ranking(llama, parts, seed)
        assert [node.kind for node in found] == [node.kind for node in parts]
        assert not set(found) & set(parts) and len(set(found)) == len(parts)
        same = [node.layer for node in found if node.kind != "mlp"]
        assert same == [0, 1, 0, 1], "an MLP has no other in its layer, the others have"
        assert found[3].layer == 1
    assert matched_ranking(llama, parts, 3) == matched_ranking(llama, parts, 3) != matched_ranking(llama, parts, 4)


def test_parts_without_enough_others_are_drawn_from_all(llama):
    mlps = [Node("mlp", layer) for layer in range(3)]
    assert set(matched_ranking(llama, mlps)) == set(mlps)
    most = [Node("head", 0, head) for head in range(3)]
    found = matched_ranking(llama, most)
    assert Node("head", 0, 3) in found and {node.layer for node in found} == {0, 1}


# --- fragility ------------------------------------------------------------------------------------------------------


def test_the_curve_is_that_of_plain_ablations(llama, pairs, log_odds):
    parts = ["L0.H1", "L2.MLP", "L1.H0"]
    found = fragility(llama, parts, pairs, log_odds, sizes=[1, 3], strengths=[0.5, 1.0], n_random=2, **QUIET)
    assert found.before.tolist() == pytest.approx(log_odds.scores(llama, pairs.harmful).tolist(), abs=1e-5)
    for s, strength in enumerate((0.5, 1.0)):
        for k, size in enumerate((1, 3)):
            for r, ranking in enumerate([parts, *(matched_ranking(llama, parts, seed) for seed in range(2))]):
                unedited = llama.logits(pairs.harmless).log_softmax(-1)
                with ms.ablate(llama, ranking[:size], strength, prompts=pairs.harmless):
                    scores = log_odds.scores(llama, pairs.harmful)
                    edited = llama.logits(pairs.harmless).log_softmax(-1)
                kl = (unedited.exp() * (unedited - edited)).sum(-1)
                own, other = (
                    (found.after, found.kl) if r == 0 else (found.random[:, :, r - 1], found.random_kl[:, :, r - 1])
                )
                assert own[s, k].tolist() == pytest.approx(scores.tolist(), abs=1e-4)
                assert other[s, k].tolist() == pytest.approx(kl.tolist(), abs=1e-5)
    assert not llama.edited
    frame = found.to_dataframe()
    assert len(frame) == 4 and frame.lost[3] == pytest.approx(float(found.lost[1, 1]))
    assert frame.p_value.between(1 / 3, 1).all() and frame.refuses.isna().all()


def test_planted_parts_are_fragile_and_random_ones_are_not(backed_up, tmp_path):
    _, model, pairs, metric = backed_up
    options = ms.MapOptions(limit=8, n_random=19, n_resamples=0, level="neuron")
    circuit = ms.map_refusal_circuit(model, pairs, options=options, **QUIET)
    found = fragility(model, circuit, pairs, metric, n_random=5, replies=True, reply_tokens=8, **QUIET)
    order = [member.node for member in sorted(circuit.nodes, key=lambda m: (-m.effect, m.node.order))]
    assert list(found.parts) == order and found.sizes[-1] == len(order)
    value, (low, high) = found.area()
    assert low <= value <= high and value > 0.3, "the planted parts carry the refusal"
    assert found.lost[-1, -1] > 0.8 > 0.3 > found.random_lost[-1, -1].max()
    half, (first, last) = found.half()
    assert half is not None and (first or 0) <= half <= (last or 99)
    assert found.kinds[0].share("refuses") == 1.0 and found.kinds[-1].share("refuses") == 0.0
    assert found.random_kinds[-1].share("refuses") == 1.0
    assert "half of the refusals is lost after" in repr(found)
    frame = found.to_dataframe()
    assert frame.refuses.iloc[-1] == 0.0 and frame.random_refuses.iloc[-1] == 1.0
    assert len(found.plot().data) >= 6 and found.overlaps == (0.0,) * len(found.sizes)
    # of four MLPs the circuit holds more than half, so that no set of as many others exists
    whole = fragility(model, [Node("mlp", layer) for layer in range(4)], pairs, metric, n_random=2, **QUIET)
    assert whole.overlaps[-1] == 1.0 and whole.to_dataframe().random_overlap.iloc[-1] == 1.0
    again = FragilityCurve.load(found.save(tmp_path / "curve"))
    assert repr(again) == repr(found) and again.parts == found.parts


def test_area_and_half_by_hand():
    """Gap 4: parts lose 0, 2 and 4, random parts nothing; half of the gap is lost at the second size."""
    before, after = torch.full((6,), 3.0), torch.tensor([3.0, 1.0, -1.0])[:, None].expand(3, 6)
    curve = FragilityCurve(
        _provenance(),
        {},
        tuple(Node("head", 0, k) for k in range(4)),
        (1, 2, 4),
        (1.0,),
        before,
        torch.full((6,), -1.0),
        after[None],
        before.expand(1, 3, 2, 6),
        (0.0,) * 3,
        torch.zeros(1, 3, 6),
        torch.zeros(1, 3, 2, 6),
    )
    assert curve.gap == 4.0 and curve.lost[0].tolist() == [0.0, 0.5, 1.0]
    # trapezoids over 0, 1/4, 1/2 and 1: 0, 1/16 and 3/8
    assert curve.area()[0] == pytest.approx(0.4375) and curve.half() == (2, (2, 2))
    never = replace(curve, after=before.expand(1, 3, 6))
    assert never.half() == (None, (None, None)) and "lost never" in repr(never) and never.area()[0] == 0.0
    kinds = [
        ("refuses",) * 6,
        ("refuses",) * 4 + ("answers",) * 2,
        ("refuses",) * 2 + ("degenerate",) * 4,
        ("answers",) * 6,
    ]
    said = replace(curve, kinds=tuple(ReplyKinds(k, torch.zeros(6), 9.0) for k in kinds))
    assert said.half()[0] == 2 and "half of the refusals" in repr(said)
    # nothing to lose is not lost, whatever the sign of the gap
    answered = tuple(ReplyKinds(("answers",) * 6, torch.zeros(6), 9.0) for _ in range(4))
    assert replace(curve, kinds=answered).half() == (None, (None, None))
    turned = replace(curve, before=-before, before_harmless=torch.full((6,), 1.0), after=-after[None])
    assert turned.gap == -4.0 and turned.half() == (2, (2, 2))
    unmoved = replace(turned, after=-before.expand(1, 3, 6))
    assert unmoved.half() == (None, (None, None))


def _provenance():
    from mechsafety.results import Provenance

    return Provenance("tiny", "0" * 64, "float32", "cpu", "0" * 64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": ["L9.H0"]}, "L9.H0"),
        ({"parts": ["L0.H0", "L0.H0"]}, "given twice"),
        ({"sizes": [4]}, r"sizes \[4\]; expected numbers of parts from 1 to 2"),
        ({"sizes": []}, r"sizes \[\]"),
        ({"strengths": [0.0]}, r"strengths \[0.0\]; expected at least one, above 0"),
        ({"strengths": [1.5]}, "strength=1.5"),
        ({"n_random": 0}, "n_random"),
    ],
)
def test_bad_input_of_fragility(llama, pairs, log_odds, wrong, message):
    options = {"parts": ["L0.H1", "L1.H0"], "n_random": 1, **wrong}
    with pytest.raises(MechsafetyError, match=message):
        fragility(llama, options.pop("parts"), pairs, log_odds, **options, **QUIET)
    with ms.ablate(llama, "L0.H0", source="zero"), pytest.raises(MechsafetyError, match="edited"):
        fragility(llama, ["L0.H1"], pairs, log_odds, **QUIET)


# --- redundancy -----------------------------------------------------------------------------------------------------


def test_backups_are_redundant_and_take_over(backed_up, tmp_path):
    made, model, pairs, metric = backed_up
    backup, primary = next(iter(made.truth.backups))
    both = redundancy(model, [primary, backup], pairs, metric)
    more, (low, _) = both.redundancy()
    assert more > 0.2 and low > 0, "together they lose more than added up"
    runs = ms.patching.pair_runs(model, pairs)
    meter = ms.circuits.FaithfulnessMeter(model, runs, metric)
    joint = 1 - meter.without([[primary, backup]])[0]
    assert both.joint_share()[0] == pytest.approx(joint, abs=1e-4)
    singles = [1 - value for value in meter.without([[primary], [backup]])]
    assert both.summed_share()[0] == pytest.approx(sum(singles), abs=1e-4)
    # the direct effects of the unedited run are those of attribution by path patching into the logits
    paths = ms.path_patching(model, pairs, metric, senders=list(both.others), receivers="logits", mlp="freeze", **QUIET)
    assert both.direct.mean(1).tolist() == pytest.approx(paths.changes.double().mean(-1).flatten().tolist(), abs=1e-3)
    alone = redundancy(model, [primary], pairs, metric)
    frame = alone.to_dataframe()
    assert alone.joint.tolist() == pytest.approx(alone.single[0].tolist(), abs=1e-5) and alone.redundancy()[
        0
    ] == pytest.approx(0, abs=1e-5)
    assert list(frame.change) == sorted(frame.change, reverse=True) and frame.ci_low.le(frame.ci_high).all()
    assert "redundancy" in repr(both) and len(both.plot().data) == 1
    assert repr(Redundancy.load(both.save(tmp_path / "found.json"))) == repr(both)


def test_what_takes_over_writes_more(shared_model, pairs, log_odds):
    """In a run in which a head is patched, by whole forwards: the others' direct effects of that run."""
    model = shared_model("llama")
    found = redundancy(model, ["L0.H1"], pairs, log_odds)
    assert Node("head", 0, 1) not in found.others and len(found.others) == 14
    assert not torch.allclose(found.direct, found.direct_without)
    early = found.others.index(Node("head", 0, 0))
    # a head of the same layer computes the same, but what its change does to the logits depends on the rest
    assert found.direct_without[early].abs().sum() > 0


# --- concentration --------------------------------------------------------------------------------------------------


def test_concentration_by_definition():
    rng = np.random.default_rng(0)
    values = rng.normal(size=12)
    sizes = np.abs(values)
    found = concentration(values)
    pairwise = np.abs(sizes[:, None] - sizes[None]).sum() / (2 * len(sizes) ** 2 * sizes.mean())
    shares = sizes / sizes.sum()
    assert found.gini == pytest.approx(pairwise)
    assert found.effective == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    by_prompt = rng.normal(loc=np.array([5.0, 1.0, 1.0])[:, None], size=(3, 40))
    assert concentration(by_prompt) == concentration(by_prompt.mean(1)) and concentration(by_prompt).n == 3
    assert concentration([2.0]) == Concentration(1, 0.0, 1.0)
    for wrong in ([], [0.0, 0.0], [float("nan")], [[[1.0]]]):
        with pytest.raises(MechsafetyError, match="effects of shape"):
            concentration(wrong)


# --- entanglement ---------------------------------------------------------------------------------------------------


def test_what_ordinary_prompts_need(llama, pairs, tmp_path):
    found = entanglement(llama, ["L0.H1", "L1.N3", "L1.N4"], pairs.harmless, **QUIET)
    assert found.refusal == (Node("head", 0, 1), Node("mlp", 1)) and len(found.nodes) == 15
    plain = llama.logits(pairs.harmless)
    for node in (Node("head", 2, 3), Node("mlp", 0)):
        with ms.ablate(llama, node, prompts=pairs.harmless):
            kl = ms.circuits.verification.side_effects.next_token_kl(plain, llama.logits(pairs.harmless))
        assert found.needed[found.nodes.index(node)].tolist() == pytest.approx(kl.tolist(), abs=1e-5)
    frame = found.to_dataframe()
    assert frame.refusal.sum() == 2 and frame.most_needed.sum() == 2 and len(found.plot().data) >= 2
    assert repr(Entanglement.load(found.save(tmp_path / "found"))) == repr(found)
    with pytest.raises(MechsafetyError, match="1 prompts; expected at least 2"):
        entanglement(llama, ["L0.H1"], ["bake bread"], **QUIET)


def test_overlap_with_the_most_needed_and_its_p():
    nodes = head_and_mlp_nodes(3, 4)
    needed = torch.tensor([[10.0 - k] * 4 if node.kind == "head" else [0.1 * k] * 4 for k, node in enumerate(nodes)])
    heads = [node for node in nodes if node.kind == "head"]
    found = Entanglement(_provenance(), nodes, needed, (heads[0], heads[1], heads[7], Node("mlp", 2)))
    assert found.most_needed == tuple(sorted([*heads[:3], Node("mlp", 2)], key=lambda node: node.order))
    shared, expected, p = found.overlap()
    assert shared == 3 and expected == pytest.approx(9 / 12 + 1 / 3)
    draws = np.random.default_rng(0)
    simulated = hypergeom(12, 3, 3).rvs(200000, random_state=draws) + hypergeom(3, 1, 1).rvs(200000, random_state=draws)
    assert p == pytest.approx((simulated >= 3).mean(), abs=0.01)


# --- depth ----------------------------------------------------------------------------------------------------------


def test_depth_along_the_reply(shared_model, make_model, pairs, log_odds, tmp_path):
    model, base = shared_model("llama"), make_model("llama", seed=1)
    prompts = pairs.harmful[:2]
    found = refusal_depth(model, prompts, log_odds, base, opener="sure here", n_tokens=4, **QUIET)
    assert found.scores.shape[0] == len(found.opener) + 1
    assert found.scores[0].tolist() == pytest.approx(log_odds.scores(model, prompts).tolist(), abs=1e-5)
    ids = model.tokenizer("sure here", add_special_tokens=False).input_ids
    read = log_odds(model.reading(ids).logits(prompts))
    assert found.scores[-1].tolist() == pytest.approx(read.tolist(), abs=1e-5)
    # the first token's KL is that of the prompts' next token; later ones are of prompts with the reply's beginning
    one, other = (side.logits(prompts).log_softmax(-1) for side in (model, base))
    assert found.kl[0].tolist() == pytest.approx((one.exp() * (one - other)).sum(-1).tolist(), abs=1e-4)
    said = model.reply_ids(prompts, 4, progress=False)
    for k, prompt in enumerate(prompts):
        if len(said[k]) > 1:
            views = (side.reading(said[k][:1]).logits([prompt]).log_softmax(-1) for side in (model, base))
            one, other = views
            assert float(found.kl[1, k]) == pytest.approx(float((one.exp() * (one - other)).sum()), abs=1e-4)
    same = refusal_depth(model, prompts, log_odds, model, opener="sure", n_tokens=3, **QUIET)
    assert float(same.kl.nan_to_num().abs().max()) < 1e-6
    frame = found.to_dataframe()
    assert set(frame.measure) == {"metric after opener", "KL(aligned || base)"} and len(found.plot().data) >= 2
    assert repr(RefusalDepth.load(found.save(tmp_path / "depth"))) == repr(found)
    alone = refusal_depth(model, prompts, log_odds, opener="sure", **QUIET)
    assert alone.kl is None and alone.base is None and "KL" not in repr(alone)


def test_bad_input_of_depth(llama, pairs, log_odds, opened):
    with pytest.raises(MechsafetyError, match="an empty opener"):
        refusal_depth(llama, pairs.harmful, log_odds, opener="", **QUIET)
    model, own, metric = opened
    with pytest.raises(MechsafetyError, match="reads after the opener"):
        refusal_depth(model, own.harmful, metric, **QUIET)
