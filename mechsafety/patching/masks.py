"""Runs in which chosen nodes take their values from the other prompt of each pair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, check_opener, public
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import (
    BaseRun,
    Fixed,
    Hook,
    check_current,
    expand_rows,
    max_variants,
    paired_runs,
    patched_run,
    resume,
    split_rows,
)
from mechsafety.models.parts import check_patchable
from mechsafety.models.replaced import Replacement
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.prompts import Align, PromptPairs, TokenPairs
from mechsafety.scale.work import work
from mechsafety.sites import Site, SiteKind

KEPT = (SiteKind.Z, SiteKind.MLP_OUT)


@dataclass(frozen=True, slots=True, eq=False)
class Constants:
    """Values that patched parts take in every prompt, in place of those of the pair's harmless prompt.

    Attributes:
        acts: Values by site kind: ``[layer 1 pos ...]``, per column counted from the end.
    """

    acts: Mapping[SiteKind, Tensor]

    @classmethod
    def mean(cls, run: BaseRun) -> "Constants":
        """Mean over a run's prompts of each stored activation, per column from the end, without padding."""
        real = run.tokens.mask[:, run.start :]
        means = {}
        for kind, values in run.acts.items():
            weight = rearrange(real.to(values.dtype), f"batch pos -> 1 batch pos{' 1' * (values.ndim - 3)}")
            total = reduce(values * weight, "layer batch ... -> layer 1 ...", "sum")
            count = reduce(weight, "layer batch ... -> layer 1 ...", "sum").clamp(min=1)
            means[kind] = total / count
        return cls(means)

    def padded(self, n_pos: int) -> "Constants":
        """The same values in at least ``n_pos`` columns; columns farther from the end take the mean over the others."""
        found = {}
        for kind, values in self.acts.items():
            rest = reduce(values, "layer 1 pos ... -> layer 1 1 ...", "mean")
            missing = max(0, n_pos - values.shape[2])
            found[kind] = torch.cat([rest.expand(-1, -1, missing, *rest.shape[3:]), values], dim=2)
        return Constants(found)

    def of(self, run: BaseRun, first: Int[Tensor, " batch"] | None = None) -> dict[SiteKind, Tensor]:
        """The values in the columns and for the prompts of a run.

        Args:
            run: The run.
            first: Each prompt's first column that takes the constants; earlier ones keep their own values.

        Raises:
            MechsafetyError: The run holds kinds or columns that the constants lack.
        """
        found = {}
        for kind, own in run.acts.items():
            if kind not in self.acts or self.acts[kind].shape[2] < run.n_pos:
                raise MechsafetyError(
                    f"constants without {kind.value} in all {run.n_pos} columns of the runs",
                    expected="runs of the kinds and columns that the constants come from",
                )
            values = self.acts[kind][:, :, -run.n_pos :].expand_as(own)
            if first is not None:
                later = torch.arange(run.n_pos, device=own.device) >= (first - run.start).to(own.device)[:, None]
                values = torch.where(rearrange(later, f"batch pos -> 1 batch pos{' 1' * (own.ndim - 3)}"), values, own)
            found[kind] = values
        return found


@dataclass(frozen=True, slots=True)
class PairRuns:
    """The two runs of every pair, by default from the first column in which any pair differs.

    Attributes:
        harmful, harmless: Stored runs.
        start: Their first column.
        left_out: Notes, in words, about pairs that were left out before the runs.
        align: ``tokens``, or ``suffix`` if only the template's tokens after the instruction correspond.
        system: Text of the system turn that all prompts share; empty if there is none.
        constants: Values that patched parts take, from each pair's first difference on; None for those of the harmless
            runs.
        replaced: The same in the columns and for the prompts of these runs.
        empty: Logits of the harmful prompts with every head and MLP at its constant, where there are constants.

    Example:
        >>> runs = ms.patching.pair_runs(model, pairs)
        >>> harmful_scores, harmless_scores = runs.scores(metric)
        >>> bool((harmful_scores > harmless_scores).all())
        True
    """

    harmful: BaseRun
    harmless: BaseRun
    start: int
    left_out: tuple[str, ...] = ()
    align: Align = "tokens"
    system: str = ""
    constants: Constants | None = None
    replaced: Mapping[SiteKind, Tensor] | None = None
    empty: Float[Tensor, "batch d_vocab"] | None = None

    @property
    def source(self) -> Mapping[SiteKind, Tensor]:
        """Values that patched parts take."""
        return self.harmless.acts if self.replaced is None else self.replaced

    @property
    def tokens(self) -> TokenPairs:
        """Token rows of the pairs."""
        sides = self.harmful.tokens, self.harmless.tokens
        return TokenPairs.of(*sides) if self.align == "tokens" else TokenPairs(*sides, self.start, common=False)

    @property
    def opener_ids(self) -> tuple[int, ...]:
        """Tokens of a reply's opener that end every prompt."""
        return self.harmful.opener_ids

    def scores(self, metric: RefusalLogOdds) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Metric of the unpatched (harmful, harmless) runs.

        Raises:
            MechsafetyError: The runs do not end in the opener after which the metric reads.
        """
        check_opener(self, metric.opener_ids, "runs")
        return metric(self.harmful.logits), metric(self.harmless.logits)

    def ends(self, metric: RefusalLogOdds) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Metric with nothing patched and with every head and MLP patched: at the harmless run's values or constants.

        Raises:
            MechsafetyError: As `scores`.
        """
        harmful, harmless = self.scores(metric)
        return harmful, harmless if self.empty is None else metric(self.empty)


@public
def pair_runs(
    model: LensModel,
    pairs: PromptPairs | TokenPairs,
    *,
    extra: Sequence[SiteKind] = (),
    start: int | None = None,
    max_batch_tokens: Count | None = None,
    fixed: Sequence[Fixed] = (),
    constants: Constants | None = None,
) -> PairRuns:
    """Run both prompts of every pair once.

    Args:
        model: The model.
        pairs: Pairs; those that do not align are left out.
        extra: Site kinds to store beside ``z`` and ``mlp_out``.
        start: First column to run in variants; the first difference by default.
        max_batch_tokens: Largest number of rows x columns of variants that go through the model at once. If it is None,
            memory sets the number.
        fixed: Values that hold in both runs, and in their variants.
        constants: Values that patched parts take; by default those of the harmless runs.

    Raises:
        MechsafetyError: No pair aligns.

    Example:
        >>> runs = ms.patching.pair_runs(model, pairs)
        >>> len(runs.harmful), runs.start  # the first column in which a pair differs
        (8, 5)
        >>> found = ms.activation_patching(model, runs, metric)  # without running the pairs again
    """
    pairs = pairs.aligned(model) if isinstance(pairs, PromptPairs) else pairs
    tokens = pairs if isinstance(pairs, TokenPairs) else model.tokenize_pairs(pairs)
    first = tokens.start if start is None else start
    keep = tuple(dict.fromkeys([*KEPT, *extra]))
    harmful, harmless = paired_runs(model, tokens, first, keep, max_batch_tokens=max_batch_tokens, fixed=fixed)
    if not tokens.common:
        _check_suffix(model, tokens, harmful, harmless)
    left_out, system = (pairs.left_out, pairs.system) if isinstance(pairs, PromptPairs) else ((), "")
    runs = PairRuns(harmful, harmless, first, left_out, "tokens" if tokens.common else "suffix", system)
    return runs if constants is None else at_constants(model, runs, constants)


def at_constants(model: LensModel, runs: PairRuns, constants: Constants) -> PairRuns:
    """The same runs, in which patched parts take constants from each pair's first difference on."""
    every = Patch.of(model, [head_and_mlp_nodes(model.n_layers, model.n_heads)])
    # at an aligned suffix, every column of the runs is patched
    first = runs.tokens.first_differences if runs.align == "tokens" else None
    replaced = constants.of(runs.harmful, first)
    empty = patched_logits(model, runs.harmful, replaced, every)[0]
    return replace(runs, constants=constants, replaced=replaced, empty=empty)


def _check_suffix(model: LensModel, tokens: TokenPairs, harmful: BaseRun, harmless: BaseRun) -> None:
    """Refuse runs whose suffix columns cannot replace each other.

    If every node's value is exchanged in the suffix, one run must become the other. The first block must therefore get
    the same input there in both runs.

    Raises:
        MechsafetyError: The runs begin before the suffix, or the model's embeddings depend on the position.
    """
    if harmful.start < tokens.start:
        raise MechsafetyError(
            f"runs that begin at column {harmful.start} of pairs aligned at the suffix",
            expected=f"at least {tokens.start}, where it begins",
        )
    if not torch.equal(harmful.resid[0], harmless.resid[0]):
        raise MechsafetyError(
            f"{model.name} adds an embedding of the position, so that the suffix of a longer prompt is another one",
            expected="a model with rotary positions for align='suffix'",
            hint="pair prompts of equal length: PromptPairs.matched(harmful, harmless, model.n_tokens)",
        )


def aligned_pairs(model: LensModel, pairs: PromptPairs | PairRuns, least: int = 1) -> PromptPairs | PairRuns:
    """The pairs that can be patched; stored runs, which are of such pairs, are returned as they are.

    Every analysis begins with this call.

    Raises:
        MechsafetyError: Fewer than ``least`` pairs align.
    """
    return pairs.aligned(model, least) if isinstance(pairs, PromptPairs) else pairs


def pair_batches(
    model: LensModel,
    pairs: PromptPairs | PairRuns,
    max_tokens: int,
    extra: Sequence[SiteKind] = (),
    start: int | None = None,
) -> list[Callable[[], PairRuns]]:
    """Functions that run a few pairs each when they are called, so that memory does not grow with the number of pairs.

    Stored runs are used as they are if they fit and hold the needed activations. Otherwise their prompts are run again.

    Args:
        model: The model.
        pairs: Pairs that align, or their stored runs.
        max_tokens: Largest number of pairs x columns in a batch; it counts the columns that variants run.
        extra: Site kinds to store beside ``z`` and ``mlp_out``.
        start: First column to run in variants; each batch's first difference by default.

    Raises:
        MechsafetyError: A pair does not align.
    """
    fixed: tuple[Fixed, ...] = ()
    constants: Constants | None = None
    if isinstance(pairs, PairRuns):
        check_current(model, pairs.harmful, pairs.harmless)
        base, fixed = pairs.harmful, pairs.harmful.fixed
        if len(base) * base.n_pos <= max_tokens and not set(extra) - set(base.acts):
            return [partial(_same, pairs)]
        tokens, constants = pairs.tokens, pairs.constants
    else:
        tokens = model.tokenize_pairs(pairs)
    first = tokens.start if start is None else start
    size = max(1, max_tokens // (tokens.harmful.ids.shape[1] - first))
    parts = [slice(row, row + size) for row in range(0, len(tokens), size)]
    return [partial(_run_rows, model, tokens, rows, extra, start, fixed, constants) for rows in parts]


def _same(runs: PairRuns) -> PairRuns:
    return runs


def _run_rows(
    model: LensModel,
    tokens: TokenPairs,
    rows: slice,
    extra: Sequence[SiteKind],
    start: int | None,
    fixed: Sequence[Fixed],
    constants: Constants | None,
) -> PairRuns:
    held = [part.rows(rows) for part in fixed]
    return pair_runs(model, tokens.rows(rows), extra=extra, start=start, fixed=held, constants=constants)


@dataclass(frozen=True, slots=True)
class Patch:
    """Which nodes are patched, in each of several variants of a run.

    Attributes:
        heads: True where a head is patched.
        mlps: True where an MLP's output is patched.
        neurons: True where a neuron is patched; None if none is.

    Example:
        >>> patch = ms.patching.Patch.of(model, [[ms.Node("head", 0, 1)], [ms.Node("mlp", 3)]])
        >>> len(patch), patch.layers  # two variants
        (2, [0, 3])
    """

    heads: Bool[Tensor, "variant layer head"]
    mlps: Bool[Tensor, "variant layer"]
    neurons: Bool[Tensor, "variant layer d_mlp"] | None = None

    def __len__(self) -> int:
        return self.heads.shape[0]

    @classmethod
    def of(cls, model: LensModel, variants: Sequence[Sequence[Node]]) -> "Patch":
        """Patch the listed nodes, one list per variant.

        Raises:
            MechsafetyError: The model lacks a node, or a node holds no value of its own (``embed``, ``logits``).
        """
        for node in dict.fromkeys(node for nodes in variants for node in nodes):
            check_patchable(model, node)
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
                elif neurons is not None:
                    neurons[row, node.layer, node.index] = True
        return cls(heads.to(model.device), mlps.to(model.device), None if neurons is None else neurons.to(model.device))

    def rows(self, keep: slice) -> "Patch":
        """Some of the variants."""
        return Patch(self.heads[keep], self.mlps[keep], None if self.neurons is None else self.neurons[keep])

    @property
    def layers(self) -> list[int]:
        """Layers in which any variant patches anything."""
        return [int(layer) for layer in self._touched.any(0).nonzero().flatten()]

    def first_layers(self, n_layers: int) -> list[int]:
        """First layer in which each variant patches anything; ``n_layers`` where it patches nothing."""
        touched = self._touched
        return [int(first) for first in torch.where(touched.any(1), touched.int().argmax(1), n_layers)]

    @property
    def _touched(self) -> Bool[Tensor, "variant layer"]:
        touched = self.heads.any(-1) | self.mlps
        return touched if self.neurons is None else touched | self.neurons.any(-1)


@public
def patched_logits(
    model: LensModel,
    base: BaseRun,
    source: Mapping[SiteKind, Tensor],
    patch: Patch,
    *,
    positions: Bool[Tensor, "batch pos"] | None = None,
    max_batch_tokens: Count | None = None,
    start: int | None = None,
) -> Float[Tensor, "variant batch d_vocab"]:
    """Next-token logits of ``base`` with the patched nodes' values from ``source``, exact, for every variant.

    A batch starts at the first layer that any of its variants patches. Variants with similar first layers should
    therefore stand next to each other.

    Args:
        model: The model.
        base: The run that is edited.
        source: Replacement activations by site kind, as `BaseRun.acts` (same columns).
        patch: What is replaced.
        positions: True at the columns (from ``base.start`` on) in which it is replaced; all by default.
        max_batch_tokens: Largest number of rows x columns in one engine batch.
        start: Block at which the variants begin to differ from the run; the first patched block by default.

    Example:
        >>> patch = ms.patching.Patch.of(model, [[ms.Node("head", 0, 1)], []])
        >>> logits = ms.patching.patched_logits(model, runs.harmful, runs.source, patch)
        >>> torch.allclose(logits[1], runs.harmful.logits, atol=1e-4)  # the second variant patches nothing
        True
    """
    size = max_variants(base, max_batch_tokens)
    columns = torch.ones_like(base.tokens.mask[:, base.start :]) if positions is None else positions
    done = []
    for first in range(0, len(patch), size):
        part = patch.rows(slice(first, first + size))
        layers = part.layers
        with torch.no_grad():
            hooks = _patch_hooks(part, layers, source, columns)
            done.append(split_rows(resume(model, base, hooks, len(part), layer=start), len(part)))
    return torch.cat(done)


def patched_scores(
    model: LensModel,
    base: BaseRun,
    source: Mapping[SiteKind, Tensor],
    patch: Patch,
    metric: RefusalLogOdds,
    *,
    positions: Bool[Tensor, "batch pos"] | None = None,
    start: int | None = None,
    report: Callable[[int], object] | None = None,
) -> Float[Tensor, "variant batch"]:
    """`patched_logits` reduced to the metric batch by batch, so that no [variant batch d_vocab] tensor is held.

    ``report`` is called after each batch with its number of variants.
    """
    scores = []
    firsts = [0] * len(patch) if start is not None else patch.first_layers(model.n_layers)
    chunks = batches_by_layer(firsts, max_variants(base))

    def scored(chunk: slice) -> Float[Tensor, "variant batch"]:
        return metric(patched_logits(model, base, source, patch.rows(chunk), positions=positions, start=start))

    for found in work("patched", chunks, scored, Tensor, of=patch):
        scores.append(found.to(model.device))
        if report is not None:
            report(len(found))
    return torch.cat(scores)


def batches_by_layer(firsts: Sequence[int], most: int) -> list[slice]:
    """Divide variants, in their order, into batches, each of which begins at the first of its variants' layers.

    A small batch takes as long as a larger one, because it reads all weights. A batch therefore takes what comes until
    it holds a quarter of the variants that fit. Beyond that only variants of the layer where it begins join.

    Args:
        firsts: First layer that each variant changes.
        most: Number of variants that fit into a batch.

    Example:
        >>> batches_by_layer([0, 0, 1, 1, 1, 1, 1, 2], most=4)
        [slice(0, 2, None), slice(2, 6, None), slice(6, 7, None), slice(7, 8, None)]
    """
    found, begin = [], 0
    for k in range(1, len(firsts) + 1):
        n = k - begin
        full = n == most or (4 * n >= most and k < len(firsts) and firsts[k] > min(firsts[begin:k]))
        if k == len(firsts) or full:
            found.append(slice(begin, k))
            begin = k
    return found


def scores_near(
    model: LensModel,
    base: BaseRun,
    source: Mapping[SiteKind, Tensor],
    common: Sequence[Node],
    variants: Sequence[Sequence[Node]],
    metric: RefusalLogOdds,
    *,
    report: Callable[[int], object] | None = None,
) -> Float[Tensor, "variant batch"]:
    """`patched_scores` for variants that patch nearly the same nodes as ``common``.

    ``common`` is patched in one run, which all variants share. A variant begins at the first block in which its nodes
    differ from ``common``.

    Args:
        model: The model.
        base: The run that is edited.
        source: Replacement activations by site kind.
        common: Nodes that most variants patch.
        variants: The nodes that each variant patches.
        metric: What is measured.
        report: Called after each batch with its number of variants.
    """
    base = patched_run(model, base, fixed_nodes(model, source, common))
    same = frozenset(common)
    first = [
        min((node.layer or 0 for node in same.symmetric_difference(nodes)), default=model.n_layers - 1)
        for nodes in variants
    ]
    order = sorted(range(len(variants)), key=lambda k: (first[k], k))

    def scored(rows: slice) -> Float[Tensor, "variant batch"]:
        chunk = order[rows]
        start = first[chunk[0]]
        patch = Patch.of(model, [[node for node in variants[k] if (node.layer or 0) >= start] for k in chunk])
        return patched_scores(model, base, source, patch, metric, start=start)

    scores: list[Tensor] = []
    chunks = batches_by_layer([first[k] for k in order], max_variants(base))
    for found in work("near", chunks, scored, Tensor, of=(common, variants)):
        scores.append(found.to(model.device))
        if report is not None:
            report(len(found))
    place = torch.tensor(order, device=model.device).argsort()
    return torch.cat(scores)[place]


def stored(source: Mapping[SiteKind, Tensor], kind: SiteKind) -> Tensor:
    """Stored activations of a kind; if the runs lack them, the error says how to store them."""
    if kind not in source:
        raise MechsafetyError(
            f"these runs hold no {kind.value}", hint=f"use pair_runs(model, pairs, extra=[SiteKind.{kind.name}])"
        )
    return source[kind]


def replacement(
    kind: SiteKind,
    layer: int,
    values: Tensor,
    where: Bool[Tensor, "variant batch pos"],
    parts: Bool[Tensor, "variant part"] | None = None,
) -> list[Hook]:
    """Hooks that replace a site's values in the chosen variants, prompts and columns.

    Args:
        kind: What is replaced.
        layer: Its layer.
        values: New activations [batch pos ...], the same for all variants ([batch head pos key] for ``pattern``).
        where: Columns that are replaced.
        parts: Heads (key-value heads, neurons) that are replaced in each variant; all by default.
    """
    new = Replacement(kind, values, where, parts)
    if kind is not SiteKind.RESID_MID:
        return [(Site(kind, layer), new)]
    # an edit at TransformerLens' resid_mid would miss the skip branch, so attention's output is set to give this stream
    before: list[Tensor] = []
    rows = rearrange(where, "variant batch pos -> (variant batch) pos 1")

    def to_new(tensor: Tensor) -> Tensor:
        return torch.where(rows, expand_rows(values, len(where)) - before.pop(), tensor)

    return [(Site(SiteKind.RESID_PRE, layer), before.append), (Site(SiteKind.ATTN_OUT, layer), to_new)]


def _patch_hooks(
    patch: Patch,
    layers: Sequence[int],
    source: Mapping[SiteKind, Tensor],
    columns: Bool[Tensor, "batch pos"],
) -> list[Hook]:
    hooks: list[Hook] = []
    every = repeat(columns, "batch pos -> variant batch pos", variant=len(patch))
    for layer in layers:
        for kind, chosen in ((SiteKind.Z, patch.heads), (SiteKind.NEURONS, patch.neurons)):
            if chosen is not None and bool(chosen[:, layer].any()):
                hooks += replacement(kind, layer, stored(source, kind)[layer], every, chosen[:, layer])
        if bool(patch.mlps[:, layer].any()):
            where = every & rearrange(patch.mlps[:, layer], "variant -> variant 1 1")
            hooks += replacement(SiteKind.MLP_OUT, layer, stored(source, SiteKind.MLP_OUT)[layer], where)
    return hooks


@dataclass(frozen=True, slots=True)
class SoftMask:
    """How much of each node is live: 1 keeps the run's own value, 0 takes the other prompt's, and between them blends.

    Attributes:
        heads, mlps, neurons: Weights. All prompts share them, or with a first axis each prompt has its own. If
            ``neurons`` is None, neurons keep their own values.
    """

    heads: Float[Tensor, "*batch layer head"]
    mlps: Float[Tensor, "*batch layer"]
    neurons: Float[Tensor, "*batch layer d_mlp"] | None = None

    @classmethod
    def of(cls, model: LensModel, nodes: Sequence[Node], weights: Float[Tensor, " node"]) -> "SoftMask":
        """Weights of these nodes; all others keep their own value. Differentiable in the weights."""

        def of_kind(kind: str, *shape: int) -> Tensor | None:
            rows = [k for k, node in enumerate(nodes) if node.kind == kind]
            if not rows:
                return None
            places = [nodes[k] for k in rows]
            axes = [[node.layer for node in places], [node.index for node in places]][: len(shape)]
            at = tuple(torch.tensor(axis, device=weights.device) for axis in axes)
            return weights.new_ones(shape).index_put(at, weights[rows])

        heads, mlps = of_kind("head", model.n_layers, model.n_heads), of_kind("mlp", model.n_layers)
        whole = weights.new_ones(model.n_layers, model.n_heads) if heads is None else heads
        rest = weights.new_ones(model.n_layers) if mlps is None else mlps
        return cls(whole, rest, of_kind("neuron", model.n_layers, model.d_mlp))


@public
def masked_logits(
    model: LensModel, base: BaseRun, source: Mapping[SiteKind, Tensor], mask: SoftMask
) -> Float[Tensor, "batch d_vocab"]:
    """Next-token logits of ``base`` with every node blended by ``mask``; differentiable in the mask.

    Example:
        >>> mask = ms.patching.masks.SoftMask.of(model, [ms.Node("head", 0, 1)], torch.tensor([0.5]))
        >>> ms.patching.masked_logits(model, runs.harmful, runs.source, mask).shape == runs.harmful.logits.shape
        True
    """
    hooks: list[Hook] = []
    for layer in range(model.n_layers):
        weights = {SiteKind.Z: rearrange(mask.heads[..., layer, :], "... head -> ... 1 head 1")}
        if mask.neurons is not None:
            weights[SiteKind.NEURONS] = rearrange(mask.neurons[..., layer, :], "... neuron -> ... 1 neuron")
        weights[SiteKind.MLP_OUT] = rearrange(mask.mlps[..., layer], "... -> ... 1 1")
        hooks += [(Site(kind, layer), blend(stored(source, kind)[layer], w)) for kind, w in weights.items()]
    return resume(model, base, hooks)


def fixed_nodes(model: LensModel, source: Mapping[SiteKind, Tensor], nodes: Sequence[Node]) -> tuple[Fixed, ...]:
    """Fixed values that hold heads, MLPs and neurons at their values in a stored run.

    Args:
        model: The model.
        source: Values of the nodes by site kind, as `BaseRun.acts`.
        nodes: The nodes that are held.
    """
    patch = Patch.of(model, [nodes])
    found: list[Fixed] = []
    for layer in patch.layers:
        for kind, chosen in ((SiteKind.Z, patch.heads), (SiteKind.NEURONS, patch.neurons)):
            if chosen is not None and bool(chosen[0, layer].any()):
                found.append(Fixed(Site(kind, layer), stored(source, kind)[layer], chosen[0, layer]))
        if bool(patch.mlps[0, layer]):
            found.append(Fixed(Site(SiteKind.MLP_OUT, layer), stored(source, SiteKind.MLP_OUT)[layer]))
    return tuple(found)


def blend(values: Tensor, weight: Tensor | float, own: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The edit to ``values + weight (own - values)``; unless ``own`` is given, it is what the run computes."""
    return lambda tensor: (values + weight * ((tensor if own is None else own) - values)).to(tensor.dtype)
