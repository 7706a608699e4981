"""Change scores: planted neurons, a stored-activation twin, batches, streaming, views."""

import copy
import gc

import numpy as np
import pytest
import torch

import mechsafety as ms
from mechsafety.models.rows import lay_out, prompt_rows
from mechsafety.neurons import NeuronScores, greedy_replies, safety_neurons, scores
from mechsafety.neurons.runs import greedy
from mechsafety.sites import Site, SiteKind


def slow_scores(aligned, base, prompts, positions, new):
    """Every activation of every prompt stored, one prompt at a time, no cache."""
    own, other, halves = [], [], []
    sites = [Site(SiteKind.NEURONS, layer) for layer in range(base.n_layers)]
    for k, prompt in enumerate(prompts):
        row = prompt_rows(base, [prompt])[0]
        reply = greedy(base, None, None, lay_out(base, [row]), new)[0][0] if positions == "completion" else []
        ids = torch.tensor([row + reply])
        read = {"completion": slice(len(row), None), "prompt": slice(0, len(row)), "last": slice(len(row) - 1, None)}
        for model, store in ((base, own), (aligned, other)):
            seen = {}
            with torch.no_grad(), model.hooks([(s, lambda t, s=s, seen=seen: seen.__setitem__(s, t)) for s in sites]):
                model.backend.plain_logits(ids)
            store.append(torch.stack([seen[site][0, read[positions]] for site in sites]))
        halves += [k % 2] * own[-1].shape[1]
    return torch.cat(own, 1), torch.cat(other, 1), torch.tensor(halves)


@pytest.mark.parametrize("positions", ["completion", "prompt", "last"])
def test_equal_to_stored_activations(pair, prompts, positions):
    base, aligned = pair
    own, other, halves = slow_scores(aligned, base, prompts, positions, 6)
    found = safety_neurons(aligned, base, prompts, positions=positions, max_new_tokens=6)
    torch.testing.assert_close(found.scores, (own - other).square().mean(1).sqrt(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.base_rms, own.square().mean(1).sqrt(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.mean_change, (other - own).mean(1), atol=1e-5, rtol=1e-4)
    for side in (0, 1):
        part = (own - other)[:, halves == side].square().mean(1).sqrt()
        torch.testing.assert_close(found.halves[side], part, atol=1e-5, rtol=1e-4)
    assert found.n_tokens == own.shape[1] and found.n_prompts == len(prompts)
    ratio = safety_neurons(aligned, base, prompts, positions=positions, score="ratio", max_new_tokens=6)
    torch.testing.assert_close(ratio.scores, found.change / found.base_rms, atol=1e-4, rtol=1e-3)


def test_given_replies_are_the_own_ones(pair, prompts):
    """Replies generated once serve any number of aligned models."""
    base, aligned = pair
    replies = greedy_replies(base, prompts, 6)
    found = safety_neurons(aligned, base, prompts, replies=replies)
    own = safety_neurons(aligned, base, prompts, max_new_tokens=6)
    torch.testing.assert_close(found.scores, own.scores, atol=1e-5, rtol=1e-4)
    assert found.n_tokens == own.n_tokens == sum(map(len, replies))
    message = r"^1 replies to 5 prompts, positions 'completion'; expected one reply of at least one token per prompt"
    with pytest.raises(ms.MechsafetyError, match=message):
        safety_neurons(aligned, base, prompts, replies=replies[:1])
    with pytest.raises(ms.MechsafetyError, match=r"^5 replies to 5 prompts, positions 'last'; expected one reply"):
        safety_neurons(aligned, base, prompts, replies=replies, positions="last")


def test_batches_do_not_matter(pair, prompts):
    base, aligned = pair
    one, all_ = (safety_neurons(aligned, base, prompts, max_new_tokens=6, batch_size=size) for size in (1, 5))
    torch.testing.assert_close(one.scores, all_.scores, atol=1e-5, rtol=1e-4)
    assert one.n_tokens == all_.n_tokens
    again = safety_neurons(aligned, base, prompts, max_new_tokens=6, batch_size=5)
    assert torch.equal(again.scores, all_.scores), "the same call gives the same bytes"


def test_any_architecture(architecture, any_model, make_hf_model, make_tokenizer, prompts):
    """The base against itself changes nothing; its neurons have a size."""
    twin = ms.load_model((make_hf_model(architecture), make_tokenizer()))
    found = safety_neurons(twin, any_model, prompts[:3], max_new_tokens=4)
    assert float(found.scores.max()) == 0.0 and float(found.base_rms.min()) > 0


def test_planted_neurons_are_found_by_the_ratio(make_hf_model, make_tokenizer, prompts):
    hf = make_hf_model("llama")
    planted = copy.deepcopy(hf)
    chosen = torch.zeros(3, 48, dtype=torch.bool)
    chosen[[0, 1, 1, 2], [5, 7, 40, 33]] = True
    with torch.no_grad():
        for layer, block in enumerate(planted.model.layers):
            block.mlp.up_proj.weight[chosen[layer]] *= 1.05
    base, aligned = (ms.load_model((model, make_tokenizer())) for model in (hf, planted))
    found = safety_neurons(aligned, base, prompts, score="ratio", max_new_tokens=6)
    assert torch.equal(found.top(count=4), chosen)


def test_memory_does_not_grow_with_prompts(pair, prompts, monkeypatch):
    """After the second, fifth and last of eight equal batches the same tensors are alive: sums are all that is kept."""
    base, aligned = pair
    alive, batches = {}, []
    plain = scores._contrast

    def watch(aligned, base, batch, read, halves):
        found = plain(aligned, base, batch, read, halves)
        batches.append(len(batch))
        if len(batches) in (2, 5, 8):  # looking through all objects of a session takes a second
            gc.collect()
            alive_now = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
            alive[len(batches)] = sum(one.numel() for one in alive_now)
        return found

    monkeypatch.setattr(scores, "_contrast", watch)
    words = [
        "bomb",
        "cake",
        "python",
        "process",
        "poem",
        "spring",
        "car",
        "people",
        "help",
        "sky",
        "blue",
        "poison",
        "tea",
        "house",
        "bread",
        "sorry",
    ]
    alike = [f"how do i make a {word}" for word in words]  # of one length, each of them once
    safety_neurons(aligned, base, alike, max_new_tokens=3, batch_size=2, progress=False)
    assert batches == [2] * 8 and len(alive) == 3 and len(set(alive.values())) == 1


@pytest.fixture(scope="module")
def found(pair, prompts):
    return safety_neurons(pair[1], pair[0], prompts, max_new_tokens=6)


def test_views(found):
    frame = found.to_dataframe()
    assert len(frame) == 144 and frame.score.is_monotonic_decreasing
    top = found.top(0.05)
    assert int(top.sum()) == 7 and float(found.scores[top].min()) >= float(found.scores[~top].max())
    assert torch.equal(top, found.top(count=7)) and torch.equal(found.above(float(found.scores[top].min())), top)
    assert [str(node) for node in found.ranked(7)] == frame.node[:7].tolist()
    first = found.ranked(1)[0]
    assert float(found.scores[first.layer, first.index]) == float(found.scores.max())
    assert float(found.layer_shares(0.05).sum()) == pytest.approx(1.0)
    assert found.layer_shares(0.05).tolist() == pytest.approx((top.sum(1) / 7).tolist())
    assert -1 <= found.reliability <= 1
    assert repr(found) == f"NeuronScores(3 x 48 neurons, rms, {found.n_tokens} completion tokens)"
    assert len(found.plot().data[0].x) == 3


def test_saved_and_loaded(found, tmp_path):
    again = NeuronScores.load(found.save(tmp_path / "scores"))
    assert torch.equal(again.scores, found.scores) and again.provenance == found.provenance
    assert again.aligned.weights_sha256 != again.provenance.weights_sha256
    assert found.provenance.options["prompts"] == 5


def test_one_prompt_has_no_reliability(pair):
    assert np.isnan(safety_neurons(pair[1], pair[0], ["kill"], max_new_tokens=2).reliability)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "all"}, r"^positions='all'; expected one of \('completion', 'prompt', 'last'\)$"),
        ({"score": "mean"}, r"^score='mean'; expected one of \('rms', 'ratio'\)$"),
    ],
)
def test_unknown_options(pair, prompts, options, message):
    with pytest.raises(ms.MechsafetyError, match=message):
        safety_neurons(pair[1], pair[0], prompts, **options)


def test_no_pair(pair, prompts, make_hf_model, make_tokenizer):
    with pytest.raises(ms.MechsafetyError, match=r"^the same model object was given twice; expected two models"):
        safety_neurons(pair[0], pair[0], prompts)
    other = ms.load_model((make_hf_model("llama", layers=2), make_tokenizer()))
    with pytest.raises(
        ms.MechsafetyError, match=r"has \(layers, neurons per layer, tokens\) \(3, 48, \d+\), .* \(2, 48,"
    ):
        safety_neurons(other, pair[0], prompts)
    with pytest.raises(ms.MechsafetyError, match=r"^no prompts; expected at least one$"):
        safety_neurons(pair[1], pair[0], [])


def test_top_is_a_share_or_a_count(found):
    with pytest.raises(ms.MechsafetyError, match=r"^share=None, count=None; expected one of the two$"):
        found.top()
    with pytest.raises(ms.MechsafetyError, match=r"^a share of 5.0; expected above 0 and at most 1 \(5 % is 0.05\)$"):
        found.top(5.0)
    with pytest.raises(ms.MechsafetyError, match=r"^145 neurons; expected 0 to 144$"):
        found.top(count=145)


def test_nothing_is_left_after_an_exception(pair, prompts, monkeypatch):
    base, aligned = pair
    before = [model.logits(prompts[:1]) for model in pair]
    monkeypatch.setattr(scores._Sums, "root", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        safety_neurons(aligned, base, prompts, max_new_tokens=2)
    monkeypatch.setattr(scores.Cursor, "feed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        safety_neurons(aligned, base, prompts, positions="last")
    for model, logits in zip(pair, before, strict=True):
        assert torch.equal(model.logits(prompts[:1]), logits)
        assert all(not point.fwd_hooks for point in model.bridge.hook_dict.values())
