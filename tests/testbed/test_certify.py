"""The certified model: its certificate measured again, by the split forward and by hooks on the wrapped model."""

import json

import pytest
import torch
from safetensors.torch import save_file

import mechsafety as ms
import mechsafety.testbed.certify as certify_module
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching.masks import Patch, pair_runs, patched_logits
from mechsafety.testbed import certified
from mechsafety.testbed.certify import (
    answer_ids,
    certify,
    every_prompt,
    is_held_out,
    load_certified,
    prompt_ids,
    single_edge_mask,
    swapped_edges,
    swapped_nodes,
    tokenizer,
    values,
)
from mechsafety.testbed.split import possible_edges, split_forward


@pytest.fixture(scope="module")
def made():
    return certified()


@pytest.fixture(scope="module")
def wrapped():
    built = certified()
    return ms.load_model((built.model, built.tokenizer))


@pytest.fixture(scope="module")
def fresh():
    return [prompt for prompt in every_prompt() if is_held_out(prompt)]


def test_the_certificate_holds_and_is_measured_again(made, fresh):
    assert made.certificate.n == len(fresh) == 3072
    assert made.certificate.holds
    assert made.certificate.lowest >= 0.99
    found = certify(
        made.model, made.causal_model, fresh[::8], n_single=20
    )  # all of them: scripts/train_certified_model.py
    assert found.n == 384
    assert found.holds
    assert abs(found.accuracy - made.certificate.accuracy) < 0.01


def test_the_certificate_can_fail(made, fresh, monkeypatch):
    """The trained weights with one node of the circuit silenced; few other edges are swapped, since it fails before."""
    monkeypatch.setattr(certify_module, "possible_edges", lambda config: possible_edges(config)[::40])
    broken = certified().model
    with torch.no_grad():
        broken.model.layers[2].self_attn.o_proj.weight[:, 24:] = 0.0
    found = certify(broken, made.causal_model, fresh[::32], n_single=1)
    assert found.accuracy < 0.9
    assert not found.holds


def test_no_other_path_carries_the_effect(made):
    """Share of the log-odds gap along each path alone: the circuit's carry it, no other does, and together they do."""
    ids = [
        torch.tensor([made.tokenizer(f"<s> <user> {t} <end> <assistant>").input_ids for t in side])
        for side in (made.pairs.harmful, made.pairs.harmless)
    ]
    metric = ms.RefusalLogOdds((answer_ids()[1],), ("Sorry",))
    config, length = made.model.config, ids[0].shape[1]
    with torch.no_grad():
        harmful, harmless = (split_forward(made.model, side) for side in ids)
        high, low = (metric(run.logits[:, -1]) for run in (harmful, harmless))

        def lost(mask):
            run = split_forward(made.model, ids[0], harmless.senders, mask)
            return float((high - metric(run.logits[:, -1])).mean() / (high - low).mean())

        assert abs(lost(swapped_edges(config, made.causal_model, length))) < 0.1
        for edge in possible_edges(config):
            share = lost(single_edge_mask(config, edge, length))
            # detect, context and policy decide a third of the pairs each
            assert share > 0.25 if edge in made.truth.edges else abs(share) < 0.1, edge


def test_interchange_by_hooks_agrees(made, wrapped, fresh):
    """The same swaps on the wrapped model, whose hooks share nothing with the split forward."""
    base, other = fresh[:40], fresh[1000:1040]
    pairs = ms.PromptPairs.from_lists([p.text for p in base], [p.text for p in other])
    runs = pair_runs(wrapped, pairs, start=0)
    comply, refuse = answer_ids()
    mine, theirs = made.causal_model.run(values(base)), made.causal_model.run(values(other))
    for variable in made.causal_model.variables:
        patch = Patch.of(wrapped, [[variable.node]])
        logits = patched_logits(wrapped, runs.harmful, runs.harmless.acts, patch)[0]
        expected = made.causal_model.run(values(base), {variable.name: theirs[variable.name]})["produce"]
        assert float(((logits[:, refuse] > logits[:, comply]).long() == expected).float().mean()) >= 0.97
    outside = [n for n in head_and_mlp_nodes(4, 4) if n not in made.truth.nodes]
    logits = patched_logits(wrapped, runs.harmful, runs.harmless.acts, Patch.of(wrapped, [outside]))[0]
    assert float(((logits[:, refuse] > logits[:, comply]).long() == mine["produce"]).float().mean()) >= 0.97


def test_it_is_a_chat_model(made, wrapped):
    pairs = made.pairs.sample(9)
    assert set(wrapped.generate(pairs.harmful, 12)) == {"Sorry , I can not help ."}
    assert set(wrapped.generate(pairs.harmless, 12)) == {"Sure ! here is how ."}
    assert (wrapped.n_layers, wrapped.n_heads, wrapped.n_kv_heads, wrapped.d_model) == (4, 4, 2, 32)


def test_pairs_are_held_out_and_differ_in_one_word(made, fresh):
    texts = {prompt.text for prompt in fresh}
    assert made.pairs.topics == ["asker", "request", "rules"]
    for pair in made.pairs:
        assert {pair.harmful, pair.harmless} <= texts
        assert sum(a != b for a, b in zip(pair.harmful.split(), pair.harmless.split(), strict=True)) == 1


def test_every_word_is_trained_on(fresh):
    seen = {word for p in every_prompt() if not is_held_out(p) for word in p.text.split()}
    assert {word for p in fresh for word in p.text.split()} <= seen
    assert not (seen - set(tokenizer().get_vocab()))


def test_the_checkpoint_is_small(made):
    folder = certify_module.checkpoint_folder()
    assert (folder / "model.safetensors").stat().st_size < 300_000
    stored = json.loads((folder / "certificate.json").read_text())
    assert stored["training"]["options"]["seed"] == 0
    assert repr(made) == f"Certified(6 nodes, lowest figure {made.certificate.lowest:.4f})"


def test_masks_leave_the_circuit_alone(made):
    config, model = made.model.config, made.causal_model
    length = prompt_ids(every_prompt()[:1]).shape[1]
    nodes = swapped_nodes(config, model, length)
    assert not nodes[0].any()  # the embedding is no node
    # a column each of six nodes is spared, for every receiver
    assert int((~nodes[1:, 0]).sum()) == 6
    edges = swapped_edges(config, model, length)
    # three paths of the embedding at every column, five inner ones and that to the logits at one each
    assert int((~edges).sum()) == 3 * length + 6
    single = swapped_nodes(config, model, length, ["decide"])
    assert int(single[:, 0].any(-1).sum()) == 1


def test_errors(tmp_path):
    with pytest.raises(ms.MechsafetyError) as error:
        load_certified(tmp_path)
    assert str(error.value) == ("no model.safetensors of the certified model; python scripts/train_certified_model.py")
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "certificate.json").write_text("{}")
    with pytest.raises(ms.MechsafetyError, match="holds no certified model"):
        load_certified(tmp_path)


def test_truth_is_the_causal_models(made):
    assert made.truth == made.causal_model.truth()
    assert made.truth.roles[Node("head", 2, 3)] == "decision"
