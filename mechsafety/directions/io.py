"""What writes a direction and what reads it: heads, MLPs and neurons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from mechsafety.directions.refusal import RefusalDirection
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import public
from mechsafety.intervals import mean_interval
from mechsafety.interventions.checks import check_nodes, check_vector
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun, Hook, max_variants, run_from
from mechsafety.nodes import SLOTS, Node, NodeLike, head_and_mlp_nodes
from mechsafety.patching import PairRuns, pair_runs
from mechsafety.patching.norms import block_norms_option
from mechsafety.patching.receivers import live_logits, slot_edit
from mechsafety.patching.senders import neuron_weights, node_outputs, own_share
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.results import Provenance, Result, bars, norms_note
from mechsafety.sites import Site, SiteKind

if TYPE_CHECKING:
    from mechsafety.circuits import RefusalCircuit

# the slots through which heads and MLPs read a direction
READ_SLOTS = (*SLOTS["head"], *SLOTS["mlp"])


@dataclass(frozen=True, slots=True)
class DirectionIO(Result):
    """Writers and readers of a direction, pair by pair.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        nodes: Heads and MLPs.
        writes: Share of the pairs' gap along the direction that each node writes, at the direction's block and
            position. Nodes at or after that block have 0. Averaged over pairs, the shares of all heads and MLPs before
            it sum to 1. Norms after attention and MLP (Gemma-2, OLMo-2) keep each run's own scale.
        cosine: Cosine between each node's mean change and the direction.
        reads: Share of the metric's gap that is lost when one slot of the node (``q``, ``k``, ``v``, ``mlp``) no longer
            reads the pairs' difference along the direction. All other slots still read it. Exact. NaN for slots that a
            node does not have.
        neurons_write: Like ``writes``, per neuron, mean over pairs. A layer's neurons sum to its MLP's share, except
            for biases.
        neurons_read: Estimate of ``reads``, per neuron: the neuron's exact change when its MLP no longer reads the
            difference, times the metric's gradient. In a mixture of experts, both neuron tables are zero.

    Example:
        >>> found = ms.directions.direction_io(model, direction, pairs, metric, nodes=["L0.H1", "L3.H1"])
        >>> found.to_dataframe()[["node", "kind"]].values.tolist()
        [['L0.H1', 'head'], ['L3.H1', 'head']]
    """

    provenance: Provenance
    metric: dict[str, object]
    nodes: tuple[Node, ...]
    writes: Float[Tensor, "node pair"]
    cosine: Float[Tensor, " node"]
    reads: Float[Tensor, "node slot pair"]
    neurons_write: Float[Tensor, "layer d_mlp"]
    neurons_read: Float[Tensor, "layer d_mlp"]

    def __repr__(self) -> str:
        top = [str(self.nodes[k]) for k in self.writes.mean(1).abs().argsort(descending=True)[:3].tolist()]
        return f"DirectionIO({len(self.nodes)} nodes, written most by {', '.join(top)}{norms_note(self.provenance)})"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per node, largest writer first: shares with intervals over pairs, cosine, reads of each slot."""
        rows = []
        for k, node in enumerate(self.nodes):
            low, high = mean_interval(self.writes[k].cpu().numpy())
            row: dict[str, Any] = {"node": str(node), "kind": node.kind, "layer": node.layer, "index": node.index}
            row |= {"writes": float(self.writes[k].mean()), "writes_low": low, "writes_high": high}
            row |= {"cosine": float(self.cosine[k])}
            for slot, values in zip(READ_SLOTS, self.reads[k], strict=True):
                ends = mean_interval(values.cpu().numpy()) if not values.isnan().any() else (np.nan, np.nan)
                row |= {f"reads_{slot}": float(values.mean())}
                row |= {f"reads_{slot}_low": ends[0], f"reads_{slot}_high": ends[1]}
            rows.append(row)
        frame = pd.DataFrame(rows).astype({"index": "Int64"})  # an MLP has none
        return frame.sort_values("writes", key=abs, ascending=False, kind="stable")

    def neurons_dataframe(self, top: int = 50) -> pd.DataFrame:
        """The ``top`` largest writers and the ``top`` largest readers among the neurons."""
        width = self.neurons_write.shape[1]
        both = [(name, getattr(self, f"neurons_{name}").flatten()) for name in ("write", "read")]
        chosen = {int(k) for _, flat in both for k in flat.abs().argsort(descending=True)[:top].tolist()}
        rows = [
            (str(Node("neuron", k // width, k % width)), k // width, k % width, *(float(flat[k]) for _, flat in both))
            for k in sorted(chosen)
        ]
        frame = pd.DataFrame(rows, columns=["node", "layer", "index", "writes", "reads_estimate"])
        return frame.sort_values("writes", key=abs, ascending=False, kind="stable")

    def plot(self) -> go.Figure:
        """Bar chart of the 30 largest writers with intervals."""
        frame = self.to_dataframe().rename(columns={"writes_low": "ci_low", "writes_high": "ci_high"})
        return bars(frame, "node", "writes", "share of the gap along the direction")


@public
def direction_io(
    model: LensModel,
    direction: RefusalDirection,
    pairs: PromptPairs | PairRuns,
    metric: RefusalLogOdds,
    *,
    circuit: "RefusalCircuit | None" = None,
    nodes: Sequence[NodeLike] | None = None,
    progress: bool = True,
) -> DirectionIO:
    """Measure which heads, MLPs and neurons write a direction, and which read it.

    Args:
        model: The model.
        direction: The direction. Only nodes before its block can write it.
        pairs: Pairs, of which those that align are taken; or their stored runs (with ``neurons``).
        metric: Metric whose gap the readers' shares refer to.
        circuit: Look only at the heads and MLPs of this circuit.
        nodes: Look only at these nodes; by default at every head and MLP.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: A direction of another width, a layer or position that the pairs' runs lack, neurons among the
            nodes, or both a circuit and nodes.

    Example:
        >>> found = ms.directions.direction_io(model, direction, pairs, metric, circuit=circuit)
        >>> [str(node) for node in found.nodes]
        ['L0.H1', 'L0.MLP', 'L1.MLP', 'L3.H1', 'L3.MLP']
    """
    if circuit is not None and nodes is not None:
        raise MechsafetyError("a circuit and nodes", expected="one of them")
    unit = check_vector(direction.vector, model.d_model).to(model.device).float()
    unit = unit / unit.norm()
    listed = head_and_mlp_nodes(model.n_layers, model.n_heads) if nodes is None else check_nodes(model, nodes)
    if circuit is not None:
        listed = tuple(member.node for member in circuit.nodes if member.node.kind in ("head", "mlp"))
    if any(node.kind == "neuron" for node in listed):
        raise MechsafetyError("neurons among the nodes", expected="heads and MLPs: all neurons are measured anyway")
    extra = [] if model.experts else [SiteKind.NEURONS]
    runs = pairs if isinstance(pairs, PairRuns) else pair_runs(model, pairs, extra=extra)
    bad, good = runs.harmful, runs.harmless
    at = bad.n_pos + direction.position
    if not 0 <= at < bad.n_pos or not 0 <= direction.layer < model.n_layers:
        raise MechsafetyError(
            f"a direction at layer {direction.layer}, position {direction.position}",
            expected=f"layers 0 to {model.n_layers - 1}, positions {-bad.n_pos} to -1",
        )
    along = ((bad.resid - good.resid)[direction.layer][:, at].float() @ unit).mean()
    with torch.no_grad():
        change = torch.stack([_change(model, runs, node, at) for node in listed])
    before = torch.tensor([(node.layer or 0) < direction.layer for node in listed], device=change.device)
    writes = einsum(change, unit, "node pair d_model, d_model -> node pair") / along
    cosine = torch.nn.functional.cosine_similarity(change.mean(1), unit, dim=-1)
    neurons_write = torch.zeros(model.n_layers, model.d_mlp, device=model.device)
    for layer in range(0 if model.experts else direction.layer):
        neurons_write[layer] = _neuron_shares(model, runs, layer, at, unit) / along
    reads = _reads(model, runs, metric, listed, unit, progress)
    return DirectionIO(
        model.provenance(
            options={"layer": direction.layer, "position": direction.position, "pairs": len(bad), **omissions(runs)}
            | block_norms_option(model, "frozen")
        ),
        metric.to_json(),
        listed,
        writes * before[:, None],
        cosine,
        reads,
        neurons_write,
        torch.zeros_like(neurons_write) if model.experts else _neuron_reads(model, runs, metric, unit),
    )


def _change(model: LensModel, runs: PairRuns, node: Node, at: int) -> Float[Tensor, "pair d_model"]:
    """Harmful less harmless output of a node at one position."""
    position = slice(at, at + 1 or None)
    harmful, harmless = (node_outputs(model, run, [node], position) for run in (runs.harmful, runs.harmless))
    return (harmful - harmless)[0, :, 0]


def _neuron_shares(
    model: LensModel, runs: PairRuns, layer: int, at: int, unit: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_mlp"]:
    """Mean over pairs of the difference, harmful less harmless, in what each neuron adds along the direction."""
    weights, sides = neuron_weights(model, layer), []
    for run in (runs.harmful, runs.harmless):
        acts = run.acts[SiteKind.NEURONS][layer][:, at].float()
        # the gradient maps a write to its part along the direction, behind the norm where there is one
        zeros = torch.zeros(len(run), 1, model.d_model, device=unit.device, requires_grad=True)
        with torch.enable_grad():
            reached = own_share(model, run, layer, "neuron", slice(at, at + 1))(zeros)
            (along,) = torch.autograd.grad((reached * unit).sum(), zeros)
        sides.append(acts * einsum(weights, along[:, 0], "d_mlp d_model, pair d_model -> pair d_mlp"))
    return (sides[0] - sides[1]).mean(0)


def _removed(run: BaseRun, other: BaseRun, layer: int, slot: str, parallel: bool, unit: Tensor) -> Tensor:
    """Change of a slot's input that takes the pairs' difference along the direction out of it."""
    difference = (run.resid[layer] - other.resid[layer]).float()
    if slot == "mlp" and not parallel:
        sides = [r.resid[layer + 1] - r.acts[SiteKind.MLP_OUT][layer] for r in (run, other)]
        difference = (sides[0] - sides[1]).float()
    return -einsum(difference, unit, unit, "pair pos d, d, e -> pair pos e")


def _reads(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, nodes: Sequence[Node], unit: Tensor, progress: bool
) -> Float[Tensor, "node slot pair"]:
    base = runs.harmful
    harmful, harmless = runs.scores(metric)
    reads = torch.full((len(nodes), len(READ_SLOTS), len(base)), torch.nan, device=harmful.device)
    groups: dict[tuple[int, int], list[int]] = {}
    for k, node in enumerate(nodes):
        for place in (3,) if node.kind == "mlp" else (0, 1, 2):
            groups.setdefault((node.layer or 0, place), []).append(k)
    size = max_variants(base)
    with torch.no_grad():
        for (layer, place), members in progress_bar(groups.items(), desc="readers", show=progress):
            delta = _removed(base, runs.harmless, layer, READ_SLOTS[place], model.parallel, unit)
            for first in range(0, len(members), size):
                chunk = members[first : first + size]
                rows = repeat(delta, "pair pos d -> variant pair pos d", variant=len(chunk))
                edit = slot_edit(model, base, [[(nodes[k], READ_SLOTS[place])] for k in chunk], rows)
                reads[chunk, place] = harmful - metric(live_logits(model, base, [[edit]]))
    return reads / (harmful - harmless).mean()


def _neurons(model: LensModel, layer: int, reads: Float[Tensor, "pair pos d_model"]) -> Float[Tensor, "pair pos d_mlp"]:
    """Activations of a layer's neurons when its MLP reads ``reads``."""
    seen: list[Tensor] = []
    with torch.no_grad(), model.hooks([(Site(SiteKind.NEURONS, layer), seen.append)]):
        model.mlp(layer, reads)
    return seen[0].float()


def _neuron_reads(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, unit: Tensor
) -> Float[Tensor, "layer d_mlp"]:
    base = runs.harmful
    acts = base.acts[SiteKind.NEURONS]
    leaves = [torch.zeros_like(acts[layer], requires_grad=True) for layer in range(model.n_layers)]

    def hook(layer: int) -> Hook:
        return (Site(SiteKind.NEURONS, layer), lambda own: own + leaves[layer])

    with torch.enable_grad():
        logits = run_from(model, base, 0, base.resid[0], [hook(layer) for layer in range(model.n_layers)])
        grads = torch.autograd.grad(metric(logits).sum(), leaves)
    harmful, harmless = runs.scores(metric)
    rows = []
    for layer, grad in enumerate(grads):
        delta = _removed(base, runs.harmless, layer, "mlp", model.parallel, unit)
        reads = base.resid[layer] if model.parallel else base.resid[layer + 1] - base.acts[SiteKind.MLP_OUT][layer]
        change = _neurons(model, layer, reads + delta.to(reads.dtype)) - acts[layer].float()
        rows.append(-rearrange(change * grad.float(), "pair pos d_mlp -> (pair pos) d_mlp").sum(0) / len(base))
    return torch.stack(rows) / (harmful - harmless).mean()
