"""Runs of one or two models with key-value caches, in which neurons are read or replaced.

Batches are laid out by `mechsafety.models.rows`: the columns that all rows share are run once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, public
from mechsafety.models import LensModel, decode
from mechsafety.models.decode import Cursor, check_room
from mechsafety.models.rows import Rows
from mechsafety.sites import Site, SiteKind

# rows x columns of one batch; on a 135M model, its neurons take a few MB per layer and under 400 MB for all layers
MAX_BATCH_TOKENS = 2048


def check_pair(base: LensModel, aligned: LensModel) -> None:
    """Refuse two models whose neurons do not correspond.

    Raises:
        MechsafetyError: One object given twice; different numbers of layers, neurons or tokens; different template
            options; or a mixture of experts.
    """
    for model in (base, aligned):
        model.check_neurons()
    check_twins(base, aligned)


def check_twins(base: LensModel, aligned: LensModel) -> None:
    """Refuse two models whose layers do not correspond.

    Raises:
        MechsafetyError: As `check_pair`, except that a mixture of experts may be given.
    """
    if base is aligned or base.hf_model is aligned.hf_model:
        raise MechsafetyError("the same model object was given twice", expected="two models, each loaded by itself")
    sizes = [(model.n_layers, model.d_mlp, model.d_vocab) for model in (base, aligned)]
    if sizes[0] != sizes[1]:
        raise MechsafetyError(
            f"{base.name} has (layers, neurons per layer, tokens) {sizes[0]}, {aligned.name} {sizes[1]}",
            expected="an aligned model and its own base",
        )
    options = [dict(model.template_options) for model in (base, aligned)]
    if options[0] != options[1]:  # both read the prompts as the base model's template renders them
        raise MechsafetyError(
            f"{base.name} has the template options {options[0]}, {aligned.name} {options[1]}",
            expected="the same for both",
        )


def batches(lengths: Sequence[int], batch_size: int | None = None) -> list[list[int]]:
    """Indices in batches of similar length, each of at most ``batch_size`` rows or `MAX_BATCH_TOKENS` tokens.

    Example:
        >>> batches([5, 900, 7, 900, 900])
        [[0, 2], [1, 3], [4]]
    """
    order = sorted(range(len(lengths)), key=lambda k: (lengths[k], k))
    out: list[list[int]] = []
    for k in order:
        full = out and (
            len(out[-1]) == batch_size if batch_size else (len(out[-1]) + 1) * lengths[k] > MAX_BATCH_TOKENS
        )
        long = out and lengths[k] > 2 * lengths[out[-1][0]] + 16  # padding would be most of the work
        if not out or full or long:
            out.append([])
        out[-1].append(k)
    return out


@dataclass(slots=True)
class Exchange:
    """What the hooks of two models share: the donor's neurons at the current columns, and which ones to replace.

    Attributes:
        values: The donor's neurons [batch pos d_mlp] by layer.
        chosen: Indices of the neurons to replace, by layer; an empty mapping replaces none.
    """

    values: dict[int, Tensor] = field(default_factory=dict)
    chosen: dict[int, Tensor] = field(default_factory=dict)

    def choose(self, mask: Bool[Tensor, "layer d_mlp"]) -> None:
        """Replace the neurons of ``mask`` from now on."""
        self.chosen = {layer: row.nonzero()[:, 0] for layer, row in enumerate(mask) if bool(row.any())}

    def keep(self, layer: int) -> Callable[[Tensor], None]:
        """Hook of the donor: store its neurons."""
        return lambda tensor: self.values.__setitem__(layer, tensor.detach())

    def replace(self, layer: int) -> Callable[[Tensor], Tensor | None]:
        """Hook of the receiver: the chosen neurons take the donor's values."""

        def hook(tensor: Tensor) -> Tensor | None:
            index = self.chosen.get(layer)
            if index is None:
                return None
            index, donor = index.to(tensor.device), self.values[layer].to(tensor)
            if len(index) == tensor.shape[-1]:
                return donor
            return tensor.index_copy(-1, index, donor.index_select(-1, index))

        return hook


@contextmanager
def hooked(*taps: tuple[LensModel, Callable[[int], Callable[[Tensor], Tensor | None]]]) -> Iterator[None]:
    """Context in which each model's hook sees the neurons of every layer; nothing is left after an exception."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # all callers lock in one order: two threads that lock in opposite orders would wait for each other
        for model, hook in sorted(taps, key=lambda tap: id(tap[0])):
            sites = [Site(SiteKind.NEURONS, layer) for layer in range(model.n_layers)]
            stack.enter_context(model.hooks([(site, hook(layer)) for layer, site in enumerate(sites)]))
        yield


@contextmanager
def exchanging(base: LensModel, aligned: LensModel | None) -> Iterator[Exchange]:
    """Context in which ``base`` takes the chosen neurons of ``aligned``; with None, it runs by itself."""
    exchange = Exchange()
    if aligned is None:
        with torch.no_grad(), base.lock:
            yield exchange
        return
    with hooked((base, exchange.replace), (aligned, exchange.keep)):
        yield exchange


def greedy(
    base: LensModel,
    aligned: LensModel | None,
    mask: Bool[Tensor, "layer d_mlp"] | None,
    rows: Rows,
    max_new_tokens: int,
    keep: int = 1,
) -> tuple[list[list[int]], Float[Tensor, "batch step d_vocab"]]:
    """Greedy tokens of ``base`` with the masked neurons replaced (Chen et al. 2024, Algorithm 1).

    At every step, the aligned model first reads the same columns, unpatched and with its own cache.

    Args:
        base: The model that speaks.
        aligned: The model whose neurons are taken; None for the base model by itself.
        mask: The neurons taken.
        rows: The prompts.
        max_new_tokens: Largest length of a reply, in tokens.
        keep: Number of steps whose logits are returned; the logits of all steps would be the largest tensor of a run.

    Returns:
        Token ids of each row, up to and including its end token; and the logits of the first ``keep`` steps that were
        run, float32. The first step is the one after the prompt.

    Raises:
        MechsafetyError: Replies that may grow beyond the model's positions.
    """
    check_room(base.backend, int(rows.mask.sum(1).max()), max_new_tokens)
    with exchanging(base, aligned) as exchange:
        donor, cursor = Cursor(aligned.backend) if aligned else None, Cursor(base.backend)
        if mask is not None:
            exchange.choose(mask)

        def read(ids: Tensor, real: Tensor) -> Tensor:
            if donor is not None and aligned is not None:
                donor.feed(ids.to(aligned.device), real.to(aligned.device))
            return cursor.feed(ids, real)[:, -1].float()

        replies, logits = decode.decode_replies(read, rows.pieces(), base.end_ids, max_new_tokens, keep)
    return replies, torch.stack(logits, dim=1)


@public
def greedy_replies(
    model: LensModel, prompts: Prompts, max_new_tokens: Count, batch_size: Count = 16
) -> list[list[int]]:
    """Token ids of a model's own greedy reply to each chat prompt, in order.

    Example:
        >>> ids = ms.neurons.greedy_replies(model, harmful[:1], 8)
        >>> model.decode(ids)
        ['Sorry , I can not help .']
    """
    return model.reply_ids(prompts, max_new_tokens, batch_size, progress=False)


def forced(
    base: LensModel,
    aligned: LensModel | None,
    masks: Sequence[Bool[Tensor, "layer d_mlp"]],
    rows: Rows,
    keep: int = 1,
) -> Iterator[Float[Tensor, "batch keep d_vocab"]]:
    """Logits of the last ``keep`` columns on given tokens, per mask; the aligned model runs once for all masks."""
    pieces = rows.pieces()
    values: list[dict[int, Tensor]] = []
    with exchanging(base, aligned) as exchange:
        if aligned is not None:
            donor = Cursor(aligned.backend)
            for ids, real in pieces:
                exchange.values = {}
                donor.feed(ids.to(aligned.device), real.to(aligned.device))
                values.append(exchange.values)
        for mask in masks:
            if aligned is not None:
                exchange.choose(mask)
            cursor = Cursor(base.backend)
            for k, (ids, real) in enumerate(pieces):
                exchange.values = values[k] if values else {}
                logits = cursor.feed(ids, real, keep)
            yield logits.float()
