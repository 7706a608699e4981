"""Every method against models whose refusal circuit is known: which are fooled by decoys, and which by backups.

    python benchmarks/truth.py [--jobs N]     # or: make bench-truth

36 planted models (10 with decoys, 10 with backups, 6 with both, 10 with neither) and the certified one. On 200 more,
whose circuits differ in shape as well, the maps alone are measured, and which role each node gets.
Writes docs/results/ground-truth.json after every model, goes on from there when stopped, and draws its page at the end.
To add a method, write a function like those below and put it into METHODS; then it alone is measured.
"""

import argparse
import datetime
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from tqdm.auto import tqdm

import mechsafety as ms
from mechsafety import testbed
from mechsafety.circuits import EdgeMeter, FaithfulnessMeter, NeuronMeter, train_masks
from mechsafety.circuits.edge_faithfulness import all_edges
from mechsafety.models import LensModel
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.output import json_text
from mechsafety.patching import pair_runs
from mechsafety.patching.masks import PairRuns
from mechsafety.patching.paths import measured_edges
from mechsafety.patching.receivers import reaches
from mechsafety.patching.senders import node_outputs
from mechsafety.results import package_versions
from mechsafety.sites import SiteKind

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from pages.ground_truth import PAGE
from pages.render import publish

# name: (decoys, stages doubled, models)
PLANTED = {"neither": (0, 0, 10), "decoys": (6, 0, 10), "backups": (0, 1, 10), "both": (4, 1, 6)}
VARIED = 200
N_PAIRS = 12
# exact path patching of more edges than this is left out
AFFORDABLE_EDGES = 1500
# and ACDC over more edges than this, which takes a minute and more
AFFORDABLE_REMOVALS = 600
FOLDS = 4


@dataclass(frozen=True)
class Case:
    """One model with its truth, and what the methods work on."""

    model: LensModel
    pairs: ms.PromptPairs
    metric: ms.RefusalLogOdds
    runs: PairRuns
    truth: testbed.Truth

    @property
    def nodes(self) -> tuple[Node, ...]:
        return head_and_mlp_nodes(self.model.n_layers, self.model.n_heads)

    @property
    def neurons(self) -> list[Node]:
        model = self.model
        return [Node("neuron", layer, k) for layer in range(model.n_layers) for k in range(model.d_mlp)]


def activation_difference(case: Case) -> Any:
    """Root mean square difference of what a node writes (of a neuron: of its activation), harmful less harmless."""
    runs = case.runs
    change = node_outputs(case.model, runs.harmful, case.nodes) - node_outputs(case.model, runs.harmless, case.nodes)
    sizes = reduce(change.square(), "node pair pos d -> node", "sum").sqrt()
    scores = dict(zip(case.nodes, sizes.tolist(), strict=True))
    acts = runs.harmful.acts[SiteKind.NEURONS] - runs.harmless.acts[SiteKind.NEURONS]
    each = rearrange(reduce(acts.square(), "layer pair pos neuron -> layer neuron", "sum").sqrt(), "l n -> (l n)")
    return scores | dict(zip(case.neurons, each.tolist(), strict=True))


def probes(case: Case) -> Any:
    """Accuracy of a logistic regression on a node's output (mean over positions), on pairs it was not fitted on."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    runs, n = case.runs, len(case.pairs)
    sides = [node_outputs(case.model, run, case.nodes).mean(2) for run in (runs.harmful, runs.harmless)]
    features = torch.cat(sides, dim=1).numpy()
    labels, groups = np.repeat([1, 0], n), np.tile(np.arange(n), 2)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return {
        node: cross_val_score(probe, rows, labels, groups=groups, cv=GroupKFold(FOLDS)).mean()
        for node, rows in zip(case.nodes, features, strict=True)
    }


def direct_logit_attribution(case: Case) -> Any:
    """What a node adds to the metric through the unembedding alone, harmful less harmless."""
    found = ms.direct_logit_attribution(case.model, case.pairs, case.metric, progress=False)
    heads, mlps = found.heads.mean(-1), found.mlps.mean(-1)
    return {
        node: float(heads[node.layer, node.index] if node.kind == "head" else mlps[node.layer]) for node in case.nodes
    }


def node_attribution(case: Case) -> Any:
    """Integrated gradients over node masks."""
    return ms.node_attribution(case.model, case.runs, case.metric, neurons=True)


def eap(case: Case) -> Any:
    """Edge attribution patching, one gradient."""
    return _with_nodes(ms.edge_attribution(case.model, case.runs, case.metric, method="eap", progress=False))


def eap_ig(case: Case) -> Any:
    """EAP with the gradient averaged over ten points between the embeddings."""
    found = ms.edge_attribution(case.model, case.runs, case.metric, method="eap-ig", steps=10, progress=False)
    return _with_nodes(found)


def _with_nodes(scores: ms.attribution.EdgeScores) -> Any:
    """Edges, and nodes by the sum of their outgoing edges."""
    nodes = {node: value for node, value in scores.node_scores().items() if node.kind != "embed"}
    return nodes | dict(testbed.ranking_of(scores) or {})


def exact_patching(case: Case) -> Any:
    """Every head, MLP and neuron patched alone, exactly."""
    both = [*case.nodes, *case.neurons]
    return ms.activation_patching(case.model, case.runs, case.metric, nodes=both, progress=False)


def exact_paths(case: Case) -> Any:
    """Every direct path between two nodes patched alone, exactly; None where there are too many."""
    slots = {"head": ("q", "k", "v"), "mlp": ("mlp",), "logits": ("resid",)}
    edges = [
        ms.Edge(sender, receiver, slot)
        for sender in case.nodes
        for receiver in (*case.nodes, Node("logits"))
        if sender != receiver and reaches(sender, receiver, parallel=False)
        for slot in slots[receiver.kind]
    ]
    if len(edges) > AFFORDABLE_EDGES:
        return None
    changes = measured_edges(case.model, case.runs, case.metric, edges).mean(1)
    return dict(zip(edges, changes.tolist(), strict=True))


def acdc(case: Case) -> Any:
    """ACDC's greedy removal of edges, by KL divergence with its default threshold; None where there are too many."""
    if len(all_edges(case.model.n_layers, case.model.n_heads, parallel=False)) > AFFORDABLE_REMOVALS:
        return None
    found = ms.circuits.acdc(case.model, case.pairs, case.metric, progress=False)
    return [*found.nodes, *found.edges]


def trained_masks(case: Case) -> Any:
    """Masks of heads and MLPs, of neurons and of edges, each trained together: the place in each ranking."""
    whole = FaithfulnessMeter(case.model, case.runs, case.metric)
    meters = [whole, NeuronMeter.of(whole, tuple(range(case.model.n_layers)))]
    if len(all_edges(case.model.n_layers, case.model.n_heads, parallel=False)) <= AFFORDABLE_EDGES:
        meters.append(EdgeMeter(case.model, case.runs, case.metric))
    found: dict[Any, float] = {}
    for meter in meters:
        ranking = train_masks(meter).ranking
        for place, part in enumerate(ranking):
            found.setdefault(part, 1 - place / len(ranking))
    return found


def map_nodes(case: Case) -> Any:
    """The whole map of heads and MLPs: search, backups, roles, edges, checks."""
    return _map(case, "node")


def map_neurons(case: Case) -> Any:
    """The whole map, MLPs taken apart into neurons."""
    return _map(case, "neuron")


def map_edges(case: Case) -> Any:
    """The whole map as a circuit of edges, everything else cut."""
    return _map(case, "edge")


def _map(case: Case, level: str) -> Any:
    # every other option is the default: the times are those of a user's map
    return ms.map_refusal_circuit(
        case.model, case.pairs, options=ms.MapOptions(level=level, limit=len(case.pairs)), progress=False
    )


# each returns what `testbed.score` takes, or None where it cannot be run
METHODS: tuple[Callable[[Case], Any], ...] = (
    activation_difference,
    probes,
    direct_logit_attribution,
    node_attribution,
    eap,
    eap_ig,
    exact_patching,
    exact_paths,
    acdc,
    trained_masks,
    map_nodes,
    map_neurons,
    map_edges,
)


# what varied circuits are for: the maps, and their roles
MAPPED: tuple[Callable[[Case], Any], ...] = (map_nodes, map_neurons)


def varied() -> dict[str, dict[str, Any]]:
    """Options of the models with varied circuits, by name; drawn once, the same in every run."""
    found = {}
    for k in range(VARIED):
        rng = random.Random(9000 + k)
        norm, layers = ("rmsnorm", "layernorm")[k % 2], 2 + k % 11
        heads = rng.choice((4, 6, 8) if layers < 4 else (2, 3, 4, 6))
        found[f"varied-{k}"] = {
            "seed": 9000 + k,
            "layers": layers,
            "heads": heads,
            "norm": norm,
            "decoys": rng.choice((0, 2, 4)),
            "neurons": rng.choice((1, 2, 3)),
            "varied": True,
        }
    return found


def shapes() -> dict[str, dict[str, Any]]:
    """Options of every planted model by name; drawn once, the same in every run."""
    found = {}
    for condition, (decoys, backups, n) in PLANTED.items():
        for k in range(n):
            seed = 1000 * (1 + list(PLANTED).index(condition)) + k
            rng = random.Random(seed)
            norm = "layernorm" if k % 3 == 2 else "rmsnorm"
            heads = rng.choice((2, 4, 8))
            # every other model of the Llama kind has grouped queries
            kv_heads = rng.choice([n for n in (1, 2, 4) if n < heads]) if norm == "rmsnorm" and k % 2 else None
            found[f"{condition}-{k}"] = {
                "seed": seed,
                "layers": rng.choice((3, 4, 5) if heads < 8 else (3, 4)),
                "heads": heads,
                "kv_heads": kv_heads,
                "norm": norm,
                "decoys": decoys,
                # the last models with backups double two stages
                "backups": backups * (2 if k >= 2 * n // 3 else 1),
                "neurons": rng.choice((1, 2, 3)),
            }
    return found


def build(options: Mapping[str, Any] | None) -> Case:
    """A planted model, or the certified one."""
    made = testbed.certified() if options is None else testbed.planted(**options)
    model = ms.load_model((made.model, made.tokenizer))
    pairs = made.pairs.sample(N_PAIRS)
    metric = ms.RefusalLogOdds.detect(model, pairs)
    return Case(model, pairs, metric, pair_runs(model, pairs, extra=[SiteKind.NEURONS]), made.truth)


def asked(options: Mapping[str, Any] | None) -> tuple[Callable[[Case], Any], ...]:
    """The methods that a model is for."""
    return MAPPED if options and options.get("varied") else METHODS


def measure(name: str, options: Mapping[str, Any] | None, wanted: Collection[str]) -> dict[str, Any]:
    """The wanted methods on one model."""
    torch.set_num_threads(1)
    case = build(options)
    rows = {}
    for method in asked(options):
        if method.__name__ not in wanted:
            continue
        begin = time.perf_counter()
        result = method(case)
        seconds = time.perf_counter() - begin
        if result is None:
            continue
        found = figures(testbed.score(result, case.truth))
        if method is trained_masks:  # a place in a ranking has no strength
            found = {key: value for key, value in found.items() if "strength" not in key}
        rows[method.__name__] = found | {"seconds": round(seconds, 2)}
        if method in MAPPED:
            rows[method.__name__]["named"] = named(result, case.truth)
    condition = name.split("-")[0]
    truth = {"nodes": len(case.truth.nodes), "neurons": len(case.truth.neurons), "edges": len(case.truth.edges)}
    return {"condition": condition, "options": options, "truth": truth, "methods": rows}


def named(circuit: ms.RefusalCircuit, truth: testbed.Truth) -> list[list[Any]]:
    """True role, kind, role found, and number of nodes, of the true nodes that were found."""
    counts = Counter(
        (truth.roles[member.node], member.node.kind, member.role)
        for member in circuit.nodes
        if member.node in truth.roles
    )
    return [[*key, count] for key, count in sorted(counts.items())]


def figures(found: testbed.TruthScore) -> dict[str, Any]:
    """What the table is made of."""
    rows: dict[str, Any] = {"roles": found.role_accuracy, "backups_found": found.backups_found}
    for name in ("nodes", "neurons", "edges"):
        ranking = getattr(found, name)
        if ranking is not None:
            rows |= {f"{name}_{key}": value for key, value in asdict(ranking).items() if not key.startswith("n")}
    for name in ("found_nodes", "found_edges"):
        part = getattr(found, name)
        if part is not None:
            rows |= {f"{name}_{key}": getattr(part, key) for key in ("precision", "recall", "f1")}
            rows["decoys_found"] = len(found.decoys_found)
    return {key: round(value, 6) for key, value in rows.items() if value is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    parser.add_argument("--again", action="store_true", help="measure all models again")
    parser.add_argument("--only", nargs="*", help="names of models")
    args = parser.parse_args()
    target = PAGE.stored()
    store: dict[str, Any] = json.loads(target.read_text()) if target.is_file() and not args.again else {"models": {}}
    store |= {
        "date": datetime.date.today().isoformat(),
        "versions": package_versions(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count()},
        "pairs": N_PAIRS,
    }
    cases: dict[str, dict[str, Any] | None] = {**shapes(), "certified": None, **varied()}
    names = {method.__name__ for method in METHODS}
    tried: dict[str, list[str]] = store.setdefault("tried", {})
    todo = {}
    for name in args.only or cases:
        missing = {method.__name__ for method in asked(cases[name])} - set(tried.get(name, ()))
        if missing:
            todo[name] = missing
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(measure, name, cases[name], missing): name for name, missing in todo.items()}
        for done in tqdm(as_completed(waiting), total=len(waiting), desc="models"):
            name, row = waiting[done], done.result()
            methods = {**store["models"].get(name, {}).get("methods", {}), **row["methods"]}
            order = [method.__name__ for method in METHODS if method.__name__ in methods]
            store["models"][name] = {**row, "methods": {method: methods[method] for method in order}}
            tried[name] = sorted((set(tried.get(name, ())) | todo[name]) & names)
            target.write_text(json_text(store) + "\n")
    store["models"] = {name: store["models"][name] for name in cases if name in store["models"]}
    publish(PAGE.name, store)


if __name__ == "__main__":
    main()
