"""Direct paths from every sender to every head: how they change attention to the instruction, and values read there.

The numbers come in closed form from stored runs. Attention scores and values are linear in the output of the norm
before a slot. One pass of each layer's attention therefore gives their gradients. Every sender's change is multiplied
with these gradients, so that no sender needs a forward of its own.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import public
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun, run_block
from mechsafety.nodes import EMBED, Edge, Node, head_and_mlp_nodes
from mechsafety.patching.activation import PatchDirection
from mechsafety.patching.masks import PairRuns, pair_runs
from mechsafety.patching.norms import NormOption, block_norms, keep_scales, through_norm
from mechsafety.patching.receivers import reaches
from mechsafety.patching.senders import sender_changes
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.results import Provenance, Result, bars
from mechsafety.scale.work import sweeps, work
from mechsafety.sites import Site, SiteKind


@dataclass(frozen=True, slots=True)
class PathMatrix(Result):
    """Change of each head's attention to the instruction, and of what it reads there, along every direct path.

    Attributes:
        provenance: Model, options, versions.
        senders: The embedding, heads and MLPs, in the order of computation.
        receivers: Heads.
        q, k: Change of the attention score from the last token to the instruction's tokens, mean over these tokens. The
            sender changes only the head's query (``q``) or only its keys (``k``). The score is the one before the
            softmax, as the model scales it.
        v: Change of what the head reads from the instruction, in units of the values. What it reads are its values,
            weighted by the base run's attention from the last token. The change is measured along the direction in
            which the source run changes it.
        norm: ``freeze`` (the norm before the head keeps the base run's scale; everything is linear) or ``recompute``
            (exact norm of the changed input).
        direction: ``noising``: changes of the harmful run; ``denoising``: of the harmless one.

    Example:
        >>> found = ms.patching.path_matrix(model, pairs)
        >>> edge, change = found.top("v", 1)[0]
        >>> edge.slot
        'v'
    """

    provenance: Provenance
    senders: tuple[Node, ...]
    receivers: tuple[Node, ...]
    q: Float[Tensor, "sender receiver prompt"]
    k: Float[Tensor, "sender receiver prompt"]
    v: Float[Tensor, "sender receiver prompt"]
    norm: NormOption
    direction: PatchDirection

    def __repr__(self) -> str:
        return f"PathMatrix({len(self.senders)} senders -> {len(self.receivers)} heads, norm={self.norm})"

    def slot(self, slot: str) -> Float[Tensor, "sender receiver"]:
        """Mean over prompts of one slot's changes.

        Raises:
            MechsafetyError: A head has no such slot.
        """
        if slot not in ("q", "k", "v"):
            raise MechsafetyError(f"a head has no slot {slot!r}", expected="q, k or v")
        mean: Tensor = getattr(self, slot).mean(-1)
        return mean

    def top(self, slot: str, n: int = 200) -> list[tuple[Edge, float]]:
        """The ``n`` edges with the largest absolute mean change in a slot, largest first: candidates to measure."""
        rows = self.slot(slot)
        flat = rearrange(rows, "sender receiver -> (sender receiver)")
        order = flat.abs().argsort(descending=True, stable=True)[:n].tolist()
        ends = [(self.senders[k // rows.shape[1]], self.receivers[k % rows.shape[1]], k) for k in order]
        return [(Edge(a, b, slot), float(flat[k])) for a, b, k in ends if float(flat[k])]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per path and slot, largest absolute mean change first, with its standard deviation over prompts."""
        rows = []
        for slot in ("q", "k", "v"):
            values = getattr(self, slot)
            mean, spread = values.mean(-1).tolist(), values.std(-1, unbiased=False).tolist()
            rows += [
                (str(sender), str(receiver), slot, mean[a][b], spread[a][b])
                for a, sender in enumerate(self.senders)
                for b, receiver in enumerate(self.receivers)
                if sender.order[:2] < receiver.order[:2]
            ]
        frame = pd.DataFrame(rows, columns=["sender", "receiver", "slot", "change", "sd"])
        return frame.sort_values("change", key=abs, ascending=False, kind="stable")

    def plot(self, slot: str = "q") -> go.Figure:
        """Bar chart of the 30 largest mean changes in a slot."""
        rows = [(f"{edge.sender} -> {edge.receiver}", value) for edge, value in self.top(slot, 30)]
        unit = "values" if slot == "v" else "attention score"
        return bars(pd.DataFrame(rows, columns=["path", "change"]), "path", "change", f"change through {slot}: {unit}")


@sweeps
@public
def path_matrix(
    model: LensModel,
    pairs: PromptPairs | PairRuns,
    *,
    norm: NormOption = "freeze",
    direction: PatchDirection = "noising",
    progress: bool = True,
) -> PathMatrix:
    """Every sender's direct path to every head, as changes in attention score and value: a first look.

    MLPs and heads between the two stay as in the base run (``mlp="freeze"``). The head's other slots stay too: a change
    of the query meets the base run's keys. With ``norm="freeze"``, the changes by all senders into a head sum to the
    change by the whole residual stream. Layers are taken one by one, so that only the stored runs make memory grow with
    their number. To measure which paths matter for the metric, use `path_patching`.

    Args:
        model: The model, without a soft cap on attention scores.
        pairs: Pairs, of which only those that align are used; or their stored runs.
        norm: What the norm before the receiving head does: ``freeze`` or ``recompute``. Norms of queries and keys
            (Qwen-3, OLMo-2) keep the base run's scale; ``recompute`` refuses models that have them.
        direction: ``noising``: changes of the harmful run towards the harmless one; ``denoising``: the reverse.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: An option is unknown; the model caps its attention scores; or ``norm`` is ``recompute`` and the
            model has norms of queries and keys.

    Example:
        >>> found = ms.patching.path_matrix(model, pairs)
        >>> found.to_dataframe().columns.tolist()
        ['sender', 'receiver', 'slot', 'change', 'sd']
    """
    if model.backend.score_cap > 0:
        raise MechsafetyError(
            f"{model.name} caps its attention scores, which are then not linear in queries and keys",
            hint="measure single paths by path_patching(...)",
        )
    if norm == "recompute" and _head_norms(model, 0):
        raise MechsafetyError(
            f"{model.name} normalises queries and keys inside the head", expected="norm='freeze' for such a model"
        )
    runs = pairs if isinstance(pairs, PairRuns) else pair_runs(model, pairs)
    base, source = (runs.harmful, runs.harmless) if direction == "noising" else (runs.harmless, runs.harmful)
    senders = (EMBED, *head_and_mlp_nodes(model.n_layers, model.n_heads))
    receivers = tuple(node for node in senders if node.kind == "head")
    found = {slot: torch.zeros(len(senders), len(receivers), len(base), device=model.device) for slot in "qkv"}
    columns_of = {
        layer: [k for k, node in enumerate(receivers) if node.layer == layer] for layer in range(model.n_layers)
    }

    def into(layer: int) -> Iterator[tuple[int, str, Float[Tensor, "sender head batch"]]]:
        slopes = _slopes(model, base, source, layer)
        for rows in _by_layer(senders, receivers[columns_of[layer][0]]):
            changed = _read_changes(model, base, source, [senders[k] for k in rows], layer, norm)
            for slot, slope in slopes.items():
                yield rows[0], slot, einsum(changed, slope, "sender batch pos d, head batch pos d -> sender head batch")

    kind = tuple[tuple[int, str, Tensor], ...]
    with model.lock, progress_bar(total=model.n_layers, desc="path matrix", show=progress) as bar:
        for layer, parts in zip(columns_of, work("path matrix", range(model.n_layers), into, kind), strict=True):
            for first, slot, part in parts:
                found[slot][first : first + len(part), columns_of[layer]] = part.to(model.device)
            bar.update()
    options = {"norm": norm, "mlp": "freeze", "direction": direction, "pairs": len(base), **omissions(runs)}
    return PathMatrix(
        model.provenance(options=options), senders, receivers, found["q"], found["k"], found["v"], norm, direction
    )


def _by_layer(senders: Sequence[Node], receiver: Node) -> Iterator[list[int]]:
    """Indices of the senders that reach a head, one layer at a time."""
    groups: dict[int | None, list[int]] = {}
    for k, sender in enumerate(senders):
        if reaches(sender, receiver, parallel=True):
            groups.setdefault(sender.layer, []).append(k)
    yield from groups.values()


def _read_changes(
    model: LensModel, base: BaseRun, source: BaseRun, senders: Sequence[Node], layer: int, norm: NormOption
) -> Float[Tensor, "sender batch pos d_model"]:
    """Change of what a layer's heads read, which is the output of the norm before them; float32."""
    with torch.no_grad():
        change = sender_changes(model, base, source, senders, norm=norm)
        for module in block_norms(model, layer, "ln1"):
            change = through_norm(model, module, base.resid[layer], change, norm)
        return change.float()


def _slopes(
    model: LensModel, base: BaseRun, source: BaseRun, layer: int
) -> dict[str, Float[Tensor, "head batch pos d_model"]]:
    """Gradients of each head's score (through its query, through its keys) and value in what the heads read."""
    instruction = base.tokens.span_mask("instruction")
    own = _read_values(model, source, layer)
    with (
        torch.enable_grad(),
        keep_scales(model, "freeze", _head_norms(model, layer), lambda: _attend(model, base, layer)),
    ):
        # one pass per slot, in which the other slots are detached from what the heads read
        passes = {slot: _attend(model, base, layer, slot) for slot in "qkv"}
        weight = instruction.float() / instruction.sum(1, keepdim=True)
        out = {slot: _pull(passes[slot], _scores(passes[slot], weight)) for slot in "qk"}
        out["v"] = _pull(passes["v"], _values(model, passes["v"], own, instruction[:, base.start :]))
    return out


@dataclass(frozen=True, slots=True, eq=False)
class _Attention:
    """Activations of one pass of a layer's attention."""

    reads: Float[Tensor, "batch pos d_model"]
    scores: Float[Tensor, "batch head pos key"]
    pattern: Float[Tensor, "batch head pos key"]
    values: Float[Tensor, "batch pos kv_head d_head"]


class _Enough(Exception):
    """Ends a pass after the attention pattern."""


def _attend(model: LensModel, run: BaseRun, layer: int, live: str = "") -> _Attention:
    """Run one layer's attention on a stored run; slot ``live`` stays differentiable in what the heads read."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[Tensor], Tensor | None]:
        def hook(tensor: Tensor) -> Tensor | None:
            seen[name] = tensor if name in (live, "scores", "pattern") else tensor.detach()
            return seen[name]

        return hook

    def leaf(tensor: Tensor) -> Tensor:
        seen["reads"] = tensor.detach().requires_grad_()
        return seen["reads"]

    def stop(tensor: Tensor) -> None:
        seen["pattern"] = tensor.detach()
        raise _Enough

    kinds = {"q": SiteKind.Q, "k": SiteKind.K, "v": SiteKind.V, "scores": SiteKind.SCORES}
    hooks: list[Any] = [(Site(kind, layer), note(name)) for name, kind in kinds.items()]
    hooks.append((Site(SiteKind.PATTERN, layer), stop))
    norms, resid = block_norms(model, layer, "ln1"), run.resid[layer]
    with contextlib.suppress(_Enough):
        run_block(model, run, layer, resid if norms else leaf(resid), hooks, leaf)
    return _Attention(seen["reads"], seen["scores"], seen["pattern"], seen["v"])


def _read_values(model: LensModel, run: BaseRun, layer: int) -> Float[Tensor, "batch pos kv_head d_head"]:
    with torch.no_grad():
        return _attend(model, run, layer).values


def _scores(seen: _Attention, weight: Float[Tensor, "batch key"]) -> Float[Tensor, "batch head"]:
    """Mean score from the last column to the instruction."""
    picked = torch.where(rearrange(weight > 0, "batch key -> batch 1 key"), seen.scores[:, :, -1], 0.0)
    return einsum(picked.float(), weight, "batch head key, batch key -> batch head")


def _values(
    model: LensModel,
    seen: _Attention,
    source: Float[Tensor, "batch pos kv_head d_head"],
    instruction: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch head"]:
    """What each head reads from the instruction, projected on the direction in which the source run changes it."""
    n_pos, group = instruction.shape[1], model.n_heads // model.n_kv_heads
    weight = seen.pattern[:, :, -1, -n_pos:].float() * rearrange(instruction, "batch pos -> batch 1 pos")
    weight = rearrange(weight, "batch (kv_head group) pos -> batch kv_head group pos", group=group)
    formula = "batch kv_head group pos, batch pos kv_head k -> batch kv_head group k"
    toward = einsum(weight, (source - seen.values.detach()).float(), formula)
    unit = toward / toward.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    read = einsum(weight, seen.values.float(), formula)
    toward_each: Tensor = rearrange((read * unit).sum(-1), "batch kv_head group -> batch (kv_head group)")
    return toward_each


def _pull(seen: _Attention, targets: Float[Tensor, "batch head"]) -> Float[Tensor, "head batch pos d_model"]:
    """Gradient of every head's target in what the heads read, separately per prompt."""
    heads = range(targets.shape[1])
    grads = [torch.autograd.grad(targets[:, head].sum(), seen.reads, retain_graph=True)[0].float() for head in heads]
    return torch.stack(grads)


def _head_norms(model: LensModel, layer: int) -> list[torch.nn.Module]:
    """Norms of queries and keys inside a layer's heads."""
    return [norm for norm in (model.backend.head_norm(layer, slot) for slot in ("q", "k")) if norm is not None]
