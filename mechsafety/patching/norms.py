"""Norms whose scale is frozen at the base run's, so that they are linear."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.models import LensModel
from mechsafety.models.backend import forward_hooks
from mechsafety.models.engine import expand_rows, split_rows

NormOption = Literal["recompute", "freeze"]

Module = torch.nn.Module


def block_norms(model: LensModel, layer: int, *names: str) -> list[Module]:
    """A block's norms of the given names (``ln1``, ``ln1_post``, ``ln2``, ``ln2_post``), without missing ones."""
    return model.backend.norms(layer, *names)


def norm_behind(model: LensModel, layer: int, kind: str) -> Module | None:
    """The norm between a layer's heads (``kind`` is ``head``) or neurons and the residual stream; None without one."""
    return next(iter(block_norms(model, layer, "ln1_post" if kind == "head" else "ln2_post")), None)


def at_own_scale(model: LensModel, norm: Module, total: Float[Tensor, "*rows d_model"]) -> Callable[[Tensor], Tensor]:
    """Function from a part of ``total`` to what the norm after it passes to the residual stream; float32.

    ``N(sum of parts) = sum of (part / s * w)``. Here ``N`` is the norm, ``s`` its scale for the sum and ``w`` its
    weight. The scale is frozen at the run's own. The parts then add up to what the block adds, except for a bias of the
    norm, which no part writes.

    Args:
        model: The model.
        norm: The norm.
        total: Sum of what all parts of the layer write, its bias included.
    """
    form = model.backend.norm_form(norm)
    frozen = form.frozen(total)
    return lambda part: frozen(part) - form.bias


def block_norms_option(model: LensModel, how: str) -> dict[str, str]:
    """The option of a result that tells how norms after attention and MLP are treated; empty if there are none.

    Args:
        model: The model.
        how: ``frozen``: they keep each run's own scale. ``recomputed``: their scale is that of the changed sum.
    """
    return {"block_norms": how} if model.post_norm else {}


def mlp_norms(model: LensModel, layer: int) -> list[Module]:
    """Norms that `LensModel.mlp` applies."""
    own = block_norms(model, layer, "ln2", "ln2_post")
    return own if own or not model.parallel else block_norms(model, layer, "ln1")


def keep_scales(
    model: LensModel, norm: str, modules: Sequence[Module], base: Callable[[], object]
) -> AbstractContextManager[None]:
    """Context in which ``modules`` divide by the scales that they have while ``base`` runs.

    Args:
        model: The model.
        norm: ``freeze``; with ``recompute`` nothing is done.
        modules: Norms. In the context they may see any number of variants of the rows that ``base`` runs.
        base: Runs the base rows once through all of ``modules``.
    """
    return _frozen(model, modules, base) if norm == "freeze" and modules else nullcontext()


def through_norm(
    model: LensModel,
    module: Module,
    base: Float[Tensor, "batch pos d_model"],
    change: Float[Tensor, "variant batch pos d_model"],
    norm: str,
) -> Float[Tensor, "variant batch pos d_model"]:
    """Change of a norm's output when ``change`` is added to its input ``base``; exact, or at the base's scale."""
    rows = rearrange(base + change.to(base.dtype), "variant batch pos d -> (variant batch) pos d")
    with model.lock:  # other threads may have hooks on this norm
        before = module(base).to(base.device)
        with keep_scales(model, norm, [module], lambda: module(base)):
            moved: Tensor = split_rows(module(rows).to(base.device), len(change)) - before
            return moved


@contextmanager
def _frozen(model: LensModel, modules: Sequence[Module], base: Callable[[], object]) -> Iterator[None]:
    scales: dict[Module, Tensor] = {}

    def note(module: Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        scales[module] = model.backend.norm_form(module).scale(args[0].to(model.device))

    def rescale(module: Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        form, kept = model.backend.norm_form(module), scales[module]
        own, shift = form.scale(args[0].to(model.device)), form.bias
        ratio = own / expand_rows(kept, own.shape[0] // kept.shape[0])
        return ((out.to(model.device).float() - shift) * ratio + shift).to(out)

    with model.lock:
        with forward_hooks(modules, note):
            base()
        with forward_hooks(modules, rescale):
            yield
