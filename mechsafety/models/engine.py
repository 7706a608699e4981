"""The forward engine: runs only what an intervention can change.

A *base run* is a stored forward of some prompts. A *variant* is a run of the same prompts with edits. A *column* is a
position in the padded token rows of a batch.

The engine takes shortcuts. Each is exact, and each has a switch in `Shortcuts`:

- The columns before the first difference of a pair are run once, and their keys and values are kept. Variants leave
  these columns out.
- Blocks before the first edited layer are not run. Their output comes from the base run.
- Logits are computed at the last column only.
- Variants of one base run (other heads patched, other circuits) run together as one larger batch.
- An MLP does not run for variants in which its output is replaced, nor a layer's attention if all heads are replaced.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.models.backend import BlockCall, Prefix
from mechsafety.models.backend import Hook as Hook
from mechsafety.models.backend import expand_rows as expand_rows
from mechsafety.models.lens_model import LensModel
from mechsafety.models.memory import CPU_TOKENS, Allocated, batch_tokens
from mechsafety.models.placed import kept
from mechsafety.models.replaced import Idle, Replacement, leave_out
from mechsafety.models.shortcuts import ALL_ON, Shortcuts
from mechsafety.models.state import ModelState, tells_columns_apart
from mechsafety.prompts import TokenPairs, Tokens
from mechsafety.sites import GLOBAL, Site, SiteKind

# kinds of activation whose head axis comes before their column axis
_HEAD_FIRST = frozenset({SiteKind.SCORES, SiteKind.PATTERN})
# kinds that hold all that heads and MLPs write
_PARTS = (SiteKind.Z, SiteKind.MLP_OUT)
_PROJECTIONS = frozenset({SiteKind.Q, SiteKind.K, SiteKind.V})


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """Values that a site has in a run instead of what the run computes there.

    Attributes:
        site: The whole site, without index.
        values: Values of the prompts' last ``pos`` columns. Columns before these keep the run's own values.
        parts: True at the heads or neurons that get the values; None means all.
    """

    site: Site
    values: Float[Tensor, "batch pos ..."]
    parts: Bool[Tensor, " part"] | None = None

    def rows(self, keep: slice | Sequence[int]) -> "Fixed":
        """The same values for some of the prompts."""
        return replace(self, values=self.values[keep])

    def hook(self, variants: int, after: int = 0) -> Hook:
        """The edit for a run of ``variants`` variants that ends ``after`` columns before the prompts' last column."""

        def edit(tensor: Tensor) -> Tensor:
            stop = self.values.shape[1] - after
            n = min(stop, tensor.shape[1])
            if n <= 0:
                return tensor
            new, own = expand_rows(self.values[:, stop - n : stop], variants).to(tensor.dtype), tensor[:, -n:]
            parts = torch.ones((), dtype=torch.bool, device=own.device) if self.parts is None else self.parts
            where = rearrange(parts, "part -> part 1") if own.ndim == 4 and parts.ndim else parts
            # torch.where and not the new values alone: the replaced values then keep a gradient, which is 0
            new = torch.where(where, new, own)
            return new if n == tensor.shape[1] else torch.cat([tensor[:, :-n], new], dim=1)

        return (self.site, edit)

    def within(self, variants: int, n_pos: int) -> Hook:
        """The edit for a run of ``variants`` variants of the prompts' last ``n_pos`` columns."""
        if self.values.shape[1] < n_pos:
            return self.hook(variants)
        values = self.values[:, -n_pos:]
        where = torch.ones(variants, len(values), n_pos, dtype=torch.bool, device=values.device)
        parts = None if self.parts is None else repeat(self.parts, "part -> variant part", variant=variants)
        return (self.site, Replacement(self.site.kind, values, where, parts))


@dataclass(frozen=True, slots=True)
class BaseRun:
    """A stored run of some prompts, with everything that is needed to continue from any layer.

    Attributes:
        tokens: The prompts.
        start: First column that variants can change; ``pos`` in the shapes below counts from here.
        resid: Input of every block, before any edit of that input. The last entry is the input of the final norm.
        calls: Each block call's arguments besides its input.
        prefix: Keys and values of the columns before ``start``, one pair of [batch kv_head pos d_head] per layer. It is
            empty if there are no such columns or they are not kept.
        acts: Stored activations by site kind, each with a leading layer axis.
        logits: Next-token logits of the base run, float32.
        shortcuts: The shortcuts of its variants.
        before: The columns of ``resid`` before ``start`` if variants run all columns; otherwise None.
        max_batch_tokens: Largest number of rows x columns in one engine batch.
        fixed: Values that hold in this run and in all of its variants.
        patched: Values that hold in this run. In a variant they hold only before the block where the variant begins.
        made: State of the model when this run was stored.
    """

    tokens: Tokens
    start: int
    resid: Float[Tensor, "layer_plus_1 batch pos d_model"]
    calls: tuple[BlockCall, ...]
    prefix: Prefix
    acts: Mapping[SiteKind, Tensor]
    logits: Float[Tensor, "batch d_vocab"]
    shortcuts: Shortcuts = ALL_ON
    before: Float[Tensor, "layer_plus_1 batch first d_model"] | None = None
    max_batch_tokens: int = CPU_TOKENS
    fixed: tuple[Fixed, ...] = ()
    patched: tuple[Fixed, ...] = ()
    made: ModelState | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def opener_ids(self) -> tuple[int, ...]:
        """Tokens of a reply's opener that end every prompt."""
        return self.tokens.opener_ids

    @property
    def n_pos(self) -> int:
        """Number of columns that variants can change."""
        return self.tokens.ids.shape[1] - self.start

    def identity_parts(self) -> tuple[object, ...]:
        """What tells this run from another one (`mechsafety.scale`)."""
        held = (self.fixed, self.patched, self.shortcuts, self.max_batch_tokens)
        return (self.tokens, self.start, sorted(kind.value for kind in self.acts), self.logits, held)


def base_run(
    model: LensModel,
    tokens: Tokens,
    start: int = 0,
    keep: Sequence[SiteKind] = _PARTS,
    prefix: "BaseRun | Prefix | None" = None,
    *,
    shortcuts: Shortcuts | None = None,
    max_batch_tokens: int | None = None,
    fixed: Sequence[Fixed] = (),
) -> BaseRun:
    """Run prompts once and store what `resume` needs, and the activations of the kinds in ``keep``.

    Args:
        model: The model.
        tokens: The prompts.
        start: First column that every variant runs. Base run and source run must have the same columns before it.
        keep: Site kinds to store, in all layers and from column ``start`` on.
        prefix: Keys and values of the columns before ``start``, or a run of other prompts that begin with the same
            columns.
        shortcuts: The shortcuts of this run and of its variants; by default the model's.
        max_batch_tokens: Largest number of rows x columns in one batch of variants. By default it is the model's; if
            the model has none, memory sets it.
        fixed: Values that hold in this run and in all of its variants.

    Raises:
        MechsafetyError: ``start`` lies outside the prompts.
    """
    on = model.shortcuts if shortcuts is None else shortcuts
    if not 0 <= start < tokens.ids.shape[1]:
        raise MechsafetyError(f"runs that begin at column {start}", expected=f"0 to {tokens.ids.shape[1] - 1}")
    # an edit that counts columns must see all of them
    first = start if on.drop_positions and not tells_columns_apart(model.backend.module) else 0
    store: dict[Site, Tensor] = {}

    def note(site: Site) -> tuple[Site, Callable[[Tensor], None]]:
        return site, lambda tensor: store.__setitem__(site, tensor.detach())

    sites = [Site(kind, layer) for kind in dict.fromkeys(keep) for layer in range(model.n_layers)]
    given = max_batch_tokens or model.max_batch_tokens or 0
    made = None if given else Allocated(kept(model.backend.module))
    with torch.no_grad(), model.lock:
        past: Prefix = ()
        if first:
            given_past = _given_prefix(prefix, first) if on.shared_prefix else ()
            past = given_past or _past(model, tokens, first, fixed)
        made_by = ModelState.of(model.backend.module)
        notes = [note(site) for site in (*sites, Site(SiteKind.FINAL_NORM_IN))]
        with model.backend.block_inputs() as entered, model.hooks([*(part.hook(1) for part in fixed), *notes]):
            last = 1 if on.last_logits else tokens.ids.shape[1] - first
            with made or contextlib.nullcontext():
                logits, calls = model.backend.run(tokens, first, past, last)
        layers = range(model.n_layers)
        stacks = {kind: torch.stack([store[Site(kind, layer)] for layer in layers]) for kind in keep}
        # inputs before any edit at a block's input: a variant that begins there makes this edit itself
        inputs = torch.stack(
            [*(entered[layer].to(model.device) for layer in layers), store[Site(SiteKind.FINAL_NORM_IN)]]
        )
    acts = {kind: from_column(stacks[kind], kind, start - first, axis=1) for kind in keep}
    if made is not None:
        given = batch_tokens(model.device, _token_bytes(model, made.total, tokens.ids[:, first:], past, acts))
    return BaseRun(
        tokens,
        start,
        inputs[:, :, start - first :],
        tuple(calls),
        past if on.shared_prefix else (),
        acts,
        logits[:, -1].float(),
        on,
        inputs[:, :, :start] if first < start else None,
        given,
        tuple(fixed),
        made=made_by,
    )


def paired_runs(
    model: LensModel,
    pairs: TokenPairs,
    start: int,
    keep: Sequence[SiteKind] = _PARTS,
    *,
    max_batch_tokens: int | None = None,
    fixed: Sequence[Fixed] = (),
) -> tuple[BaseRun, BaseRun]:
    """`base_run` of the harmful and of the harmless prompts of aligned pairs, in one batch if that is exact.

    Args:
        model: The model.
        pairs: The prompts.
        start: As for `base_run`.
        keep: As for `base_run`.
        max_batch_tokens: As for `base_run`.
        fixed: Values that hold in both runs, and in their variants.
    """
    on, n = model.shortcuts, len(pairs)
    one_batch = on.batch_variants and on.drop_positions and on.shared_prefix
    with torch.no_grad(), model.lock:  # the lock keeps other threads' edits out of this run
        shares = pairs.common and start <= pairs.start
        if not one_batch or model.edited or not shares:  # an edit may treat rows differently
            harmful = base_run(model, pairs.harmful, start, keep, max_batch_tokens=max_batch_tokens, fixed=fixed)
            shared = harmful if shares else None
            harmless = base_run(
                model, pairs.harmless, start, keep, shared, max_batch_tokens=max_batch_tokens, fixed=fixed
            )
            return harmful, harmless
        past = _past(model, pairs.harmful, start, fixed) if start else ()
        whole = base_run(
            model,
            pairs.harmful.joined(pairs.harmless),
            start,
            keep,
            tuple((_twice(keys), _twice(values)) for keys, values in past),
            max_batch_tokens=max_batch_tokens,
            fixed=[replace(part, values=_twice(part.values)) for part in fixed],
        )
    harmful, harmless = (
        replace(
            whole,
            tokens=tokens,
            resid=whole.resid[:, rows],
            calls=tuple(call.rows(2 * n, rows) for call in whole.calls),
            prefix=past,
            acts={kind: tensor[:, rows] for kind, tensor in whole.acts.items()},
            logits=whole.logits[rows],
            fixed=tuple(fixed),
        )
        for tokens, rows in ((pairs.harmful, slice(0, n)), (pairs.harmless, slice(n, None)))
    )
    return harmful, harmless


def _twice(tensor: Tensor) -> Tensor:
    """The rows twice in a row; nothing is copied if all rows are one expanded row."""
    if tensor.stride(0) == 0:
        return tensor[:1].expand(2 * len(tensor), *tensor.shape[1:])
    return torch.cat([tensor, tensor])


def from_later(model: LensModel, base: BaseRun, column: int) -> BaseRun:
    """A run of the same prompts that begins ``column`` columns later, for variants that change no earlier column."""
    if column == 0:
        return base
    held = (*base.fixed, *base.patched)
    later = base_run(model, base.tokens, base.start + column, (), shortcuts=base.shortcuts, fixed=held)
    # each row now carries more keys and values, so that fewer rows may fit
    most = min(base.max_batch_tokens, later.max_batch_tokens)
    return replace(later, max_batch_tokens=most, fixed=base.fixed, patched=base.patched)


def may_begin_later(model: LensModel, base: BaseRun) -> bool:
    """Whether `from_later` saves work; it saves none if the model is edited or if all columns are run anyway."""
    with model.lock:  # under the lock no other thread has an open edit
        return base.before is None and base.shortcuts.drop_positions and not model.edited


def shared_columns(model: LensModel, n: int) -> int:
    """How many of the first ``n`` columns may be run once per edit, in a run before the remaining columns.

    The number is 0 if a shortcut that this needs is off, or if an edit counts columns.
    """
    on = model.shortcuts.drop_positions and model.shortcuts.shared_prefix
    return n if on and not tells_columns_apart(model.backend.module) else 0


def check_current(model: LensModel, *runs: BaseRun) -> None:
    """Refuse stored runs that the model would no longer give.

    Raises:
        MechsafetyError: Another model made the runs. Or since then the model was edited, an edit of it ended, or its
            weights changed.
    """
    for run in runs:
        what = "" if run.made is None else run.made.difference(model.backend.module)
        if what:
            raise MechsafetyError(
                f"stored runs that do not fit {model.name}: {what}",
                expected="runs of the model as it is",
                hint="make them again where they are used: pair_runs(model, pairs)",
            )


def from_column(tensor: Tensor, kind: SiteKind, start: int, axis: int = 0) -> Tensor:
    """An activation's columns from ``start`` on; ``axis`` is the number of axes before the batch axis."""
    axis += 2 if kind in _HEAD_FIRST else 1
    return tensor.narrow(axis, start, tensor.shape[axis] - start)


def resume(
    model: LensModel,
    run: BaseRun,
    edits: Sequence[Hook],
    variants: int = 1,
    *,
    layer: int | None = None,
    stop: int | None = None,
) -> Float[Tensor, "row ..."]:
    """Next-token logits of variants of a stored run, in which ``edits`` hold from block ``layer`` on.

    Before that block a variant equals the stored run, so that these blocks need not be run again.

    Args:
        model: The model.
        run: The stored run.
        edits: Edits, as for `LensModel.hooks`. They see the rows in the order ``variant * batch + prompt``.
        variants: Number of variants.
        layer: First block in which a variant differs from the run; by default the first edited block.
        stop: As for `run_from`.

    Returns:
        As `run_from`.

    Example:
        >>> from mechsafety.models.engine import base_run, resume
        >>> run = base_run(model, model.tokenize(harmful))
        >>> resume(model, run, [(ms.Site("mlp_out", 3), torch.zeros_like)]).shape  # without the MLP of layer 3
        torch.Size([8, 65])
    """
    first = min((model.n_layers if site.layer is None else site.layer for site, _ in edits), default=model.n_layers)
    begin = first if layer is None else layer
    return run_from(model, run, begin, expand_rows(run.resid[begin], variants), edits, stop=stop)


def patched_run(model: LensModel, run: BaseRun, patched: Sequence[Fixed]) -> BaseRun:
    """Store a run of the same prompts with some values patched, to `resume` at any block; it holds no activations.

    A variant that begins at some block has the patched values before that block. From that block on it has its own
    edits alone.

    Args:
        model: The model.
        run: The stored run.
        patched: Values to patch, for columns from the run's start on.
    """
    held = (*run.patched, *patched)
    with torch.no_grad(), model.lock:
        with model.backend.block_inputs() as entered:
            hooks = [part.within(1, run.n_pos) for part in held]
            final = run_from(model, run, 0, run.resid[0], hooks, stop=model.n_layers)
        inputs = [entered[layer][:, -run.n_pos :].to(final.device) for layer in range(1, model.n_layers)]
        resid = torch.stack([run.resid[0], *inputs, final])
        made = replace(run, resid=resid, acts={}, patched=held)
        return replace(made, logits=run_from(model, made, model.n_layers, final))


def holding(model: LensModel, run: BaseRun) -> contextlib.AbstractContextManager[None]:
    """Context for whole forwards of exactly the run's prompts, in which the run's fixed values hold too."""
    return model.hooks([part.hook(1) for part in run.fixed]) if run.fixed else contextlib.nullcontext()


def run_from(
    model: LensModel,
    base: BaseRun,
    layer: int,
    resid: Float[Tensor, "row pos d_model"],
    hooks: Sequence[Hook] = (),
    *,
    stop: int | None = None,
    reads: Callable[[Tensor], Tensor] | None = None,
    mlp_reads: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "row ..."]:
    """Next-token logits when the residual stream before block ``layer`` is ``resid`` and ``hooks`` edit what follows.

    For variants whose stream is the stored one, use `resume`.

    Args:
        model: The model.
        base: The base run; its rows repeat in order, ``row = variant * batch + prompt``.
        layer: First block to run; ``n_layers`` runs the final norm and the unembedding only.
        resid: Input of that block. Gradients flow through it under grad mode.
        hooks: Edits, as for `LensModel.hooks`, of that block and those after it.
        stop: Block before which the run stops. Its input is then returned instead of logits.
        reads: Function from the norm's output to what the heads of block ``layer`` read instead.
        mlp_reads: Function from the residual stream to what the MLP of block ``layer`` reads instead, before its norm.

    Returns:
        Logits [row d_vocab] in float32 at the last position; with ``stop``, the residual stream [row pos d_model].

    Raises:
        MechsafetyError: The model is no longer what it was when the base run was stored.
    """
    variants = resid.shape[0] // len(base)
    end = model.n_layers if stop is None else stop
    first = layer if base.shortcuts.start_layer else 0
    dropped = 0 if base.before is None else base.start
    earlier = [part.hook(variants) for part in base.patched if (part.site.layer or 0) < layer and first < layer]
    # each hook costs time whether its block runs or not
    runs = range(first, end)
    fixed = [part for part in base.fixed if part.site.layer is None or part.site.layer in runs]
    held = [part.hook(variants) if dropped else part.within(variants, resid.shape[1]) for part in fixed]
    edits = [*earlier, *held, *(_from_start(hook, dropped, base.shortcuts.last_logits) for hook in hooks)]
    with model.lock:
        check_current(model, base)
        idle: list[Idle] = []
        # another edit would see fewer rows; under grad mode what is replaced keeps a gradient, which is 0
        if base.shortcuts.live_parts and not dropped and not model.edited and not torch.is_grad_enabled():
            read = reads is not None or mlp_reads is not None
            edits, idle = leave_out(model.backend, edits, range(layer + read, end))
        cache = None
        if base.start and not dropped:
            # a block that runs alone needs the keys and values of its own layer only
            past = base.prefix or _prefix(model, base)
            if end == first + 1:
                past = tuple(_only(pair, k == first) for k, pair in enumerate(past))
            cache = model.backend.cache(past, variants)
        reading = _reading(model.backend.reads, layer, dropped, reads)
        mlp_reading = _reading(model.backend.mlp_reads, layer, dropped, mlp_reads)
        with model.hooks(edits), reading, mlp_reading, contextlib.ExitStack() as fewer:
            for one in idle:
                fewer.enter_context(model.backend.for_rows(one.layer, one.part, one.rows, len(resid), one.out))
            hidden = resid if first == layer else expand_rows(base.resid[0], variants)
            if base.before is not None:
                hidden = torch.cat([expand_rows(base.before[first], variants), hidden], dim=1)
            for index in range(first, end + 1):
                if index == layer and first < layer:
                    hidden = hidden.to(resid.device) + _change(base, layer, resid, dropped)
                if index < end:
                    hidden = model.backend.block(index, hidden, base.calls[index], len(base), cache)
            if stop is not None:
                return hidden[:, dropped:].to(resid.device)
            return unembed(model, hidden[:, -1:] if base.shortcuts.last_logits else hidden)[:, -1]


class _Captured(Exception):
    """Ends a run as soon as the wanted activation has been seen."""


def capture(
    model: LensModel,
    base: BaseRun,
    layer: int,
    resid: Float[Tensor, "row pos d_model"],
    site: Site,
    hooks: Sequence[Hook] = (),
) -> Tensor:
    """Activation at a site of one block; the block runs alone and stops at that site."""
    seen: list[Tensor] = []

    def stop(tensor: Tensor) -> None:
        seen.append(tensor)
        raise _Captured

    # projections work column by column, so they need no keys and values of earlier columns
    local = site.kind in _PROJECTIONS and base.before is None and base.shortcuts.start_layer
    with contextlib.suppress(_Captured):
        run_block(model, replace(base, start=0) if local else base, layer, resid, [*hooks, (site, stop)])
    return seen[0]


def run_block(
    model: LensModel,
    base: BaseRun,
    layer: int,
    resid: Float[Tensor, "row pos d_model"],
    hooks: Sequence[Hook] = (),
    reads: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "row pos d_model"]:
    """Output of one block alone, for variants of a base run; ``reads`` as for `run_from`."""
    return run_from(model, base, layer, resid, hooks, stop=layer + 1, reads=reads)


def unembed(model: LensModel, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
    """Final norm, unembedding and, if the model has one, the soft cap of the logits; float32."""
    with model.lock:
        return model.backend.unembed(resid)


def max_variants(base: BaseRun, max_batch_tokens: int | None = None) -> int:
    """How many variants of a base run fit into one engine batch; 1 if variants may not share a batch."""
    if not base.shortcuts.batch_variants:
        return 1
    columns = base.n_pos if base.before is None else base.tokens.ids.shape[1]
    return max(1, (max_batch_tokens or base.max_batch_tokens) // (len(base) * columns))


def split_rows(tensor: Tensor, variants: int) -> Tensor:
    """Inverse grouping of `expand_rows`: [(variant batch) ...] -> [variant batch ...]."""
    return rearrange(tensor, "(variant batch) ... -> variant batch ...", variant=variants)


def check_engine(model: LensModel, tokens: Tokens, shortcuts: Shortcuts | None = None) -> float:
    """Largest difference between the engine's logits and those of whole forwards, with and without an edited layer.

    One edit halves the heads' outputs; another replaces these and what the MLP writes.

    Args:
        model: The model.
        tokens: Two or more prompts.
        shortcuts: The engine's shortcuts; by default the model's.
    """
    on = model.shortcuts if shortcuts is None else shortcuts
    width, middle = tokens.ids.shape[1], model.n_layers // 2
    start, site = width // 2, Site(SiteKind.Z, middle)

    with torch.no_grad(), model.lock:
        plain = model.backend.logits(tokens, width)[:, -1].float()
        with model.hooks([(site, lambda tensor: torch.cat([tensor[:, :start], tensor[:, start:] / 2], dim=1))]):
            edited = model.backend.logits(tokens, width)[:, -1].float()
        values = {
            kind: stored / 2
            for kind, stored in base_run(model, tokens, 0, _PARTS, shortcuts=Shortcuts.none()).acts.items()
        }
        whole = {kind: values[kind][middle] for kind in _PARTS}
        # if variants run all columns, a part runs for fewer rows only if it is replaced from the first column on
        begin = start if on.drop_positions else 0
        with model.hooks([(Site(kind, middle), _later(new, begin)) for kind, new in whole.items()]):
            replaced = model.backend.logits(tokens, width)[:, -1].float()
        budget = tokens.ids.numel()  # all prompts at once; to measure a limit would cost as much as the run
        base = base_run(model, tokens, start, (), shortcuts=on, max_batch_tokens=budget)
        base = base_run(model, tokens, start, (), base, shortcuts=on, max_batch_tokens=budget)
        # another run in between, because no state that a block keeps from its last run may matter
        model.backend.logits(tokens.rows(slice(0, 1)), 1)
        gaps = [(base.logits - plain).abs().max()]
        chunks = [[False, True]] if on.batch_variants else [[False], [True]]
        for layer in (middle, 0, model.n_layers):
            for chunk in chunks:
                scale = torch.tensor([0.5 if edit else 1.0 for edit in chunk], device=model.device)
                rows = repeat(scale, "variant -> (variant batch) 1 1 1", batch=len(tokens))
                hooks = [(site, _scaled(rows))] if layer <= middle else []
                found = run_from(model, base, layer, expand_rows(base.resid[layer], len(chunk)), hooks)
                for logits, edit in zip(split_rows(found, len(chunk)), chunk, strict=True):
                    gaps.append((logits - (edited if edit and hooks else plain)).abs().max())
        base = base if begin == start else base_run(model, tokens, begin, (), shortcuts=on, max_batch_tokens=budget)
        for chunk in chunks:
            where = repeat(torch.tensor(chunk), "variant -> variant batch pos", batch=len(tokens), pos=width - begin)
            where = where.to(model.device)
            edits = [(Site(kind, middle), Replacement(kind, new[:, begin:], where)) for kind, new in whole.items()]
            for logits, edit in zip(split_rows(resume(model, base, edits, len(chunk)), len(chunk)), chunk, strict=True):
                gaps.append((logits - (replaced if edit else plain)).abs().max())
    return float(torch.stack(gaps).max())  # NaN if any gap is NaN; Python's max would lose it


def _token_bytes(model: LensModel, made: int, ids: Tensor, past: Prefix, acts: Mapping[SiteKind, Tensor]) -> float:
    """Upper bound on the bytes per row and column of a variant, from the bytes that the base run of ``ids`` made."""
    block = made / model.n_layers
    replaced = sum(tensor.nbytes for tensor in acts.values())  # a variant may replace the values of every layer
    kept = sum(keys.nbytes + values.nbytes for keys, values in past)
    joined = 1 + ids.shape[1] / past[0][0].shape[2] if past else 1.0  # the run appends its own columns to the prefix
    logits = 4 * len(ids) * model.d_vocab * 4  # float32, and the metric makes a few copies
    return (block + replaced + kept * joined + logits) / ids.numel()


def _scaled(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: (tensor * rows).to(tensor.dtype)


def _later(new: Tensor, start: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.cat([tensor[:, :start], new[:, start:]], dim=1)


def _given_prefix(prefix: "BaseRun | Prefix | None", stop: int) -> Prefix:
    if isinstance(prefix, BaseRun):
        return prefix.prefix if prefix.start == stop else ()
    return prefix or ()


def _prefix(model: LensModel, base: BaseRun) -> Prefix:
    with torch.no_grad():
        return _past(model, base.tokens, base.start, (*base.fixed, *base.patched))


def _past(model: LensModel, tokens: Tokens, stop: int, fixed: Sequence[Fixed] = ()) -> Prefix:
    """Keys and values of the columns before ``stop``; if all rows are alike there, one row is run for all."""
    ids, mask = tokens.ids[:, :stop], tokens.mask[:, :stop]
    after = tokens.ids.shape[1] - stop
    held = [part.hook(1, after) for part in fixed if part.values.shape[1] > after]
    alike = bool((ids == ids[:1]).all()) and bool((mask == mask[:1]).all())
    if model.edited or held or not alike:  # an edit may treat rows differently
        with model.hooks(held):
            return model.backend.prefix(tokens, stop)
    # keep every column: if only suffixes correspond, some columns are padding in all prompts of one side
    past = model.backend.prefix(Tokens(tokens.ids[:1], tokens.mask[:1], tokens.spans[:1]), stop)
    return tuple((keys.expand(len(ids), -1, -1, -1), values.expand(len(ids), -1, -1, -1)) for keys, values in past)


def _only(pair: tuple[Tensor, Tensor], whole: bool) -> tuple[Tensor, Tensor]:
    return pair if whole else (pair[0][:, :, :0], pair[1][:, :, :0])


def _reading(
    context: Callable[[int, Callable[[Tensor], Tensor]], contextlib.AbstractContextManager[None]],
    layer: int,
    dropped: int,
    reads: Callable[[Tensor], Tensor] | None,
) -> contextlib.AbstractContextManager[None]:
    """Context in which a layer's heads or its MLP read ``reads`` of their input, in the columns from ``dropped`` on."""
    if reads is None:
        return contextlib.nullcontext()
    return context(
        layer, lambda own: torch.cat([own[:, :dropped], reads(own[:, dropped:])], dim=1) if dropped else reads(own)
    )


def _change(base: BaseRun, layer: int, resid: Tensor, dropped: int) -> Tensor:
    """Difference between a caller's stream and the stored one, with zeros for ``dropped`` columns before them."""
    change = resid - expand_rows(base.resid[layer], resid.shape[0] // len(base))
    return torch.nn.functional.pad(change, (0, 0, dropped, 0))


def _from_start(hook: Hook, dropped: int, last_only: bool) -> Hook:
    """The same hook for a run of all columns: it sees and edits only the columns from ``dropped`` on."""
    site, function = hook
    if not dropped or (site.kind in GLOBAL and last_only):
        return hook
    axis = 2 if site.kind in _HEAD_FIRST else 1

    def edit(tensor: Tensor) -> Tensor | None:
        new = function(from_column(tensor, site.kind, dropped))
        return None if new is None else torch.cat([tensor.narrow(axis, 0, dropped), new], dim=axis)

    return (site, edit)
