"""Measure how fragile the demo model's refusal is; write docs/results/robustness.json.

    python scripts/study_robustness.py

The parts are those of the map docs/results/robustness/circuit.json. Everything is measured on built-in pairs of topics
that the map's search did not see, and that the map itself did not use. Each step is kept in --work and not done again,
so that a stopped run goes on. The steps are in docs/results/robustness/steps. Of replies only their kinds are kept. The
page is drawn from the stored JSON alone.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from pages.page import RESULTS
from pages.render import publish
from pages.robustness import PAGE
from reproduce_refusal_direction import rows_of
from steps import Steps

import mechsafety as ms
from mechsafety.circuits import check_behaviour, draw_pairs
from mechsafety.prompts import builtin_prompts
from mechsafety.robustness import (
    Entanglement,
    FragilityCurve,
    Redundancy,
    RefusalDepth,
    Relocation,
    concentration,
    entanglement,
    fragility,
    redundancy,
    refusal_depth,
    relocation,
)

CIRCUIT = RESULTS / "robustness" / "circuit.json"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything."""

    pairs: int = 16
    n_random: int = 20
    ordinary: int = 10
    reply_tokens: int = 48
    depth_prompts: int = 16
    depth_tokens: int = 20
    direction_pairs: int = 32
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    relocation_prompts: int = 12
    relocation_tokens: int = 12


SMALL = Size(
    pairs=4,
    n_random=2,
    ordinary=4,
    reply_tokens=8,
    depth_prompts=2,
    depth_tokens=4,
    direction_pairs=8,
    relocation_prompts=2,
    relocation_tokens=3,
)


def unseen(model: ms.LensModel, circuit: ms.RefusalCircuit, metric: ms.RefusalLogOdds, n: int) -> ms.PromptPairs:
    """Pairs that the model treats as expected, of held-out topics, other than those of the map."""
    limit, seed = circuit.provenance.options["limit"], circuit.provenance.seed or 0
    used = set(draw_pairs(model, metric=metric, limit=limit, seed=seed, progress=False).there.pairs)
    test = ms.PromptPairs.builtin("test").aligned(model)
    left = dataclasses.replace(test, pairs=tuple(pair for pair in test.pairs if pair not in used))
    tried = left.sample(2 * n, seed=1)
    keep = check_behaviour(model, tried, metric, seed=seed, progress=False)[-1]
    return dataclasses.replace(tried, pairs=tuple(p for p, good in zip(tried.pairs, keep, strict=True) if good)[:n])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--base", default="demo-base", help="the model before its alignment")
    parser.add_argument("--circuit", type=Path, default=CIRCUIT)
    parser.add_argument("--work", type=Path, default=RESULTS / "robustness" / "steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--small", action="store_true", help="a little of everything: does it run?")
    args = parser.parse_args()
    publish(PAGE.name, study(args, SMALL if args.small else Size()), args.out)


def study(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    """Every measurement."""
    circuit, model = ms.RefusalCircuit.load(args.circuit), ms.load_model(args.model)
    metric = ms.RefusalLogOdds.from_json(circuit.metric, model)
    made_of = {"size": dataclasses.asdict(size), "weights": model.provenance().weights_sha256}
    made_of["circuit"] = [str(member.node) for member in circuit.nodes]
    steps = Steps(args.work, made_of)
    pairs = steps.value("pairs", ms.PromptPairs, lambda: unseen(model, circuit, metric, size.pairs))
    heads = [member.node for member in sorted(circuit.nodes, key=lambda m: -m.effect) if member.node.kind == "head"]
    edges = [member.edge for member in sorted(circuit.edges, key=lambda m: -m.effect)]
    found_on = ms.PromptPairs.builtin("train").aligned(model).sample(size.direction_pairs, seed=2)
    direction = steps.result(
        "direction", ms.RefusalDirection, lambda: ms.refusal_direction(model, found_on, metric, progress=False)
    )
    asked: dict[str, tuple[Any, dict[str, Any]]] = {
        "whole circuit": (circuit, {}),
        "heads": (heads, {}),
        "heads at the other prompt's values": (heads, {"source": "counterfactual"}),
        "edges": (edges, {"replies": False, "sizes": sorted({k for k in (1, 5, 20) if k < len(edges)} | {len(edges)})}),
        "refusal direction": ([direction], {"strengths": size.strengths}),
    }
    common = {"n_random": size.n_random, "replies": True, "reply_tokens": size.reply_tokens, "progress": False}
    curves = {
        name: steps.result(
            f"curve {name}",
            FragilityCurve,
            lambda parts=parts, options=options: fragility(model, parts, pairs, metric, **common | options),
        )
        for name, (parts, options) in asked.items()
    }
    both = steps.result("redundancy", Redundancy, lambda: redundancy(model, circuit, pairs, metric))
    ordinary = [prompt.text for prompt in builtin_prompts("plain")][: size.ordinary]
    shared = steps.result("entanglement", Entanglement, lambda: entanglement(model, circuit, ordinary, progress=False))
    deep = steps.result(
        "depth",
        RefusalDepth,
        lambda: refusal_depth(
            model,
            pairs.harmful[: size.depth_prompts],
            metric,
            ms.load_model(args.base),
            n_tokens=size.depth_tokens,
            progress=False,
        ),
    )
    moved = steps.result(
        "relocation",
        Relocation,
        lambda: relocation(
            model,
            ms.load_model(args.base),
            pairs.harmful[: size.relocation_prompts],
            metric,
            max_new_tokens=size.relocation_tokens,
            progress=False,
        ),
    )
    return {
        "model": model.name,
        "pairs": len(pairs),
        "parts": len(circuit.nodes),
        "candidates": circuit.n_candidates,
        "curves": {name: curve_record(curve, found_on) for name, curve in curves.items()},
        "redundancy": {
            "joint": interval_of(both.joint_share()),
            "summed": interval_of(both.summed_share()),
            "redundancy": interval_of(both.redundancy()),
            "takes_over": rows_of(both.to_dataframe().head(5)),
        },
        "entanglement": {
            **dict(zip(("shared", "expected", "p"), shared.overlap(), strict=True)),
            "refusal": len(shared.refusal),
            "prompts": shared.needed.shape[1],
            "most": rows_of(shared.to_dataframe().sort_values("kl", ascending=False).head(5)),
        },
        "concentration": dataclasses.asdict(concentration(both.single.numpy())),
        "depth": {"opener": list(deep.opener), "rows": rows_of(deep.to_dataframe()), "prompts": deep.scores.shape[1]},
        "relocation": relocation_record(moved),
        "versions": dict(model.provenance().versions),
    }


def relocation_record(found: Relocation) -> dict[str, Any]:
    """A relocation as plain data."""
    first, ends = found.half()
    return {
        "base": found.edited.model,
        "half": [first, *ends],
        "floor": found.floor.share("refuses"),
        "ceiling": found.ceiling.share("refuses"),
        "same": bool(torch.equal(found.self_log_odds, found.floor_log_odds)),
        "prompts": len(found.floor_log_odds),
        "rows": rows_of(found.to_dataframe()),
    }


def curve_record(curve: FragilityCurve, found_on: ms.PromptPairs | None = None) -> dict[str, Any]:
    """A curve as plain data; of directions, with the number of pairs that they were found on."""
    half, ends = curve.half()
    kinds = [one.rates()["share"].tolist() for one in curve.kinds]
    return {
        "what": curve.what,
        "parts": len(curve.names),
        "order": list(curve.names[:5]),
        "source": curve.provenance.options["source"],
        "rows": rows_of(curve.to_dataframe()),
        "area": interval_of(curve.area()),
        "half": [half, *ends],
        "unedited": kinds[0] if kinds else None,
        "kinds": kinds[1:],
        "harmless": [one.rates()["share"].tolist() for one in curve.kinds_harmless],
        "found_on": len(found_on) if curve.directions and found_on is not None else None,
        "mlps": sum(node.kind == "mlp" for node in curve.parts),
    }


def interval_of(found: tuple[float, tuple[float, float]]) -> list[float]:
    """Value, lower and upper end."""
    return [found[0], *found[1]]


if __name__ == "__main__":
    main()
