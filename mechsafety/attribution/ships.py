"""Safety-head baselines of Zhou et al. 2024: Ships (KL of a masked head) and Sahara (rotation of a subspace)."""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mechsafety.errors import MechsafetyError
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun, Hook, base_run, expand_rows, max_variants, run_from, unembed
from mechsafety.nodes import Node
from mechsafety.prompts import Tokens
from mechsafety.sites import Site, SiteKind

MASKS = ("uniform", "zero")


def ships(
    model: LensModel, prompts: Sequence[str] | Tokens, *, mask: str = "uniform", rank: int = 4, progress: bool = True
) -> tuple[Float[Tensor, "layer head prompt"], Float[Tensor, "layer head"]]:
    """Every head's Ships and generalised Ships when it alone is masked, at all positions.

    Ships: KL(p || p without the head) of the next token, in nats. Generalised Ships, which Sahara searches by: sum of
    the principal angles, in radians, between the spans of the first ``rank`` right singular vectors of the matrix of
    last-token activations [prompt d_model] before the final norm, with and without the head (Zhou et al. 2024).

    Args:
        model: The model.
        prompts: Harmful prompts.
        mask: ``uniform``: the head attends to all visible positions alike (the paper's undifferentiated attention);
            ``zero``: it writes nothing (scaling its contribution to 0).
        rank: Of the subspaces.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: Unknown mask, or a rank above the number of prompts.
    """
    heads = [Node("head", layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    found, base, spans = _masked(model, prompts, [[head] for head in heads], mask, rank, progress)
    kl = _divergence(model, base, found)
    shape = {"layer": model.n_layers, "head": model.n_heads}
    by_head = rearrange(kl, "(layer head) prompt -> layer head prompt", **shape)
    return by_head, rearrange(spans, "(layer head) -> layer head", **shape)


def sahara(
    model: LensModel,
    prompts: Sequence[str] | Tokens,
    size: int = 3,
    *,
    mask: str = "uniform",
    rank: int = 4,
    progress: bool = True,
) -> list[tuple[Node, float]]:
    """Sahara's greedy group of safety heads: at each step the head that rotates the subspace most, those before masked.

    Args:
        model: The model.
        prompts: Harmful prompts.
        size: Number of heads.
        mask: As for `ships`.
        rank: As for `ships`.
        progress: Whether to show bars.

    Returns:
        Heads in the order found, with the group's generalised Ships so far.

    Raises:
        MechsafetyError: As `ships`, or a size that is no number of heads.
    """
    left = [Node("head", layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    if not 1 <= size <= len(left):
        raise MechsafetyError(f"size={size}", expected=f"1 to {len(left)} heads")
    group: list[tuple[Node, float]] = []
    for _ in range(size):
        chosen = [node for node, _ in group]
        _, _, angles = _masked(model, prompts, [[*chosen, node] for node in left], mask, rank, progress)
        best = int(angles.argmax())
        group.append((left.pop(best), float(angles[best])))
    return group


def _masked(
    model: LensModel,
    prompts: Sequence[str] | Tokens,
    groups: Sequence[Sequence[Node]],
    mask: str,
    rank: int,
    progress: bool,
) -> tuple[Float[Tensor, "group prompt d_model"], BaseRun, Float[Tensor, " group"]]:
    """Last-token activations with each group of heads masked, the unmasked run, and the rotation of the subspace."""
    if mask not in MASKS:
        raise MechsafetyError(f"mask={mask!r}", expected=f"one of {MASKS}")
    tokens = prompts if isinstance(prompts, Tokens) else model.tokenize(prompts)
    if not 1 <= rank <= min(len(tokens), model.d_model):
        raise MechsafetyError(f"rank={rank}", expected=f"1 to {min(len(tokens), model.d_model)}, one for each prompt")
    base = base_run(model, tokens, keep=(SiteKind.Z,))
    values = _uniform(model, tokens) if mask == "uniform" else torch.zeros_like(base.acts[SiteKind.Z])
    out = torch.zeros(len(groups), len(tokens), model.d_model, device=model.device)
    order = sorted(range(len(groups)), key=lambda k: min(node.layer or 0 for node in groups[k]))
    size = max_variants(base)
    with torch.no_grad(), tqdm(total=len(groups), desc="masking", disable=not progress, leave=False) as bar:
        for first in range(0, len(order), size):
            chunk = order[first : first + size]
            hooks = _hooks(model, [groups[k] for k in chunk], values)
            start = min(site.layer or 0 for site, _ in hooks)
            resid = expand_rows(base.resid[start], len(chunk))
            final = run_from(model, base, start, resid, hooks, stop=model.n_layers)[:, -1].float()
            out[chunk] = rearrange(final, "(group prompt) d -> group prompt d", group=len(chunk))
            bar.update(len(chunk))
    before = base.resid[-1][:, -1].float()
    return out, base, principal_angles(before, out, rank).sum(-1)


def principal_angles(
    before: Float[Tensor, "prompt d_model"], after: Float[Tensor, "*rows prompt d_model"], rank: int
) -> Float[Tensor, "*rows rank"]:
    """Principal angles, in radians, between the spans of the first right singular vectors of two matrices."""
    first = torch.linalg.svd(before.double(), full_matrices=False).Vh[:rank]
    second = torch.linalg.svd(after.double(), full_matrices=False).Vh[..., :rank, :]
    overlap = einsum(first, second, "i d, ... j d -> ... i j")
    return torch.linalg.svdvals(overlap).clamp(max=1).arccos().float()


def _divergence(model: LensModel, base: BaseRun, final: Tensor) -> Float[Tensor, "group prompt"]:
    log_p = base.logits.log_softmax(-1)
    rows = []
    with torch.no_grad():
        for row in final:
            log_q = unembed(model, row.to(base.resid.dtype)).log_softmax(-1)
            rows.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
    return torch.stack(rows)


def _uniform(model: LensModel, tokens: Tokens) -> Float[Tensor, "layer batch pos head d_head"]:
    """Heads' mixed values if they attended to all visible positions alike."""
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
    """One hook a layer that masks each variant's heads."""
    masked = torch.zeros(model.n_layers, len(groups), model.n_heads, dtype=torch.bool, device=values.device)
    for row, group in enumerate(groups):
        for node in group:
            masked[node.layer, row, node.index] = True

    def hook(layer: int) -> Hook:
        where = repeat(masked[layer], "group head -> (group prompt) 1 head 1", prompt=values.shape[1])
        new = expand_rows(values[layer], len(groups))
        return (Site(SiteKind.Z, layer), lambda own: torch.where(where, new.to(own.dtype), own))

    return [hook(layer) for layer in range(model.n_layers) if bool(masked[layer].any())]
