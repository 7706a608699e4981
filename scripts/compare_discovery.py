"""Compare ways to rank heads and MLPs by how small their circuits are; write docs/results/discovery.json.

    python scripts/compare_discovery.py demo                     # or a GGUF file, a folder, a hub id
    python scripts/compare_discovery.py qwen.gguf --only methods goals --no-resamples

Every method ranks all heads and MLPs on the same discovery pairs. The circuits of its first k parts are then measured
exactly on pairs that no method saw. No circuit is polished afterwards, so that the figures say what a ranking is worth.
Each step is kept in --work and not done again, so that a stopped run goes on. The page is drawn from all models
that are in the record.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from einops import einsum
from pages.discovery import PAGE
from pages.page import RESULTS
from pages.render import publish
from steps import Steps

import mechsafety as ms
from mechsafety.attribution import edge_attribution
from mechsafety.circuits import Draw, Goal, acdc, draw_pairs, rank_parts, search_circuit, split_pairs, train_masks
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.edge_faithfulness import all_edges
from mechsafety.circuits.effects import single_effects
from mechsafety.circuits.goal import GoalKind
from mechsafety.circuits.map import Split
from mechsafety.circuits.search import SearchKind
from mechsafety.circuits.verification.stability import attribute_pairs, bootstrap_stability
from mechsafety.intervals import mean_interval
from mechsafety.nodes import Node, as_node, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.results import package_versions
from mechsafety.testbed.truth import Truth

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from measure import cpu_model, memory_gib, reset_peak

N_RANDOM = 10
TARGETS = (0.8, 0.9)
# sizes at which curves are measured, as shares of all parts
SHARES = (
    0.02,
    0.03,
    0.05,
    0.07,
    0.1,
    0.13,
    0.17,
    0.2,
    0.225,
    0.25,
    0.275,
    0.3,
    0.35,
    0.4,
    0.45,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
)

KINDS: tuple[GoalKind, ...] = get_args(GoalKind)
N_RESAMPLES = 5
# points of EAP-IG's integral, as of the gradients of nodes
EDGE_STEPS = 8
# ACDC has no ranking: a part's score is the largest of these thresholds at which one of its edges is kept
THRESHOLDS = tuple(float(value) for value in np.logspace(-3, 0, 10))

Ranking = list[Node]
# scores of all parts, if each discovery pair counts so many times (None: once)
Score = Callable[[Sequence[int] | None], dict[str, float]]


def every(split: Split) -> Ranking:
    """All heads and MLPs."""
    return list(head_and_mlp_nodes(split.model.n_layers, split.model.n_heads))


def by_gradient(split: Split) -> Score:
    """Integrated gradients, as the map ranks by default."""
    by_pair = attribute_pairs(split.meters.found_on)
    return lambda weights: {str(node): by_pair.mean(weights).of(node) for node in every(split)}


def by_patching(split: Split) -> Score:
    """Exact effect of each node alone."""
    found = single_effects((split.meters.found_on,), every(split), Budget(), False)
    return lambda weights: {str(node): float(np.average(own, weights=weights)) for node, own in found.items()}


def by_edges(split: Split) -> Score:
    """EAP-IG (Hanna et al. 2024): a node's score is that of the strongest edge that leaves it."""
    model, metric, sums, gaps = split.model, split.drawn.metric, [], []
    for pair in split.drawn.here:
        runs = pair_runs(model, replace(split.drawn.here, pairs=(pair,)))
        found = edge_attribution(model, runs, metric, steps=EDGE_STEPS, progress=False)
        harmful, harmless = runs.ends(metric)
        gaps.append(float(harmful - harmless))
        sums.append(found.scores * gaps[-1])
    by_pair, names = torch.stack(sums), list(map(str, found.senders))

    def score(weights: Sequence[int] | None) -> dict[str, float]:
        w = torch.ones(len(gaps)) if weights is None else torch.tensor(weights).float()
        scores = einsum(w, by_pair, "pair, pair sender receiver -> sender receiver") / float(w @ torch.tensor(gaps))
        strongest = scores.gather(1, scores.abs().argmax(1, keepdim=True)).flatten().tolist()
        of = dict(zip(names, strongest, strict=True))
        return {str(node): of[str(node)] for node in every(split)}

    return score


def by_acdc(split: Split) -> Score:
    """ACDC (Conmy et al. 2023): the largest threshold at which an edge of the node is kept.

    A pair that counts several times counts once here, because ACDC has no weights.
    """
    pairs = split.drawn.here

    def score(weights: Sequence[int] | None) -> dict[str, float]:
        counted = [1] * len(pairs) if weights is None else weights
        some = replace(pairs, pairs=tuple(pair for pair, n in zip(pairs, counted, strict=True) if n))
        found = dict.fromkeys(map(str, every(split)), 0.0)
        for threshold in THRESHOLDS:
            kept = acdc(split.model, some, split.drawn.metric, threshold=threshold, measure="metric", progress=False)
            found |= {str(node): threshold for node in kept.nodes}
        return found

    return score


def by_masks(split: Split, kind: GoalKind) -> Callable[[Sequence[int] | None], list[str]]:
    """Masks that are trained together."""
    return lambda weights: [str(part) for part in train_masks(split.meters.found_on, kind, weights=weights).ranking]


SCORES: Mapping[str, Callable[[Split], Score]] = {
    "gradient": by_gradient,
    "single effects": by_patching,
    "EAP-IG": by_edges,
    "ACDC": by_acdc,
}


def ordered(split: Split, scores: Mapping[str, float], kind: GoalKind) -> Ranking:
    """All parts, in the order in which a goal wants them."""
    aim = Goal(kind=kind)
    return sorted(every(split), key=lambda node: (-aim.size(scores[str(node)]), node.order))


@dataclass(frozen=True)
class Method:
    """A way to rank all parts.

    Attributes:
        name: Its name and the goal.
        kind: The goal.
        seconds, peak_gib: What one ranking took, and the largest resident memory meanwhile, the model included.
        order: Its ranking.
        ranking_of: The ranking if each discovery pair counts so many times.
    """

    name: str
    kind: GoalKind
    seconds: float
    peak_gib: float
    order: Ranking
    ranking_of: Callable[[Sequence[int] | None], Ranking]


def methods(split: Split, steps: Steps, names: Collection[str]) -> Iterator[Method]:
    """Every method."""
    for name in names:
        made: list[Score] = []  # of a method that a stored step need not make again

        def score(name: str = name, made: list[Score] = made) -> Score:
            if not made:
                made.append(SCORES[name](split))
            return made[0]

        found, seconds = steps.with_seconds(f"scores {name}", lambda own=score: with_peak(lambda: own()(None)))
        for kind in KINDS:

            def ranking_of(weights: Sequence[int] | None, kind: GoalKind = kind, own: Any = score) -> Ranking:
                return ordered(split, own()(weights), kind)

            order = ordered(split, found["found"], kind)
            yield Method(f"{name}, {kind}", kind, seconds, found["peak_gib"], order, ranking_of)
    for kind in KINDS:
        own = by_masks(split, kind)
        found, seconds = steps.with_seconds(f"masks {kind}", lambda own=own: with_peak(lambda: own(None)))

        def trained(weights: Sequence[int] | None, own: Any = own) -> Ranking:
            return [as_node(name) for name in own(weights)]

        order = [as_node(name) for name in found["found"]]
        yield Method(f"masks, {kind}", kind, seconds, found["peak_gib"], order, trained)


def with_peak(compute: Callable[[], Any]) -> dict[str, Any]:
    """What a function returns, and the largest resident memory of this process meanwhile, in GiB (Linux)."""
    reset_peak()
    found = compute()
    return {"found": found, "peak_gib": round(memory_gib(), 2)}


def stability(split: Split, method: Method) -> dict[str, Any]:
    """Overlap of the smallest prefix for the first target with those of bootstrap resamples of the pairs."""
    meter, goal = split.meters.found_on, Goal(kind=method.kind, target=TARGETS[0])
    found = bootstrap_stability(meter, method.ranking_of, goal, n=N_RESAMPLES)
    assert found is not None
    return {"mean": found.mean, "jaccards": list(found.jaccards)}


def searched(split: Split, search: SearchKind, kind: GoalKind, target: float) -> dict[str, Any]:
    """The circuit after removal one by one, and its faithfulness on fresh pairs, which neither step has seen."""
    options = replace(split.options, search=search, goal=kind, target=target)
    result = search_circuit(rank_parts(replace(split, options=options))).result
    meter = split.meters.fresh
    assert meter is not None
    kept, (harmful, harmless) = meter.kept([list(result.circuit)])[0], meter.ends()
    by_pair = (kept - harmless) / float((harmful - harmless).mean())
    return {
        "parts": len(result.circuit),
        "reached": result.reached,
        "fresh": [float(by_pair.mean()), *mean_interval(by_pair, 0)],
        "n_pairs": len(by_pair),
    }


def at_random(split: Split, seed: int) -> Ranking:
    """Any order."""
    return [every(split)[k] for k in np.random.default_rng(seed).permutation(len(every(split)))]


def curve(split: Split, ranking: Ranking) -> dict[str, Any]:
    """Faithfulness of the first k parts on the pairs that no method saw, with intervals over pairs."""
    sizes = sorted({0, len(ranking)} | {round(share * len(ranking)) for share in SHARES})
    judges = split.meters.judges
    kept = np.concatenate([meter.kept([ranking[:size] for size in sizes]) for meter in judges], axis=1)
    harmful, harmless = (np.concatenate([meter.ends()[k] for meter in judges]) for k in range(2))
    gap = float((harmful - harmless).mean())
    # the mean over pairs of these is the faithfulness
    by_pair = (kept - harmless) / gap
    points = by_pair.mean(1)
    shares = np.array(sizes) / len(ranking)
    cpr_by_pair = np.trapezoid(by_pair, shares, axis=0)
    return {
        "sizes": sizes,
        "faithfulness": points.tolist(),
        "low": [mean_interval(row, 0)[0] for row in by_pair],
        "high": [mean_interval(row, 0)[1] for row in by_pair],
        "cmd": float(np.trapezoid(np.abs(1 - points), shares)),
        "cpr": [float(cpr_by_pair.mean()), *mean_interval(cpr_by_pair, 0)],
        "needed": {str(target): needed(sizes, points, target) for target in TARGETS},
        "n_pairs": by_pair.shape[1],
    }


def needed(sizes: list[int], points: np.ndarray, target: float) -> int | None:
    """The smallest size of the grid that reaches the target; None where only the whole model does."""
    return next((size for size, point in zip(sizes[:-1], points, strict=False) if point >= target), None)


def measure(
    split: Split, steps: Steps, names: Collection[str] = tuple(SCORES), resample: bool = True
) -> dict[str, Any]:
    """Every method on one model; without `resample` no ranking is repeated on resampled pairs."""
    found: dict[str, Any] = {}
    for method in methods(split, steps, names):
        found[method.name] = {
            "seconds": method.seconds,
            "peak_gib": method.peak_gib,
            **steps.json(f"curve {method.name}", lambda own=method: curve(split, own.order)),
        }
        if resample or (steps.folder / f"resamples {method.name}.json").is_file():
            again = steps.json(f"resamples {method.name}", lambda own=method: stability(split, own))
            found[method.name] |= {"stability": again}
    rows = [steps.json(f"random {seed}", lambda s=seed: curve(split, at_random(split, s))) for seed in range(N_RANDOM)]
    found["random"] = {
        "sizes": rows[0]["sizes"],
        "faithfulness": np.mean([row["faithfulness"] for row in rows], axis=0).tolist(),
        "cmd": float(np.mean([row["cmd"] for row in rows])),
        "cpr": [float(np.mean([row["cpr"][0] for row in rows]))],
        "n_pairs": rows[0]["n_pairs"],
    }
    return found


def measure_searches(split: Split, steps: Steps) -> list[dict[str, Any]]:
    """The circuits after removal, for every search, goal and target."""
    rows = []
    for search, kind, target in product(get_args(SearchKind), KINDS, TARGETS):
        name = f"search {search}, {kind}, {target}"
        found, seconds = steps.with_seconds(
            name, lambda s=search, k=kind, t=target: with_peak(lambda: searched(split, s, k, t))
        )
        made_of = {"search": search, "goal": kind, "target": target, "seconds": seconds, "peak_gib": found["peak_gib"]}
        rows.append(made_of | found["found"])
    return rows


def verdicts(split: Split, kind: GoalKind, truth: Truth | None) -> dict[str, Any]:
    """A whole map for a goal: its size, its faithfulness on fresh pairs, and the verdict on each claim."""
    circuit = ms.map_refusal_circuit(
        split.model, split.drawn, options=replace(split.options, goal=kind), progress=False
    )
    check, nodes = circuit.verification, {member.node for member in circuit.nodes}
    known = None if truth is None else len(nodes & set(truth.nodes)) / len(truth.nodes)
    fresh = None if check.fresh is None else [check.fresh.faithfulness, *check.fresh.ci]
    claims = {verdict: list(names) for verdict, names in check.by_verdict.items()}
    opposing = sum(member.opposes for member in circuit.nodes)
    return {"goal": kind, "parts": len(nodes), "opposing": opposing, "fresh": fresh, "claims": claims, "recall": known}


def planted_split(**parts: Any) -> tuple[Split, Truth]:
    """A planted model with decoys and such parts, with its pairs split, and its circuit."""
    made = ms.testbed.planted(3, decoys=2, **parts)
    model = ms.load_model((made.model, made.tokenizer))
    drawn = draw_pairs(model, made.pairs, limit=48, progress=False)
    return split_pairs(model, drawn, progress=False), made.truth


ASPECTS = ("methods", "searches", "goals")
PLANTED: Mapping[str, Mapping[str, Any]] = {
    "planted": {},
    "planted with backups": {"backups": 1},
    "planted with opposing parts": {"opposing": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"also: {', '.join(PLANTED)}")
    parser.add_argument("--drawn", type=Path, help="pairs that `draw_pairs` drew of this model, as they were saved")
    parser.add_argument("--limit", type=int, default=64, help="pairs to try, if none are given")
    parser.add_argument("--only", nargs="+", choices=ASPECTS, default=ASPECTS, help="what to measure; else everything")
    parser.add_argument(
        "--no-resamples", action="store_true", help="repeat no ranking on resampled pairs, which takes long"
    )
    parser.add_argument("--work", type=Path, default=RESULTS / "discovery" / "steps", help="where steps are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    made_of: dict[str, Any] = {"thresholds": list(THRESHOLDS), "resamples": N_RESAMPLES}
    truth = None
    if args.model in PLANTED:
        name, names = args.model, tuple(SCORES)
        split, truth = planted_split(**PLANTED[args.model])
        made_of["weights"] = split.model.provenance().weights_sha256
        steps = Steps(args.work / name.replace(" ", "-"), made_of)
    else:
        model = ms.load_model(args.model)
        # ACDC tries every edge, which takes days on a model of this size
        name, names = model.name, tuple(method for method in SCORES if method != "ACDC")
        made_of |= {"weights": model.provenance().weights_sha256, "drawn": str(args.drawn or args.limit)}
        steps = Steps(args.work / name.replace("/", "--"), made_of)
        if args.drawn is None:
            drawn = steps.result("pairs", Draw, lambda: draw_pairs(model, limit=args.limit, progress=False))
        else:
            drawn = Draw.load(args.drawn)
        split = split_pairs(model, drawn, progress=False)
    target = PAGE.stored(args.out)
    record = json.loads(target.read_text()) if target.is_file() else {"models": {}}
    now = {
        "parts": len(every(split)),
        "edges": len(all_edges(split.model.n_layers, split.model.n_heads, split.model.parallel)),
        "found_on": len(split.drawn.here),
        # what earlier records lack: they searched each size with runs, and a quarter of the held-out pairs set the size
        "sizes": "read from the curve",
        "versions": package_versions(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count()},
    }
    before = record["models"].get(name, {})
    kept = {aspect: row for aspect, row in before.items() if aspect in ASPECTS and aspect not in args.only}
    if kept and any(before.get(key) != value for key, value in now.items()):
        raise SystemExit(f"{target} has {' and '.join(kept)} of {name} from another place; measure all, or use --out")
    aspects: dict[str, Callable[[], Any]] = {
        "methods": lambda: measure(split, steps, names, not args.no_resamples),
        "searches": lambda: measure_searches(split, steps),
        "goals": lambda: [steps.json(f"map {kind}", lambda own=kind: verdicts(split, own, truth)) for kind in KINDS],
    }
    record["models"][name] = {
        **kept,
        **{aspect: aspects[aspect]() for aspect in args.only},
        **now,
    }
    publish(PAGE.name, record, args.out)


if __name__ == "__main__":
    main()
