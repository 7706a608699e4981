"""Safety-head baselines of Zhou et al. 2024: Ships (KL of a masked head) and Sahara (rotation of a subspace).

Generalised Ships is equation 11 of the paper: the principal angles between the leading left singular vectors of two
matrices [prompt d_model]. It therefore compares how the prompts lie to each other, not which directions of the stream
they use. The paper leaves the number of vectors open. Its code takes one vector, reads the last token after the final
norm, and returns degrees. This module does the same, with the number of vectors as an option.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from mechsafety.conversation import PromptLike
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, public
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun, Hook, base_run, expand_rows, max_variants, run_from, unembed
from mechsafety.nodes import Node
from mechsafety.progress import progress_bar
from mechsafety.prompts import Tokens
from mechsafety.scale.work import sweeps, work
from mechsafety.sites import Site, SiteKind

Mask = Literal["uniform", "zero"]
# number of left singular vectors that are compared, as in the published code
RANK = 1


@sweeps
@public
def ships(
    model: LensModel, prompts: Prompts | Tokens, *, mask: Mask = "uniform", rank: Count = RANK, progress: bool = True
) -> tuple[Float[Tensor, "layer head prompt"], Float[Tensor, "layer head"]]:
    """Every head's Ships and generalised Ships when it alone is masked, at all positions.

    Ships (Zhou et al. 2024, equation 6) is KL(p || p without the head) of the next token, in nats.

    Generalised Ships (equation 11), by which Sahara searches, is a sum of principal angles, in degrees. The angles are
    between two spans, one with the head and one without it. Each is the span of the first ``rank`` left singular
    vectors of the last token's states after the final norm [prompt d_model].

    Args:
        model: The model.
        prompts: Harmful prompts.
        mask: ``uniform``: the head attends to all visible positions alike (the paper's undifferentiated attention with
            epsilon = 0); ``zero``: it writes nothing (scaling contribution with epsilon = 0).
        rank: Number of left singular vectors that are compared; the paper's code takes 1. There must be more prompts
            than this, because as many vectors as prompts span the same space, whatever is masked.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: The mask is unknown, or there are no more prompts than the rank.

    Example:
        >>> each, all_prompts = ms.attribution.ships(model, harmful)
        >>> each.shape, all_prompts.shape
        (torch.Size([4, 4, 8]), torch.Size([4, 4]))
    """
    found, base = masked_heads(model, prompts, mask, rank, progress)
    return divergences(model, base, found), rotations(model, base, found, rank)


def masked_heads(
    model: LensModel, prompts: Sequence[PromptLike] | Tokens, mask: Mask, rank: int | None, progress: bool
) -> tuple[Float[Tensor, "layer head prompt d_model"], BaseRun]:
    """The final norm's input at the last token with each head masked alone, and the unmasked run.

    If ``rank`` is given, there must be more prompts than that.
    """
    heads = [Node("head", layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    found, base = _masked(model, prompts, [[head] for head in heads], mask, rank, progress)
    return rearrange(found, "(layer head) prompt d -> layer head prompt d", layer=model.n_layers), base


@sweeps
@public
def sahara(
    model: LensModel,
    prompts: Prompts | Tokens,
    size: Count = 3,
    *,
    mask: Mask = "uniform",
    rank: Count = RANK,
    progress: bool = True,
) -> list[tuple[Node, float]]:
    """Sahara's greedy group of safety heads (Zhou et al. 2024, algorithm 1).

    Each step adds the head that rotates the subspace most when it is masked together with all heads found before.

    Args:
        model: The model.
        prompts: Harmful prompts.
        size: Number of heads.
        mask: As for `ships`.
        rank: As for `ships`.
        progress: Whether to show bars.

    Returns:
        Heads in the order found, with the group's generalised Ships so far, in degrees.

    Raises:
        MechsafetyError: As `ships`; or ``size`` is not between 1 and the number of heads.

    Example:
        >>> [str(head) for head, change in ms.attribution.sahara(model, harmful, size=1)]
        ['L3.H1']
    """
    left = [Node("head", layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    if not 1 <= size <= len(left):
        raise MechsafetyError(f"size={size}", expected=f"1 to {len(left)} heads")
    group: list[tuple[Node, float]] = []
    for _ in range(size):
        chosen = [node for node, _ in group]
        found, base = _masked(model, prompts, [[*chosen, node] for node in left], mask, rank, progress)
        angles = rotations(model, base, found, rank)
        best = int(angles.argmax())
        group.append((left.pop(best), float(angles[best])))
    return group


def _masked(
    model: LensModel,
    prompts: Sequence[PromptLike] | Tokens,
    groups: Sequence[Sequence[Node]],
    mask: Mask,
    rank: int | None,
    progress: bool,
) -> tuple[Float[Tensor, "group prompt d_model"], BaseRun]:
    """The final norm's input at the last token with each group of heads masked, and the unmasked run."""
    tokens = prompts if isinstance(prompts, Tokens) else model.tokenize(prompts)
    if rank is not None and not 1 <= rank <= min(len(tokens) - 1, model.d_model):
        raise MechsafetyError(
            f"rank={rank} of {len(tokens)} prompts",
            expected=f"a rank of 1 to {model.d_model} and more prompts than that",
        )
    base = base_run(model, tokens, keep=(SiteKind.Z,))
    values = _uniform(model, tokens) if mask == "uniform" else torch.zeros_like(base.acts[SiteKind.Z])
    out = torch.zeros(len(groups), len(tokens), model.d_model, device=model.device)
    order = sorted(range(len(groups)), key=lambda k: min(node.layer or 0 for node in groups[k]))
    size = max_variants(base)
    with torch.no_grad(), progress_bar(total=len(groups), desc="masking", show=progress) as bar:

        def masked(chunk: list[int]) -> Float[Tensor, "group prompt d_model"]:
            hooks = _hooks(model, [groups[k] for k in chunk], values)
            start = min(site.layer or 0 for site, _ in hooks)
            resid = expand_rows(base.resid[start], len(chunk))
            final = run_from(model, base, start, resid, hooks, stop=model.n_layers)[:, -1].float()
            return rearrange(final, "(group prompt) d -> group prompt d", group=len(chunk))

        chunks = [order[first : first + size] for first in range(0, len(order), size)]
        for chunk, found in zip(chunks, work("masking", chunks, masked, Tensor), strict=True):
            out[chunk] = found.to(out.device)
            bar.update(len(chunk))
    return out, base


def rotations(
    model: LensModel, base: BaseRun, found: Float[Tensor, "*rows prompt d_model"], rank: int
) -> Float[Tensor, "*rows"]:
    """Sum of the principal angles, in degrees, between the unmasked states after the final norm and the masked ones."""
    plain = base.resid[-1][:, -1].float()
    before, after = (model.frozen_final_norm(states)(states) for states in (plain, found))
    return principal_angles(before, after, rank).sum(-1)


def principal_angles(
    before: Float[Tensor, "prompt d_model"], after: Float[Tensor, "*rows prompt d_model"], rank: int
) -> Float[Tensor, "*rows rank"]:
    """Principal angles, in degrees, between the spans of the first left singular vectors of two matrices."""
    first = torch.linalg.svd(before.double(), full_matrices=False).U[:, :rank]
    second = torch.linalg.svd(after.double(), full_matrices=False).U[..., :rank]
    overlap = einsum(first, second, "prompt i, ... prompt j -> ... i j")
    angles: Tensor = torch.linalg.svdvals(overlap).clamp(max=1).arccos().rad2deg().float()
    return angles


def divergences(
    model: LensModel, base: BaseRun, found: Float[Tensor, "layer head prompt d_model"]
) -> Float[Tensor, "layer head prompt"]:
    """KL(p || p of the masked run) of the next token, in nats."""
    log_p = base.logits.log_softmax(-1)
    rows = []
    with torch.no_grad():
        for row in rearrange(found, "layer head prompt d -> (layer head) prompt d"):
            log_q = unembed(model, row.to(base.resid.dtype)).log_softmax(-1)
            rows.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
    return rearrange(torch.stack(rows), "(layer head) prompt -> layer head prompt", layer=model.n_layers)


def _uniform(model: LensModel, tokens: Tokens) -> Float[Tensor, "layer batch pos head d_head"]:
    """The values that heads would mix if they attended to all visible positions alike."""
    cache = model.cache(tokens, ["pattern", "v"])
    visible = (cache.pattern > 0).float()
    weights = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    values = repeat(
        cache.v.float(),
        "layer kv batch pos d_head -> layer (kv group) batch pos d_head",
        group=model.n_heads // model.n_kv_heads,
    )
    return einsum(
        weights, values, "layer head batch pos source, layer head batch source d_head -> layer batch pos head d_head"
    )


def _hooks(model: LensModel, groups: Sequence[Sequence[Node]], values: Tensor) -> list[Hook]:
    """One hook per layer that masks each variant's heads."""
    masked = torch.zeros(model.n_layers, len(groups), model.n_heads, dtype=torch.bool, device=values.device)
    for row, group in enumerate(groups):
        for node in group:
            masked[node.layer, row, node.index] = True

    def hook(layer: int) -> Hook:
        where = repeat(masked[layer], "group head -> (group prompt) 1 head 1", prompt=values.shape[1])
        new = expand_rows(values[layer], len(groups))
        return (Site(SiteKind.Z, layer), lambda own: torch.where(where, new.to(own.dtype), own))

    return [hook(layer) for layer in range(model.n_layers) if bool(masked[layer].any())]
