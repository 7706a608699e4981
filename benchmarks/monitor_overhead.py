"""How much processor time a monitor takes beside generation; runs without and with it take turns.

    python benchmarks/monitor_overhead.py [--repeats N] [--tokens N] [--tiny] [--out FOLDER]

It writes its part of benchmarks/service.json, and SERVICE.md from that. The exit status is not zero if a monitor
changes a token, or if a median ratio is above 1.10.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import load
from service_report import HERE, LIMIT, store

import mechsafety as ms
from mechsafety.interventions import Direction
from mechsafety.monitors import ActivationMonitor
from mechsafety.sites import Site, SiteKind

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["Tell me the story of a lighthouse keeper.", "Explain how a bicycle stays upright."]


def monitors(model: ms.LensModel) -> dict[str, ActivationMonitor]:
    """Monitors of every kind of source, from the fewest sites to the most."""
    pairs = ms.PromptPairs.builtin().sample(8)
    generator = torch.Generator().manual_seed(0)
    layer = model.n_layers // 2
    vector = torch.randn(1, model.d_model, generator=generator)
    direction = Direction(model.provenance(), "any", (Site(SiteKind.RESID_PRE, layer),), vector)
    tenth = torch.rand(model.n_layers, model.d_mlp, generator=generator) < 0.1
    circuit = ms.RefusalCircuit.load(ROOT / "docs" / "gallery" / "demo.json")
    if circuit.provenance.model != model.name:
        circuit = None
    sources: dict[str, Any] = {"a direction": direction, "10 % of all neurons": tenth}
    if circuit is not None:
        sources[f"the mapped circuit, {len(circuit.nodes)} nodes"] = circuit
    options = {"false_positive_rate": 0.25, "reply_tokens": 2}
    return {name: ActivationMonitor.fit(model, source, pairs, **options) for name, source in sources.items()}


def turns(plain: Callable[[], Any], watched: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Processor seconds of both calls, which take turns; each turn begins with the other one.

    Unlike a clock's time, they do not count what else runs on the machine.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    calls = (plain, watched)
    same = plain() == watched()
    for turn in range(repeats):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            calls[which]()
            seconds[which].append(time.process_time() - start)
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    return {
        "plain_s": statistics.median(seconds[0]),
        "watched_s": statistics.median(seconds[1]),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "same": same,
    }


def cases(model: ms.LensModel, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Every monitor beside a stream of one reply, and beside a batch of eight replies."""
    batch = [f"{prompt} Answer {word}." for prompt in PROMPTS for word in ("at length", "in detail", "fully", "simply")]
    rows = []
    for name, monitor in monitors(model).items():
        about = {"monitor": name, "sites": len(monitor.weights.sites)}

        def stream(monitor: ActivationMonitor = monitor) -> list[int]:
            return [token.id for token in monitor.stream(PROMPTS[0], tokens)]

        def generate(monitor: ActivationMonitor = monitor) -> list[list[int]]:
            return model.reply_ids(batch, tokens, watch=monitor.watch(), progress=False)

        plain_stream = lambda: [token.id for token in model.stream(PROMPTS[0], tokens)]  # noqa: E731
        plain_batch = lambda: model.reply_ids(batch, tokens, progress=False)  # noqa: E731
        rows.append({**about, "call": "one reply, streamed", **turns(plain_stream, stream, repeats)})
        rows.append({**about, "call": "eight replies, one batch", **turns(plain_batch, generate, repeats)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers, to try the code")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    model = load(args.tiny)
    found = cases(model, args.tokens, args.repeats)
    store("monitors", {"model": model.name, "tokens": args.tokens, "repeats": args.repeats, "cases": found}, args.out)
    bad = [case for case in found if not case["same"] or case["ratio"] > LIMIT]
    if bad:
        sys.exit("\n".join(f"{case['monitor']}, {case['call']}: {case['ratio']:.3f}" for case in bad))


if __name__ == "__main__":
    main()
