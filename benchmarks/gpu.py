"""Random-weight Llamas on a CUDA device: seconds and peak device memory. Rows are "not run" where there is none."""

import statistics
from typing import Any

import torch
from measure import timed, times
from models import equal_length_pairs, metric_of, random_llama

import mechsafety as ms
from mechsafety.nodes import Node

GPU_SHAPES = ("135M", "1B", "3B", "8B")
DTYPES = ("float32", "bfloat16")


def gpu_cases() -> dict[str, tuple[str, str]]:
    """Case name to (shape, dtype)."""
    return {f"gpu_{shape}_{dtype}": (shape, dtype) for shape in GPU_SHAPES for dtype in DTYPES}


def gpu(shape: str, dtype: str, device: str = "cuda") -> dict[str, Any]:
    """Plain forward, 64 heads patched, all heads -> logits, node and edge attribution (1 step), 8 pairs."""
    if device == "cuda" and not torch.cuda.is_available():
        return {"status": "not run", "shape": shape, "dtype": dtype, "reason": "no CUDA device"}
    model = random_llama(shape, dtype, device)
    pairs, metric = equal_length_pairs(model, 8), metric_of(model)
    model.provenance()  # hashes the weights, once a model
    every = [Node("head", layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    heads = every[:: max(1, len(every) // 64)][:64]
    calls = {
        "forward_s": lambda: model.logits(pairs.harmful),
        "heads_s": lambda: ms.activation_patching(model, pairs, metric, nodes=heads, progress=False),
        "paths_s": lambda: ms.path_patching(model, pairs, metric, senders=every, progress=False),
        "nodes_s": lambda: ms.node_attribution(model, pairs, metric, steps=1, progress=False),
        "edges_s": lambda: ms.edge_attribution(model, pairs, metric, steps=1, progress=False),
    }
    result: dict[str, Any] = {"status": "run", "shape": shape, "dtype": dtype, "heads": len(heads)}
    if device == "cuda":
        result["device"] = torch.cuda.get_device_name()
        torch.cuda.reset_peak_memory_stats()
    for name, call in calls.items():
        timed(call)  # kernels are chosen on the first call
        seconds = times(call)
        result |= {name: statistics.median(seconds), name.replace("_s", "_repeats"): len(seconds)}
    if device == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result
