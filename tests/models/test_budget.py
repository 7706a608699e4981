"""How many rows go through at once: measured, bounded, the same on every run, and never part of a result."""

import types

import pytest
import torch

import mechsafety as ms
from mechsafety.models import budget
from mechsafety.models.budget import Allocated, batch_tokens
from mechsafety.models.engine import base_run, expand_rows, max_variants, run_from
from mechsafety.patching import pair_runs
from mechsafety.sites import Site, SiteKind

CPU = torch.device("cpu")
GIB = 2**30


def with_free(monkeypatch, n_bytes):
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=n_bytes))


def test_allocations_are_counted_once_and_weights_not():
    weight, x = torch.ones(6, 4), torch.ones(2, 6)
    with Allocated([weight]) as seen:
        copy = weight.T.contiguous()  # depends on no batch
        y = x @ weight  # 8 numbers
        y.add_(1.0)
        y[:, :2].relu()  # 4
    assert seen.total == 4 * (8 + 4) and copy.shape == (4, 6)
    with Allocated() as seen:
        weight.T.contiguous()
    assert seen.total == 4 * 24


@pytest.mark.parametrize(
    ("free", "per_token", "expected"),
    [(64 * GIB, 1e3, 2048), (64 * GIB, 1e6, 1024), (GIB, 1e6, 256), (GIB, 1.1e6, 128), (1e6, 1e6, 1), (0, 1e6, 1)],
)
def test_a_power_of_two_within_the_free_memory(free, per_token, expected, monkeypatch):
    """At most a quarter of what is free, a gibibyte, and 2,048 columns."""
    with_free(monkeypatch, free)
    assert batch_tokens(CPU, per_token) == expected


def test_on_a_gpu(monkeypatch):
    """Half of what is free to this process, with what torch holds back; no gibibyte's bound."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * GIB)
    assert budget.free_bytes(gpu) == 8 * GIB
    assert batch_tokens(gpu, 2.0**20) == 8192 and batch_tokens(gpu, 1.0) == budget.GPU_TOKENS


def test_a_run_needs_no_more_than_was_foreseen(any_model, pairs, monkeypatch):
    """Everything that a block makes, and every layer's values replaced, for as many variants as are allowed."""
    with_free(monkeypatch, 40 * 2**20)
    runs = pair_runs(any_model, pairs, extra=[SiteKind.NEURONS])
    base, variants = runs.harmful, max_variants(runs.harmful)
    assert variants > 4
    made = []
    sites = [Site(kind, layer) for kind in base.acts for layer in range(any_model.n_layers)]
    with Allocated(any_model.hf_model.parameters()) as held:
        values = {site: expand_rows(base.acts[site.kind][site.layer], variants) for site in sites}
        resid = expand_rows(base.resid[0], variants)
    with Allocated(any_model.hf_model.parameters()) as seen, torch.no_grad():
        made.append(run_from(any_model, base, 0, resid, [(s, lambda t, s=s: values[s]) for s in sites]))
    needed = held.total + seen.total / any_model.n_layers
    assert 0.2 * 10 * 2**20 < needed < 10 * 2**20


def test_batches_shrink_with_the_free_memory_and_numbers_stay(llama, pairs, log_odds, monkeypatch):
    def changes():
        return ms.activation_patching(llama, pairs, log_odds, progress=False).changes

    plenty, wide = changes(), pair_runs(llama, pairs).harmful.max_batch_tokens
    with_free(monkeypatch, 2**20)
    narrow = pair_runs(llama, pairs).harmful.max_batch_tokens
    assert wide == 2048 and 1 <= narrow < 64
    torch.testing.assert_close(changes(), plenty, atol=1e-5, rtol=1e-5)


def test_an_explicit_budget(llama, pairs, log_odds, monkeypatch):
    tokens = llama.tokenize(pairs.harmful)
    assert base_run(llama, tokens, max_batch_tokens=77).max_batch_tokens == 77
    assert pair_runs(llama, pairs, max_batch_tokens=99).harmless.max_batch_tokens == 99
    monkeypatch.setattr(llama, "max_batch_tokens", 55)
    assert base_run(llama, tokens).max_batch_tokens == 55
    assert base_run(llama, tokens, max_batch_tokens=77).max_batch_tokens == 77
    rows = []
    real = type(llama.backend).block

    def block(self, layer, hidden, *rest):
        rows.append(hidden.shape[0])
        return real(self, layer, hidden, *rest)

    monkeypatch.setattr(type(llama.backend), "block", block)
    base = pair_runs(llama, pairs).harmful
    two = 2 * len(base) * base.n_pos
    ms.activation_patching(llama, pairs, log_odds, max_batch_tokens=two, progress=False)
    assert max(rows) == 2 * len(base)
