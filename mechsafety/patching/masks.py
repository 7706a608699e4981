"""Runs in which chosen nodes take their values from the other prompt of each pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import (
    BaseRun,
    Hook,
    base_run,
    expand_rows,
    max_variants,
    run_from,
    split_rows,
)
from mechsafety.nodes import Node
from mechsafety.prompts import PromptPairs, TokenPairs
from mechsafety.sites import Site, SiteKind

KEPT = (SiteKind.Z, SiteKind.MLP_OUT)


@dataclass(frozen=True, slots=True)
class PairRuns:
    """The two runs of every pair, from the first column in which any pair differs.

    Attributes:
        harmful, harmless: Stored runs.
        start: That column.
    """

    harmful: BaseRun
    harmless: BaseRun
    start: int

    def scores(self, metric: RefusalLogOdds) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Metric of the unpatched (harmful, harmless) runs."""
        return metric(self.harmful.logits), metric(self.harmless.logits)


def pair_runs(
    model: LensModel,
    pairs: PromptPairs | TokenPairs,
    *,
    extra: Sequence[SiteKind] = (),
    start: int | None = None,
    max_batch_tokens: int | None = None,
) -> PairRuns:
    """Run both prompts of every pair once.

    Args:
        model: The model.
        pairs: Pairs that align.
        extra: Site kinds to store beside ``z`` and ``mlp_out``.
        start: First column to run in variants; the first difference by default.
        max_batch_tokens: Rows x columns of variants that go through the model at once; None finds how many fit.

    Raises:
        MechsafetyError: A pair does not align.
    """
    tokens = pairs if isinstance(pairs, TokenPairs) else model.tokenize_pairs(pairs)
    first = tokens.start if start is None else start
    keep = tuple(dict.fromkeys([*KEPT, *extra]))
    harmful = base_run(model, tokens.harmful, first, keep, max_batch_tokens=max_batch_tokens)
    shared = harmful if first <= tokens.start else None
    harmless = base_run(model, tokens.harmless, first, keep, shared, max_batch_tokens=max_batch_tokens)
    return PairRuns(harmful, harmless, first)


@dataclass(frozen=True, slots=True)
class Patch:
    """Which nodes are patched, in each of several variants of a run.

    Attributes:
        heads: True where a head is patched.
        mlps: True where an MLP's output is patched.
        neurons: True where a neuron is patched; None if none is.
    """

    heads: Bool[Tensor, "variant layer head"]
    mlps: Bool[Tensor, "variant layer"]
    neurons: Bool[Tensor, "variant layer d_mlp"] | None = None

    def __len__(self) -> int:
        return self.heads.shape[0]

    @classmethod
    def of(cls, model: LensModel, variants: Sequence[Sequence[Node]]) -> "Patch":
        """Patch the listed nodes, one list a variant."""
        heads = torch.zeros(len(variants), model.n_layers, model.n_heads, dtype=torch.bool)
        mlps = torch.zeros(len(variants), model.n_layers, dtype=torch.bool)
        any_neuron = any(node.kind == "neuron" for nodes in variants for node in nodes)
        neurons = torch.zeros(len(variants), model.n_layers, model.d_mlp, dtype=torch.bool) if any_neuron else None
        for row, nodes in enumerate(variants):
            for node in nodes:
                if node.kind == "head":
                    heads[row, node.layer, node.index] = True
                elif node.kind == "mlp":
                    mlps[row, node.layer] = True
                elif node.kind == "neuron" and neurons is not None:
                    neurons[row, node.layer, node.index] = True
        return cls(heads.to(model.device), mlps.to(model.device), None if neurons is None else neurons.to(model.device))

    def rows(self, keep: slice) -> "Patch":
        """Some of the variants."""
        return Patch(self.heads[keep], self.mlps[keep], None if self.neurons is None else self.neurons[keep])

    @property
    def layers(self) -> list[int]:
        """Layers in which any variant patches anything."""
        touched = self.heads.any(-1) | self.mlps
        if self.neurons is not None:
            touched = touched | self.neurons.any(-1)
        return [int(layer) for layer in touched.any(0).nonzero().flatten()]


def patched_logits(
    model: LensModel,
    base: BaseRun,
    source: Mapping[SiteKind, Tensor],
    patch: Patch,
    *,
    positions: Bool[Tensor, "batch pos"] | None = None,
    max_batch_tokens: int | None = None,
) -> Float[Tensor, "variant batch d_vocab"]:
    """Next-token logits of ``base`` with the patched nodes' values from ``source``, exact, for every variant.

    Variants whose first patched layers are alike should stand together: a batch starts at its first one's.

    Args:
        model: The model.
        base: The run that is edited.
        source: Replacement activations by site kind, as `BaseRun.acts` (same columns).
        patch: What is replaced.
        positions: Columns at which it is replaced (of those from ``base.start``); all by default.
        max_batch_tokens: Rows x columns of one engine batch.
    """
    size = max_variants(base, max_batch_tokens)
    done = []
    for first in range(0, len(patch), size):
        part = patch.rows(slice(first, first + size))
        layers = part.layers
        start = min(layers, default=model.n_layers)
        with torch.no_grad():
            resid = expand_rows(base.resid[start], len(part))
            done.append(
                split_rows(run_from(model, base, start, resid, _hooks(part, layers, source, positions)), len(part))
            )
    return torch.cat(done)


def patched_scores(
    model: LensModel,
    base: BaseRun,
    source: Mapping[SiteKind, Tensor],
    patch: Patch,
    metric: RefusalLogOdds,
    *,
    positions: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "variant batch"]:
    """`patched_logits` reduced to the metric batch by batch, so that no [variant batch d_vocab] tensor is held."""
    size = max_variants(base)
    parts = [patch.rows(slice(first, first + size)) for first in range(0, len(patch), size)]
    scores = [metric(patched_logits(model, base, source, part, positions=positions)) for part in parts]
    return torch.cat(scores)


def stored(source: Mapping[SiteKind, Tensor], kind: SiteKind) -> Tensor:
    """Stored activations of a kind; an error with the cure where the runs do not hold them."""
    if kind not in source:
        raise MechsafetyError(
            f"these runs hold no {kind.value}", cure=f"use pair_runs(model, pairs, extra=[SiteKind.{kind.name}])"
        )
    return source[kind]


def _hooks(
    patch: Patch, layers: Sequence[int], source: Mapping[SiteKind, Tensor], positions: "Tensor | None"
) -> list[Hook]:
    hooks: list[Hook] = []

    def replace(kind: SiteKind, layer: int, mask: Tensor, shape: str) -> None:
        if not bool(mask.any()):
            return
        variants, values = mask.shape[0], stored(source, kind)[layer]
        where = rearrange(mask, f"{shape} -> {_AXES[shape]}")
        if positions is not None:
            where = where & rearrange(positions, f"batch pos -> 1 batch pos{' 1' * (where.ndim - 3)}")
        rows = rearrange(
            where.expand(variants, values.shape[0], *where.shape[2:]), "variant batch ... -> (variant batch) ..."
        )
        new = expand_rows(values, variants)
        hooks.append((Site(kind, layer), lambda tensor: torch.where(rows, new, tensor)))

    for layer in layers:
        replace(SiteKind.Z, layer, patch.heads[:, layer], "variant head")
        if patch.neurons is not None:
            replace(SiteKind.NEURONS, layer, patch.neurons[:, layer], "variant neuron")
        replace(SiteKind.MLP_OUT, layer, patch.mlps[:, layer], "variant")
    return hooks


# how a mask over nodes lines up with its activation [variant batch pos ...]
_AXES = {"variant head": "variant 1 1 head 1", "variant neuron": "variant 1 1 neuron", "variant": "variant 1 1 1"}


@dataclass(frozen=True, slots=True)
class SoftMask:
    """How much of each node is live: 1 keeps the run's own value, 0 takes the other prompt's, between is a blend.

    Attributes:
        heads, mlps, neurons: Weights, shared by all prompts; neurons None leaves them alone.
    """

    heads: Float[Tensor, "layer head"]
    mlps: Float[Tensor, " layer"]
    neurons: Float[Tensor, "layer d_mlp"] | None = None


def masked_logits(
    model: LensModel, base: BaseRun, source: Mapping[SiteKind, Tensor], mask: SoftMask
) -> Float[Tensor, "batch d_vocab"]:
    """Next-token logits of ``base`` with every node blended by ``mask``; differentiable in the mask."""
    hooks: list[Hook] = []

    def blend(kind: SiteKind, layer: int, weight: Tensor) -> None:
        values = stored(source, kind)[layer]
        hooks.append((Site(kind, layer), lambda tensor: (values + weight * (tensor - values)).to(tensor.dtype)))

    for layer in range(model.n_layers):
        blend(SiteKind.Z, layer, rearrange(mask.heads[layer], "head -> head 1"))
        if mask.neurons is not None:
            blend(SiteKind.NEURONS, layer, mask.neurons[layer])
        blend(SiteKind.MLP_OUT, layer, mask.mlps[layer])
    return run_from(model, base, 0, base.resid[0], hooks)
