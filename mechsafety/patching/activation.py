"""Activation patching (causal tracing, Meng et al. 2022): the exact effect of single nodes and sites."""

import html
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, public
from mechsafety.metrics import RefusalLogOdds, check_gap
from mechsafety.models import LensModel
from mechsafety.models.engine import (
    BaseRun,
    Hook,
    check_current,
    from_column,
    from_later,
    max_variants,
    may_begin_later,
    resume,
    split_rows,
)
from mechsafety.models.parts import check_exists
from mechsafety.nodes import NODE_SITES, Node, as_node, head_and_mlp_nodes
from mechsafety.patching.effects import effect_intervals, effect_p_values, effect_table, mean_gap
from mechsafety.patching.masks import PairRuns, aligned_pairs, pair_batches, replacement
from mechsafety.patching.sources import Source, check_start, column_masks, source_values
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.results import Provenance, Result, bars, visible
from mechsafety.scale.work import sweeps, work
from mechsafety.sites import GLOBAL, Site, SiteKind

# pairs x columns that are patched at once, so that memory does not grow with the number of pairs
BATCH_TOKENS = 1024
PatchDirection = Literal["noising", "denoising"]

Target = Node | Site
EFFECT = "share of the harmful-harmless gap"


@dataclass(frozen=True, slots=True)
class PatchMap(Result):
    """Exact effects of patching single nodes or sites.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        nodes: What was patched in each row.
        changes: Change of the metric towards the source run when the node is patched, in metric units (nats).
        harmful, harmless: Metric of the unpatched runs.
        direction: ``noising`` (the harmful run gets harmless values) or ``denoising`` (the reverse).
        positions: Where values were patched: ``all``, a span, ``each`` or a list of positions.
        row_positions: With ``each``, the position of each row, counted from the end (-1 is the last token); otherwise
            None.
        source: Where replacement values come from: ``other``, ``mean``, ``resample`` or ``zero``.
        tokens: With ``each``, the text of the token at each position, the first one first; empty where the prompts
            have different tokens.

    Example:
        >>> found = ms.activation_patching(model, pairs, metric)
        >>> str(found.nodes[found.effects.argmax()])
        'L0.H1'
        >>> found.to_dataframe().columns.tolist()
        ['node', 'kind', 'layer', 'index', 'position', 'effect', 'ci_low', 'ci_high', 'p_value']
    """

    provenance: Provenance
    metric: dict[str, object]
    nodes: tuple[Target, ...]
    changes: Float[Tensor, "node prompt"]
    harmful: Float[Tensor, " prompt"]
    harmless: Float[Tensor, " prompt"]
    direction: str
    positions: str
    row_positions: tuple[int, ...] | None = None
    source: str = "other"
    tokens: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"PatchMap({len(self.nodes)} rows x {self.changes.shape[1]} pairs, {self.direction}, {self.positions})"

    @property
    def gap(self) -> float:
        """Mean metric on harmful prompts minus that on harmless prompts."""
        return mean_gap(self.harmful, self.harmless)

    @property
    def effects(self) -> Float[Tensor, " node"]:
        """Share of the gap that each node carries: its mean change over the gap."""
        return self.changes.mean(dim=1) / self.gap

    def intervals(self, seed: int = 0) -> list[tuple[float, float]]:
        """95 % interval of each effect over prompts; it counts the variation of the gap too (`ratio_intervals`)."""
        return effect_intervals(self.changes, self.harmful - self.harmless, seed)

    def p_values(self, seed: int = 0) -> list[float]:
        """Sign-flip permutation p of each effect, Benjamini-Hochberg adjusted over all nodes."""
        return effect_p_values(self.changes, seed)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per node (and position): effect (share of the gap), interval, adjusted p."""
        rows = {
            "node": [str(node) for node in self.nodes],
            "kind": [str(node.kind) for node in self.nodes],
            "layer": [node.layer for node in self.nodes],
            "index": pd.array([node.index for node in self.nodes], dtype="Int64"),  # an MLP has none
            "position": self.row_positions if self.row_positions is not None else [None] * len(self.nodes),
        }
        return pd.DataFrame(rows).join(effect_table(self.changes, self.harmful - self.harmless))

    def plot(self, most: int = 40) -> go.Figure:
        """Bar chart of the strongest effects with intervals; with ``each``, a heat map of nodes by position.

        The heat map shows the tokens under their positions. Its nodes go upward in the order that was patched.

        Args:
            most: Largest number of nodes in a heat map. It shows those with the largest effects.
        """
        if self.row_positions is None:
            n = len(self.harmful)
            pairs = "pair" if n == 1 else "pairs"
            return bars(
                self.to_dataframe(), "node", "effect", EFFECT, f"{self.direction.capitalize()} one node, {n} {pairs}"
            )
        return self._heat_map(most)

    def _heat_map(self, most: int) -> go.Figure:
        positions = list(dict.fromkeys(self.row_positions or ()))
        grid = rearrange(self.effects, "(node position) -> node position", position=len(positions))
        nodes = self.nodes[:: len(positions)]
        shown = sorted(grid.abs().amax(1).topk(min(most, len(nodes))).indices.tolist())
        limit = float(grid.abs().max()) or 1.0
        figure = go.Figure(
            go.Heatmap(
                z=grid[shown].tolist(),
                x=positions,
                y=[str(nodes[row]) for row in shown],
                colorscale="RdBu_r",
                zmin=-limit,
                zmax=limit,
                colorbar={"title": {"text": "effect<br>(share of gap)"}, "thickness": 14},
                xgap=1,
                ygap=1,
                hovertemplate="%{y} at position %{x}: %{z:.3f}<extra></extra>",
            )
        )
        labels = [visible(token) or "(differs)" for token in self.tokens or [""] * len(positions)]
        names = [f"{html.escape(label)}<br>{at}" for label, at in zip(labels, positions, strict=True)]
        angle = 0 if max(map(len, labels)) <= 11 and len(positions) <= 10 else -45
        figure.update_xaxes(title_text="token, and its position from the end", tickvals=positions, ticktext=names)
        figure.update_xaxes(tickangle=angle, showgrid=False)
        figure.update_yaxes(type="category")
        most_of = f": the {len(shown)} of {len(nodes)} with the largest effects" if len(shown) < len(nodes) else ""
        return figure.update_layout(
            title_text=f"{self.direction.capitalize()} one node at one position{most_of}",
            height=max(380, 160 + 18 * len(shown)),  # the colour scale needs room
            # a notebook's page is about this wide; beyond it a figure has to be scrolled
            width=max(520, min(960, 220 + 72 * len(positions))),
        )


@sweeps
@public
def activation_patching(
    model: LensModel,
    pairs: PromptPairs | PairRuns,
    metric: RefusalLogOdds,
    *,
    nodes: Target | str | Sequence[Target | str] | None = None,
    direction: PatchDirection = "noising",
    positions: str | Sequence[int] = "all",
    source: Source = "other",
    seed: Amount = 0,
    max_batch_tokens: Count | None = None,
    progress: bool = True,
) -> PatchMap:
    """Replace single nodes' or sites' values and run on, exactly (causal tracing, Meng et al. 2022).

    Args:
        model: The model.
        pairs: Pairs, of which only those that align are used; or their stored runs, which must hold the activations
            that are patched.
        metric: What is measured.
        nodes: What to patch: heads, MLPs and neurons (a `Node` or its name), or any `Site`. Sites are the residual
            stream before, between and after the layers, ``attn_out``, ``mlp_out``, ``z``, ``q``, ``k``, ``v`` (of a
            key-value head), ``pattern`` and ``neurons``. A site with an index is one head or neuron. By default every
            head and MLP is patched.
        direction: ``noising``: the harmful run is edited with the harmless run's values; ``denoising``: the reverse.
        positions: ``all`` (every token), a span (``prefix``, ``instruction``, ``suffix``), ``each`` (one row per
            position), or positions counted from the end (negative), which are patched together. With
            ``source="other"``, ``each`` and listed positions begin at the first difference, because before it both
            prompts have the same values.
        source: Where replacement values come from. ``other``: the other prompt of the pair. ``mean``: the mean over
            the other prompts of all pairs of the same token length, position by position. ``resample``: the other
            prompt of another pair of the same length. ``zero``: zeros. All except ``other`` also replace the values of
            the tokens that both prompts share.
        seed: Seed of ``resample``.
        max_batch_tokens: Largest number of rows x positions that go through the model at once. If it is None, memory
            sets the number.
        progress: Whether to show a bar.

    Returns:
        Changes per prompt; a positive effect moves the metric towards the source run.

    Raises:
        MechsafetyError: An option is unknown; the model lacks a target; no pair aligns; no other pair has the length of
            some pair (``mean``, ``resample``); or stored runs begin after a position to be patched.

    Example:
        >>> found = ms.activation_patching(model, pairs, metric, nodes=["L0.H1", "L1.H3"])
        >>> detection, decoy = found.effects.tolist()
        >>> detection > 0.9, abs(decoy) < 0.1
        (True, True)
    """
    from mechsafety.progress import progress_bar

    listed = head_and_mlp_nodes(model.n_layers, model.n_heads) if nodes is None else nodes
    listed = (listed,) if isinstance(listed, Node | Site | str) else listed
    targets = tuple(target if isinstance(target, Site) else as_node(target) for target in listed)
    sites = [_checked_site(model, target) for target in targets]
    if not sites:
        raise MechsafetyError("no nodes to patch", expected="at least one head, MLP or neuron")
    # with a named span, neither the other prompt's values nor zeros depend on what else is in the batch
    alone = source in ("other", "zero") and isinstance(positions, str) and positions != "each"
    pairs = aligned_pairs(model, pairs)
    batches: list[Callable[[], PairRuns]]
    if isinstance(pairs, PairRuns):
        check_current(model, pairs.harmful, pairs.harmless)
        batches = [lambda: pairs]
    else:
        # before the first difference, both prompts of a pair have the same values; other pairs and zeros do not
        start = None if source == "other" or pairs.align == "suffix" else 0
        batches = pair_batches(model, pairs, BATCH_TOKENS if alone else sys.maxsize, _kinds(sites), start)
    with progress_bar(total=len(batches) * len(sites), desc="patching", show=progress) as bar:

        def patched(number: int) -> _Batch:
            runs = batches[number]()
            check_start(runs, positions, source)
            base, other = (runs.harmful, runs.harmless) if direction == "noising" else (runs.harmless, runs.harmful)
            columns, where = column_masks(base, runs.start, positions)
            values = source_values(other, _kinds(sites), source, seed, runs.align)
            bar.total = len(batches) * len(sites) * len(where)
            chosen = [(site, columns_of) for site in sites for columns_of in where]
            scores = _patched(model, base, values, metric, chosen, max_batch_tokens, bar.update)
            return _Batch(scores, *runs.scores(metric), len(where), tuple(columns), _token_texts(model, base, columns))

        done = []
        for found in work("patching", range(len(batches)), patched, _Batch, nested=True):
            done.append(found)
            bar.update(len(done) * len(found.scores) - bar.n)
    scores, harmful, harmless = (
        torch.cat([getattr(found, name) for found in done], -1).to(model.device)
        for name in ("scores", "harmful", "harmless")
    )
    rows = [(k, at) for k in range(len(sites)) for at in range(done[-1].n_places)]
    columns = done[-1].columns
    changes = (harmful - scores) if direction == "noising" else (scores - harmless)
    check_gap(harmful, harmless)
    shown = positions if isinstance(positions, str) else ",".join(map(str, positions))
    options = {"direction": direction, "positions": shown, "source": source, "seed": seed, "pairs": len(harmful)}
    options |= omissions(pairs)
    return PatchMap(
        model.provenance(seed=seed if source == "resample" else None, options=options),
        metric.to_json(),
        tuple(targets[k] for k, _ in rows),
        changes,
        harmful,
        harmless,
        direction,
        shown,
        tuple(columns[at] for _, at in rows) if positions == "each" else None,
        source,
        done[-1].tokens,
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    """What patching a batch of pairs gives.

    Attributes:
        scores: Metric of the patched runs.
        harmful, harmless: Metric of the unpatched runs.
        n_places: How many sets of columns each site was patched in.
        columns: With ``each``, the columns, counted from the end.
        tokens: The token at each of them.
    """

    scores: Float[Tensor, "row prompt"]
    harmful: Float[Tensor, " prompt"]
    harmless: Float[Tensor, " prompt"]
    n_places: int
    columns: tuple[int, ...]
    tokens: tuple[str, ...]


def _token_texts(model: LensModel, base: BaseRun, columns: Sequence[int]) -> tuple[str, ...]:
    """The token at each column, counted from the end; empty where the prompts have different ones."""
    ids, mask = base.tokens.ids, base.tokens.mask
    found = [set(ids[mask[:, at], at].tolist()) for at in columns]
    return tuple(model.tokenizer.decode(list(one)) if len(one) == 1 else "" for one in found)


def _patched(
    model: LensModel,
    base: BaseRun,
    values: Mapping[SiteKind, Tensor],
    metric: RefusalLogOdds,
    rows: Sequence[tuple[Site, Tensor]],
    max_batch_tokens: int | None,
    done: Callable[[int], object],
) -> Float[Tensor, "row batch"]:
    """Metric of the base run for each (site, columns [batch pos]) patched alone."""
    scores = torch.zeros(len(rows), len(base), device=model.device)
    sizes = _sizes(model)
    with torch.no_grad():
        for column, members in _by_first_column(model, base, [where for _, where in rows]):
            here = from_later(model, base, column)
            later = {kind: from_column(tensor, kind, column, axis=1) for kind, tensor in values.items()}
            size = max_variants(here, max_batch_tokens)
            order = sorted(members, key=lambda row: rows[row][0].layer or 0)

            def scored(
                chunk: list[int],
                column: int = column,
                here: BaseRun = here,
                later: Mapping[SiteKind, Tensor] = later,
            ) -> Float[Tensor, "row batch"]:
                chosen = [rows[row][0] for row in chunk]
                where = torch.stack([rows[row][1][:, column:] for row in chunk])
                hooks = _site_hooks(chosen, where, later, sizes)
                return split_rows(metric(resume(model, here, hooks, len(chunk))), len(chunk))

            chunks = [order[first : first + size] for first in range(0, len(order), size)]
            for chunk, found in zip(chunks, work("patched", chunks, scored, Tensor), strict=True):
                scores[chunk] = found.to(scores.device)
                done(len(chunk))
    return scores


def _by_first_column(
    model: LensModel, base: BaseRun, masks: Sequence[Bool[Tensor, "batch pos"]]
) -> list[tuple[int, list[int]]]:
    """Up to four groups of rows by their first patched column, each with the first column that it must run."""
    if not may_begin_later(model, base):
        return [(0, list(range(len(masks))))]
    first = [int(mask.any(0).int().argmax()) for mask in masks]
    step = max(1, -(-base.n_pos // 4))
    groups: dict[int, list[int]] = {}
    for row, column in enumerate(first):
        groups.setdefault(column // step, []).append(row)
    return [(min(first[row] for row in members), members) for members in groups.values()]


def _checked_site(model: LensModel, target: Target) -> Site:
    """The site of a target, if the model has it."""
    if isinstance(target, Node):
        if target.kind not in NODE_SITES:
            raise MechsafetyError(f"{target} cannot be patched", expected="heads, MLPs, neurons or sites")
        check_exists(model, target)
        site = Site(NODE_SITES[target.kind], target.layer, target.index)
    else:
        site = target
    if site.kind in GLOBAL or site.kind in (SiteKind.SCORES, SiteKind.MLP_IN):
        raise MechsafetyError(f"{site} cannot be patched", expected="a site inside a block that is no score")
    if site.kind is SiteKind.NEURONS:
        model.check_neurons()
    if site.kind is SiteKind.RESID_MID and model.parallel:
        raise MechsafetyError(f"{model.name} has no residual stream between attention and MLP")
    size = _sizes(model).get(site.kind, 1)
    if not (0 <= (site.layer or 0) < model.n_layers and 0 <= (site.index or 0) < size):
        raise MechsafetyError(f"{target} does not exist in {model!r}")
    return site


def _sizes(model: LensModel) -> dict[SiteKind, int]:
    """Number of heads or neurons per kind of site."""
    heads = dict.fromkeys((SiteKind.Q, SiteKind.Z, SiteKind.PATTERN), model.n_heads)
    kv_heads = dict.fromkeys((SiteKind.K, SiteKind.V), model.n_kv_heads)
    return heads | kv_heads | {SiteKind.NEURONS: model.d_mlp}


def _kinds(sites: Sequence[Site]) -> tuple[SiteKind, ...]:
    """Kinds whose activations the patches need."""
    return tuple(dict.fromkeys(site.kind for site in sites))


def _site_hooks(
    sites: Sequence[Site],
    masks: Bool[Tensor, "variant batch pos"],
    values: Mapping[SiteKind, Tensor],
    sizes: Mapping[SiteKind, int],
) -> list[Hook]:
    """Hooks per (kind, layer) that give the source's values to the rows whose variant patches it."""
    groups: dict[tuple[SiteKind, int], list[int]] = {}
    for variant, site in enumerate(sites):
        groups.setdefault((site.kind, site.layer or 0), []).append(variant)
    hooks: list[Hook] = []
    for (kind, layer), variants in groups.items():
        picked = torch.zeros(len(sites), dtype=torch.bool, device=masks.device)
        picked[variants] = True
        parts = None
        if any(sites[variant].index is not None for variant in variants):
            parts = torch.zeros(len(sites), sizes[kind], dtype=torch.bool, device=masks.device)
            for variant in variants:
                index = sites[variant].index
                parts[variant, slice(None) if index is None else index] = True
        where = masks & rearrange(picked, "variant -> variant 1 1")
        hooks += replacement(kind, layer, values[kind][layer], where, parts)
    return hooks
