"""What removing or adding each of many directions does to refusal: bypass, induce, KL, and COSMIC's cosines."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.directions.select import cosmic_layers, joint_cosine
from mechsafety.errors import MechsafetyError
from mechsafety.interventions.batched import (
    PromptBatch,
    PromptBatches,
    added_runs,
    removed_runs,
    run_unedited,
    swept_batches,
)
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.models.engine import BaseRun
from mechsafety.progress import progress_bar
from mechsafety.scale.work import work

# mean differences shorter than this share of the mean activation count as rounding errors
NO_DIFFERENCE = 1e-5
# what the runs of some edits on some prompts give: places of edits and prompts, their scores, and sums of activations
Scored = tuple[tuple[int, ...], tuple[int, ...], Tensor, Tensor]
# the same, and the places among COSMIC's layers that the sums are of
Induced = tuple[tuple[int, ...], tuple[int, ...], Tensor, Tensor, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Validation:
    """Validation prompts and their unedited runs.

    Attributes:
        harmful, harmless: The prompts, grouped for `removed_runs` and `added_runs`.
        harmful_scores, harmless_scores: Metric of the unedited runs.
        harmless_log_probs: Next-token log-probabilities of the unedited harmless runs.
        low: Layers at which COSMIC compares activations.
        harmful_mean, harmless_mean: Mean outputs of all layers at the last token.
    """

    harmful: PromptBatches
    harmless: PromptBatches
    harmful_scores: Float[Tensor, " harmful"]
    harmless_scores: Float[Tensor, " harmless"]
    harmless_log_probs: Float[Tensor, "harmless d_vocab"]
    low: tuple[int, ...]
    harmful_mean: Float[Tensor, "layer d_model"]
    harmless_mean: Float[Tensor, "layer d_model"]

    @classmethod
    def of(
        cls, model: LensModel, harmful: Sequence[str], harmless: Sequence[str], metric: RefusalLogOdds
    ) -> "Validation":
        """Run the prompts unedited and keep what the scores need."""
        bad, good = PromptBatches.of(model, harmful), PromptBatches.of(model, harmless)
        bad_run, good_run = run_unedited(model, bad), run_unedited(model, good)
        bad_mean, good_mean = (run.resid[1:, 0].double().mean(1).float() for run in (bad_run, good_run))
        low = tuple(cosmic_layers(bad_mean, good_mean))
        log_probs = good_run.logits[0].log_softmax(-1)
        return cls(
            bad, good, metric(bad_run.logits[0]), metric(good_run.logits[0]), log_probs, low, bad_mean, good_mean
        )


@dataclass(frozen=True, slots=True)
class DirectionScores:
    """Scores of candidate directions on validation prompts.

    Attributes:
        bypass: Metric on harmful prompts with the direction removed.
        induce: Metric on harmless prompts with the direction added at its layer only, at all positions.
        kl: KL(unedited || removed) of next-token distributions on harmless prompts, in nats.
        cosmic: COSMIC's sum of cosines; NaN for candidates without a direction.
    """

    bypass: Float[Tensor, "layer position harmful"]
    induce: Float[Tensor, "layer position harmless"]
    kl: Float[Tensor, "layer position harmless"]
    cosmic: Float[Tensor, "layer position"]


def mean_differences(
    model: LensModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    metric: RefusalLogOdds | None = None,
    *,
    n_positions: int | None = None,
) -> tuple[Float[Tensor, "layer position d_model"], tuple[int, int]]:
    """Mean harmful less mean harmless input of every block at the template's tokens after the instruction.

    Sums run in float64. Where both kinds of prompts have the same token (as before block 0), the difference is only
    rounding and is set to 0.

    Args:
        model: The model.
        harmful: Prompts of any length.
        harmless: Prompts of any length.
        metric: If given, only harmful prompts above 0 and harmless ones below 0 count.
        n_positions: Number of last positions; by default all tokens after the instruction.

    Returns:
        The differences, and how many prompts of each kind count. Positions are in order: the last one is the prompt's
        last token.

    Raises:
        MechsafetyError: No prompt of a kind counts.
    """
    groups = PromptBatches.of(model, [*harmful, *harmless], variants=1)
    width = n_positions if n_positions is not None else groups.suffix
    # one sum over the harmful prompts, one over the harmless ones
    totals = torch.zeros(2, model.n_layers, width, model.d_model, dtype=torch.float64, device=model.device)
    counts = [0, 0]

    def summed(batch: PromptBatch, run: BaseRun) -> tuple[Tensor, tuple[int, ...]]:
        resid, bad = run.resid[:-1, :, -width:], torch.tensor([k < len(harmful) for k in batch.index])
        score = None if metric is None else metric(run.logits).cpu()
        chosen = [bad, ~bad] if score is None else [bad & (score > 0), ~bad & (score < 0)]
        sums = [resid[:, rows.to(resid.device)].double().sum(1) for rows in chosen]
        return torch.stack(sums), tuple(int(rows.sum()) for rows in chosen)

    for _, (sums, own) in swept_batches(model, groups, summed, tuple[Tensor, tuple[int, ...]]):
        totals += sums.to(totals.device)
        counts = [count + more for count, more in zip(counts, own, strict=True)]
    kinds = ("harmful prompts is refused", "harmless prompts is answered")
    for count, prompts, kind in zip(counts, (harmful, harmless), kinds, strict=True):
        if not count:
            raise MechsafetyError(f"none of {len(prompts)} {kind}", expected="a model that tells them apart")
    means = [total / count for total, count in zip(totals, counts, strict=True)]
    size = max(float(mean.norm(dim=-1).mean()) for mean in means)
    difference = means[0] - means[1]
    real = difference.norm(dim=-1) > NO_DIFFERENCE * size
    return (difference * rearrange(real, "layer position -> layer position 1")).float(), (counts[0], counts[1])


def score_directions(
    model: LensModel,
    validation: Validation,
    metric: RefusalLogOdds,
    vectors: Float[Tensor, "layer position d_model"],
    layers: Sequence[int],
    *,
    also: Float[Tensor, "rank d_model"] | None = None,
    progress: bool = True,
) -> DirectionScores:
    """Bypass, induce, KL and COSMIC's score of each vector, exactly (see `mechsafety.interventions.batched`).

    Args:
        model: The model.
        validation: Prompts and their unedited runs.
        metric: Refusal log-odds.
        vectors: Candidates; zero ones are not run and keep the unedited scores.
        layers: Layer of each row of ``vectors``, at which they are added.
        also: Directions that are removed together with each candidate.
        progress: Whether to show a bar.
    """
    n_rows, n_positions, _ = vectors.shape
    flat = rearrange(vectors, "layer position d -> (layer position) d")
    real = (flat.norm(dim=-1) > 0).nonzero().flatten().tolist()
    bypass = validation.harmful_scores.repeat(len(flat), 1)
    induce = validation.harmless_scores.repeat(len(flat), 1)
    kl = torch.zeros_like(induce)
    low = torch.tensor(validation.low, device=flat.device)
    cosines = torch.full((2, len(flat)), torch.nan, device=flat.device)
    bases = [flat[[k]] if also is None else torch.cat([also.to(flat), flat[[k]]]) for k in real]
    # a row that holds only zero vectors (before block 0) needs no run
    rows = [row for row in range(n_rows) if bool((vectors[row] != 0).any())]
    # every prompt counts alike in each of the three passes, in whole numbers: fractions could add up to over 100 %
    share, each = len(real) or 1, len(rows) or 1
    total = (2 * validation.harmless.n + validation.harmful.n) * share * each
    with progress_bar(total=total, desc="directions", show=progress) as bar:
        sums = torch.zeros(len(flat), len(low), model.d_model, dtype=torch.float64, device=flat.device)
        runs = removed_runs(model, validation.harmful, bases)

        def bypassed(k: int) -> Scored:
            run = runs[k]()
            seen = run.resid[low + 1 - run.layer].double().sum(2)
            return run.variants, run.index, metric(run.logits), rearrange(seen, "layer variant d -> variant layer d")

        for variants, index, scores, seen in work("bypass", range(len(runs)), bypassed, Scored):
            at = [real[k] for k in variants]
            bypass[_cells(at, index)] = scores.to(bypass.device)
            sums[at] += seen.to(sums.device)
            bar.update(len(index) * len(at) * each)
        cosines[0, real] = joint_cosine(sums[real] / validation.harmful.n, validation.harmless_mean[low])
        quiet = removed_runs(model, validation.harmless, bases)

        def diverged(k: int) -> Scored:
            run = quiet[k]()
            found = divergence(validation.harmless_log_probs[list(run.index)], run.logits)
            return run.variants, run.index, found, found[:0]

        for variants, index, scores, _ in work("divergence", range(len(quiet)), diverged, Scored):
            at = [real[k] for k in variants]
            kl[_cells(at, index)] = scores.to(kl.device)
            bar.update(len(index) * len(at) * each)
        sums.zero_()
        added = added_runs(model, validation.harmless, vectors[rows], [layers[row] for row in rows])

        def induced(k: int) -> Induced:
            run = added[k]()
            places = [place for place, layer in enumerate(validation.low) if layer + 1 >= run.layer]
            seen = [run.resid[validation.low[place] + 1 - run.layer].double().sum(1) for place in places]
            none = run.resid.new_zeros(0, dtype=torch.float64)
            return run.variants, run.index, metric(run.logits), torch.stack(seen) if seen else none, tuple(places)

        for variants, index, scores, seen, places in work("induce", range(len(added)), induced, Induced):
            at = [rows[k // n_positions] * n_positions + k % n_positions for k in variants]
            induce[_cells(at, index)] = scores.to(induce.device)
            for place, part in zip(places, seen, strict=True):
                sums[at, place] += part.to(sums.device)
            bar.update(len(index) * share)
        means = sums / validation.harmless.n
        for row, layer in enumerate(layers):
            before = [place for place, seen in enumerate(validation.low) if seen < layer]
            for place in before:  # the addition does not change the blocks before it
                means[row * n_positions : (row + 1) * n_positions, place] = validation.harmless_mean[
                    validation.low[place]
                ].double()
        cosines[1, real] = joint_cosine(means[real], validation.harmful_mean[low])

    def grid(rows: Tensor) -> Tensor:
        return rearrange(rows, "(layer position) ... -> layer position ...", layer=n_rows)

    return DirectionScores(grid(bypass), grid(induce), grid(kl), grid(cosines.sum(0)))


def divergence(log_probs: Float[Tensor, "prompt d_vocab"], logits: Float[Tensor, "*rows prompt d_vocab"]) -> Tensor:
    """KL(p || q) per prompt, in nats, from log p and the logits of q."""
    return (log_probs.exp() * (log_probs - logits.log_softmax(-1))).sum(-1).clamp(min=0)


def positional_vectors(
    model: LensModel, prompts: Sequence[str], layer: int, position: int
) -> Float[Tensor, "prompt d_model"]:
    """Input of a block at one of the last positions, for each prompt in order."""
    rows: dict[int, Tensor] = {}
    batches = PromptBatches.of(model, prompts, variants=1)
    for batch, found in swept_batches(model, batches, lambda _, run: run.resid[layer, :, position].float(), Tensor):
        rows |= dict(zip(batch.index, found.to(model.device), strict=True))
    return torch.stack([rows[k] for k in range(len(prompts))])


def _cells(rows: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(rows)[:, None], torch.tensor(positions)[None, :]
