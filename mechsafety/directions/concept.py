"""Directions found in other ways, with the same interface: representation reading and inference-time intervention."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, public
from mechsafety.interventions import Direction
from mechsafety.interventions.checks import check_layers
from mechsafety.interventions.steering import token_batches
from mechsafety.models import LensModel
from mechsafety.progress import progress_bar
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.sites import Site, SiteKind

MIN_PAIRS = 4


@public
def repe_direction(
    model: LensModel,
    pairs: PromptPairs,
    *,
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> Direction:
    """Representation reading (Zou et al. 2023, section 3.1): first principal component of pair differences.

    For each block, activations are read at the block's input, at the prompt's last token.

    1. Take the differences within pairs, harmful less harmless, without centring them.
    2. Take the first principal component of the differences.
    3. Turn it so that harmful prompts lie farther along it.
    4. Give it the length of the mean difference along it.

    The published code centres the differences. Centring would take the mean difference out, so that code also shuffles
    the order within pairs; the mean is then about 0. Without centring, the order within pairs does not matter, and
    nothing is random.

    Args:
        model: The model.
        pairs: Harmful prompts and harmless ones; they need not align.
        layers: Blocks; by default all but the first, whose input is the same token for all prompts.
        progress: Whether to show a bar, after two seconds.

    Raises:
        MechsafetyError: Fewer than four pairs, or a layer where pairs do not differ.

    Example:
        >>> reading = ms.directions.repe_direction(model, pairs, layers=[1, 2])
        >>> [str(site) for site in reading.sites]
        ['L1.resid_pre', 'L2.resid_pre']
    """
    _enough(pairs)
    chosen = check_layers(model, layers) if layers is not None else tuple(range(1, model.n_layers))
    sites = [Site(SiteKind.RESID_PRE, layer) for layer in chosen]
    harmful, harmless = (_last(model, side, sites, progress) for side in (pairs.harmful, pairs.harmless))
    rows = []
    for site in sites:
        difference = (harmful[site] - harmless[site]).double().cpu()
        if float(difference.norm()) <= 1e-6 * float(harmful[site].norm()):
            raise MechsafetyError(f"the pairs do not differ at {site}", expected="a later layer")
        _, _, components = torch.linalg.svd(difference, full_matrices=False)
        along = float((difference @ components[0]).mean())
        rows.append((components[0] * along).float())
    options = {"layers": list(chosen), "pairs": len(pairs), **omissions(pairs)}
    return Direction(model.provenance(options=options), "representation reading", tuple(sites), torch.stack(rows))


@public
def iti_direction(
    model: LensModel,
    pairs: PromptPairs,
    *,
    n_heads: Count = 16,
    folds: int = 4,
    progress: bool = True,
) -> Direction:
    """Inference-time intervention (Li et al. 2023): mean shifts of the heads from which refusal is read best.

    1. For each head, cross-validate a logistic probe on the head's mixed values ``z`` at the prompt's last token. Both
       prompts of a pair are in one fold.
    2. Keep the ``n_heads`` heads whose probes are most accurate.
    3. Each head's vector points along its mean difference, harmful less harmless. The vector's length is the standard
       deviation of the activations along it, so that strength is the paper's alpha.

    The published code judges probes on one random fifth of the prompts and takes 48 heads of 1,024. Here, values are
    scaled before the probe, every fold is used for judging once, and nothing is random.

    Args:
        model: The model.
        pairs: Harmful prompts and harmless ones.
        n_heads: Number of heads to keep.
        folds: Number of folds of the cross-validation.
        progress: Whether to show bars, after two seconds.

    Raises:
        MechsafetyError: Fewer than four pairs, or ``n_heads`` above the number of heads that differ.

    Example:
        >>> shift = ms.directions.iti_direction(model, pairs, n_heads=2)
        >>> len(shift.sites), str(shift.sites[0].kind)
        (2, 'z')
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _enough(pairs)
    sites = [Site(SiteKind.Z, layer) for layer in range(model.n_layers)]
    harmful, harmless = (_last(model, side, sites, progress) for side in (pairs.harmful, pairs.harmless))
    labels = np.repeat([1, 0], len(pairs))
    groups = np.tile(np.arange(len(pairs)), 2)
    splits = GroupKFold(min(folds, len(pairs)))
    found: list[tuple[float, Site, Tensor]] = []
    for site in progress_bar(sites, desc="probes", delay=2, show=progress):
        for head in range(model.n_heads):
            bad, good = (side[site][:, head].double().cpu() for side in (harmful, harmless))
            shift = bad.mean(0) - good.mean(0)
            values = torch.cat([bad, good])
            if float(shift.norm()) <= 1e-6 * float(values.norm()):
                continue
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            accuracy = cross_val_score(probe, values.numpy(), labels, groups=groups, cv=splits).mean()
            unit = shift / shift.norm()
            found.append((float(accuracy), Site(SiteKind.Z, site.layer, head), (unit * (values @ unit).std()).float()))
    if not 1 <= n_heads <= len(found):
        raise MechsafetyError(f"n_heads={n_heads}", expected=f"1 to {len(found)}, the heads that differ")
    best = sorted(found, key=lambda item: (-item[0], item[1]))[:n_heads]
    options = {
        "n_heads": n_heads,
        "folds": folds,
        "pairs": len(pairs),
        "accuracy": [round(accuracy, 4) for accuracy, _, _ in best],
    }
    return Direction(
        model.provenance(options=options),
        "inference-time intervention",
        tuple(site for _, site, _ in best),
        torch.stack([vector for _, _, vector in best]),
    )


def _enough(pairs: PromptPairs) -> None:
    if len(pairs) < MIN_PAIRS:
        raise MechsafetyError(f"{len(pairs)} pairs", expected=f"at least {MIN_PAIRS}")


def _last(
    model: LensModel, prompts: Sequence[str], sites: Sequence[Site], progress: bool
) -> dict[Site, Float[Tensor, "prompt ..."]]:
    """Activations at the last token of each prompt."""
    rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    with progress_bar(total=len(prompts), desc="reading prompts", delay=2, show=progress) as bar:
        for tokens in token_batches(model, prompts):
            for site, found in model.read(tokens, sites).items():
                rows[site].append(found[:, -1].float())
            bar.update(len(tokens))
    return {site: torch.cat(parts) for site, parts in rows.items()}
