"""How far numbers move in bfloat16 and float16, and with the number of threads: docs/results/precision.json."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures import tiny_tokenizer
from tiny import tiny_hf_model, tiny_pairs

import mechsafety as ms
from mechsafety.attribution import direct_logit_attribution
from mechsafety.nodes import Node

DTYPES = ("float32", "bfloat16", "float16")
OUT = Path(__file__).parents[1] / "docs" / "results" / "precision.json"

# each quantity: function of model, pairs and metric
QUANTITIES: dict[str, Callable[..., torch.Tensor]] = {
    "metric of a prompt": lambda m, pairs, metric: metric.scores(m, [*pairs.harmful, *pairs.harmless]),
    "share of the gap, heads patched": lambda m, pairs, metric: _shares(
        ms.activation_patching(m, pairs, metric, nodes=_heads(m), progress=False)
    ),
    "share of the gap, paths to the logits": lambda m, pairs, metric: _shares(
        ms.path_patching(m, pairs, metric, progress=False)
    ),
    "direct logit attribution": lambda m, pairs, metric: direct_logit_attribution(m, pairs, metric).heads,
    "node attribution": lambda m, pairs, metric: ms.node_attribution(m, pairs, metric, progress=False).heads,
}


def _heads(model: ms.LensModel) -> list[Any]:
    """Heads of the last layers, whose runs are short."""
    layers = range(max(0, model.n_layers - 4), model.n_layers)
    return [Node("head", layer, head) for layer in layers for head in range(model.n_heads)]


def _shares(effects: Any) -> torch.Tensor:
    return torch.tensor(effects.to_dataframe().effect.to_numpy())


def moved(full: torch.Tensor, half: torch.Tensor) -> dict[str, float]:
    """Largest difference, also as a share of the largest value; correlation; share of the ten largest that stay."""
    a, b = full.detach().double().flatten(), half.detach().double().flatten()
    top = min(10, len(a) // 2)
    tops = [set(x.abs().topk(top).indices.tolist()) for x in (a, b)]
    return {
        "largest": float((a - b).abs().max()),
        "of_largest": float((a - b).abs().max() / a.abs().max()),
        "correlation": float(torch.corrcoef(torch.stack([a, b]))[0, 1]),
        "top": len(tops[0] & tops[1]) / top,
    }


def compare(load: Callable[[str], ms.LensModel], pairs: ms.PromptPairs, words: list[str]) -> dict[str, Any]:
    """Every quantity in half precision against float32, on the same weights."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for dtype in DTYPES:
        model = load(dtype)
        metric = ms.RefusalLogOdds.of(model, words)
        found[dtype] = {name: call(model, pairs, metric) for name, call in QUANTITIES.items()}
    return {
        dtype: {name: moved(found["float32"][name], value) for name, value in found[dtype].items()}
        for dtype in DTYPES[1:]
    }


def threads(model: ms.LensModel, prompts: list[str]) -> dict[str, float]:
    """Largest difference of logits between 1 and 2 threads, and between two runs with the same number."""
    runs, before = {}, torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            runs[number] = [model.logits(prompts) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    again = max(float((one - other).abs().max()) for one, other in runs.values())
    return {"between_1_and_2": float((runs[1][0] - runs[2][0]).abs().max()), "again": again}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true", help="the demo model as well")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()

    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "models": {}}
    for kind in ("llama", "gpt2", "gemma2"):
        found["models"][kind] = compare(
            lambda dtype, kind=kind: ms.load_model((tiny_hf_model(kind), tiny_tokenizer()), dtype=dtype),
            tiny_pairs(),
            ["sorry"],
        )
    if arguments.demo:
        pairs = ms.PromptPairs.builtin("train").sample(4)
        found["models"]["demo"] = compare(lambda dtype: ms.load_model("demo", dtype=dtype), pairs, ["Sorry"])
        found["threads_demo"] = threads(ms.load_model("demo"), list(pairs.harmful))
    arguments.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
