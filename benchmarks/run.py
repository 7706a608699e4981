"""Ours against TransformerLens' own functions, in one process, interleaved, with equality of results checked.

    python benchmarks/run.py [CASE ...]     # or: make bench

Writes benchmarks/results.json after every case and the table benchmarks/RESULTS.md at the end. Times are medians of
interleaved repeats; the peer and we run on the same bridge, the same prompts and the same number of threads.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformer_lens import patching as tl_patching
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

import mechsafety as ms
from mechsafety.cli import quiet_libraries
from mechsafety.models import LensModel
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.patching.paths import measured_edges
from mechsafety.prompts import PromptPairs
from mechsafety.results import package_versions
from mechsafety.sites import Site, SiteKind

HERE = Path(__file__).parent


def equal_length_pairs(model: LensModel, n: int) -> PromptPairs:
    """Built-in pairs of one token length (TransformerLens' functions take no mask), the commonest that has ``n``."""
    by_length: dict[int, list[Any]] = {}
    for pair in PromptPairs.builtin():
        by_length.setdefault(model.n_tokens(pair.harmful), []).append(pair)
    longest = max(by_length.values(), key=len)
    return PromptPairs(tuple(longest[:n]), "builtin")


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    out = function()
    return time.perf_counter() - begin, out


def compare(ours: Callable[[], Any], peer: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Interleaved repeats of both; medians, all times, and the largest difference of what they return."""
    mine, theirs, gaps = [], [], []
    for _ in range(repeats):
        seconds, a = timed(ours)
        mine.append(seconds)
        seconds, b = timed(peer)
        theirs.append(seconds)
        gaps.append(float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max()))
    return {
        "ours_s": statistics.median(mine),
        "peer_s": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(mine),
        "max_difference": max(gaps),
        "ours_all_s": mine,
        "peer_all_s": theirs,
    }


def head_sweep(model: LensModel) -> dict[str, Any]:
    """Every head patched at all positions, 8 pairs, mean metric."""
    pairs = equal_length_pairs(model, 8)
    metric = ms.RefusalLogOdds.of(model, ["Sorry"])
    tokens = model.tokenize_pairs(pairs)
    heads = [node for node in head_and_mlp_nodes(model.n_layers, model.n_heads) if node.kind == "head"]
    shape = (model.n_layers, model.n_heads)

    def ours() -> torch.Tensor:
        found = ms.activation_patching(model, pairs, metric, nodes=heads, progress=False)
        return (found.harmful.mean() - found.changes.mean(1)).reshape(shape)

    def peer() -> torch.Tensor:
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(tokens.harmless.ids)
            return tl_patching.get_act_patch_attn_head_out_all_pos(
                model.bridge, tokens.harmful.ids, cache, lambda logits: metric(logits[:, -1]).mean()
            ).cpu()

    result = compare(ours, peer, 3)
    width = tokens.harmful.ids.shape[1]
    # blocks from the patch on, columns from the first difference on; the unembedding is a fifth of a plain forward
    # and needed once for each variant at one column of `width`
    block, head = 0.8, 0.2
    live = (width - tokens.start) / width
    per_layer = [
        block * live * (model.n_layers - layer) / model.n_layers + head / width for layer in range(model.n_layers)
    ]
    result |= {"tokens": width, "shared": tokens.start, "floor_ratio": 1 / (sum(per_layer) / model.n_layers)}
    return result


def paths_to_logits(model: LensModel) -> dict[str, Any]:
    """All heads -> logits, MLPs recomputed, 4 pairs; the peer freezes all other heads by hooks, one forward a head."""
    pairs = equal_length_pairs(model, 4)
    metric = ms.RefusalLogOdds.of(model, ["Sorry"])
    tokens = model.tokenize_pairs(pairs)
    heads = [node for node in head_and_mlp_nodes(model.n_layers, model.n_heads) if node.kind == "head"]

    def ours() -> torch.Tensor:
        return ms.path_patching(model, pairs, metric, senders=heads, progress=False).changes[:, 0].mean(1)

    def peer() -> torch.Tensor:
        sites = [Site(SiteKind.Z, layer) for layer in range(model.n_layers)]
        base, source = model.read(tokens.harmful, sites), model.read(tokens.harmless, sites)
        before = metric(model.logits(tokens.harmful)).mean()
        out = []
        for head in heads:

            def freeze(site: Site, head: Node = head) -> Callable[[torch.Tensor], torch.Tensor]:
                frozen = base[site].clone()
                if site.layer == head.layer:
                    frozen[:, :, head.index] = source[site][:, :, head.index]
                return lambda tensor: frozen

            with model.hooks([(site, freeze(site)) for site in sites]):
                out.append(before - metric(model.logits(tokens.harmful)).mean())
        return torch.stack(out)

    result = compare(ours, peer, 1) | {"repeats_note": "one repeat of the peer, which takes minutes"}
    # what any exact method must do, in columns x blocks: both runs of every pair; every head's change through all MLPs
    # from its layer on (three quarters of a block), at the last column; its unembedding, which the log-odds read whole
    width, layers, vocabulary = tokens.harmful.ids.shape[1], model.n_layers, model.d_vocab * model.d_model
    block = 3 * model.d_model * model.d_mlp / 0.75
    runs = (tokens.start + 2 * (width - tokens.start)) * layers
    changes = 0.75 * sum(model.n_heads * (layer + 1) for layer in range(layers)) + len(heads) * vocabulary / block
    floor = len(heads) * width * layers / (runs + changes)
    return result | {"tokens": width, "shared": tokens.start, "floor_ratio": floor}


def path_matrix(model: LensModel) -> dict[str, Any]:
    """Every sender -> every head, changes of score and value in closed form, 4 pairs."""
    pairs = equal_length_pairs(model, 4)
    seconds, found = timed(lambda: ms.path_matrix(model, pairs, progress=False))
    paths = int((found.q != 0).any(-1).sum())
    return {"ours_s": seconds, "paths": paths, "peer": "none"}


def head_to_query(model: LensModel) -> dict[str, Any]:
    """Exact head -> head query paths, the 200 strongest by estimate, 4 pairs."""
    pairs = equal_length_pairs(model, 4)
    metric = ms.RefusalLogOdds.of(model, ["Sorry"])
    runs = pair_runs(model, pairs)
    tokens = model.tokenize_pairs(pairs)
    scores = ms.edge_attribution(model, pairs, metric, method="eap-ig", progress=False)
    edges = [e for e, _ in scores.top() if e.slot == "q" and e.sender.kind == "head"][:200]
    sites = [Site(SiteKind.Z, layer) for layer in range(model.n_layers)]

    def ours() -> torch.Tensor:
        fresh = pair_runs(model, pairs)
        return measured_edges(model, fresh, metric, edges).mean(1)

    def peer() -> torch.Tensor:
        # TransformerLens' direct path sweeps all receivers of a sender; its own hook on the listed ones alone
        bridge = model.bridge
        before = metric(runs.harmful.logits).mean()
        base, source = model.read(tokens.harmful, sites), model.read(tokens.harmless, sites)
        out = []
        with torch.no_grad(), tl_patching._split_qkv_input(bridge):
            for edge in edges:
                at, head = Site(SiteKind.Z, edge.sender.layer), edge.sender.index
                delta = (source[at] - base[at])[:, :, head] @ model.W_O(edge.sender.layer)[head]
                name = f"blocks.{edge.receiver.layer}.attn.hook_q_input"
                hook = tl_patching._make_direct_path_hook(delta, edge.receiver.index, [])
                logits = bridge.run_with_hooks(tokens.harmful.ids, fwd_hooks=[(name, hook)])
                out.append(before - metric(logits[:, -1]).mean())
        return torch.stack(out)

    return compare(ours, peer, 3) | {"edges": len(edges)}


def eap_ig(model: LensModel) -> dict[str, Any]:
    """EAP-IG with 5 steps for every edge, 16 pairs. No peer has it under grouped queries."""
    pairs = PromptPairs.builtin().sample(16)
    metric = ms.RefusalLogOdds.of(model, ["Sorry"])
    seconds, scores = timed(lambda: ms.edge_attribution(model, pairs, metric, steps=5, progress=False))
    return {"ours_s": seconds, "edges": scores.n_edges, "peer": "none under grouped queries"}


def node_attribution(model: LensModel) -> dict[str, Any]:
    """Gradient attribution of every node, 4 pairs, one step, against TransformerLens' attribution_patch."""
    pairs = equal_length_pairs(model, 4)
    metric = ms.RefusalLogOdds.of(model, ["Sorry"])
    tokens = model.tokenize_pairs(pairs)

    def ours() -> torch.Tensor:
        return torch.tensor(ms.node_attribution(model, pairs, metric, steps=1).total)

    def peer() -> torch.Tensor:
        for parameter in model.hf_model.parameters():
            parameter.requires_grad_(True)  # its backward hooks need a graph
        attribution_patch(
            model.bridge,
            tokens.harmful.ids,
            tokens.harmless.ids,
            lambda logits: metric(logits[:, -1]).mean(),
            EdgeAttributionConfig(granularity="node"),
        )
        for parameter in model.hf_model.parameters():
            parameter.requires_grad_(False)
        return torch.tensor(0.0)

    found = compare(ours, peer, 3)
    found["max_difference"] = None
    found["note"] = "times only: the two define a node's score differently (blend of both runs; gradient at one run)"
    return found


def neurons(model: LensModel) -> dict[str, Any]:
    """Exact patching of the 2,000 neurons with the largest estimates, one by one, 8 pairs."""
    pairs = equal_length_pairs(model, 8)
    metric = ms.RefusalLogOdds.of(model, ["Sorry"])
    runs = pair_runs(model, pairs, extra=[SiteKind.NEURONS])
    scores = ms.node_attribution(model, runs, metric, steps=4, neurons=True).neurons
    top = scores.flatten().abs().topk(2000).indices.tolist()
    nodes = [Node("neuron", k // model.d_mlp, k % model.d_mlp) for k in top]
    plain, _ = timed(lambda: model.logits(pairs.harmful))
    seconds, _ = timed(lambda: ms.activation_patching(model, runs, metric, nodes=nodes, progress=False))
    return {"ours_s": seconds, "per_neuron_s": seconds / 2000, "plain_forward_s": plain, "neurons": 2000}


CASES: dict[str, Callable[[LensModel], dict[str, Any]]] = {
    case.__name__: case
    for case in (eap_ig, head_to_query, node_attribution, neurons, head_sweep, paths_to_logits, path_matrix)
}
TARGETS = {
    "head_sweep": "at least 6x, within 1e-4",
    "paths_to_logits": "at least 100x, within 1e-4",
    "path_matrix": "none set",
    "head_to_query": "at least 8x",
    "eap_ig": "under 240 s and 3 GiB",
    "node_attribution": "at least 3x",
    "neurons": "none set",
}


def table(results: dict[str, Any]) -> str:
    lines = ["| case | ours | peer | ratio | largest difference | peak memory | target |", "| " + "--- | " * 7]
    for name, case in results["cases"].items():
        peer = f"{case['peer_s']:.1f} s" if "peer_s" in case else case.get("peer", "")
        ratio = f"{case['ratio']:.1f}x" if "ratio" in case else ""
        if "floor_ratio" in case:
            ratio += f" (floor {case['floor_ratio']:.1f}x, {case['shared']} of {case['tokens']} tokens shared)"
        gap = case.get("max_difference")
        gap_text = "" if gap is None else f"{gap:.1e}"
        peak = f"{case['peak_gib']:.2f} GiB"
        doc = (CASES[name].__doc__ or "").split("\n")[0]
        lines.append(f"| {doc} | {case['ours_s']:.2f} s | {peer} | {ratio} | {gap_text} | {peak} | {TARGETS[name]} |")
    machine = results["machine"]
    head = (
        f"# Benchmarks\n\n{results['date']}, {machine['cpu']}, {machine['threads']} threads, "
        f"{', '.join(f'{k} {v}' for k, v in results['versions'].items())}. Demo model, float32. `make bench`.\n"
        "Peak memory is the whole process', the model's 0.5 GiB and the peer's cases before it included.\n"
        "GPU: not run.\n\n"
    )
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all by default")
    args = parser.parse_args()
    quiet_libraries()
    model = ms.load_model("demo")
    store = HERE / "results.json"
    results: dict[str, Any] = json.loads(store.read_text()) if store.is_file() else {"cases": {}}
    results |= {
        "date": datetime.date.today().isoformat(),
        "versions": package_versions(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }
    for name in args.cases or CASES:
        case = CASES[name](model)
        case["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        results["cases"][name] = case
        print(name, json.dumps(case))
        store.write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "RESULTS.md").write_text(table(results))


if __name__ == "__main__":
    main()
