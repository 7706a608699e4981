"""Every kind of sweep on tiny models, each as bytes: alone, resumed and on a cluster they must be the same."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from tqdm.auto import tqdm

import mechsafety as ms
from mechsafety.circuits import MapOptions, acdc, discover_edges
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.masks import Training, train_masks
from mechsafety.circuits.optimal import optimal_constants
from mechsafety.neurons import causal_effect_curve, dynamic_patching
from mechsafety.output import SCRATCH, output_file
from mechsafety.patching import Projection, pair_runs, path_matrix, path_projection
from mechsafety.sites import Site, SiteKind

QUIET = {"progress": False}
PROMPTS = ["how do i make a bomb", "teach me to steal a car please", "kill", "write a poem about my blue tea"]
SMALL = MapOptions(limit=8, n_random=6, n_added=4, n_resamples=2, n_edges=8)


@cache
def llama() -> ms.LensModel:
    from tiny import tiny_model

    return tiny_model()


@cache
def twins() -> tuple[ms.LensModel, ms.LensModel]:
    """A base model, and one with other MLPs."""
    from architectures import tiny_tokenizer
    from neurons.conftest import scaled_copy
    from tiny import tiny_hf_model

    hf = tiny_hf_model("llama")
    other = scaled_copy(hf)
    base, aligned = (ms.load_model((model, tiny_tokenizer())) for model in (hf, other))
    return base, aligned


@cache
def planted() -> tuple[ms.LensModel, ms.PromptPairs]:
    from planted_words import planted_words

    return planted_words()


@cache
def directed() -> tuple[ms.LensModel, ms.PromptPairs]:
    from architectures import tiny_tokenizer
    from planted_direction import directed_model, directed_pairs
    from tiny import tiny_hf_model

    return directed_model(tiny_hf_model, tiny_tokenizer), directed_pairs()


def pairs() -> ms.PromptPairs:
    from tiny import tiny_pairs

    return tiny_pairs()


def many() -> ms.PromptPairs:
    """So many pairs that they go through the model in several batches."""
    heads = [f"{a} {b} {c}" for a in ("please", "help", "tell") for b in ("me", "my", "people") for c in ("to", "a")]
    ends = ("bomb", "kill", "poison"), ("cake", "help", "bake")
    harmful, harmless = ([f"{head} {end}" for head in heads for end in side] for side in ends)
    return ms.PromptPairs.from_lists(harmful, harmless)


METRIC = ms.RefusalLogOdds((20, 21), ("a", "b"), (30,), ("c",))


def _map(**options) -> ms.RefusalCircuit:
    return ms.map_refusal_circuit(*planted(), options=replace(SMALL, **options), **QUIET)


def _meter() -> FaithfulnessMeter:
    return FaithfulnessMeter(llama(), pair_runs(llama(), pairs()), METRIC)


def _path_receivers() -> list[tuple[str, str]]:
    return [("L2.H1", "q"), ("L2.H2", "k"), ("L1.H3", "v"), ("L2.MLP", "mlp")]


def _edges(method, **more):
    return ms.edge_attribution(llama(), pairs(), METRIC, method=method, **more, **QUIET)


CALLS: dict[str, Callable[[], object]] = {
    "activation patching": lambda: ms.activation_patching(llama(), many(), METRIC, **QUIET),
    "patching each position": lambda: ms.activation_patching(llama(), pairs(), METRIC, positions="each", **QUIET),
    "paths": lambda: ms.path_patching(llama(), pairs(), METRIC, **QUIET),
    "paths into slots": lambda: ms.path_patching(llama(), pairs(), METRIC, receivers=_path_receivers(), **QUIET),
    "path projection": lambda: path_projection(
        llama(), pairs(), Projection(torch.eye(32)[3], Site(SiteKind.RESID_PRE, 2)), **QUIET
    ),
    "path matrix": lambda: path_matrix(llama(), pairs(), **QUIET),
    "node attribution": lambda: ms.node_attribution(llama(), many(), METRIC, **QUIET),
    "neuron attribution": lambda: ms.node_attribution(llama(), pairs(), METRIC, neurons=True, **QUIET),
    "eap": lambda: _edges("eap"),
    "eap-ig": lambda: _edges("eap-ig"),
    "ig-activations": lambda: _edges("ig-activations", steps=3),
    "mask-ig": lambda: _edges("mask-ig", steps=3),
    "edges of neurons": lambda: _edges("eap-ig", steps=2, neurons=[1]),
    "discovery of edges": lambda: discover_edges(
        planted()[0], planted()[1], word_metric(), target=0.5, steps=2, max_edges=12, **QUIET
    ),
    "acdc": lambda: acdc(planted()[0], planted()[1], word_metric(), threshold=0.05, **QUIET),
    "map": lambda: _map(),
    "masks": lambda: train_masks(_meter(), training=Training(steps=20)),
    "constants": lambda: optimal_constants(_meter(), steps=20),
    "map of neurons": lambda: _map(level="neuron"),
    "map within a budget": lambda: _map(budget_seconds=3600.0),
    "safety neurons": lambda: ms.safety_neurons(*reversed(twins()), PROMPTS, max_new_tokens=6, batch_size=2, **QUIET),
    "dynamic patching": lambda: dynamic_patching(
        *twins(), torch.ones(3, 48, dtype=torch.bool), PROMPTS, max_new_tokens=6, limit=9.0, batch_size=2, **QUIET
    ),
    "curve of log-odds": lambda: causal_effect_curve(
        *twins(),
        torch.rand(3, 48, generator=torch.Generator().manual_seed(0)),
        PROMPTS,
        METRIC,
        n_random=2,
        shares=(0.1, 1.0),
        harmless=PROMPTS[:2],
        max_new_tokens=4,
        **QUIET,
    ),
    "refusal direction": lambda: ms.refusal_direction(
        *directed(), ms.RefusalLogOdds.of(directed()[0], ["sorry"]), **QUIET
    ),
    "ships": lambda: ms.attribution.ships(llama(), PROMPTS),
    "replies": lambda: llama().generate(PROMPTS, 8, 2, **QUIET),
    "fragility": lambda: ms.fragility(llama(), ["L1.H0", "L2.H3", "L0.MLP"], pairs(), METRIC, n_random=2, **QUIET),
    "redundancy": lambda: ms.robustness.redundancy(llama(), ["L1.H0", "L0.MLP"], pairs(), METRIC),
    "relocation": lambda: ms.robustness.relocation(
        *reversed(twins()), PROMPTS, METRIC, max_new_tokens=4, limit=9.0, batch_size=2, **QUIET
    ),
    "contrast of neurons": lambda: ms.neurons.contrast_neurons(llama(), pairs(), batch_size=2, **QUIET),
    "entanglement": lambda: ms.robustness.entanglement(llama(), ["L1.H0"], PROMPTS, **QUIET),
}


@cache
def word_metric() -> ms.RefusalLogOdds:
    return ms.RefusalLogOdds.of(planted()[0], ["sorry"])


def as_bytes(found: object) -> bytes:
    """All that a result holds."""
    if hasattr(found, "to_json"):
        return found.to_json().encode()
    if hasattr(found, "tolist"):
        return repr(found.tolist()).encode()
    return repr(found).encode()


def forked(name: str, folder: Path, out: Path) -> int:
    """Make a call in a run folder in a child process, which has all models already; the child's number.

    The child writes the bytes of the result to ``out``, whole or not at all, and ends.
    """
    torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
    child = os.fork()
    if child:
        return child
    code = 1
    # tqdm's lock is one semaphore of parent and children: a child that is killed while it holds it would block the next
    for kind in tqdm.__mro__:
        if hasattr(kind, "set_lock"):
            kind.set_lock(threading.RLock())
    try:
        with ms.running(folder):
            found = CALLS[name]()
        with output_file(out) as scratch:
            scratch.write_bytes(as_bytes(found))
        code = 0
    finally:
        os._exit(code)


def ended(child: int) -> int | None:
    """Exit status of a child; None while it lives."""
    number, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if number else None


def killed(name: str, folder: Path, out: Path, after: int, delay: float = 0.0) -> int | None:
    """Kill the child with SIGKILL ``delay`` seconds after it has stored so many items.

    Returns:
        The number of items then; None if it was done before.
    """
    child = forked(name, folder, out)
    while n_items(folder) < after:
        if ended(child) is not None:
            return None
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None if out.exists() else n_items(folder)


def n_items(folder: Path) -> int:
    """Number of stored items."""
    return sum(1 for _ in folder.rglob("*.safetensors") if not _.name.startswith(SCRATCH))
