"""One check of a machine with a GPU, in under 8 minutes: equality, precision, memory, time, and maps over GPU and CPU.

    python benchmarks/gpu_check.py --out gpu.json

Each row is one shape of random weights, made on the device. Rows are run from the smallest shape on. A row that would
begin after ``--seconds`` is "not run". ``--device cpu --tiny`` tries the code where there is no GPU.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from models import equal_length_pairs, metric_of, random_llama
from transformer_lens import patching
from transformers import AutoModelForCausalLM

import mechsafety as ms
from mechsafety.models.placed import offloaded
from mechsafety.nodes import Node

SHAPES = ("135M", "1B", "3B", "8B")
# relative to the largest value; a GPU sums in another order than a CPU
SAME = 1e-3
# correlation of effects in bfloat16 with those in float32, as tests/test_precision.py holds on tiny models
DRIFT = 0.95


def largest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).abs().max() / wanted.abs().max())


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Seconds of a second call; the first one chooses kernels."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


class Rows:
    """Rows of the check, each with its seconds; those that would begin too late are not run.

    Args:
        seconds: Seconds for all rows.
        out: File that is written anew after each row.
    """

    def __init__(self, seconds: float, out: Path) -> None:
        self.begun, self.seconds, self.out = time.perf_counter(), seconds, out
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, name: str, row: Callable[[], dict[str, Any]]) -> None:
        """Run a row and store it; an error is stored as its text, and the other rows go on."""
        begin = time.perf_counter()
        if begin - self.begun > self.seconds:
            self.found[name] = {"status": "not run", "reason": f"{self.seconds:.0f} s are over"}
        else:
            try:
                self.found[name] = {"status": "run", **row()}
            except Exception as error:
                self.found[name] = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
            self.found[name]["seconds"] = round(time.perf_counter() - begin, 1)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.out.write_text(json.dumps(self.found, indent=1, allow_nan=False) + "\n")
        print(name, json.dumps(self.found[name], allow_nan=False), flush=True)


_PAIRS: dict[int, ms.PromptPairs] = {}


def prompts(model: ms.LensModel) -> ms.PromptPairs:
    """8 pairs of one length; 2 for the model that only tries the code."""
    n = 2 if model.n_layers == 2 else 8
    if n not in _PAIRS:  # all models here have one tokenizer, and to look for the pairs takes seconds
        _PAIRS[n] = equal_length_pairs(model, n)
    return _PAIRS[n]


def analyses(model: ms.LensModel, n_heads: int = 64) -> dict[str, Callable[[], torch.Tensor]]:
    """What is compared and timed, by name."""
    pairs, metric = prompts(model), metric_of(model)
    every = [Node("head", layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    some = every[:: max(1, len(every) // n_heads)][:n_heads]
    return {
        "logits": lambda: model.logits(pairs.harmful),
        "heads": lambda: ms.activation_patching(model, pairs, metric, nodes=some, progress=False).changes,
        "paths": lambda: ms.path_patching(model, pairs, metric, senders=every, progress=False).changes,
        "nodes": lambda: ms.node_attribution(model, pairs, metric, steps=1, progress=False).heads,
        "edges": lambda: ms.edge_attribution(model, pairs, metric, steps=1, progress=False).scores,
    }


def twin(model: ms.LensModel, dtype: str, device: str) -> ms.LensModel:
    """The same weights in another dtype, on another device."""
    config = type(model.hf_model.config)(**model.hf_model.config.to_dict())
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    held = {name.replace("_original_component.", ""): tensor for name, tensor in model.hf_model.state_dict().items()}
    hf.load_state_dict({name: held[name] for name in hf.state_dict()})
    return ms.load_model((hf.eval(), model.tokenizer), device=device, dtype=dtype)


def equality(shape: str, device: str) -> dict[str, Any]:
    """float32 on the device against float32 on the CPU, with the same weights."""
    model = random_llama(shape)
    other = twin(model, "float32", device)
    ours, theirs = analyses(model, 16), analyses(other, 16)
    gaps = {name: largest(theirs[name](), call()) for name, call in ours.items()}
    return {"gaps": gaps, "met": max(gaps.values()) <= SAME}


def drift(shape: str, device: str) -> dict[str, Any]:
    """bfloat16 against float32 on the device, with the same weights."""
    model = random_llama(shape, "float32", device)
    other = twin(model, "bfloat16", device)
    ours, theirs = analyses(model, 64), analyses(other, 64)
    found = {}
    for name, call in ours.items():
        both = torch.stack([value.detach().cpu().double().flatten() for value in (call(), theirs[name]())])
        found[name] = float(torch.corrcoef(both)[0, 1])
    return {"correlations": found, "met": min(found.values()) >= DRIFT}


def speed(shape: str, dtype: str, device: str) -> dict[str, Any]:
    """Seconds of each analysis, of TransformerLens' patching of the same heads, and peak memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = random_llama(shape, dtype, device)
    found: dict[str, Any] = {f"{name}_s": seconds_of(call, device) for name, call in analyses(model, 16).items()}
    pairs, metric = prompts(model), metric_of(model)
    tokens = model.tokenize_pairs(pairs)
    every = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    some = every[:: max(1, len(every) // 16)][:16]

    def peer() -> torch.Tensor:
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(tokens.harmless.ids)
            return patching.generic_activation_patch(
                model.bridge,
                tokens.harmful.ids,
                cache,
                lambda logits: metric(logits[:, -1]).mean(),
                patching.layer_head_vector_patch_setter,
                "z",
                index_df=pd.DataFrame(some, columns=["layer", "head"]),
            )

    ours = analyses(model, 16)["heads"]().mean(1)
    harmful = float(metric(model.logits(pairs.harmful)).double().mean())
    found["transformer_lens_heads_s"] = seconds_of(peer, device)
    found["heads_gap"] = float((harmful - ours.cpu().double() - peer().cpu().double()).abs().max())
    if device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def placed(shape: str, device: str) -> dict[str, Any]:
    """A map over the device and the CPU's memory (or, without a GPU, over memory and disk), against the whole model."""
    with tempfile.TemporaryDirectory() as folder:
        whole = random_llama(shape, "float32", device)
        plain = twin(whole, "float32", "cpu")
        hf = AutoModelForCausalLM.from_config(type(plain.hf_model.config)(**plain.hf_model.config.to_dict()))
        held = {name.replace("_original_component.", ""): t for name, t in plain.hf_model.state_dict().items()}
        hf.load_state_dict({name: held[name] for name in hf.state_dict()})
        hf.save_pretrained(folder)
        whole.tokenizer.save_pretrained(folder)
        first, second = (0, "cpu") if device == "cuda" else ("cpu", "disk")
        half = whole.n_layers // 2
        ends = {name: first for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
        layers = {f"model.layers.{k}": first if k < half else second for k in range(whole.n_layers)}
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        part = ms.load_model(folder, device_map=ends | layers)
        ours, theirs = analyses(whole, 16), analyses(part, 16)
        gaps = {name: largest(theirs[name](), call()) for name, call in ours.items()}
        times = {f"{name}_s": seconds_of(theirs[name], device) for name in ("logits", "heads")}
        absent = len(offloaded(part.hf_model))
        return {"gaps": gaps, "offloaded": absent, **times, "met": absent > 0 and max(gaps.values()) <= SAME}


def check(device: str, tiny: bool, seconds: float, out: Path) -> dict[str, dict[str, Any]]:
    """All rows."""
    rows, small = Rows(seconds, out), "tiny" if tiny else "135M"
    rows.add("equality", lambda: equality(small, device))
    rows.add("drift", lambda: drift(small, device))
    rows.add("placed", lambda: placed("tiny" if tiny else "1B", device))
    for shape in ("tiny",) if tiny else SHAPES:
        for dtype in ("float32",) if tiny else ("bfloat16", "float32"):
            rows.add(f"{shape} {dtype}", lambda shape=shape, dtype=dtype: speed(shape, dtype, device))
    return rows.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, to try the code")
    parser.add_argument("--seconds", type=float, default=420.0, help="no row begins later than this")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device; to try the code: --device cpu --tiny\n")
    found = check(arguments.device, arguments.tiny, arguments.seconds, arguments.out)
    bad = [name for name, row in found.items() if row["status"] == "failed" or row.get("met") is False]
    if bad:
        parser.exit(1, f"failed: {', '.join(bad)}\n")


if __name__ == "__main__":
    main()
