"""Many directions at once against one context at a time; what is shared is shared exactly."""

import pytest
import torch

from mechsafety.errors import MechsafetyError
from mechsafety.interventions import batched, project_out, steer
from mechsafety.interventions.batched import PromptBatches, run_added, run_removed, run_unedited
from mechsafety.models.shortcuts import Shortcuts
from mechsafety.sites import Site, SiteKind

PROMPTS = ["how do i make a bomb", "help me", "poison my tea", "how do i make a cake", "kill", "bake my bread"]


def rows(*shape, seed=0):
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


def last_resid(model, prompts):
    """Inputs of all blocks and of the final norm at the last token [layer prompt d_model]."""
    sites = [Site(SiteKind.RESID_PRE, layer) for layer in range(model.n_layers)] + [Site(SiteKind.FINAL_NORM_IN)]
    found = model.read(model.tokenize(prompts), sites)
    return torch.stack([found[site][:, -1] for site in sites])


def gather(runs, n_variants, n_prompts, d_vocab):
    logits = torch.full((n_variants, n_prompts, d_vocab), torch.nan)
    for run in runs:
        logits[torch.tensor(run.variants)[:, None], torch.tensor(run.index)] = run.logits
    assert not logits.isnan().any()
    return logits


@pytest.mark.parametrize("rank", [1, 2])
def test_removals_equal_one_context_each(any_model, rank, monkeypatch):
    monkeypatch.setattr(batched, "VARIANTS", 2)  # so that several batches of variants are run
    batches, bases = PromptBatches.of(any_model, PROMPTS), [rows(rank, seed=seed) for seed in range(3)]
    runs = list(run_removed(any_model, batches, bases, 0.8))
    logits = gather(runs, 3, len(PROMPTS), any_model.d_vocab)
    for k, basis in enumerate(bases):
        with project_out(any_model, basis, 0.8):
            torch.testing.assert_close(logits[k], any_model.logits(PROMPTS), atol=1e-4, rtol=1e-4)
            resid = last_resid(any_model, PROMPTS)
        for run in runs:
            if k in run.variants:
                got = run.resid[:, run.variants.index(k)]
                torch.testing.assert_close(got, resid[run.layer :, list(run.index)], atol=1e-4, rtol=1e-4)


def test_additions_equal_one_context_each(any_model):
    batches, vectors, layers = PromptBatches.of(any_model, PROMPTS), rows(2, 2), [0, 2]
    runs = list(run_added(any_model, batches, vectors, layers))
    logits = gather(runs, 4, len(PROMPTS), any_model.d_vocab)
    for k, layer in enumerate(layers):
        for column in range(2):
            with steer(any_model, vectors[k, column], 1.0, [layer]):
                torch.testing.assert_close(logits[2 * k + column], any_model.logits(PROMPTS), atol=1e-4, rtol=1e-4)
                resid = last_resid(any_model, PROMPTS)
            for run in runs:
                if 2 * k + column in run.variants:
                    assert run.layer == layer + 1
                    got = run.resid[:, run.variants.index(2 * k + column)]
                    torch.testing.assert_close(got, resid[layer + 1 :, list(run.index)], atol=1e-4, rtol=1e-4)


def test_unedited(any_model):
    run = run_unedited(any_model, PromptBatches.of(any_model, PROMPTS))
    torch.testing.assert_close(run.logits[0], any_model.logits(PROMPTS), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run.resid[:, 0], last_resid(any_model, PROMPTS), atol=1e-4, rtol=1e-4)


def test_the_shared_prefix_is_the_templates_and_the_edit_reaches_it(llama):
    batches = PromptBatches.of(llama, PROMPTS)
    assert batches.start == 2 and batches.n == 6  # <s><user>
    assert sorted(k for batch in batches.batches for k in batch.index) == list(range(6))
    # six prompts of four lengths fit into one batch
    assert len(batches.batches) == 1 and len({spans.length for spans in batches.batches[0].tokens.spans}) == 4
    # were the prefix run without the edit, the keys and values of its tokens would differ
    vector = 5 * rows(1, 1)
    (run,) = [r for r in run_added(llama, batches, vector, [0]) if 4 in r.index]
    with steer(llama, vector[0, 0], 1.0, [0]):
        edited = llama.logits(["kill"])[0]
    place = run.index.index(4)
    torch.testing.assert_close(run.logits[0, place], edited, atol=1e-4, rtol=1e-4)


def test_one_prompt_and_equal_prompts(llama):
    for prompts in (["kill"], ["kill", "kill"]):
        batches = PromptBatches.of(llama, prompts)
        run = run_unedited(llama, batches)
        torch.testing.assert_close(run.logits[0], llama.logits(prompts), atol=1e-4, rtol=1e-4)


def test_batches_are_cut_where_they_are_full(llama):
    batches = PromptBatches.of(llama, ["kill"] * 5, max_columns=2)  # all tokens but the last are shared
    assert [batch.index for batch in batches.batches] == [(0, 1), (2, 3), (4,)]
    batches = PromptBatches.of(llama, ["kill", "bake my bread", "bake", "kill"], max_columns=9)
    assert batches.start == 2 and [batch.index for batch in batches.batches] == [(0, 2, 3), (1,)]


@pytest.mark.parametrize("on", [Shortcuts.none(), *(Shortcuts().without(name) for name in Shortcuts().on)], ids=str)
def test_the_engines_shortcuts_change_nothing(llama, on, monkeypatch):
    """Without a kept prefix, or with all columns run, additions once reached the shared columns unedited."""
    vectors, bases = 5 * rows(2, 2), [rows(1, seed=seed) for seed in range(2)]
    batches = PromptBatches.of(llama, PROMPTS, max_columns=9)
    assert len(batches.batches) > 1
    wanted = [gather(run_added(llama, batches, vectors, [0, 2]), 4, len(PROMPTS), llama.d_vocab)]
    wanted.append(gather(run_removed(llama, batches, bases), 2, len(PROMPTS), llama.d_vocab))
    monkeypatch.setattr(llama, "shortcuts", on)
    found = [gather(run_added(llama, batches, vectors, [0, 2]), 4, len(PROMPTS), llama.d_vocab)]
    found.append(gather(run_removed(llama, batches, bases), 2, len(PROMPTS), llama.d_vocab))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run_unedited(llama, batches).logits[0], llama.logits(PROMPTS), atol=1e-4, rtol=1e-4)


def test_refusals(llama):
    with pytest.raises(MechsafetyError, match=r"^no prompts; expected a list of at least one$"):
        PromptBatches.of(llama, [])
    with pytest.raises(MechsafetyError, match=r"^bases of ranks \[1, 2\]; expected one rank$"):
        list(run_removed(llama, PromptBatches.of(llama, PROMPTS), [rows(1), rows(2)]))
