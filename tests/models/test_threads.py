"""One lock a model, and a model that is as it was after whatever ends a run."""

import threading

import pytest
import torch
from reference import hook_count

import mechsafety as ms
from mechsafety.models.engine import base_run, capture, run_from
from mechsafety.nodes import Node
from mechsafety.patching import pair_runs
from mechsafety.sites import Site, SiteKind


def free_elsewhere(lock):
    """Whether another thread gets the lock at once."""
    found = []

    def ask():
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]


def own_methods(model):
    """What instances carry besides what their classes give them: a patched method would be there."""
    return {name: sorted(key for key in vars(part) if callable(vars(part)[key])) for name, part in parts(model)}


def parts(model):
    return [("lens", model.bridge), *model.hf_model.named_modules()]


@pytest.mark.parametrize("how", ["sites", "paths"])
def test_two_threads_get_the_numbers_of_one(any_model, pairs, log_odds, how):
    first, second = pairs, ms.PromptPairs(pairs.pairs[::-1][:3])
    nodes = [Node("head", layer, head) for layer in range(3) for head in (0, 3)] + [
        Node("mlp", 1),
        Node("neuron", 2, 5),
    ]

    def patched(some, direction):
        if how == "paths":
            senders, receivers = [*nodes[:4], nodes[6]], [(Node("head", 2, 1), "v"), (Node("mlp", 2), "mlp")]
            return ms.path_patching(
                any_model, some, log_odds, senders=senders, receivers=receivers, direction=direction, progress=False
            ).changes
        return ms.activation_patching(
            any_model, some, log_odds, nodes=nodes, direction=direction, max_batch_tokens=100, progress=False
        ).changes

    jobs = [(first, "noising"), (second, "denoising")]
    alone = [patched(*job) for job in jobs]
    assert not torch.allclose(alone[0][..., :3], alone[1])
    found, ready = {}, threading.Barrier(2)

    def work(k):
        ready.wait()
        found[k] = [patched(*jobs[k]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        assert len(found[k]) == 3 and all(torch.equal(changes, alone[k]) for changes in found[k])


def test_a_model_wrapped_twice_has_one_lock(llama):
    again = ms.load_model((llama.bridge, llama.tokenizer))
    assert again.lock is llama.lock and again.backend is not llama.backend
    plain = again.logits(["make tea"])
    edit = [(Site(SiteKind.MLP_OUT, 0), lambda tensor: tensor * 0)]
    found = []
    thread = threading.Thread(target=lambda: found.append(again.logits(["make tea"])))
    with llama.hooks(edit):
        thread.start()
        assert free_elsewhere(llama.lock) is False, "the thread must wait: the hook would be in its run too"
    thread.join()
    assert torch.equal(found[0], plain)


def in_a_base_run(model, tokens, runs, metric, edit, patch, stop):
    with model.hooks(edit):
        base_run(model, tokens.harmful, tokens.start)


def in_a_run_from_a_layer(model, tokens, runs, metric, edit, patch, stop):
    run_from(model, runs.harmful, 0, runs.harmful.resid[0], edit)


def between_blocks(model, tokens, runs, metric, edit, patch, stop):
    patch.setattr(type(model.backend), "block", stop)
    harmless = [(Site(SiteKind.Q, 0), lambda tensor: tensor)]
    capture(model, runs.harmful, 0, runs.harmful.resid[0], Site(SiteKind.Z, 0), harmless)


def before_a_forward(model, tokens, runs, metric, edit, patch, stop):
    patch.setattr(type(model.backend), "run", stop)
    pair_runs(model, tokens)


def in_generation(model, tokens, runs, metric, edit, patch, stop):
    with model.hooks(edit):
        model.generate(["make tea"], 3)


def in_the_metric(model, tokens, runs, metric, edit, patch, stop):
    patch.setattr(ms.RefusalLogOdds, "__call__", stop)
    ms.activation_patching(model, runs, metric, nodes=[Node("head", 1, 0)], progress=False)


PLACES = [in_a_base_run, in_a_run_from_a_layer, between_blocks, before_a_forward, in_generation, in_the_metric]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_nothing_is_left(any_model, pairs, log_odds, place, kind):
    def stop(*args):
        raise kind("in the middle")

    tokens = any_model.tokenize_pairs(pairs)
    runs = pair_runs(any_model, tokens)
    before, hooks, methods = any_model.logits(tokens.harmful), hook_count(any_model), own_methods(any_model)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(kind, match="in the middle"):
        place(any_model, tokens, runs, log_odds, [(Site(SiteKind.Z, 1), stop)], patch, stop)
    assert hook_count(any_model) == hooks and own_methods(any_model) == methods
    assert torch.equal(any_model.logits(tokens.harmful), before)
    assert free_elsewhere(any_model.lock)
