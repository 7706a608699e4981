"""The cases with a peer: ours and TransformerLens' own functions on one bridge, the same prompts and threads.

Where the peer is other code, `peers` does what that code does.
"""

from collections.abc import Callable
from typing import Any

import torch
from flops import Shape, floor_ratio, floor_ratio_of_paths, forward
from measure import alone, compare, timed
from models import difference_of, equal_length_pairs, metric_of, mixed_prompts
from peers import plain_acdc, plain_twin, published_means, published_scores
from targets import Target
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens import patching as tl_patching
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

import mechsafety as ms
from mechsafety import testbed
from mechsafety.attribution.nodes import mask_gradients
from mechsafety.circuits.edge_faithfulness import all_edges, prune
from mechsafety.directions import scores
from mechsafety.models import LensModel
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.patching.paths import measured_edges
from mechsafety.prompts import PromptPairs
from mechsafety.sites import Site, SiteKind

# last columns at which mean differences are taken
N_COLUMNS = 5


def head_sweep(model: LensModel) -> dict[str, Any]:
    """Every head patched at all positions, 8 pairs, mean metric."""
    pairs, metric = equal_length_pairs(model, 8), metric_of(model)
    tokens = model.tokenize_pairs(pairs)
    heads = [node for node in head_and_mlp_nodes(model.n_layers, model.n_heads) if node.kind == "head"]

    def ours() -> torch.Tensor:
        found = ms.activation_patching(model, pairs, metric, nodes=heads, progress=False)
        return (found.harmful.mean() - found.changes.mean(1)).reshape(model.n_layers, model.n_heads)

    def peer() -> torch.Tensor:
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(tokens.harmless.ids)
            return tl_patching.get_act_patch_attn_head_out_all_pos(
                model.bridge, tokens.harmful.ids, cache, lambda logits: metric(logits[:, -1]).mean()
            ).cpu()

    result = compare(ours, peer)
    shape, width = Shape.of(model), tokens.harmful.ids.shape[1]
    with FlopCounterMode(display=False) as counted:
        ours()
    plain = len(heads) * len(pairs) * forward(shape, width)
    floor = floor_ratio(shape, width, tokens.start)
    return result | {
        "tokens": width,
        "shared": tokens.start,
        "floor_ratio": floor,
        "operations_over_floor": counted.get_total_flops() * floor / plain,
    }


def paths_to_logits(model: LensModel) -> dict[str, Any]:
    """All heads -> logits, MLPs recomputed, 4 pairs, log-odds; the peer freezes other heads by hooks, one by one."""
    return paths(model, metric_of(model))


def paths_to_two_logits(model: LensModel) -> dict[str, Any]:
    """All heads -> the difference of two logits, MLPs recomputed, 4 pairs; the peer as above."""
    return paths(model, difference_of(model))


def direct_paths(model: LensModel) -> dict[str, Any]:
    """All heads -> the difference of two logits, MLPs frozen, 4 pairs; the peer as above, with MLPs frozen too."""
    return paths(model, difference_of(model), "freeze")


def paths(model: LensModel, metric: ms.RefusalLogOdds, mlp: str = "recompute") -> dict[str, Any]:
    """Ours, both base runs included, against one hooked forward a head."""
    pairs = equal_length_pairs(model, 4)
    tokens = model.tokenize_pairs(pairs)
    heads = [node for node in head_and_mlp_nodes(model.n_layers, model.n_heads) if node.kind == "head"]

    def ours() -> torch.Tensor:
        found = ms.path_patching(model, pairs, metric, senders=heads, mlp=mlp, progress=False)
        return found.changes[:, 0].mean(1)

    def peer() -> torch.Tensor:
        heads_at = [Site(SiteKind.Z, layer) for layer in range(model.n_layers)]
        mlps_at = [Site(SiteKind.MLP_OUT, layer) for layer in range(model.n_layers)] if mlp == "freeze" else []
        base, source = model.read(tokens.harmful, heads_at + mlps_at), model.read(tokens.harmless, heads_at)
        before = metric(model.logits(tokens.harmful)).mean()
        out = []
        for head in heads:

            def freeze(site: Site, head: Node = head) -> Callable[[torch.Tensor], torch.Tensor]:
                frozen = base[site].clone()
                if site.kind is SiteKind.Z and site.layer == head.layer:
                    frozen[:, :, head.index] = source[site][:, :, head.index]
                return lambda tensor: frozen

            with model.hooks([(site, freeze(site)) for site in heads_at + mlps_at]):
                out.append(before - metric(model.logits(tokens.harmful)).mean())
        return torch.stack(out)

    result = compare(ours, peer)
    shape, width, first = Shape.of(model), tokens.harmful.ids.shape[1], tokens.start
    read = 2 if metric.is_linear else model.d_vocab
    floor = floor_ratio_of_paths(shape, width, first, read, mlps=mlp == "recompute")
    return result | {"tokens": width, "shared": first, "floor_ratio": floor}


def path_matrix(model: LensModel) -> dict[str, Any]:
    """Every sender -> every head, changes of score and value in closed form, 4 pairs."""
    pairs = equal_length_pairs(model, 4)
    result, found = alone(lambda: ms.patching.path_matrix(model, pairs, progress=False))
    return result | {"paths": int((found.q != 0).any(-1).sum()), "peer": "none"}


def head_to_query(model: LensModel) -> dict[str, Any]:
    """Exact head -> head query paths, the 200 strongest by estimate, 4 pairs."""
    pairs, metric = equal_length_pairs(model, 4), metric_of(model)
    runs, tokens = pair_runs(model, pairs), model.tokenize_pairs(pairs)
    ranked = ms.edge_attribution(model, pairs, metric, method="eap-ig", steps=5, progress=False)
    edges = [e for e, _ in ranked.top() if e.slot == "q" and e.sender.kind == "head"][:200]
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

    return compare(ours, peer) | {"edges": len(edges)}


def eap_ig(model: LensModel) -> dict[str, Any]:
    """EAP-IG with 5 steps for every edge, 16 pairs. No peer has it under grouped queries."""
    pairs, metric = PromptPairs.builtin().sample(16), metric_of(model)
    result, found = alone(lambda: ms.edge_attribution(model, pairs, metric, steps=5, progress=False))
    return result | {"edges": found.n_edges, "completeness": found.completeness, "peer": "none under grouped queries"}


def node_attribution(model: LensModel) -> dict[str, Any]:
    """Gradient attribution of every node, 4 pairs, one step, against TransformerLens' attribution_patch."""
    pairs, metric = equal_length_pairs(model, 4), metric_of(model)
    tokens, runs = model.tokenize_pairs(pairs), pair_runs(model, pairs)
    model.provenance()  # hashes the weights, once a model

    def ours() -> None:
        ms.node_attribution(model, pairs, metric, steps=1, progress=False)

    def value() -> torch.Tensor:
        # our step lies halfway between the two runs; its gradient at the harmful run is what the peer computes
        heads, mlps = mask_gradients(model, runs, metric, 1.0)
        return torch.cat([heads.flatten(), mlps])

    def peer() -> torch.Tensor:
        for parameter in model.hf_model.parameters():
            parameter.requires_grad_(True)  # its backward hooks need a graph
        found = attribution_patch(
            model.bridge,
            tokens.harmless.ids,
            tokens.harmful.ids,
            lambda logits: metric(logits[:, -1]).mean(),
            EdgeAttributionConfig(granularity="node"),
        )
        for parameter in model.hf_model.parameters():
            parameter.requires_grad_(False)
        heads, mlps = torch.zeros(model.n_layers, model.n_heads), torch.zeros(model.n_layers)
        for node, score in found.node_scores.items():  # one a position; theirs point from harmful to harmless
            if node.kind == "attn_head_out":
                heads[node.layer, node.head] -= score
            elif node.kind == "mlp_out":
                mlps[node.layer] -= score
        return torch.cat([heads.flatten(), mlps])

    return compare(ours, peer, 5, value) | {
        "note": "ours is timed as users call it (gradient halfway between the runs); values compared at the harmful run"
    }


def neurons(model: LensModel) -> dict[str, Any]:
    """Exact patching of the 2,000 neurons with the largest estimates, one by one, 8 pairs."""
    pairs, metric = equal_length_pairs(model, 8), metric_of(model)
    runs = pair_runs(model, pairs, extra=[SiteKind.NEURONS])
    estimates = ms.node_attribution(model, runs, metric, steps=4, neurons=True, progress=False).neurons
    top = estimates.flatten().abs().topk(min(2000, estimates.numel())).indices.tolist()
    nodes = [Node("neuron", k // model.d_mlp, k % model.d_mlp) for k in top]
    plain, _ = timed(lambda: model.logits(pairs.harmful))
    result, _ = alone(lambda: ms.activation_patching(model, runs, metric, nodes=nodes, progress=False))
    return result | {"per_neuron_s": result["ours_s"] / len(top), "plain_forward_s": plain, "neurons": len(top)}


def mean_differences(model: LensModel) -> dict[str, Any]:
    """Mean differences of the refusal direction, 64 prompts of mixed lengths; the peer as published."""
    harmful, harmless = mixed_prompts(32)
    twin = plain_twin(model)

    def ours() -> torch.Tensor:
        found, _ = scores.mean_differences(model, harmful, harmless, n_positions=N_COLUMNS)
        return found / found.abs().max()

    def peer() -> torch.Tensor:
        found = published_means(model, twin, harmful, harmless, N_COLUMNS).float()
        return found / found.abs().max()

    return compare(ours, peer) | {"note": "values are compared as shares of the largest"}


def direction_scores(model: LensModel) -> dict[str, Any]:
    """Bypass, induce and KL of 4 candidate directions on 32 prompts of mixed lengths; the peer as published."""
    harmful, harmless = mixed_prompts(16)
    metric, twin = metric_of(model), plain_twin(model)
    layers = [max(1, model.n_layers // 3), 2 * model.n_layers // 3]
    vectors = scores.mean_differences(model, harmful, harmless, n_positions=2)[0][layers]

    def ours() -> torch.Tensor:
        checked = scores.Validation.of(model, harmful, harmless, metric)
        found = scores.score_directions(model, checked, metric, vectors, layers, progress=False)
        rows = torch.stack([part.double().mean(-1) for part in (found.bypass, found.induce, found.kl)])
        return rows / rows.abs().max()

    def peer() -> torch.Tensor:
        rows = published_scores(model, twin, metric, harmful, harmless, vectors, layers)
        return rows / rows.abs().max()

    return compare(ours, peer) | {"note": "values are compared as shares of the largest"}


def acdc(_: LensModel) -> dict[str, Any]:
    """ACDC on the certified model, 479 edges, 8 pairs; the peer one edge a run, from the receiver's block on."""
    known = testbed.certified()
    model = ms.load_model((known.model, known.tokenizer))
    pairs = known.pairs.sample(8)
    return acdc_of(model, pairs, ms.RefusalLogOdds.detect(model, known.pairs))


def acdc_of(model: LensModel, pairs: PromptPairs, metric: ms.RefusalLogOdds, repeats: int = 3) -> dict[str, Any]:
    """Which edges each leaves on paths from the embedding to the logits."""
    twin, tokens = plain_twin(model), model.tokenize_pairs(pairs)
    every = all_edges(model.n_layers, model.n_heads, model.parallel)
    order = sorted(every, key=lambda edge: (edge.receiver.order, edge.slot, edge.sender.order), reverse=True)

    def ours() -> torch.Tensor:
        left = set(ms.circuits.acdc(model, pairs, metric, progress=False).edges)
        return torch.tensor([float(edge in left) for edge in every])

    def peer() -> torch.Tensor:
        left = set(prune(plain_acdc(twin, tokens.harmful.ids, tokens.harmless.ids, 0.01, order)))
        return torch.tensor([float(edge in left) for edge in every])

    return compare(ours, peer, repeats)


# what each case is to reach
PEER_CASES: dict[str, tuple[Callable[[LensModel], dict[str, Any]], Target]] = {
    "eap_ig": (eap_ig, Target(seconds=240, gib=3)),
    "node_attribution": (node_attribution, Target(ratio=3)),
    "paths_to_logits": (paths_to_logits, Target(ratio=100)),
    "paths_to_two_logits": (paths_to_two_logits, Target(ratio=100)),
    "direct_paths": (direct_paths, Target(ratio=100)),
    "path_matrix": (path_matrix, Target()),
    "head_to_query": (head_to_query, Target(ratio=8)),
    "neurons": (neurons, Target()),
    "head_sweep": (head_sweep, Target(ratio=6)),
    "mean_differences": (mean_differences, Target(ratio=1)),
    "direction_scores": (direction_scores, Target(ratio=1)),
    "acdc": (acdc, Target(ratio=1)),
}
