"""From changes of the final residual stream to the metric."""

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun, check_current, split_rows, unembed
from mechsafety.patching.norms import NormOption, keep_scales

# elements of one unembedding: 64 MiB of float32
MAX_LOGITS = 2**24


def final_scores(
    model: LensModel,
    base: BaseRun,
    change: Float[Tensor, "variant batch d_model"],
    metric: RefusalLogOdds,
    norm: NormOption = "recompute",
) -> Float[Tensor, "variant batch"]:
    """Metric when ``change`` is added to the final residual stream at the last column.

    Log-odds read the logits of all tokens, so every variant is unembedded, in parts that bound memory. A logit
    difference reads only the logits of its own tokens. If the model caps its logits or computes in half precision,
    every variant is unembedded for it too.

    Args:
        model: The model.
        base: The run that is edited.
        change: Change of the final residual stream.
        metric: What is measured.
        norm: What the final norm does: ``recompute`` or ``freeze``.
    """
    check_current(model, base)
    final, ln = base.resid[-1][:, -1], model.backend.last_norm
    rows = rearrange(final + change.to(final.dtype), "variant batch d -> (variant batch) d")
    # a soft cap is not linear, and coarser types round every logit
    capped = model.backend.logit_cap > 0
    few = metric.is_linear and not capped and final.dtype in (torch.float32, torch.float64)
    with keep_scales(model, norm, [ln], lambda: ln(final)), model.lock:
        if not few:
            parts = rows.split(max(1, MAX_LOGITS // model.d_vocab))
            return split_rows(torch.cat([metric(unembed(model, part)) for part in parts]), len(change))
        moved = split_rows(ln(rows), len(change)) - ln(final)
    both = (list(metric.refusal_ids), list(metric.comply_ids))
    slope = [model.W_U[:, ids].mean(-1) for ids in both]
    moves: Tensor = einsum(moved, slope[0] - slope[1], "variant batch d, d -> variant batch").float()
    return metric(base.logits) + moves
