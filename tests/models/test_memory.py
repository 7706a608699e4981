"""How many rows go through at once: measured, bounded, the same on every run, and never part of a result."""

import types

import pytest
import torch

import mechsafety as ms
from mechsafety.models import memory
from mechsafety.models.engine import base_run, expand_rows, max_variants, run_from
from mechsafety.models.memory import Allocated, batch_tokens
from mechsafety.patching import pair_runs
from mechsafety.sites import Site, SiteKind

CPU = torch.device("cpu")
GIB = 2**30


def with_memory(monkeypatch, total, free):
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(total=int(total), available=int(free)))


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
    ("total", "free", "per_token", "expected"),
    [
        (64 * GIB, 60 * GIB, 1e3, 2048),
        (24 * GIB, 14 * GIB, 1e6, 1024),
        (24 * GIB, 1.5 * GIB, 1e6, 1024),  # the same, however little others leave
        (24 * GIB, GIB, 1e6, 1024),
        (24 * GIB, GIB - 1, 1e6, 512),  # it does not fit
        (2 * GIB, 2 * GIB, 1e6, 512),
        (2 * GIB, GIB, 1.1e6, 256),
        (2 * GIB, 1e6, 1e6, 1),
        (2 * GIB, 0, 1e6, 1),
    ],
)
def test_a_power_of_two_within_the_memory(total, free, per_token, expected, monkeypatch):
    """A quarter of what the machine has, at most a gibibyte, and 2,048 columns; half of what is free if that is not."""
    with_memory(monkeypatch, total, free)
    assert batch_tokens(CPU, per_token) == expected


def test_smaller_batches_are_said_once(monkeypatch, caplog):
    memory._warn.cache_clear()
    with_memory(monkeypatch, 24 * GIB, 4 * GIB)
    batch_tokens(CPU, 1e6)
    assert not caplog.records
    with_memory(monkeypatch, 24 * GIB, 2**20)
    batch_tokens(CPU, 1e6)
    batch_tokens(CPU, 1e6)
    assert [record.message for record in caplog.records] == [
        "little memory is free on the cpu: batches are smaller, last digits may differ between runs"
    ]


def test_on_a_gpu(monkeypatch):
    """A quarter of the device; of what is free, with what torch holds back, where that is less. No gibibyte's bound."""
    gpu, free = torch.device("cuda"), 8 * GIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * GIB)
    assert memory.batch_bytes(gpu) == 8 * GIB
    assert batch_tokens(gpu, 2.0**20) == 8192 and batch_tokens(gpu, 1.0) == memory.GPU_TOKENS
    free = 40 * GIB
    assert memory.batch_bytes(gpu) == 20 * GIB
    free = 12 * GIB
    assert memory.batch_bytes(gpu) == 20 * GIB, "12 free and 8 held back"


def test_a_run_needs_no_more_than_was_foreseen(any_model, pairs, monkeypatch):
    """Everything that a block makes, and every layer's values replaced, for as many variants as are allowed."""
    with_memory(monkeypatch, 40 * 2**20, 40 * 2**20)
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
    with_memory(monkeypatch, 2**20, 2**20)
    narrow = pair_runs(llama, pairs).harmful.max_batch_tokens
    assert wide == 2048 and 1 <= narrow < 64
    torch.testing.assert_close(changes(), plenty, atol=1e-5, rtol=1e-5)


def test_the_same_bytes_however_much_is_free(llama, pairs, log_odds, monkeypatch):
    monkeypatch.setattr(memory, "CPU_BYTES", 2**20)  # so that memory decides on a tiny model too
    found, sizes = [], []
    for free in (20 * GIB, 1.1 * 2**20):
        with_memory(monkeypatch, 24 * GIB, free)
        sizes.append(pair_runs(llama, pairs).harmful.max_batch_tokens)
        found.append(ms.activation_patching(llama, pairs, log_odds, progress=False).changes)
    assert torch.equal(*found) and sizes[0] == sizes[1] < 256


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
