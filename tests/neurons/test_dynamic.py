"""Dynamic patching: both ends of the scale, batches against loops, a plain twin without caches."""

import json

import pytest
import torch

import mechsafety as ms
from mechsafety.models.rows import lay_out, prompt_rows
from mechsafety.neurons import dynamic_patching, neuron_mask, random_masks, runs
from mechsafety.neurons.runs import batches, forced, greedy
from mechsafety.nodes import Node
from mechsafety.replies import phrase_judge, reply_loss
from mechsafety.sites import Site, SiteKind

SOME = torch.rand(3, 48, generator=torch.Generator().manual_seed(0)) < 0.4
NONE, ALL = torch.zeros(3, 48, dtype=torch.bool), torch.ones(3, 48, dtype=torch.bool)


def slow_patching(base, aligned, mask, row, steps):
    """One prompt, no cache: the whole sequence through both models at every step."""
    ids, logits = list(row), []
    for _ in range(steps):
        seen = {}
        sites = [Site(SiteKind.NEURONS, layer) for layer in range(base.n_layers)]
        now = torch.tensor([ids])
        with torch.no_grad(), aligned.hooks([(s, lambda t, s=s, d=seen: d.__setitem__(s, t)) for s in sites]):
            aligned.hf_model(input_ids=now)
        edits = [(s, lambda t, s=s, d=seen, m=mask[s.layer]: torch.where(m, d[s], t)) for s in sites]
        with torch.no_grad(), base.hooks(edits):
            logits.append(base.hf_model(input_ids=now).logits[0, -1])
        ids.append(int(logits[-1].argmax()))
        if ids[-1] == base.tokenizer.eos_token_id:
            break
    return ids[len(row) :], torch.stack(logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2", "phi3"])
def test_none_is_the_base_and_all_the_aligned_model(make_pair, prompts, kind):
    base, aligned = make_pair(kind)
    for mask, model in ((NONE, base), (ALL, aligned)):
        mask = mask if base.d_mlp == 48 else torch.full((3, base.d_mlp), bool(mask.all()))
        found = dynamic_patching(base, aligned, mask, prompts, max_new_tokens=6, judge=None, progress=False)
        assert list(found.replies) == model.generate(prompts, 6)
        torch.testing.assert_close(found.logits, model.logits(prompts), atol=1e-4, rtol=1e-4)
        batch = lay_out(base, prompt_rows(base, prompts))
        alone, steps = greedy(model, None, None, batch, 8, keep=8)
        patched, logits = greedy(base, aligned, mask, batch, 8, keep=8)
        assert patched == alone
        for k, reply in enumerate(alone):  # what a finished row goes on to say is read by nobody
            torch.testing.assert_close(logits[k, : len(reply)], steps[k, : len(reply)], atol=1e-4, rtol=1e-4)
    assert base.generate(prompts, 8) != aligned.generate(prompts, 8), "the pair differs"


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral"])
def test_equal_to_the_plain_twin(make_pair, prompts, kind):
    base, aligned = make_pair(kind)
    batch = lay_out(base, prompt_rows(base, prompts))
    assert (batch.shared > 0) == (kind == "llama"), "windows count columns, so nothing is shared there"
    found, logits = greedy(base, aligned, SOME, batch, 7, keep=7)
    for k, row in enumerate(prompt_rows(base, prompts)):
        reply, steps = slow_patching(base, aligned, SOME, row, 7)
        assert found[k] == reply
        torch.testing.assert_close(logits[k, : len(reply)], steps, atol=1e-4, rtol=1e-4)


def test_batched_is_unbatched(pair, prompts):
    one, all_ = (
        dynamic_patching(*pair, SOME, prompts, max_new_tokens=9, batch_size=size, judge=None, progress=False)
        for size in (1, 5)
    )
    assert one.tokens == all_.tokens and one.replies == all_.replies
    torch.testing.assert_close(one.logits, all_.logits, atol=1e-5, rtol=1e-4)


def test_shared_columns_change_nothing(pair, prompts):
    rows = prompt_rows(pair[0], prompts)
    plain, shared = lay_out(pair[0], rows, 0), lay_out(pair[0], rows)
    assert plain.shared == 0 and shared.shared == 2  # <s><user>
    found, expected = (next(forced(*pair, [SOME], batch)) for batch in (shared, plain))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_forced_reuses_the_aligned_run(pair, prompts):
    batch = lay_out(pair[0], prompt_rows(pair[0], prompts))
    together = list(forced(*pair, [SOME, NONE, ALL], batch, 3))
    for mask, logits in zip((SOME, NONE, ALL), together, strict=True):
        torch.testing.assert_close(next(forced(*pair, [mask], batch, 3)), logits)
    assert not torch.allclose(together[0], together[1]) and not torch.allclose(together[0], together[2])


def test_repeated_prompts_and_single_tokens(pair):
    """Identical rows leave at least their last token unshared."""
    batch = lay_out(pair[0], [[2, 3, 9], [2, 3, 9]])
    assert batch.shared == 2 and [piece[0].shape for piece in batch.pieces()] == [(1, 2), (2, 1)]
    assert lay_out(pair[0], [[2, 9], [3, 9]]).shared == 0
    assert lay_out(pair[0], [[2, 3, 9]]).shared == 0


def test_batches_cover_everything_once():
    lengths = [int(n) for n in torch.randint(3, 900, (60,), generator=torch.Generator().manual_seed(1))]
    for size in (None, 7):
        found = batches(lengths, size)
        assert sorted(k for chunk in found for k in chunk) == list(range(60))
        if size:
            assert max(map(len, found)) <= size
        else:
            assert all(len(c) * max(lengths[k] for k in c) <= runs.MAX_BATCH_TOKENS for c in found)


def test_nodes_are_as_good_as_a_mask(pair, prompts):
    nodes = [Node("neuron", 0, 3), Node("neuron", 2, 47)]
    mask = neuron_mask(pair[0], nodes)
    assert mask.sum() == 2 and mask[0, 3] and mask[2, 47]
    found = [
        dynamic_patching(*pair, n, prompts[:2], max_new_tokens=2, judge=None, progress=False) for n in (nodes, mask)
    ]
    assert torch.equal(found[0].logits, found[1].logits)
    with pytest.raises(ms.MechsafetyError, match=r"^L0.H1 is not a neuron of LensModel"):
        neuron_mask(pair[0], [Node("head", 0, 1)])
    with pytest.raises(ms.MechsafetyError, match=r"(?m)^L3.N0 does not exist in Llama.*; the nearest is L2.N0$"):
        neuron_mask(pair[0], [Node("neuron", 3, 0)])
    with pytest.raises(ms.MechsafetyError, match=r"^a neuron mask of type torch.float32 and shape \(3, 48\); expected"):
        neuron_mask(pair[0], torch.zeros(3, 48))
    assert torch.equal(neuron_mask(pair[0], ["L0.N3", "L2.N47"]), mask)
    with pytest.raises(ms.MechsafetyError, match=r"^max_new_tokens=0; expected at least 1$"):
        dynamic_patching(*pair, nodes, prompts[:1], max_new_tokens=0, progress=False)


def test_random_sets_match_layers_and_avoid_the_chosen():
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, :5] = mask[1, 0] = True
    sets = random_masks(mask, 25, seed=3)
    assert len(sets) == 25 and all((one.sum(1) == mask.sum(1)).all() and not (one & mask).any() for one in sets)
    assert len({tuple(one[1].tolist()) for one in sets}) > 3, "they differ"
    assert all(torch.equal(a, b) for a, b in zip(sets, random_masks(mask, 25, seed=3), strict=True))
    mask[0, 5] = True
    assert random_masks(mask, 25) is None
    filled = random_masks(mask, 25, fill=True)
    assert all((one.sum(1) == mask.sum(1)).all() and (one & mask).sum(1).tolist() == [2, 0] for one in filled)
    assert len({tuple((one & mask)[0].tolist()) for one in filled}) > 3, "what fills up is random"
    assert random_masks(torch.ones_like(mask), 3, fill=True) is None


def test_result(pair, prompts, tmp_path):
    found = dynamic_patching(*pair, SOME, prompts, max_new_tokens=3, judge=None, progress=False)
    assert repr(found) == f"PatchedReplies(5 prompts, {int(SOME.sum())} of 144 neurons; not judged)"
    again = type(found).load(found.save(tmp_path / "replies"))
    assert again.replies == found.replies and again.tokens == found.tokens and torch.equal(again.neurons, SOME)
    frame = again.to_dataframe()
    assert list(frame.columns) == ["prompt", "reply", "kind", "perplexity"]
    assert frame.kind.isna().all() and frame.perplexity.isna().all(), "not measured"
    assert found.plot().data[0].name == "not judged"
    with pytest.raises(ms.MechsafetyError, match=r"^the same model object was given twice"):
        dynamic_patching(pair[0], pair[0], SOME, prompts)


def test_replies_are_judged(pair, prompts, tmp_path):
    found = dynamic_patching(*pair, ALL, prompts, max_new_tokens=6, limit=1e9, progress=False)
    losses = torch.stack([reply_loss(model, prompts, found.replies) for model in pair])
    torch.testing.assert_close(found.judged.loss, losses.amin(0))
    assert found.judged.kinds == tuple(phrase_judge(prompts, found.replies))
    beyond = dynamic_patching(*pair, ALL, prompts, max_new_tokens=6, limit=0.0, progress=False)
    assert set(beyond.judged.kinds) == {"degenerate"} and "refused 0%, degenerate 100%, perplexity" in repr(beyond)
    again = type(found).load(beyond.save(tmp_path / "judged"))
    assert again.to_dataframe().kind.tolist() == ["degenerate"] * 5 and again.judged.limit == 0.0
    # what earlier versions saved
    path = tmp_path / "judged" / "result.json"
    stored = json.loads(path.read_text())
    del stored["result"]["judged"]
    path.write_text(json.dumps(stored))
    assert type(found).load(tmp_path / "judged").judged is None


def test_nothing_is_left_after_an_exception(pair, prompts, monkeypatch):
    before = [model.logits(prompts[:1]) for model in pair]
    plain, calls = runs.Cursor.feed, []

    def fail(self, ids, mask, keep=1):
        calls.append(self.backend)
        if len(calls) == 6:  # the base model's second step, all hooks on
            raise KeyboardInterrupt
        return plain(self, ids, mask, keep)

    monkeypatch.setattr(runs.Cursor, "feed", fail)
    with pytest.raises(KeyboardInterrupt):
        dynamic_patching(*pair, SOME, prompts, max_new_tokens=5, judge=None, progress=False)
    for model, logits in zip(pair, before, strict=True):
        assert all(not point.fwd_hooks for point in model.bridge.hook_dict.values())
        assert torch.equal(model.logits(prompts[:1]), logits)
        assert model.lock.acquire(blocking=False)
        model.lock.release()
