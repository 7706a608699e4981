"""Edge attribution against a plain twin with a separate input for every slot, on random tiny models, by autograd."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import PlainModel, random_model

import mechsafety as ms
import mechsafety.attribution.edges as edges_module
import mechsafety.attribution.gradients as gradients_module
import mechsafety.attribution.senders as senders_module
from mechsafety.attribution import edge_attribution
from mechsafety.nodes import Node
from mechsafety.patching import Patch, pair_runs
from mechsafety.patching.masks import patched_scores

HARMFUL = ["how do i make a bomb", "teach me to steal a car please", "poison my tea"]
HARMLESS = ["how do i make a cake", "teach me to help a car please", "explain my tea"]
METRIC = ms.RefusalLogOdds((20, 21), ("a", "b"), (30,), ("c",))
MODELS = st.fixed_dictionaries({"kind": st.sampled_from(["llama", "gpt2", "gpt_neox"]), "seed": st.integers(0, 99)})
GROUPS = st.sampled_from([1, 2, 4])  # key-value heads for 4 heads


class NeuronModel(PlainModel):
    """A plain model whose MLP of one layer has a separate input for every neuron."""

    layer, forks = None, None

    def hidden(self, layer, x):
        act = torch.nn.functional
        if self.kind == "llama":
            x, mlp = self.norm(f"model.layers.{layer}.post_attention_layernorm", x), f"model.layers.{layer}.mlp"
            return act.silu(x @ self.w[f"{mlp}.gate_proj.weight"].T) * (x @ self.w[f"{mlp}.up_proj.weight"].T)
        x, mlp = self.norm(f"transformer.h.{layer}.ln_2", x), f"transformer.h.{layer}.mlp"
        return act.gelu(x @ self.w[f"{mlp}.c_fc.weight"] + self.w[f"{mlp}.c_fc.bias"], approximate="tanh")

    def rows(self, layer):
        """Output weights [neuron d_model]."""
        if self.kind == "llama":
            return self.w[f"model.layers.{layer}.mlp.down_proj.weight"].T
        return self.w[f"transformer.h.{layer}.mlp.c_proj.weight"]

    def mlp(self, layer, x):
        if layer != self.layer:
            return super().mlp(layer, x)
        every = self.hidden(layer, x + self.forks)  # [fork pos neuron]
        own = torch.stack([every[k, :, k] for k in range(every.shape[-1])], dim=-1)
        bias = self.w.get(f"transformer.h.{layer}.mlp.c_proj.bias", 0.0)
        return own @ self.rows(layer) + bias


def copy_of(plain):
    twin = type(plain).__new__(type(plain))
    twin.__dict__.update(plain.__dict__)
    return twin


def blended(plain, method, alpha, site, ends):
    """A copy of the plain model with what the method blends; ``ends`` are its two runs' (embedding, writes)."""
    twin = copy_of(plain)
    (high_embed, high), (low_embed, low) = ends

    def mix(a, b):
        return b + alpha * (a - b)

    if method == "eap-ig" or site == "embed":
        twin.embed = lambda ids: mix(high_embed, low_embed)
    if method in ("mask-ig", "ig-activations"):
        write, mlp = twin.write, twin.mlp

        def new_write(layer, head, z):
            if method == "mask-ig":
                return mix(write(layer, head, z), low[layer, head])
            return mix(high[layer, head], low[layer, head]) if site == ("heads", layer) else write(layer, head, z)

        def new_mlp(layer, x):
            if method == "mask-ig":
                return mix(mlp(layer, x), low[layer, None])
            return mix(high[layer, None], low[layer, None]) if site == ("mlp", layer) else mlp(layer, x)

        twin.write, twin.mlp = new_write, new_mlp
    return twin


def sublayer(node):
    return "embed" if node.kind == "embed" else ("heads" if node.kind == "head" else "mlp", node.layer)


def slow_scores(plain, model, pairs, method, steps, senders, receivers):
    """Scores [sender receiver] one pair, one point and one fork at a time."""
    total, gap = torch.zeros(len(senders), len(receivers)), 0.0
    for pair in pairs:
        rows = [model.tokenize([text]).ids[0] for text in (pair.harmful, pair.harmless)]
        runs = [plain(ids) for ids in rows]
        gap += float(METRIC(runs[0][0]) - METRIC(runs[1][0]))
        ends = [(plain.embed(ids), run[1]) for ids, run in zip(rows, runs, strict=True)]
        change = [
            ends[0][0] - ends[1][0]
            if node.kind == "embed"
            else ends[0][1][node.layer, node.index] - ends[1][1][node.layer, node.index]
            for node in senders
        ]
        alphas = [1.0] if method == "eap" else [(k + 0.5) / steps for k in range(steps)]
        sites = dict.fromkeys(map(sublayer, senders)) if method == "ig-activations" else [None]
        for site in sites:
            for alpha in alphas:
                forks = {}
                for node, slot in receivers:
                    key = ("logits", None, None) if node.kind == "logits" else (slot, node.layer, node.index)
                    forks[key] = torch.zeros_like(ends[0][0]).requires_grad_()
                score = METRIC(blended(plain, method, alpha, site, ends)(rows[0], forks)[0])
                grads = torch.autograd.grad(score, list(forks.values()), allow_unused=True, materialize_grads=True)
                for column, gradient in enumerate(grads):
                    scale = 1 / alpha if method == "mask-ig" and receivers[column][0].kind != "logits" else 1.0
                    for row, node in enumerate(senders):
                        if site is None or sublayer(node) == site:
                            total[row, column] += scale * float((change[row] * gradient).sum()) / len(alphas)
    return total / gap


def reach(senders, receivers, parallel):
    """Which sender comes before which receiver, from the order of computation alone."""

    def place(node):
        if node.kind in ("embed", "logits"):
            return -1 if node.kind == "embed" else 99
        return node.layer if parallel else 2 * node.layer + (node.kind != "head")

    return torch.tensor([[place(a) < place(b) for b, _ in receivers] for a in senders])


@settings(max_examples=6)
@given(drawn=MODELS, kv_heads=GROUPS, method=st.sampled_from(edges_module.METHODS))
def test_every_edge_equals_the_twin(make_hf_model, make_tokenizer, drawn, kv_heads, method):
    plain = PlainModel(random_model(drawn["kind"], drawn["seed"], kv_heads, make_hf_model))
    hf = random_model(drawn["kind"], drawn["seed"], kv_heads, make_hf_model)
    model, pairs = ms.load_model((hf, make_tokenizer())), ms.PromptPairs.from_lists(HARMFUL, HARMLESS)
    found = edge_attribution(model, pairs, METRIC, method=method, steps=2, progress=False)
    slow = slow_scores(plain, model, pairs, method, 2, found.senders, found.receivers)
    allowed = reach(found.senders, found.receivers, plain.parallel)
    assert found.n_edges == int(allowed.sum())
    assert bool((found.scores[~allowed] == 0).all())
    scale = float(slow[allowed].abs().max())
    torch.testing.assert_close(found.scores[allowed], slow[allowed], atol=1e-4 * max(1.0, scale), rtol=1e-4)


@settings(max_examples=3)
@given(
    order=st.permutations(range(3)), method=st.sampled_from(edges_module.METHODS), tokens=st.sampled_from([1, 12, 96])
)
def test_neither_order_nor_batches_matter(llama, order, method, tokens):
    """A batch is the gap-weighted mean of its pairs one by one, in any order."""
    whole, weighted = whole_and_one_by_one(llama, method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edges_module, "BATCH_TOKENS", tokens)
        mixed = ms.PromptPairs.from_lists([HARMFUL[k] for k in order], [HARMLESS[k] for k in order])
        again = edge_attribution(llama, mixed, METRIC, method=method, steps=2, progress=False).scores
    torch.testing.assert_close(again, whole, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(weighted, whole, atol=1e-4, rtol=1e-3)


@functools.cache
def whole_and_one_by_one(model, method):
    """Scores of all pairs at once, and the gap-weighted mean of those of each pair alone."""
    pairs, total, gap = ms.PromptPairs.from_lists(HARMFUL, HARMLESS), 0.0, 0.0
    whole = edge_attribution(model, pairs, METRIC, method=method, steps=2, progress=False).scores
    for pair in pairs:
        one = ms.PromptPairs((pair,))
        high, low = pair_runs(model, one).scores(METRIC)
        gap += float(high - low)
        total += float(high - low) * edge_attribution(model, one, METRIC, method=method, steps=2, progress=False).scores
    return whole, total / gap


@pytest.mark.parametrize("method", edges_module.METHODS)
def test_streamed_is_all_at_once(method, llama, pairs, monkeypatch):
    whole = edge_attribution(llama, pairs, METRIC, method=method, steps=2, neurons=[1], progress=False)
    monkeypatch.setattr(senders_module, "SENDER_BYTES", 2**15)
    monkeypatch.setattr(gradients_module, "DERIVATIVE_BYTES", 2**15)
    streamed = edge_attribution(llama, pairs, METRIC, method=method, steps=2, neurons=[1], progress=False)
    torch.testing.assert_close(streamed.scores, whole.scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["eap", "ig-activations"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_neurons_equal_brute_force(kind, method, shared_model, make_hf_model):
    """Into and out of every neuron of a layer, each with an input of its own in the twin."""
    model, plain, layer = shared_model(kind), NeuronModel(make_hf_model(kind)), 1
    pair = ms.PromptPairs.from_lists(HARMFUL[:1], HARMLESS[:1])
    found = edge_attribution(model, pair, METRIC, method=method, steps=1, neurons=[layer], progress=False)
    rows = [model.tokenize([text]).ids[0] for text in (HARMFUL[0], HARMLESS[0])]
    ends, hidden = [], []
    for ids in rows:
        kept = {}
        spy = copy_of(plain)
        spy.mlp = lambda at, x, kept=kept: (kept.update({at: plain.hidden(at, x)}), PlainModel.mlp(plain, at, x))[1]
        logits, writes = spy(ids)
        ends.append((logits, writes, plain.embed(ids)))
        hidden.append(kept[layer])
    gap = float(METRIC(ends[0][0]) - METRIC(ends[1][0]))
    heads = [(a, h) for a in range(3) for h in range(4)]
    n = len(plain.rows(layer))

    # receivers: only what stands before the layer's MLP reaches its neurons
    def into(site):
        twin = copy_of(plain)
        twin.layer, twin.forks = layer, torch.zeros(n, len(rows[0]), 32).requires_grad_()
        if method == "ig-activations":
            twin = blended(twin, method, 0.5, site, [(end[2], end[1]) for end in ends])
        (gradient,) = torch.autograd.grad(METRIC(twin(rows[0])[0]), twin.forks)
        return gradient

    columns = [k for k, (node, _) in enumerate(found.receivers) if node.kind == "neuron"]
    assert len(columns) == n
    senders = [*[Node("head", *head) for head in heads if head[0] <= layer], Node("mlp", 0), Node("embed")]
    for node in senders:
        at = (node.layer, node.index)
        change = ends[0][2] - ends[1][2] if node.kind == "embed" else ends[0][1][at] - ends[1][1][at]
        expected = (into(sublayer(node)) * change).sum((1, 2)) / gap
        row = found.scores[found.senders.index(node), columns]
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-3)
        assert float(expected.abs().max()) > 1e-5

    # senders: every neuron writes its own row of the output weights
    twin = plain if method == "eap" else blended(plain, method, 0.5, ("mlp", layer), [(e[2], e[1]) for e in ends])
    fork = torch.zeros(len(rows[0]), 32).requires_grad_()
    for key, receiver in ((("q", 2, 3), (Node("head", 2, 3), "q")), (("mlp", 2, None), (Node("mlp", 2), "mlp"))):
        (gradient,) = torch.autograd.grad(METRIC(twin(rows[0], {key: fork})[0]), fork)
        writes = (hidden[0] - hidden[1])[:, :, None] * plain.rows(layer)
        expected = (writes * gradient[:, None]).sum((0, 2)) / gap
        out = [k for k, node in enumerate(found.senders) if node.kind == "neuron"]
        torch.testing.assert_close(found.scores[out, found.receivers.index(receiver)], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", edges_module.METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_neurons_sum_to_their_mlp(kind, method, shared_model, pairs):
    model = shared_model(kind)
    whole = edge_attribution(model, pairs, METRIC, method=method, steps=2, progress=False)
    split = edge_attribution(model, pairs, METRIC, method=method, steps=2, neurons=[0, 2], progress=False)
    assert len(split.senders) == 1 + 12 + 1 + 2 * model.d_mlp and split.n_edges > whole.n_edges
    total = torch.zeros_like(whole.scores)

    def place(node):
        return Node("mlp", node.layer) if node.kind == "neuron" else node

    rows = torch.tensor([whole.senders.index(place(node)) for node in split.senders])
    columns = torch.tensor([whole.receivers.index((place(node), slot)) for node, slot in split.receivers])
    total.index_put_((rows[:, None], columns[None]), split.scores, accumulate=True)
    torch.testing.assert_close(total, whole.scores, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_inputs_of_every_receiver_complete(kind, shared_model, make_hf_model):
    """The scores into a receiver sum to (its whole input's change) . (its gradient): no input is missing."""
    model, plain = shared_model(kind), PlainModel(make_hf_model(kind))
    pairs = ms.PromptPairs.from_lists(HARMFUL[:1], HARMLESS[:1])
    found = edge_attribution(model, pairs, METRIC, method="eap", progress=False)
    rows = [model.tokenize([text]).ids[0] for text in (HARMFUL[0], HARMLESS[0])]
    streams = []
    for ids in rows:
        logits, writes = plain(ids)
        stream, seen = plain.embed(ids), []
        for layer in range(3):
            middle = stream + sum(writes[layer, head] for head in range(4)) + plain.write_bias(layer)
            seen.append((stream, stream if plain.parallel else middle))
            stream = middle + writes[layer, None]
        streams.append((METRIC(logits), seen, stream))
    gap = float(streams[0][0] - streams[1][0])
    for column, (node, slot) in enumerate(found.receivers):
        fork = torch.zeros(len(rows[0]), 32).requires_grad_()
        key = ("logits", None, None) if node.kind == "logits" else (slot, node.layer, node.index)
        (gradient,) = torch.autograd.grad(METRIC(plain(rows[0], {key: fork})[0]), fork)
        reads = [s[2] if node.kind == "logits" else s[1][node.layer][node.kind == "mlp"] for s in streams]
        expected = float(((reads[0] - reads[1]) * gradient).sum()) / gap
        assert float(found.scores[:, column].sum()) == pytest.approx(expected, rel=1e-4, abs=1e-4), (node, slot)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_the_embedding_carries_the_whole_gap_as_steps_grow(kind, shared_model):
    """eap-ig: what the embedding sends sums to the gap, by the completeness of integrated gradients."""
    model, pairs, errors = shared_model(kind), ms.PromptPairs.from_lists(HARMFUL, HARMLESS), []
    for steps in (4, 16, 32):
        found = edge_attribution(model, pairs, METRIC, method="eap-ig", steps=steps, progress=False)
        errors.append(abs(found.node_scores()[Node("embed")] - 1))
    assert errors[2] < 0.005 and errors[2] < errors[1] / 2 < errors[0] / 4


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_each_sublayer_sums_to_its_exact_effect_as_steps_grow(kind, shared_model):
    """ig-activations: the scores sent by a layer's heads (its MLP) sum to what patching them all does."""
    model, pairs = shared_model(kind), ms.PromptPairs.from_lists(HARMFUL[:2], HARMLESS[:2])
    runs = pair_runs(model, pairs)
    high, low = runs.scores(METRIC)
    groups = [[Node("head", layer, head) for head in range(4)] for layer in range(3)]
    groups += [[Node("mlp", layer)] for layer in range(3)]
    patched = patched_scores(model, runs.harmful, runs.harmless.acts, Patch.of(model, groups), METRIC)
    exact = ((high - patched).mean(1) / (high - low).mean()).tolist()
    found = [
        edge_attribution(model, runs, METRIC, method="ig-activations", steps=steps, progress=False) for steps in (4, 16)
    ]
    sent = [scores.node_scores() for scores in found]
    errors = [
        max(abs(sum(of[node] for node in group) - effect) for group, effect in zip(groups, exact, strict=True))
        for of in sent
    ]
    assert errors[1] < 0.01 * max(map(abs, exact)) and errors[1] < errors[0] / 4
    # blends of the embedding alone are what eap-ig takes
    ig = edge_attribution(model, runs, METRIC, method="eap-ig", steps=16, progress=False)
    torch.testing.assert_close(found[1].scores[0], ig.scores[0], atol=1e-5, rtol=1e-4)
