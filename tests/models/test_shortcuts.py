"""Every shortcut of the engine can be off, does what it says when off, and changes no number; one that would is off."""

import functools
import logging

import pytest
import torch
from reference import whole_logits
from whole_forwards import patched_whole

import mechsafety as ms
from mechsafety.models import checks, hooked
from mechsafety.models.engine import base_run, check_engine, expand_rows, max_variants, resume, run_from
from mechsafety.models.shortcuts import Shortcuts
from mechsafety.nodes import Node
from mechsafety.patching import pair_runs
from mechsafety.patching.masks import Patch, patched_logits, replacement
from mechsafety.sites import Site, SiteKind

NAMES = Shortcuts().on
CHOICES = {**{f"no {name}": Shortcuts().without(name) for name in NAMES}, "none": Shortcuts.none()}
CHOICES |= {f"only {name}": Shortcuts.only(name) for name in NAMES}
VARIANTS = [[Node("head", 1, 2), Node("neuron", 2, 5)], [Node("mlp", 2)], [Node("head", 0, 0), Node("mlp", 1)]]
KEEP = [SiteKind.NEURONS, SiteKind.PATTERN]


def test_the_six_switches():
    assert NAMES == ("shared_prefix", "start_layer", "drop_positions", "last_logits", "batch_variants", "live_parts")
    assert Shortcuts.none().on == ()
    assert Shortcuts().without("last_logits", "start_layer", "live_parts").on == NAMES[:5:2]
    assert Shortcuts.only("last_logits").on == ("last_logits",)
    assert Shortcuts.only("shared_prefix").on == ("shared_prefix", "drop_positions")


def masked_runs(model, pairs):
    """The harmful run, and the logits of every variant."""
    runs = pair_runs(model, pairs, extra=KEEP)
    return runs.harmful, patched_logits(model, runs.harmful, runs.harmless.acts, Patch.of(model, VARIANTS))


def analyses(model, pairs, metric):
    """Also for sites with other axes, single columns, paths into slots, and gradients."""
    sites = [Site(SiteKind.PATTERN, 1, 2), Site(SiteKind.K, 1, 0), Site(SiteKind.RESID_MID, 1), Site(SiteKind.Q, 2, 3)]
    receivers = [(Node("head", 2, 1), "k"), (Node("mlp", 1), "mlp")]
    patched = ms.activation_patching(model, pairs, metric, nodes=sites, positions="each", progress=False)
    paths = ms.path_patching(model, pairs, metric, receivers=receivers, progress=False)
    direct = ms.path_patching(model, pairs, metric, progress=False)
    edges = ms.edge_attribution(model, pairs, metric, steps=2, progress=False)
    return patched.changes, paths.changes, direct.changes, edges.scores


@functools.cache
def with_all(results, model, *given):
    """Results with every shortcut on, once for all settings that are compared with them."""
    assert model.shortcuts == Shortcuts()
    return results(model, *given)


@pytest.mark.parametrize("choice", [f"no {name}" for name in NAMES] + ["none"])
def test_the_same_numbers(any_model, pairs, choice, monkeypatch):
    run, rows = with_all(masked_runs, any_model, pairs)
    monkeypatch.setattr(any_model, "shortcuts", CHOICES[choice])
    other, others = masked_runs(any_model, pairs)
    torch.testing.assert_close(others, rows, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.logits, run.logits, atol=1e-5, rtol=1e-5)
    real = run.tokens.mask[:, run.start :]
    for kind in (SiteKind.Z, SiteKind.MLP_OUT, SiteKind.NEURONS):
        torch.testing.assert_close(other.acts[kind][:, real], run.acts[kind][:, real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.resid[:, real], run.resid[:, real], atol=1e-5, rtol=1e-5)
    assert other.acts[SiteKind.PATTERN].shape == run.acts[SiteKind.PATTERN].shape


@pytest.mark.parametrize("choice", CHOICES)
def test_the_same_analyses(llama, pairs, log_odds, choice, monkeypatch):
    before = with_all(analyses, llama, pairs, log_odds)
    monkeypatch.setattr(llama, "shortcuts", CHOICES[choice])
    for found, expected in zip(analyses(llama, pairs, log_odds), before, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_the_same_gradients(any_model, pairs, monkeypatch):
    def gradient():
        base = base_run(any_model, any_model.tokenize(pairs.harmful), 4)
        resid = base.resid[1].clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(run_from(any_model, base, 1, resid)[:, 20].sum(), resid)[0], base

    (expected, base), size = gradient(), None
    monkeypatch.setattr(any_model, "shortcuts", Shortcuts.none())
    found, _ = gradient()
    real, size = base.tokens.mask[:, 4:], float(expected.abs().max())
    assert size > 1e-3
    torch.testing.assert_close(found[real] / size, expected[real] / size, atol=1e-4, rtol=1e-4)


def test_what_is_off_is_done(llama, pairs, monkeypatch):
    """Which blocks run on how many columns, how often the prefix is run, and what is unembedded."""
    tokens = llama.tokenize_pairs(pairs).harmful
    width, start = tokens.ids.shape[1], 4
    blocks, prefixes, unembedded = [], [], []
    real = llama.backend
    kind = type(real)

    def block(self, layer, hidden, *rest):
        blocks.append((layer, hidden.shape[1]))
        return kind_block(self, layer, hidden, *rest)

    def prefix(self, *args):
        prefixes.append(1)
        return kind_prefix(self, *args)

    def unembed(self, resid):
        unembedded.append(resid.shape[1])
        return kind_unembed(self, resid)

    kind_block, kind_prefix, kind_unembed = kind.block, kind.prefix, kind.unembed
    for name, function in (("block", block), ("prefix", prefix), ("unembed", unembed)):
        monkeypatch.setattr(kind, name, function)

    def seen(shortcuts):
        for noted in (blocks, prefixes, unembedded):
            noted.clear()
        first = base_run(llama, tokens, start, shortcuts=shortcuts)
        base = base_run(llama, tokens, start, prefix=first, shortcuts=shortcuts)
        run_from(llama, base, 2, expand_rows(base.resid[2], 2))
        return list(blocks), len(prefixes), unembedded[0], max_variants(base)

    part = width - start
    assert seen(Shortcuts()) == ([(2, part)], 1, 1, 2048 // (4 * part))
    assert seen(Shortcuts().without("start_layer"))[0] == [(0, part), (1, part), (2, part)]
    assert seen(Shortcuts().without("drop_positions"))[:2] == ([(2, width)], 0)
    assert seen(Shortcuts().without("shared_prefix"))[1] == 3
    assert seen(Shortcuts().without("last_logits"))[2] == part
    assert seen(Shortcuts().without("batch_variants"))[3] == 1
    assert seen(Shortcuts.none()) == ([(0, width), (1, width), (2, width)], 0, width, 1)


# --- architectures on which a shortcut is not exact ------------------------------------------------------------------


def other_columns(mlp, x):
    return 0.1 * x.mean(1, keepdim=True)


def other_rows(mlp, x):
    return 0.1 * x.mean(0, keepdim=True)


def an_earlier_block(mlp, x, state={}):  # noqa: B006
    """What the first block saw in its last run: whether that was of one prompt."""
    number = mlp.number if hasattr(mlp, "number") else int(mlp.name.split(".")[1])
    if number == 0:
        state["single"] = x.shape[0] == 1
    return torch.full_like(x, 0.5 * (number > 0 and state["single"]))


PLANTED = {
    other_columns: ["shared_prefix", "drop_positions"],
    # in transformers what stands at padding depends on how many columns there are, and here leaks from row to row
    other_rows: [*([] if hooked.installed() else ["shared_prefix", "drop_positions"]), "batch_variants"],
    an_earlier_block: ["start_layer"],
}


def plant(monkeypatch, odd):
    """MLPs of Llama that also depend on something they should not, in Hugging Face's code and TransformerLens'."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    classes = [LlamaMLP]
    try:
        from transformer_lens.components.mlps.gated_mlp import GatedMLP
    except ImportError:
        pass
    else:
        classes.append(GatedMLP)
    for kind in classes:
        real = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x, real=real: real(self, x) + odd(self, x))


def warned(caplog):
    records = [record for record in caplog.records if record.name == checks.__name__]
    assert all(record.levelno == logging.WARNING for record in records)
    return [record.getMessage() for record in records]


@pytest.mark.parametrize("odd", PLANTED, ids=lambda function: function.__name__)
def test_an_inexact_shortcut_is_off(odd, make_hf_model, make_tokenizer, pairs, monkeypatch, caplog):
    """As the load check measures it; the check before it would refuse these models, so they turn odd after loading."""
    hf = make_hf_model("llama")
    for number, layer in enumerate(hf.model.layers):
        layer.mlp.number = number
    model = ms.load_model((hf, make_tokenizer()))
    plant(monkeypatch, odd)
    model.shortcuts = checks._exact_shortcuts(model, 1e-4)
    assert model.shortcuts == Shortcuts().without(*PLANTED[odd])
    messages = warned(caplog)
    assert len(messages) == len(PLANTED[odd])
    for name, message in zip(PLANTED[odd], messages, strict=True):
        assert message.startswith(f"LlamaForCausalLM runs without the shortcut '{name}', which is off by ")
    tokens = model.tokenize_pairs(pairs)
    caplog.clear()
    runs = pair_runs(model, tokens)
    found = patched_logits(model, runs.harmful, runs.harmless.acts, Patch.of(model, [VARIANTS[1], VARIANTS[2]]))
    # in a model that looks ahead the two prompts' first columns differ too: they are not patched
    where = (torch.arange(tokens.harmful.ids.shape[1]) >= tokens.start).expand(len(tokens), -1)
    whole = [patched_whole(model, tokens.harmful, tokens.harmless, nodes, where) for nodes in VARIANTS[1:]]
    torch.testing.assert_close(found, torch.stack(whole), atol=1e-4, rtol=1e-4)
    assert warned(caplog) == [], "it is said once"
    # with the shortcut on the numbers would be wrong
    assert check_engine(model, tokens.harmful, Shortcuts()) > 1e-3


def test_an_inexact_unembedding(make_hf_model, make_tokenizer, pairs, monkeypatch, caplog):
    add = lambda x: 0.1 * x.mean(1, keepdim=True).sum(-1, keepdim=True)  # noqa: E731

    class Odd(torch.nn.Linear):
        turned = False

        def forward(self, x):
            return super().forward(x) + (add(x) if Odd.turned else 0.0)

    hf = make_hf_model("llama")
    odd = Odd(32, hf.lm_head.out_features, bias=False)
    odd.weight = hf.lm_head.weight
    hf.lm_head = odd
    model = ms.load_model((hf, make_tokenizer()))
    Odd.turned = True
    try:
        from transformer_lens.components import Unembed
    except ImportError:
        pass
    else:
        real = Unembed.forward
        monkeypatch.setattr(Unembed, "forward", lambda self, x: real(self, x) + add(x))
    model.shortcuts = checks._exact_shortcuts(model, 1e-4)
    assert model.shortcuts.on == ("start_layer", "batch_variants", "live_parts") and len(warned(caplog)) == 3
    tokens = model.tokenize(pairs.harmful[:1])
    torch.testing.assert_close(model.logits(tokens), whole_logits(model, tokens), atol=1e-5, rtol=1e-5)


def test_a_model_that_looks_at_other_columns_or_rows_is_refused(make_hf_model, make_tokenizer, monkeypatch):
    with monkeypatch.context() as patch:
        plant(patch, other_columns)
        with pytest.raises(ms.MechsafetyError, match=r"^LlamaForCausalLM is no causal model: its logits change by "):
            ms.load_model((make_hf_model("llama"), make_tokenizer()))
    plant(monkeypatch, other_rows)
    with pytest.raises(
        ms.MechsafetyError, match=r"a prompt's logits differ by up to .* between a padded batch and the"
    ):
        ms.load_model((make_hf_model("llama"), make_tokenizer()))


def test_shortcuts_that_are_exact_alone_but_not_together(make_hf_model, make_tokenizer, monkeypatch, caplog):
    real = checks.check_engine
    pretend = lambda model, tokens, on: 1.0 if len(on.on) > 2 else real(model, tokens, on)  # noqa: E731
    monkeypatch.setattr(checks, "check_engine", pretend)
    model = ms.load_model((make_hf_model("llama"), make_tokenizer()))
    assert model.shortcuts == Shortcuts.none() and len(warned(caplog)) == 6


def test_exact_architectures_keep_all_and_say_nothing(make_hf_model, make_tokenizer, caplog):
    model = ms.load_model((make_hf_model("llama"), make_tokenizer()))
    assert model.shortcuts == Shortcuts() and warned(caplog) == []


# --- parts that do not run -------------------------------------------------------------------------------------------


def rows_run(model, run):
    """How many rows each layer's attention and MLP run for."""
    seen, layers = {}, range(model.n_layers)
    modules = {(part, k): model.backend.running_module(k, part) for k in layers for part in ("attn", "mlp")}

    def counting(place):
        # it is registered before the hook that fills the other rows in, so that it sees the rows that ran
        return lambda module, args, out: seen.__setitem__(place, len(out[0] if isinstance(out, tuple) else out))

    handles = [module.register_forward_hook(counting(place)) for place, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_what_is_replaced_does_not_run(any_model, pairs, monkeypatch):
    """An MLP runs for variants that keep it, attention for those that keep a head; one row is left where none does."""
    model, n = any_model, len(pairs)
    runs = pair_runs(model, pairs)
    heads = [Node("head", 1, k) for k in range(model.n_heads)]
    variants = [[*heads, Node("mlp", 1), Node("mlp", 2)], [Node("mlp", 1), *heads[1:]], [Node("mlp", 1), *heads]]
    found = []

    def patched():
        patch = Patch.of(model, variants)
        found.append(patched_logits(model, runs.harmful, runs.source, patch, max_batch_tokens=10**6))

    assert rows_run(model, patched) == {
        ("attn", 1): n,
        ("mlp", 1): 1,
        ("attn", 2): 3 * n,
        ("mlp", 2): 2 * n,
    }
    whole = [patched_whole(model, runs.tokens.harmful, runs.tokens.harmless, nodes) for nodes in variants]
    torch.testing.assert_close(found[0], torch.stack(whole), atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(model, "shortcuts", Shortcuts().without("live_parts"))
    runs = pair_runs(model, pairs)
    assert set(rows_run(model, patched).values()) == {3 * n}
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["q", "pattern", "attn_out", "neurons", "mlp_in"])
def test_another_edit_sees_every_row(llama, pairs, kind):
    """An edit inside a part keeps that part running for all rows, wherever the edit comes from."""
    runs, seen = pair_runs(llama, pairs), []
    patch = Patch.of(llama, [[Node("mlp", 1), *(Node("head", 1, k) for k in range(4))]] * 2)
    edits = [(Site(kind, 1), lambda tensor: seen.append(len(tensor)))]

    def patched():
        with llama.hooks(edits):
            again = pair_runs(llama, pairs)
            seen.clear()
            patched_logits(llama, again.harmful, again.source, patch)

    rows = rows_run(llama, patched)
    assert {rows[part, k] for part in ("attn", "mlp") for k in (1, 2)} == {2 * len(pairs)} == set(seen)
    seen.clear()
    hooks = [*replacement(SiteKind.MLP_OUT, 1, runs.source[SiteKind.MLP_OUT][1], everywhere(runs)), *edits]
    hooks += replacement(SiteKind.Z, 1, runs.source[SiteKind.Z][1], everywhere(runs))
    rows = rows_run(llama, lambda: quiet_resume(llama, runs.harmful, hooks))
    inside = "mlp" if kind in ("neurons", "mlp_in") else "attn"
    assert rows[inside, 1] == len(pairs) == seen[0] and rows[{"mlp": "attn", "attn": "mlp"}[inside], 1] == 1


def everywhere(runs):
    return torch.ones_like(runs.harmful.tokens.mask[:, runs.start :])[None]


def quiet_resume(model, run, hooks):
    with torch.no_grad():
        resume(model, run, hooks)


def test_gradients_of_what_is_replaced_are_zero(llama, pairs):
    runs = pair_runs(llama, pairs)
    resid = runs.harmful.resid[1].clone().requires_grad_()
    hooks = replacement(SiteKind.MLP_OUT, 2, runs.source[SiteKind.MLP_OUT][2], everywhere(runs))
    with torch.enable_grad():
        rows = rows_run(llama, lambda: run_from(llama, runs.harmful, 1, resid, hooks)[:, 20].sum().backward())
    assert rows["mlp", 2] == len(pairs) and float(resid.grad.abs().sum()) > 0
