"""From changes of the final residual stream to the metric, without unembedding every variant onto every token."""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun, split_rows, unembed
from mechsafety.patching.norms import keep_scales

# how many of the likeliest tokens are looked at first, and what share of their sum all others may have at most
KEPT = 8192
ERROR = 2e-6
# below so many variants finding the tokens costs more than it saves
MIN_VARIANTS = 16
# elements of one unembedding: 64 MiB of float32
MAX_LOGITS = 2**24


def final_scores(
    model: LensModel,
    base: BaseRun,
    change: Float[Tensor, "variant batch d_model"],
    metric: RefusalLogOdds,
    norm: str = "recompute",
) -> Float[Tensor, "variant batch"]:
    """Metric when ``change`` is added to the final residual stream at the last column.

    A logit difference reads its own tokens' logits alone. Log-odds read all tokens, but nearly all probability lies on
    few: where the final norm's output moves by Δ, a token's logit l moves by at most |w| |Δ| (Cauchy-Schwarz, w its
    unembedding), so all tokens but the likeliest `KEPT` sum to at most Σ exp(l + |w| |Δ|). Where that is at most
    `ERROR` of what the kept ones sum to, they are left out, which moves the log-odds by less than `ERROR`; variants
    that cannot be decided so are unembedded whole.

    Args:
        model: The model.
        base: The run that is edited.
        change: Change of the final residual stream.
        metric: What is measured.
        norm: ``recompute`` or ``freeze``, of the final norm.
    """
    final, ln = base.resid[-1][:, -1], model.backend.last_norm
    rows, n = rearrange(final + change.to(final.dtype), "variant batch d -> (variant batch) d"), len(change)
    with keep_scales(model, norm, [ln], lambda: ln(final)):
        # a soft cap is not linear, and coarser types round every logit
        if model.backend.logit_cap > 0 or final.dtype is not torch.float32:
            parts = rows.split(max(1, MAX_LOGITS // model.d_vocab))
            return split_rows(torch.cat([metric(unembed(model, part)) for part in parts]), n)
        with model.lock:
            moved = split_rows(ln(rows), n) - ln(final)
    weights = rearrange(model.W_U, "d_model token -> token d_model")
    if metric.is_linear:
        both = (list(metric.refusal_ids), list(metric.comply_ids))
        refuse, comply = (base.logits[:, ids] + moved @ rearrange(weights[ids], "token d -> d token") for ids in both)
        return refuse.mean(-1) - comply.mean(-1)
    lengths = weights.norm(dim=1)
    logits = base.logits
    return torch.stack([_log_odds(row, moved[:, k], weights, lengths, metric) for k, row in enumerate(logits)], dim=1)


def _log_odds(
    logits: Float[Tensor, " d_vocab"],
    moved: Float[Tensor, "variant d_model"],
    weights: Float[Tensor, "d_vocab d_model"],
    lengths: Float[Tensor, " d_vocab"],
    metric: RefusalLogOdds,
) -> Float[Tensor, " variant"]:
    """Log-odds of one prompt's variants, whose final norm's output moves by ``moved``."""
    ids = torch.tensor(metric.refusal_ids, device=moved.device)
    order = logits.index_fill(0, ids, torch.inf).argsort(descending=True)  # the refusal tokens are always kept
    scores, left = torch.empty(len(moved), device=moved.device), torch.arange(len(moved), device=moved.device)
    if len(moved) >= MIN_VARIANTS and len(ids) < KEPT < len(logits) // 2:
        kept, others = order[:KEPT], order[KEPT:]
        found = logits[kept] + moved @ rearrange(weights[kept], "token d -> d token")
        refuse, rest = found[:, : len(ids)].logsumexp(-1), found[:, len(ids) :].logsumexp(-1)
        sure = _bound(logits[others], lengths[others], moved) <= rest + math.log(ERROR)
        scores[sure], left = (refuse - rest)[sure], (~sure).nonzero().flatten()
    for part in left.split(max(1, MAX_LOGITS // len(logits))):
        found = logits + moved[part] @ rearrange(weights, "token d -> d token")
        refuse = found[:, ids].logsumexp(-1)
        scores[part] = refuse - found.index_fill_(1, ids, -torch.inf).logsumexp(-1)
    return scores


def _bound(
    logits: Float[Tensor, " token"], lengths: Float[Tensor, " token"], moved: Float[Tensor, "variant d_model"]
) -> Float[Tensor, " variant"]:
    """Upper bound of the logsumexp of some tokens' logits, for each variant."""
    far = moved.norm(dim=-1)
    # at a few distances only, each variant's rounded up: the bound grows with the distance
    grid = far.sort().values[torch.linspace(0, len(far) - 1, min(len(far), 33), device=far.device).ceil().long()]
    bounds = torch.stack([(logits + lengths * distance).logsumexp(-1) for distance in grid])
    return bounds[torch.searchsorted(grid, far)]
