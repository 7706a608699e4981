"""Weights that cannot write a direction: the same as removing it by hooks, in memory and inside a context only."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import public
from mechsafety.interventions.checks import check_strength, check_vector
from mechsafety.interventions.steering import orthonormal, project_out
from mechsafety.models import LensModel

_PROBES = ("What is two plus two?", "Name a colour, please.")
# largest difference in logits from the hooks that counts as rounding; norms compute in float32 for every weight type
TOLERANCE = {"float64": 1e-4, "float32": 1e-3, "float16": 2e-1, "bfloat16": 5e-1}


@public
@contextmanager
def orthogonalized(
    model: LensModel, directions: Float[Tensor, "*rank d_model"], strength: float = 1.0
) -> Iterator[LensModel]:
    """Context in which the model's weights are copies that cannot write the directions (Arditi et al. 2024, eq. 5).

    W <- W - strength Q Q^T W, where Q is an orthonormal basis. This is applied to the embeddings and to the output
    weights and biases of attention and MLPs. The logits are those of `project_out`, without its cost at each token. A
    tied unembedding keeps its weights: only the embedding gets a copy. At the end the original weights are back, bit
    for bit. Such a model is never saved: inside the context, its ``save_pretrained`` raises an error.

    Args:
        model: The model.
        directions: One vector or several rows.
        strength: Share that is removed, 0 to 1.

    Yields:
        The model.

    Raises:
        MechsafetyError: A model with a norm after attention or MLP (no such weights exist). Weights that have no known
            name. Logits that differ from those of the hooks.

    Example:
        >>> with ms.interventions.orthogonalized(model, direction.vector) as edited:
        ...     edited.generate(harmful[:1], 8)
        ['Sure ! here is how .']
        >>> model.generate(harmful[:1], 8)  # the weights are the model's own again
        ['Sorry , I can not help .']
    """
    rows = rearrange(check_vector(directions, model.d_model), "... d_model -> (...) d_model")
    share, basis = check_strength(strength, share=True), orthonormal(rows)
    if model.post_norm:
        raise MechsafetyError(
            f"{model.name} normalises each block's output, so no weights are equivalent to the hooks",
            expected="a model without a norm after attention or MLP",
            hint="use project_out",
        )
    with torch.no_grad(), project_out(model, rows, share):
        expected = model.logits(list(_PROBES))
    _ = model.weights_sha256  # compute it now, from the original weights: the model keeps the first value
    with model.lock, ExitStack() as restore:
        for module, name, axis in model.backend.writers():
            _swap(module, name, without_directions(getattr(module, name), basis, share, axis), restore)
        model.hf_model.save_pretrained = _refuse_to_save
        restore.callback(delattr, model.hf_model, "save_pretrained")
        gap = float((model.logits(list(_PROBES)) - expected).abs().max())
        if not gap <= TOLERANCE.get(model.dtype_name, 1e-3):
            raise MechsafetyError(
                f"orthogonalised weights of {model.name} differ from the hooks by {gap:.2g} in logits"
            )
        yield model


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise MechsafetyError("a model with a direction removed from its weights is not saved", hint="use it in memory")


def without_directions(weight: Tensor, basis: Tensor, share: float, axis: int) -> Tensor:
    """The weight without its part in the basis, along the axis (0 or -1) of the residual stream."""
    q = basis.to(weight.device, torch.float64)
    w = weight.double()
    if w.ndim == 1 or axis == -1:
        part = einsum(w, q, q, "... d, rank d, rank e -> ... e")
    else:
        part = einsum(w, q, q, "d inner, rank d, rank e -> e inner")
    return (w - share * part).to(weight.dtype)


def _swap(module: Any, name: str, new: Tensor, restore: ExitStack) -> None:
    old = getattr(module, name)
    restore.callback(setattr, module, name, old)
    setattr(module, name, torch.nn.Parameter(new.detach(), requires_grad=old.requires_grad))
