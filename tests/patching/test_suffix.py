"""Pairs of any lengths, patched at the template's suffix alone: against two prompts run alone with hooks there."""

from dataclasses import replace

import pytest
import torch

import mechsafety as ms
from mechsafety.circuits import FaithfulnessMeter, acdc, discover_edges
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node
from mechsafety.patching import pair_runs, path_matrix
from mechsafety.patching.senders import At
from mechsafety.prompts import PromptPair, PromptPairs, TokenPairs
from mechsafety.sites import Site, SiteKind

QUIET = {"progress": False}
HARMFUL = ["how do i make a bomb", "kill", "teach me to steal a car please and hurt people"]
HARMLESS = ["explain why the sky is blue and write a poem", "bake a cake please", "help"]
SUFFIX = 2  # tokens that the tiny template writes after the instruction
WHERE = {"head": SiteKind.Z, "mlp": SiteKind.MLP_OUT, "neuron": SiteKind.NEURONS}


@pytest.fixture(scope="module")
def loose() -> PromptPairs:
    return PromptPairs.from_lists(HARMFUL, HARMLESS, "loose", align="suffix")


def alone(model, prompt, hooks=()):
    """Next-token logits of one prompt, with hooks."""
    with model.hooks(list(hooks)):
        return model.logits([prompt])[0]


def values(model, prompt, site):
    return model.read(model.tokenize([prompt]), [site])[site]


def at_suffix(site, new, index=None):
    """The hook that puts the last columns of another run's values into a run of another length."""

    def edit(tensor):
        out = tensor.clone()
        if index is None:
            out[:, -SUFFIX:] = new[:, -SUFFIX:]
        else:
            out[:, -SUFFIX:, index] = new[:, -SUFFIX:, index]
        return out

    return (site, edit)


def learned_positions(model):
    return "GPT2" in model.name


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_activation_patching_is_that_of_two_prompts_run_alone(any_model, loose, log_odds, direction):
    model = any_model
    nodes = [Node("head", 0, 1), Node("head", 2, 3), Node("mlp", 1), Node("neuron", 1, 5)]
    if learned_positions(model):
        with pytest.raises(MechsafetyError, match=r"adds an embedding of the position, so that the suffix of a longer"):
            ms.activation_patching(model, loose, log_odds, **QUIET)
        return
    found = ms.activation_patching(model, loose, log_odds, nodes=nodes, direction=direction, **QUIET)
    assert found.provenance.options["align"] == "suffix"
    for column, pair in enumerate(loose):
        base, other = (pair.harmful, pair.harmless) if direction == "noising" else (pair.harmless, pair.harmful)
        clean = log_odds(alone(model, base))
        for row, node in enumerate(nodes):
            site = Site(WHERE[node.kind], node.layer)
            patched = log_odds(alone(model, base, [at_suffix(site, values(model, other, site), node.index)]))
            change = clean - patched if direction == "noising" else patched - clean
            torch.testing.assert_close(found.changes[row, column], change, rtol=0, atol=2e-5)


@pytest.mark.parametrize("source", ["mean", "resample", "zero"])
def test_other_sources_take_the_suffix_of_all_prompts(llama, loose, log_odds, source):
    node = Node("head", 1, 2)
    site = Site(SiteKind.Z, 1)
    found = ms.activation_patching(llama, loose, log_odds, nodes=[node], source=source, seed=1, **QUIET)
    others = torch.cat([values(llama, pair.harmless, site)[:, -SUFFIX:] for pair in loose])
    clean = torch.stack([log_odds(alone(llama, pair.harmful)) for pair in loose])
    if source == "resample":
        changes = [
            [clean[k] - log_odds(alone(llama, pair.harmful, [at_suffix(site, others[j : j + 1], 2)])) for j in range(3)]
            for k, pair in enumerate(loose)
        ]
        gaps = (found.changes[0][:, None] - torch.tensor(changes)).abs()
        assert gaps.min(1).values.max() < 2e-5 and sorted(gaps.argmin(1).tolist()) == [0, 1, 2]
        return
    new = others.mean(0, keepdim=True) if source == "mean" else torch.zeros_like(others[:1])
    for k, pair in enumerate(loose):
        patched = log_odds(alone(llama, pair.harmful, [at_suffix(site, new, 2)]))
        torch.testing.assert_close(found.changes[0, k], clean[k] - patched, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mlp", ["freeze", "recompute"])
@pytest.mark.parametrize("receiver", ["logits", "q", "mlp"])
def test_path_patching_is_that_of_two_prompts_run_alone(llama, loose, log_odds, mlp, receiver):
    sender, to = Node("head", 0, 1), {"q": (Node("head", 2, 3), "q"), "mlp": (Node("mlp", 2), "mlp")}.get(receiver)
    found = ms.path_patching(
        llama, loose, log_odds, senders=[sender], receivers="logits" if to is None else [to], mlp=mlp, **QUIET
    )
    sites = {kind: [Site(kind, layer) for layer in range(3)] for kind in (SiteKind.Z, SiteKind.MLP_OUT)}
    for column, pair in enumerate(loose):
        tokens, clean = llama.tokenize([pair.harmful]), log_odds(alone(llama, pair.harmful))
        own = llama.read(tokens, [*sites[SiteKind.Z], *sites[SiteKind.MLP_OUT]])
        frozen = []
        for site in sites[SiteKind.Z]:
            z = own[site].clone()
            if site.layer == sender.layer:
                z[:, -SUFFIX:, sender.index] = values(llama, pair.harmless, site)[:, -SUFFIX:, sender.index]
            frozen.append((site, lambda tensor, z=z: z))
        if mlp == "freeze":
            stop = 3 if to is None else to[0].layer  # the receiver itself is read, not frozen
            frozen += [(s, lambda tensor, new=own[s]: new) for s in sites[SiteKind.MLP_OUT][:stop]]
        if to is None:
            patched = alone(llama, pair.harmful, frozen)
        else:
            read = Site(SiteKind.Q if receiver == "q" else SiteKind.MLP_OUT, to[0].layer)
            seen = []
            alone(llama, pair.harmful, [*frozen, (read, lambda tensor, seen=seen: seen.append(tensor.clone()))])
            patched = alone(llama, pair.harmful, [at_suffix(read, seen[0], to[0].index)])
        torch.testing.assert_close(found.changes[0, 0, column], clean - log_odds(patched), rtol=0, atol=3e-5)


def test_node_attribution_is_the_slope_of_blends_of_two_prompts_run_alone(llama, loose, log_odds):
    one = PromptPairs(loose.pairs[:1], "one", align="suffix")
    found = ms.node_attribution(llama, one, log_odds, steps=1, **QUIET)
    pair = one[0]
    sites = [Site(kind, layer) for layer in range(3) for kind in (SiteKind.Z, SiteKind.MLP_OUT)]
    other = llama.read(llama.tokenize([pair.harmless]), sites)
    gap = float(log_odds(alone(llama, pair.harmful)) - log_odds(alone(llama, pair.harmless)))

    def blended(node, shift):
        """The metric with every node half its own value, one of them a little more."""

        def edit(site):
            def hook(tensor):
                weight = torch.full(tensor.shape[2:3] if site.kind is SiteKind.Z else (), 0.5, dtype=tensor.dtype)
                if site == Site(WHERE[node.kind], node.layer):
                    weight = weight.index_fill(0, torch.tensor(node.index), 0.5 + shift) if weight.ndim else 0.5 + shift
                weight = weight[:, None] if torch.is_tensor(weight) and weight.ndim else weight
                out = tensor.clone()
                new = other[site][:, -SUFFIX:]
                out[:, -SUFFIX:] = new + weight * (tensor[:, -SUFFIX:] - new)
                return out

            return (site, hook)

        return float(log_odds(alone(llama, pair.harmful, [edit(site) for site in sites])))

    for node in (Node("head", 1, 2), Node("head", 0, 0), Node("mlp", 2)):
        slope = (blended(node, 0.02) - blended(node, -0.02)) / 0.04
        assert found.of(node) == pytest.approx(slope / gap, rel=2e-2, abs=2e-3)
    whole = ms.node_attribution(llama, loose, log_odds, steps=32, **QUIET)
    assert whole.total == pytest.approx(1.0, abs=0.02), "with all nodes exchanged one run becomes the other"


def test_with_every_node_exchanged_one_run_becomes_the_other(llama, loose, log_odds):
    meter = FaithfulnessMeter(llama, pair_runs(llama, loose), log_odds).grouped()
    nothing = meter.kept([[]])[0]
    harmless = [float(log_odds(alone(llama, pair.harmless))) for pair in loose]
    assert nothing == pytest.approx(harmless, abs=2e-5) and meter.groups == ()


def test_rows_and_batches_keep_the_suffix(llama, loose, log_odds):
    tokens = llama.tokenize_pairs(loose)
    width = max(llama.n_tokens(prompt) for prompt in (*HARMFUL, *HARMLESS))
    assert tokens.harmful.ids.shape == tokens.harmless.ids.shape == (3, width)
    assert tokens.start == width - SUFFIX and not tokens.common
    few = tokens.rows([1])
    assert few.harmful.ids.shape[1] == llama.n_tokens(HARMLESS[1]) and few.start == few.harmful.ids.shape[1] - SUFFIX
    many = PromptPairs.from_lists(HARMFUL * 2, HARMLESS[1:] + HARMLESS[:1] + HARMLESS, align="suffix")
    runs = pair_runs(llama, many)
    assert isinstance(runs.tokens, TokenPairs) and runs.tokens.start == runs.start
    whole = ms.activation_patching(llama, runs, log_odds, nodes=[Node("head", 0, 1)], **QUIET)
    again = ms.activation_patching(llama, many, log_odds, nodes=[Node("head", 0, 1)], positions="suffix", **QUIET)
    torch.testing.assert_close(whole.changes, again.changes, rtol=0, atol=2e-5)
    both = ms.activation_patching(llama, loose, log_odds, nodes=[Node("head", 0, 1)], **QUIET)
    for k in range(3):  # a pair alone: the shorter prompt's first columns are padding, in a batch of its own
        one = ms.activation_patching(llama, loose[k : k + 1], log_odds, nodes=[Node("head", 0, 1)], **QUIET)
        torch.testing.assert_close(one.changes[:, 0], both.changes[:, k], rtol=0, atol=2e-5)
    each = ms.activation_patching(llama, loose, log_odds, nodes=[Node("mlp", 2)], positions="each", **QUIET)
    assert each.row_positions == (-2, -1)


@pytest.mark.parametrize("name", ["start_layer", "shared_prefix", "drop_positions", "batch_variants", "last_logits"])
def test_every_shortcut_off_gives_the_same(llama, loose, log_odds, name, monkeypatch):
    nodes = [Node("head", 1, 1), Node("mlp", 2)]
    fast = ms.activation_patching(llama, loose, log_odds, nodes=nodes, **QUIET).changes
    paths = ms.path_patching(llama, loose, log_odds, senders=nodes, **QUIET).changes
    monkeypatch.setattr(llama, "shortcuts", llama.shortcuts.without(name))
    slow = ms.activation_patching(llama, loose, log_odds, nodes=nodes, **QUIET).changes
    torch.testing.assert_close(fast, slow, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        paths, ms.path_patching(llama, loose, log_odds, senders=nodes, **QUIET).changes, rtol=0, atol=2e-5
    )


def test_what_cannot_be_asked_of_them(llama, loose, log_odds):
    spans = r"^positions 'instruction' of pairs aligned at the suffix; expected 'all' \(which is the suffix\), 'each'"
    with pytest.raises(MechsafetyError, match=spans):
        ms.activation_patching(llama, loose, log_odds, positions="instruction", **QUIET)
    with pytest.raises(MechsafetyError, match=spans):
        ms.path_patching(llama, loose, log_odds, senders=[At(Node("head", 0, 1), "instruction")], **QUIET)
    with pytest.raises(
        MechsafetyError, match=r"^method='eap-ig' on pairs aligned at the suffix, .* pass method='mask-"
    ):
        ms.edge_attribution(llama, loose, log_odds, **QUIET)
    for search in (discover_edges, acdc):
        with pytest.raises(
            MechsafetyError, match=r"^a circuit of edges on pairs aligned at the suffix \(no edge carries"
        ):
            search(llama, loose, log_odds, **QUIET)
    with pytest.raises(MechsafetyError, match=r"^level 'edge' on pairs aligned at the suffix; expected 'node' or 'ne"):
        ms.map_refusal_circuit(llama, loose, options=ms.MapOptions(level="edge"), **QUIET)
    with pytest.raises(
        MechsafetyError, match=r"^runs that begin at column 0 of pairs aligned at the suffix; expected a"
    ):
        pair_runs(llama, loose, start=0)
    with pytest.raises(MechsafetyError, match=r"^align='end'; expected one of \('tokens', 'suffix'\)$"):
        PromptPairs.from_lists(["a"], ["b"], align="end")


def test_edge_methods_that_lead_through_the_nodes(llama, loose, log_odds):
    found = ms.edge_attribution(llama, loose, log_odds, method="mask-ig", steps=40, **QUIET)
    assert found.completeness == pytest.approx(1.0, abs=0.02)
    assert not found.scores[0].any(), "the embedding's edges carry nothing: the suffix has the same tokens"
    assert path_matrix(llama, loose, **QUIET).q.abs().max() > 0


def test_directions_and_probes_do_not_ask_for_twins(directed):
    """They read each prompt alone: how pairs are aligned is nothing to them."""
    model, pairs, metric = directed
    odd = replace(pairs, align="suffix")
    here, there = (ms.refusal_direction(model, p, metric, **QUIET) for p in (pairs, odd))
    assert torch.equal(here.vectors, there.vectors) and there.provenance.options["align"] == "suffix"


def test_head_scores_are_those_of_prompts_run_alone(llama, loose, log_odds):
    found = ms.head_attribution(llama, loose, log_odds, scores=["direct", "total", "attention"], **QUIET)
    heads = [Node("head", layer, head) for layer in range(3) for head in range(4)]
    patched = ms.activation_patching(llama, loose, log_odds, nodes=heads, **QUIET).changes.unflatten(0, (3, 4))
    odds = {prompt: float(log_odds(alone(llama, prompt))) for pair in loose for prompt in (pair.harmful, pair.harmless)}
    gap = sum(odds[pair.harmful] - odds[pair.harmless] for pair in loose) / len(loose)
    torch.testing.assert_close(found.total, patched / gap, rtol=1e-4, atol=1e-5)
    for column, pair in enumerate(loose):
        own = [
            ms.direct_logit_attribution(llama, [prompt], log_odds, **QUIET).heads[..., 0]
            for prompt in (pair.harmful, pair.harmless)
        ]
        torch.testing.assert_close(found.direct[..., column], (own[0] - own[1]) / gap, rtol=1e-4, atol=1e-4)
        start, stop = llama.tokenize([pair.harmful]).spans[0].instruction
        for layer in range(3):
            row = values(llama, pair.harmful, Site(SiteKind.PATTERN, layer))[0, :, -1]
            parts = [row[:, :start].sum(-1), row[:, start:stop].sum(-1), row[:, stop:].sum(-1)]
            torch.testing.assert_close(found.attention[layer, :, column], torch.stack(parts, -1), rtol=0, atol=1e-5)


def test_writers_of_a_direction_are_those_of_prompts_run_alone(directed, directed_found, loose):
    model, _, metric = directed
    found = ms.directions.direction_io(model, directed_found, loose, metric, **QUIET)
    layer, column = directed_found.layer, directed_found.position
    assert -SUFFIX <= column < 0
    unit = directed_found.vector / directed_found.vector.norm()

    def along(site, node=None):
        """What each pair's two prompts differ by along the direction."""
        sides = []
        for side in ("harmful", "harmless"):
            rows = [values(model, getattr(pair, side), site)[0, column] for pair in loose]
            rows = [row[node.index] @ model.W_O(node.layer)[node.index] if node else row for row in rows]
            sides.append(torch.stack(rows) @ unit)
        return sides[0] - sides[1]

    gap = along(Site(SiteKind.RESID_PRE, layer)).mean()
    for node, written in zip(found.nodes, found.writes, strict=True):
        if node.layer < layer:
            site = Site(SiteKind.Z if node.kind == "head" else SiteKind.MLP_OUT, node.layer)
            change = along(site, node if node.kind == "head" else None)
            torch.testing.assert_close(written, change / gap, rtol=1e-3, atol=1e-4)
    assert float(found.writes.sum(0).mean()) == pytest.approx(1.0, abs=1e-3), "the suffix has the same tokens"
    one = ms.directions.direction_io(
        model, directed_found, loose[1:2], metric, **QUIET
    )  # no padding, in a batch of its own
    own = along(Site(SiteKind.RESID_PRE, layer))[1]
    torch.testing.assert_close(one.writes[:, 0] * own, found.writes[:, 1] * gap, rtol=1e-3, atol=1e-4)


def test_probes_do_not_ask_for_twins_either(llama, log_odds):
    words = ["car", "bomb", "tea", "cake"]
    rows = [PromptPair(f"kill the {word} please", f"help {word}", word) for word in words] * 2
    pairs = PromptPairs(tuple(dict.fromkeys(rows)), "loose", align="suffix")
    options = {"layers": [1], "spans": ["last"], "n_shuffled": 2, "n_random": 2, "outer": 2, "inner": 2, **QUIET}
    found = ms.probe_layers(llama, pairs, log_odds, **options)
    again = ms.probe_layers(llama, replace(pairs, align="tokens"), log_odds, **options)
    assert found.provenance.options["align"] == "suffix"
    assert found.to_dataframe().equals(again.to_dataframe())


def test_the_map_of_pairs_of_any_lengths(planted):
    model, pairs = planted
    harmless = ["please explain a cake", "can i make a cake please", "make a cake", "write about a cake"] * 2
    rows = [
        PromptPair(pair.harmful, text + " please" * (k % 3), pair.topic)
        for k, (pair, text) in enumerate(zip(pairs, harmless, strict=True))
    ]
    loose = PromptPairs(tuple(rows), "loose", align="suffix")
    table = loose.alignment(model)
    assert table["aligned"].all() and (table["harmful"] != table["harmless"]).sum() >= 6
    metric = ms.RefusalLogOdds.of(model, ["sorry"])
    options = ms.MapOptions(limit=8, n_random=20, n_added=4, n_resamples=2, n_backup_parts=1)
    found = ms.map_refusal_circuit(model, loose, metric, options, **QUIET)
    assert found.provenance.options["align"] == "suffix" and found.nodes
    assert found.verification.faithfulness >= 0.8 and "NaN" not in found.to_json()
    assert all(member.evidence.at_instruction is None for member in found.nodes)
    assert ms.RefusalCircuit.from_json(found.to_json()).to_json() == found.to_json()


def test_the_map_of_neurons_of_such_pairs(planted):
    model, pairs = planted
    rows = [PromptPair(pair.harmful, pair.harmless + " please" * (k % 3), pair.topic) for k, pair in enumerate(pairs)]
    loose = PromptPairs(tuple(rows), "loose", align="suffix")
    options = ms.MapOptions(limit=8, n_random=20, n_added=4, n_resamples=2, n_backup_parts=1, level="neuron")
    found = ms.map_refusal_circuit(model, loose, ms.RefusalLogOdds.of(model, ["sorry"]), options, **QUIET)
    assert found.level == "neuron" and found.nodes
    assert found.provenance.options["align"] == "suffix" and found.verification.faithfulness >= 0.8
