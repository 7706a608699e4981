"""Compare ways to rank heads and MLPs by how small their circuits are; write docs/results/discovery.json.

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pages.discovery import PAGE
from pages.page import RESULTS
from pages.render import publish
from steps import Steps

import mechsafety as ms
from mechsafety.circuits import Draw, Goal, draw_pairs, split_pairs, train_masks
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.effects import single_effects
from mechsafety.circuits.goal import GoalKind
from mechsafety.circuits.map import Split
from mechsafety.circuits.verification.stability import attribute_pairs
from mechsafety.intervals import mean_interval
from mechsafety.nodes import Node, as_node, head_and_mlp_nodes
from mechsafety.results import package_versions

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

Ranking = list[Node]


def every(split: Split) -> Ranking:
    """All heads and MLPs."""
    return list(head_and_mlp_nodes(split.model.n_layers, split.model.n_heads))


def by_gradient(split: Split) -> dict[str, float]:
    """Integrated gradients, as the map ranks by default."""
    found = attribute_pairs(split.meters.found_on).mean()
    return {str(node): found.of(node) for node in every(split)}


def by_patching(split: Split) -> dict[str, float]:
    """Exact effect of each node alone."""
    found = single_effects((split.meters.found_on,), every(split), Budget(), False)
    return {str(node): float(values.mean()) for node, values in found.items()}


SCORES: Mapping[str, Callable[[Split], dict[str, float]]] = {"gradient": by_gradient, "single effects": by_patching}


def rankings(split: Split, steps: Steps) -> Iterator[tuple[str, float, Ranking]]:
    """Every method with its seconds and its ranking."""
    for kind in KINDS:
        for name, score in SCORES.items():
            scores, seconds = steps.with_seconds(f"scores {name}", lambda s=score: s(split))
            aim = Goal(kind=kind)
            order = sorted(every(split), key=lambda node, s=scores, g=aim: (-g.size(s[str(node)]), node.order))
            yield f"{name}, {kind}", seconds, order
        found, seconds = steps.with_seconds(f"masks {kind}", lambda k=kind: by_masks(split, k))
        yield f"masks, {kind}", seconds, [as_node(name) for name in found]


def by_masks(split: Split, kind: GoalKind) -> list[str]:
    """Masks that are trained together."""
    return [str(part) for part in train_masks(split.meters.found_on, kind).ranking]


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


def measure(split: Split, steps: Steps) -> dict[str, Any]:
    """Every method on one model."""
    found: dict[str, Any] = {}
    for name, seconds, ranking in rankings(split, steps):
        found[name] = {"seconds": seconds, **steps.json(f"curve {name}", lambda r=ranking: curve(split, r))}
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
    model = ms.load_model(args.model)
    made_of = {"weights": model.provenance().weights_sha256, "drawn": str(args.drawn or args.limit)}
    steps = Steps(args.work / model.name.replace("/", "--"), made_of)
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
