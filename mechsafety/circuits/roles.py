"""Roles of nodes, from measurements and never from where in the network a node lies."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechsafety.cache import ActivationCache
from mechsafety.circuits.circuit import CircuitEdge, RoleEvidence
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import unembed
from mechsafety.nodes import Node
from mechsafety.patching import activation_patching
from mechsafety.patching.masks import PairRuns, Patch, patched_scores
from mechsafety.patching.paths import node_outputs
from mechsafety.sites import SiteKind

# a node has a property when at least this share of its own effect comes that way
MOST = 0.5
# and is fed by, or feeds, other nodes when the paths to them carry at least this share of its own effect
SOME = 0.1


def role_evidence(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, nodes: Sequence[Node], *, progress: bool = True
) -> dict[Node, RoleEvidence]:
    """Measure for each node where its effect arises and how it reaches the metric.

    Args:
        model: The model.
        runs: Stored runs of aligned pairs.
        metric: What is measured.
        nodes: Heads and MLPs.
        progress: Whether to show bars.

    Returns:
        Evidence without the path sums, which `assign_roles` adds.
    """
    at = {
        span: activation_patching(model, runs, metric, nodes=nodes, positions=span, progress=progress).effects.tolist()
        for span in ("instruction", "suffix")
    }
    harmful, harmless = runs.scores(metric)
    gap = float((harmful - harmless).mean())
    heads = [node for node in nodes if node.kind == "head"]
    caches = [model.cache(run.tokens, ["pattern", "v"]) for run in (runs.harmful, runs.harmless)]
    with torch.no_grad():
        change = (node_outputs(model, runs.harmless, nodes) - node_outputs(model, runs.harmful, nodes))[:, :, -1]
        final = runs.harmful.resid[-1][:, -1]
        direct = (harmful - metric(unembed(model, final + change.to(final.dtype)))).mean(1) / gap
        via = _via_instruction(model, runs, metric, heads, gap, caches)
    to_instruction = _mean_attention(runs, caches[0].pattern)
    found = {}
    for k, node in enumerate(nodes):
        is_head = node.kind == "head"
        found[node] = RoleEvidence(
            direct=float(direct[k]),
            at_instruction=at["instruction"][k],
            at_suffix=at["suffix"][k],
            via_instruction=via[node] if is_head else None,
            attention_to_instruction=float(to_instruction[node.layer, node.index]) if is_head else None,
        )
    return found


def assign_roles(
    effects: Mapping[Node, float], evidence: Mapping[Node, RoleEvidence], edges: Sequence[CircuitEdge]
) -> dict[Node, tuple[str, RoleEvidence]]:
    """Roles by these rules, in this order; a node without a positive effect, or that fits none, gets ``none``.

    production: at least half of its effect is direct, through the logits. detection: a head, at least half of whose
    effect is what it moves from instruction tokens. decision: at least half of its effect arises at suffix positions,
    and it feeds production nodes. evaluation: fed by detection nodes, and feeds decision or production nodes. "Feeds"
    means direct paths worth at least a tenth of its own effect.

    Args:
        effects: Exact total effects.
        evidence: From `role_evidence`.
        edges: Direct effects between the nodes.
    """
    roles: dict[Node, str] = {}
    for node, seen in evidence.items():
        effect = effects[node]
        if effect <= 0:
            roles[node] = "none"
        elif (seen.direct or 0.0) >= MOST * effect:
            roles[node] = "production"
        elif node.kind == "head" and (seen.via_instruction or 0.0) >= MOST * effect:
            roles[node] = "detection"

    def paths(node: Node, role: set[str], incoming: bool) -> float:
        total = 0.0
        for member in edges:
            near, far = member.edge.sender, member.edge.receiver
            if incoming:
                near, far = far, near
            if near == node and roles.get(far) in role:
                total += member.effect
        return total

    for node, seen in evidence.items():
        at_suffix = node not in roles and (seen.at_suffix or 0.0) >= MOST * effects[node]
        if at_suffix and paths(node, {"production"}, incoming=False) >= SOME * effects[node]:
            roles[node] = "decision"
    named = {}
    for node, seen in evidence.items():
        received = paths(node, {"detection"}, incoming=True)
        sent = paths(node, {"decision", "production"}, incoming=False)
        if node not in roles:
            enough = SOME * effects[node]
            roles[node] = "evaluation" if received >= enough and sent >= enough else "none"
        named[node] = (roles[node], replace(seen, from_detection=received, to_decision=sent))
    return named


def _mean_attention(
    runs: PairRuns, pattern: Float[Tensor, "layer head batch query source"]
) -> Float[Tensor, "layer head"]:
    """Mean attention from suffix positions to the instruction span in the harmful run."""
    tokens = runs.harmful.tokens
    instruction = tokens.span_mask("instruction").float()
    suffix = tokens.span_mask("suffix")[:, runs.start :].float()
    mass = einsum(
        pattern[:, :, :, runs.start :].float(),
        instruction,
        suffix,
        "layer head batch pos source, batch source, batch pos -> layer head",
    )
    return mass / suffix.sum()


def _via_instruction(
    model: LensModel,
    runs: PairRuns,
    metric: RefusalLogOdds,
    heads: Sequence[Node],
    gap: float,
    caches: Sequence[ActivationCache],
) -> dict[Node, float]:
    """Effect of replacing only what each head moves from instruction tokens: attention there times values there."""
    if not heads:
        return {}
    moved = []
    for cache in caches:
        values = cache.v.repeat_interleave(model.n_heads // model.n_kv_heads, dim=1)
        moved.append(
            einsum(
                cache.pattern[:, :, :, runs.start :].float(),
                values.float(),
                cache.tokens.span_mask("instruction").float(),
                "layer head batch pos source, layer head batch source d_head, batch source"
                " -> layer batch pos head d_head",
            )
        )
    z = runs.harmful.acts[SiteKind.Z]
    source = {**runs.harmless.acts, SiteKind.Z: (z.float() + moved[1] - moved[0]).to(z.dtype)}
    ordered = sorted(heads, key=lambda node: node.order)
    patch = Patch.of(model, [[node] for node in ordered])
    scores = patched_scores(model, runs.harmful, source, patch, metric)
    lost = (metric(runs.harmful.logits) - scores).mean(1) / gap
    return {node: float(value) for node, value in zip(ordered, lost, strict=True)}
