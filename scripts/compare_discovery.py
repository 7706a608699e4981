"""Compare ways to rank heads and MLPs, by how small the circuits are that they propose; write docs/results/discovery.json.

    python scripts/compare_discovery.py demo                     # or a GGUF file, a folder, a hub id
    python scripts/compare_discovery.py qwen.gguf --drawn docs/results/native-model/steps/native/pairs

Every method ranks all heads and MLPs on the same discovery pairs. The circuits of its first k parts are then measured
exactly on pairs that no method saw. No circuit is polished afterwards, so that the figures say what a ranking is worth.
Each step is kept in --work and not done again, so that a stopped run goes on. The page is drawn from all models
that are in the record.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pages.discovery import PAGE
from pages.page import RESULTS
from pages.render import publish
from steps import Steps

import mechsafety as ms
from mechsafety.circuits import Draw, FaithfulnessMeter, Goal, draw_pairs, split_pairs, train_masks
from mechsafety.circuits.effects import single_effects
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.map import Split
from mechsafety.circuits.search import ranked
from mechsafety.circuits.verification.stability import attribute_pairs
from mechsafety.cli import quiet_libraries
from mechsafety.intervals import mean_interval
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.results import package_versions

N_RANDOM = 10
TARGETS = (0.8, 0.9)
# sizes at which curves are measured, as shares of all parts
SHARES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.17, 0.2, 0.225, 0.25, 0.275, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)

Ranking = list[Node]


def every(split: Split) -> Ranking:
    """All heads and MLPs."""
    return list(head_and_mlp_nodes(split.model.n_layers, split.model.n_heads))


def by_gradient(split: Split, goal: Goal) -> Ranking:
    """Integrated gradients, as the map ranks by default."""
    return ranked(every(split), attribute_pairs(split.meters.found_on).mean(), goal)


def by_patching(split: Split, goal: Goal) -> Ranking:
    """Exact effect of each node alone."""
    effects = single_effects((split.meters.found_on,), every(split), Budget(), False)
    return sorted(effects, key=lambda node: (-goal.size(float(effects[node].mean())), node.order))


def by_masks(split: Split, goal: Goal) -> Ranking:
    """Masks that are trained together."""
    found = train_masks(split.meters.found_on, goal.kind).ranking
    return [part for part in found if isinstance(part, Node)]


METHODS: Mapping[str, Callable[[Split], Ranking]] = {
    f"{name}, {kind}": lambda split, rank=rank, kind=kind: rank(split, Goal(kind=kind))
    for name, rank in (("gradient", by_gradient), ("single effects", by_patching), ("masks", by_masks))
    for kind in ("reach", "match")
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
    """The smallest size of the grid from which on the target is met up to half of all parts; None if there is none."""
    met = [size for size, point in zip(sizes, points, strict=True) if point >= target]
    return min(met) if met else None


def measure(split: Split, steps: Steps) -> dict[str, Any]:
    """Every method on one model."""
    found: dict[str, Any] = {}
    for name, method in METHODS.items():

        def compute(rank: Callable[[Split], Ranking] = method) -> dict[str, Any]:
            ranking, seconds = steps.measured(name, lambda: rank(split))
            return {"ranking": [str(node) for node in ranking], "seconds": seconds, **curve(split, ranking)}

        found[name] = steps.json(name, compute)
    rows = [steps.json(f"random {seed}", lambda s=seed: curve(split, at_random(split, s))) for seed in range(N_RANDOM)]
    found["random"] = {
        "sizes": rows[0]["sizes"],
        "faithfulness": np.mean([row["faithfulness"] for row in rows], axis=0).tolist(),
        "cmd": float(np.mean([row["cmd"] for row in rows])),
        "cpr": [float(np.mean([row["cpr"][0] for row in rows]))],
        "n_pairs": rows[0]["n_pairs"],
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--drawn", type=Path, help="pairs that `draw_pairs` drew of this model, as they were saved")
    parser.add_argument("--limit", type=int, default=64, help="pairs to try, if none are given")
    parser.add_argument("--work", type=Path, default=Path(".work/discovery"), help="where steps are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    quiet_libraries()
    model = ms.load_model(args.model)
    steps = Steps(args.work / model.name.replace("/", "--"), {"model": model.provenance().to_json()["weights"]})
    if args.drawn is None:
        drawn = steps.result("pairs", Draw, lambda: draw_pairs(model, limit=args.limit, progress=False))
    else:
        drawn = Draw.load(args.drawn)
    split = split_pairs(model, drawn, progress=False)
    target = PAGE.stored(args.out)
    record = json.loads(target.read_text()) if target.is_file() else {"models": {}}
    record["models"][model.name] = {
        "methods": measure(split, steps),
        "parts": len(every(split)),
        "found_on": len(drawn.here),
        "versions": package_versions(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count()},
    }
    publish(PAGE.name, record, args.out)


if __name__ == "__main__":
    main()
