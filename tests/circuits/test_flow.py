"""Paths into and out of a circuit's nodes, against a plain model in which every slot reads a stream of its own."""

from dataclasses import replace

import pytest
import torch
from reference import PlainModel
from whole_forwards import patched_whole

import mechsafety as ms
from mechsafety.circuits.backups import knocked_out
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.flow import Flow
from mechsafety.nodes import EMBED, LOGITS, SLOTS, Node, head_and_mlp_nodes
from mechsafety.patching import pair_runs, path_patching
from mechsafety.patching.masks import Patch, patched_scores
from mechsafety.patching.receivers import reaches
from mechsafety.patching.senders import added_changes
from mechsafety.sites import SiteKind

EVERY = head_and_mlp_nodes(3, 4)
SOME = [Node("head", 0, 1), Node("mlp", 0), Node("head", 1, 2), Node("head", 1, 3), Node("mlp", 1), Node("head", 2, 0)]


def flow_of(model, runs, metric, nodes=EVERY):
    high, low = runs.scores(metric)
    return Flow(model, [runs], metric, nodes, float((high - low).mean()))


class Slow:
    """The same effects from whole runs of the plain model, pair by pair."""

    def __init__(self, model, hf, pairs, metric):
        self.plain, self.metric, self.model = PlainModel(hf), metric, model
        self.rows = [(model.tokenize([p.harmful]).ids[0], model.tokenize([p.harmless]).ids[0]) for p in pairs]
        self.clean = [(self.plain(a), self.plain(b)) for a, b in self.rows]
        self.gap = sum(float(metric(a[0]) - metric(b[0])) for a, b in self.clean) / len(self.rows)

    def change(self, k, sender):
        (_, here), (_, there) = self.clean[k]
        if sender == EMBED:
            return self.plain.embed(self.rows[k][1]) - self.plain.embed(self.rows[k][0])
        return there[sender.layer, sender.index] - here[sender.layer, sender.index]

    def effect(self, forks_of):
        lost = 0.0
        for k, (a, _) in enumerate(self.rows):
            changed, _ = self.plain(a, forks_of(k))
            lost += float(self.metric(self.clean[k][0][0]) - self.metric(changed)) / len(self.rows)
        return lost / self.gap


def slots_of(node):
    return [(slot, node.layer, node.index) for slot in SLOTS[node.kind]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_paths_into_a_node_and_out_of_it(kind, shared_model, make_hf_model, pairs, logit_difference):
    model = shared_model(kind)
    slow = Slow(model, make_hf_model(kind), pairs, logit_difference)
    flow = flow_of(model, pair_runs(model, pairs), logit_difference)
    into, out = flow.into(EVERY, [EMBED, *SOME]), flow.out_of(EVERY, SOME)
    parallel = model.parallel
    for node in EVERY:
        senders = [one for one in (EMBED, *SOME) if reaches(one, node, parallel=parallel)]

        def read(k, node=node, senders=senders):
            total = torch.stack([slow.change(k, one) for one in senders]).sum(0)
            return dict.fromkeys(slots_of(node), total)

        assert into[node] == pytest.approx(slow.effect(read), abs=2e-3), node
        receivers = [one for one in SOME if reaches(node, one, parallel=parallel)]

        def sent(k, node=node, receivers=receivers):
            return {slot: slow.change(k, node) for one in receivers for slot in slots_of(one)}

        assert out[node] == pytest.approx(slow.effect(sent), abs=2e-3), node
    direct, together = flow.direct(EVERY), flow.out_of(SOME, [*SOME, LOGITS])
    assert flow.out_of(EVERY, [LOGITS]) == pytest.approx(direct, abs=2e-3)
    for node in EVERY:
        logits = slow.effect(lambda k, node=node: {("logits", None, None): slow.change(k, node)})
        assert direct[node] == pytest.approx(logits, abs=2e-3)
        if node in SOME:  # together is not the sum of both

            def everywhere(k, node=node):
                receivers = [one for one in SOME if reaches(node, one, parallel=parallel)]
                slots = [slot for one in receivers for slot in slots_of(one)]
                return dict.fromkeys([*slots, ("logits", None, None)], slow.change(k, node))

            assert together[node] == pytest.approx(slow.effect(everywhere), abs=2e-3), node
    assert max(map(abs, out.values())) > 0.02 and max(map(abs, into.values())) > 0.02


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_all_paths_into_a_node_are_the_node(kind, shared_model, pairs, log_odds):
    """Embeddings and nodes are all that differs, so that with all of them exchanged the node has its harmless value."""
    model = shared_model(kind)
    flow = flow_of(model, pair_runs(model, pairs), log_odds)
    every, alone = flow.into(EVERY, [EMBED, *EVERY]), flow.effects(EVERY)
    for node in EVERY:
        assert every[node] == pytest.approx(alone[node], abs=2e-3)
    prompt = flow.from_prompt(EVERY, alone)
    assert prompt == flow.into(EVERY, [EMBED]) and prompt[EVERY[0]] == pytest.approx(alone[EVERY[0]], abs=2e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_all_paths_out_of_a_node_are_the_node(kind, shared_model, pairs, log_odds):
    """To everything at once, it is as if the node itself were patched; in a circuit as well."""
    model = shared_model(kind)
    runs = pair_runs(model, pairs)
    flow = flow_of(model, runs, log_odds)
    assert flow.out_of(EVERY, [*EVERY, LOGITS]) == pytest.approx(flow.effects(EVERY), abs=2e-3)
    gone = knocked_out(model, runs, [node for node in EVERY if node not in SOME])
    inside = Flow(model, [gone], log_odds, SOME, flow.gap)
    assert inside.out_of(SOME, [*SOME, LOGITS]) == pytest.approx(inside.effects(SOME), abs=2e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_some_neurons_of_an_mlp_together_are_the_mlp_with_the_others_patched(kind, shared_model, pairs, log_odds):
    """A circuit too large to measure each neuron is measured so, see `wire`."""
    model = shared_model(kind)
    runs = pair_runs(model, pairs, extra=[SiteKind.NEURONS])
    mlps = [Node("mlp", layer) for layer in (0, 2)]
    inside = [Node("neuron", mlp.layer, index) for mlp in mlps for index in range(0, model.d_mlp, 3)]
    others = [Node("neuron", mlp.layer, index) for mlp in mlps for index in range(model.d_mlp)]
    gone = knocked_out(model, runs, [*(node for node in others if node not in inside), Node("head", 1, 1)])
    flow = flow_of(model, gone, log_odds)
    heads = [Node("head", 1, 0), Node("head", 1, 2)]
    for mlp in mlps:
        own = [node for node in inside if node.home == mlp]
        together = flow.out_of(heads, own), flow.into(heads, own)
        assert flow.out_of(heads, [mlp]) == pytest.approx(together[0], abs=2e-4)
        assert flow.into(heads, [mlp]) == pytest.approx(together[1], abs=2e-4)
        high, _ = gone.scores(log_odds)
        patch = Patch.of(model, [own])
        lost = high - patched_scores(model, gone.harmful, gone.harmless.acts, patch, log_odds)[0]
        assert flow.effects([mlp])[mlp] == pytest.approx(float(lost.mean()) / flow.gap, abs=2e-4)
        assert abs(flow.effects([mlp])[mlp]) > 1e-3


def test_in_a_circuit_nothing_else_differs(llama, pairs, log_odds):
    runs = pair_runs(llama, pairs, extra=[SiteKind.NEURONS])
    outside = [node for node in EVERY if node not in SOME]
    high, low = runs.scores(log_odds)
    flow = Flow(llama, [knocked_out(llama, runs, outside)], log_odds, SOME, float((high - low).mean()))
    meter = FaithfulnessMeter(llama, runs, log_odds)
    (whole,) = meter.faithfulness([SOME])
    tokens = llama.tokenize_pairs(pairs)
    for node, effect in flow.effects(SOME).items():
        (without,) = meter.faithfulness([[one for one in SOME if one != node]])
        assert effect == pytest.approx(whole - without, abs=1e-3)
        slow = log_odds(patched_whole(llama, tokens.harmful, tokens.harmless, [*outside, node])).mean()
        kept = log_odds(patched_whole(llama, tokens.harmful, tokens.harmless, outside)).mean()
        assert effect == pytest.approx(float(kept - slow) / flow.gap, abs=1e-3)
    every, alone = flow.into(SOME, [EMBED, *SOME]), flow.effects(SOME)
    assert every == pytest.approx(alone, abs=2e-3)


def test_groups_of_pairs_and_batches_change_nothing(llama, pairs, log_odds):
    whole = flow_of(llama, pair_runs(llama, pairs), log_odds)
    tokens = llama.tokenize_pairs(pairs)
    halves = [
        pair_runs(llama, tokens.rows(slice(0, 2)), max_batch_tokens=1),
        pair_runs(llama, tokens.rows(slice(2, None))),
    ]
    parted = Flow(llama, halves, log_odds, EVERY, whole.gap)
    both = replace(parted, whole=whole.groups[0])
    for name in ("into", "out_of"):
        one, *others = (getattr(flow, name)(EVERY, SOME) for flow in (whole, parted, both))
        assert all(one == pytest.approx(other, abs=1e-4) for other in others)
    assert whole.direct(EVERY) == pytest.approx(parted.direct(EVERY), abs=1e-4)
    assert whole.into([], SOME) == whole.out_of([], SOME) == {}
    assert whole.into(SOME, []) == dict.fromkeys(SOME, 0.0)


def test_few_nodes_are_measured_on_all_pairs_at_once(llama, pairs, log_odds, monkeypatch):
    """A small batch takes as long as a larger one; nodes that fill a batch are measured in groups of less to run."""
    runs = pair_runs(llama, pairs)
    halves = [pair_runs(llama, llama.tokenize_pairs(pairs).rows(rows)) for rows in (slice(0, 2), slice(2, None))]
    flow = Flow(llama, halves, log_odds, EVERY, 1.0, whole=runs)
    asked = []
    monkeypatch.setattr(Flow, "_sent", lambda self, of, senders, receivers: asked.append(len(of.harmful)) or iter(()))
    monkeypatch.setattr(Flow, "_lost", lambda self, groups, nodes, run: [list(run(of)) for of in groups] and nodes)
    monkeypatch.setattr(Flow, "_shares", lambda self, nodes, changes: {})
    cells = len(pairs) * runs.harmful.n_pos
    monkeypatch.setattr("mechsafety.circuits.faithfulness.SMALL_BATCH", 2 * cells)
    flow.out_of(SOME[:2], SOME)
    flow.out_of(SOME[:3], SOME)
    assert asked == [len(pairs), 2, len(pairs) - 2]


def test_who_repeats_whom(planted, log_odds):
    """By hand: cosine of what a node writes and what it reads of another, attention taken into account."""
    model, pairs = planted
    runs = pair_runs(model, pairs)
    flow = flow_of(model, runs, log_odds)
    node, sender = Node("head", 2, 0), Node("mlp", 1)
    wrote, written = added_changes(model, runs.harmful, runs.harmless, [node, sender])
    pattern = model.cache(runs.harmful.tokens, ["pattern"]).pattern[2, 0][:, runs.start :, runs.start :]
    read = pattern @ written
    cosine = float((read * wrote).sum() / (read.norm() * wrote.norm()))
    near, far = (flow.repeated([node, sender], cosine + gap) for gap in (-1e-3, 1e-3))
    assert sender in near[node] and sender not in far[node]
    assert node not in flow.repeated([sender], -1.0)[sender], "what comes later is not read"
    assert flow.repeated([], 0.7) == {}


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_neurons_send_and_receive(kind, shared_model, pairs, log_odds):
    """All neurons of an MLP together are the MLP, as senders; into one neuron all paths are the neuron."""
    model = shared_model(kind)
    runs = pair_runs(model, pairs, extra=[SiteKind.NEURONS])
    neurons = [Node("neuron", 1, index) for index in range(model.d_mlp)]
    some, late = neurons[:3], [Node("head", 2, 0), Node("head", 2, 3), Node("mlp", 2)]
    flow = flow_of(model, runs, log_odds, [*EVERY, *neurons])
    whole, parts = flow.into(late, [Node("mlp", 1)]), flow.into(late, neurons)
    assert parts == pytest.approx(whole, abs=2e-3)
    every, alone = flow.into(some, [EMBED, *EVERY]), flow_of(model, runs, log_odds, some).effects(some)
    assert every == pytest.approx(alone, abs=2e-3)


def test_one_neurons_path_is_path_patching(llama, pairs, log_odds):
    runs = pair_runs(llama, pairs, extra=[SiteKind.NEURONS])
    some, end = [Node("neuron", 1, index) for index in (0, 7)], Node("mlp", 2)
    flow = flow_of(llama, runs, log_odds, [*EVERY, *some])
    options = {"senders": some, "receivers": [(end, "mlp")], "mlp": "freeze", "progress": False}
    known = path_patching(llama, runs, log_odds, **options).changes[:, 0].mean(1) / flow.gap
    assert list(flow.out_of(some, [end]).values()) == pytest.approx(known.tolist(), abs=1e-4)


def test_each_receiver_may_have_senders_of_its_own(llama, pairs, log_odds):
    flow = flow_of(llama, pair_runs(llama, pairs), log_odds)
    of = {Node("head", 2, 0): [Node("mlp", 1)], Node("mlp", 2): SOME, Node("head", 1, 1): []}
    found = flow.into(list(of), of)
    for node, senders in of.items():
        assert found[node] == pytest.approx(flow.into([node], senders)[node], abs=1e-5)


def test_at_the_suffix_the_prompt_is_read_by_attention(planted, log_odds):
    """The embeddings of an aligned suffix are the same, and what no node there wrote was read from the instruction."""
    model, pairs = planted
    metric = ms.RefusalLogOdds.of(model, ["sorry"], ["sure"])
    loose = ms.PromptPairs(pairs.pairs, "loose", align="suffix")
    runs = pair_runs(model, loose)
    flow = flow_of(model, runs, metric)
    whole, written = flow.effects(EVERY), flow.into(EVERY, EVERY)
    prompt = flow.from_prompt(EVERY, whole)
    assert flow.into(EVERY, [EMBED]) == pytest.approx(dict.fromkeys(EVERY, 0.0), abs=1e-6)
    assert prompt == pytest.approx({node: whole[node] - written[node] for node in EVERY}, abs=1e-6)
    assert max(map(abs, prompt.values())) > 0.1


def test_effects_of_a_span(llama, pairs, log_odds):
    """And no complaint about a group of pairs whose gap in the circuit is 0 or negative: the whole gap counts."""
    runs = pair_runs(llama, pairs)
    flow = Flow(llama, [runs], log_odds, SOME, 2.0)
    for span in ("instruction", "suffix", "all"):
        known = ms.activation_patching(llama, runs, log_odds, nodes=SOME, positions=span, progress=False).changes
        assert [flow.effects(SOME, span)[node] for node in SOME] == pytest.approx(
            (known.mean(1) / 2.0).tolist(), abs=1e-5
        )
    nothing = knocked_out(llama, runs, EVERY)
    assert float((nothing.scores(log_odds)[0] - nothing.scores(log_odds)[1]).abs().max()) < 1e-4
    still = Flow(llama, [nothing], log_odds, SOME, 2.0)
    assert still.effects(SOME) == pytest.approx(dict.fromkeys(SOME, 0.0), abs=1e-4)
