"""Roles of nodes, from measurements and never from a node's place in the network."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechsafety.cache import ActivationCache
from mechsafety.circuits.circuit import CircuitEdge, Role, RoleEvidence
from mechsafety.inputs import public
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import holding, unembed
from mechsafety.nodes import Node
from mechsafety.patching import activation_patching
from mechsafety.patching.masks import PairRuns, Patch, patched_scores
from mechsafety.patching.senders import sender_changes
from mechsafety.sites import SiteKind

# a node has a property if at least this share of its own effect comes that way
MOST = 0.5
# other nodes feed a node, or are fed by it, if the paths between carry at least this share of the node's own effect
SOME = 0.1
# a head attends to the instruction if this share of its attention is on it, from the suffix or from inside it
ATTENDS = 0.1


@public
def role_evidence(
    model: LensModel,
    runs: PairRuns,
    metric: RefusalLogOdds,
    nodes: Sequence[Node],
    *,
    groups: Sequence[PairRuns] = (),
    progress: bool = True,
) -> dict[Node, RoleEvidence]:
    """Measure for each node where its effect arises and how it reaches the metric.

    Args:
        model: The model.
        runs: Stored runs of aligned pairs.
        metric: The metric to measure.
        nodes: Heads, MLPs and neurons. Neurons need runs that hold them.
        groups: The same pairs in groups by length (see `FaithfulnessMeter.grouped`), so that patching runs fewer
            columns.
        progress: Whether to show bars.

    Returns:
        Evidence without the path sums, which `assign_roles` adds.
    """
    harmful, harmless = runs.scores(metric)
    gap = float((harmful - harmless).mean())
    at: dict[str, list[float | None]] = {"instruction": [None] * len(nodes)}
    for span in ("instruction", "suffix") if runs.align == "tokens" else ("suffix",):
        found_at = [
            activation_patching(model, group, metric, nodes=nodes, positions=span, progress=progress)
            for group in groups or [runs]
        ]
        at[span] = (torch.cat([one.changes for one in found_at], dim=1).mean(1) / gap).tolist()
    heads = [node for node in nodes if node.kind == "head"]
    caches = []
    for run in (runs.harmful, runs.harmless):
        with holding(model, run):
            caches.append(model.cache(run.tokens, ["pattern", "v"]))
    with torch.no_grad():
        change = sender_changes(model, runs.harmful, runs.harmless, nodes, at=slice(-1, None))[:, :, 0]
        final = runs.harmful.resid[-1][:, -1]
        direct = (harmful - metric(unembed(model, final + change.to(final.dtype)))).mean(1) / gap
        via = _via_instruction(model, runs, metric, heads, gap, caches)
    # pairs aligned at the suffix have no run columns in the instruction
    to_instruction = {span: _mean_attention(runs, caches[0].pattern, span) for span in ("instruction", "suffix")}
    found = {}
    for k, node in enumerate(nodes):
        is_head = node.kind == "head"
        found[node] = RoleEvidence(
            direct=float(direct[k]),
            at_instruction=at["instruction"][k],
            at_suffix=at["suffix"][k],
            via_instruction=via[node] if is_head else None,
            attention_to_instruction=float(to_instruction["suffix"][node.layer, node.index]) if is_head else None,
            attention_within_instruction=(
                float(to_instruction["instruction"][node.layer, node.index]) if is_head else None
            ),
        )
    return found


def assign_roles(
    effects: Mapping[Node, float], evidence: Mapping[Node, RoleEvidence], edges: Sequence[CircuitEdge]
) -> dict[Node, tuple[Role, RoleEvidence]]:
    """Assign roles by these rules; a node without a positive effect, or that fits no rule, gets ``none``.

    - production: at least half of the node's effect is direct, through the logits.
    - detection: the node is a head that attends to the instruction, and at least half of its effect is what it moves
      from there.
    - evaluation: detection nodes feed the node, and the node feeds decision or production nodes.
    - decision: at least half of the node's effect arises at suffix positions. Evaluation (or detection) nodes feed it,
      and it feeds production nodes.

    To *feed* means: the direct paths are worth at least a tenth of the node's own effect. A node that could be both
    evaluation and decision is a decision in two cases: evaluation nodes feed it at least as much as detection nodes do,
    or it feeds no other possible decision node.

    Args:
        effects: Exact total effect of each node.
        evidence: Evidence from `role_evidence`.
        edges: Direct effects between the nodes.
    """
    roles: dict[Node, Role] = {}
    for node, seen in evidence.items():
        effect = effects[node]
        if effect <= 0:
            roles[node] = "none"
        elif (seen.direct or 0.0) >= MOST * effect:
            roles[node] = "production"
        elif node.kind == "head" and _attends(seen) and (seen.via_instruction or 0.0) >= MOST * effect:
            roles[node] = "detection"

    def paths(node: Node, others: Collection[Node], incoming: bool) -> float:
        ends = ((m.edge.receiver, m.edge.sender) if incoming else (m.edge.sender, m.edge.receiver) for m in edges)
        found = (m.effect for m, (near, far) in zip(edges, ends, strict=True) if near == node and far in others)
        return sum(found, 0.0)

    def having(*names: str) -> set[Node]:
        return {node for node, role in roles.items() if role in names}

    rest = [node for node in evidence if node not in roles]
    enough = {node: SOME * effects[node] for node in rest}
    detection, production = having("detection"), having("production")
    fed = {node: paths(node, detection, incoming=True) for node in rest}
    evaluating = {node for node in rest if fed[node] >= enough[node]}
    deciding = {
        node
        for node in rest
        if (evidence[node].at_suffix or 0.0) >= MOST * effects[node]
        and paths(node, production, incoming=False) >= enough[node]
    }
    both = evaluating & deciding
    later = {
        node
        for node in both
        if paths(node, evaluating - {node}, incoming=True) >= fed[node]
        or paths(node, deciding - {node}, incoming=False) < enough[node]
    }
    evaluating, deciding = evaluating - later, deciding - (both - later)
    evaluating = {n for n in evaluating if paths(n, deciding | production, incoming=False) >= enough[n]}
    deciding = {n for n in deciding if paths(n, evaluating | detection, incoming=True) >= enough[n]}
    for node in rest:
        roles[node] = "evaluation" if node in evaluating else "decision" if node in deciding else "none"
    return {
        node: (
            roles[node],
            replace(
                seen,
                from_detection=paths(node, having("detection"), incoming=True),
                from_evaluation=paths(node, having("evaluation"), incoming=True),
                to_decision=paths(node, having("decision", "production"), incoming=False),
            ),
        )
        for node, seen in evidence.items()
    }


def _attends(seen: RoleEvidence) -> bool:
    return max(seen.attention_to_instruction or 0.0, seen.attention_within_instruction or 0.0) >= ATTENDS


def _mean_attention(
    runs: PairRuns, pattern: Float[Tensor, "layer head batch query source"], span: str
) -> Float[Tensor, "layer head"]:
    """Mean attention to the instruction span from positions of ``span``, in the harmful run."""
    tokens = runs.harmful.tokens
    instruction = tokens.span_mask("instruction").float()
    queries = tokens.span_mask(span)[:, runs.start :].float()
    mass = einsum(
        pattern[:, :, :, runs.start :].float(),
        instruction,
        queries,
        "layer head batch pos source, batch source, batch pos -> layer head",
    )
    return mass / queries.sum().clamp(min=1)


def _via_instruction(
    model: LensModel,
    runs: PairRuns,
    metric: RefusalLogOdds,
    heads: Sequence[Node],
    gap: float,
    caches: Sequence[ActivationCache],
) -> dict[Node, float]:
    """Effect of replacing only what each head moves from the instruction: attention there times values there."""
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
