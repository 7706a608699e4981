"""Refusal subspaces: directions found one after the other, each judged by what it adds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.directions.refusal import RefusalDirection, usable_validation
from mechsafety.directions.scores import mean_differences, score_directions
from mechsafety.directions.select import MAX_DEPTH, smallest
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, public
from mechsafety.intervals import mean_interval
from mechsafety.interventions import project_out
from mechsafety.interventions.steering import orthonormal
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.prompts import PromptPairs
from mechsafety.results import Provenance, Result

# random directions to compare each one with
N_RANDOM = 4


@dataclass(frozen=True, slots=True)
class RefusalSubspace(Result):
    """Orthogonal directions, in the order found, and what removing the first k of them does.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        layers, positions: Where each was found.
        vectors: The directions, each orthogonal to those before.
        before: Metric of harmful validation prompts with the directions before removed. Of the half of these prompts
            that choosing did not see.
        bypass: The same with this direction removed as well.
        control: The same with a random direction removed instead (mean of several).
        induce_control: Metric of harmless prompts with a random direction of the same norm added (mean of several).
        kl: KL on harmless prompts with this and the ones before removed.
        induce: Metric of harmless prompts with this direction alone added, at its layer.
        causal: Whether its removal lowers refusal, and its addition raises it, more than a random one's: the 95 %
            intervals of the mean differences over prompts lie on that side of 0.
    """

    provenance: Provenance
    metric: dict[str, object]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    vectors: Float[Tensor, "direction d_model"]
    before: Float[Tensor, "direction harmful"]
    bypass: Float[Tensor, "direction harmful"]
    control: Float[Tensor, "direction harmful"]
    induce_control: Float[Tensor, "direction harmless"]
    kl: Float[Tensor, "direction harmless"]
    induce: Float[Tensor, "direction harmless"]
    causal: tuple[bool, ...]

    def __repr__(self) -> str:
        return f"RefusalSubspace({len(self.layers)} directions, {self.dimension} of them causal)"

    @property
    def dimension(self) -> int:
        """Number of directions before the first that is not causal."""
        return next((k for k, held in enumerate(self.causal) if not held), len(self.causal))

    @public
    @contextmanager
    def ablate(self, model: LensModel, strength: float = 1.0) -> Iterator[None]:
        """Context in which the causal directions are removed (all before the first that is not).

        Raises:
            MechsafetyError: There is none.
        """
        if not self.dimension:
            raise MechsafetyError("no direction of the subspace is causal", expected="at least one")
        with project_out(model, self.vectors[: self.dimension], strength):
            yield

    def to_dataframe(self) -> pd.DataFrame:
        """One row a direction: where, and mean effects with intervals over prompts."""
        rows = []
        for k, (layer, position) in enumerate(zip(self.layers, self.positions, strict=True)):
            row: dict[str, object] = {
                "direction": k + 1,
                "layer": layer,
                "position": position,
                "causal": self.causal[k],
            }
            change, beyond = self.bypass[k] - self.before[k], self.bypass[k] - self.control[k]
            gain = self.induce[k] - self.induce_control[k]
            parts = {"change": change, "beyond_random": beyond, "induce": self.induce[k]}
            parts |= {"induce_beyond_random": gain, "kl": self.kl[k]}
            for name, values in parts.items():
                low, high = mean_interval(values.cpu().numpy())
                row |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
        return pd.DataFrame(rows)


@public
def refusal_subspace(
    model: LensModel,
    found: RefusalDirection,
    pairs: PromptPairs,
    metric: RefusalLogOdds,
    validation: PromptPairs,
    *,
    n_directions: Count = 3,
    layers: Sequence[int] | None = None,
    max_depth: float = MAX_DEPTH,
    stop_below: float | None = 0.0,
    seed: Amount = 0,
    progress: bool = True,
) -> RefusalSubspace:
    """Look for refusal in what is left when the refusal direction is removed, again and again.

    Each round removes the directions found so far, takes mean differences of what the model computes then (they are
    orthogonal to what is removed), and chooses on every other validation prompt the one whose removal besides the
    others lowers refusal most. On the prompts between, it is compared with random directions; the search ends at the
    first that does not do more, and when no refusal is left: when the mean metric of the choosing prompts is below
    ``stop_below``. A mean below 0 can hide prompts that are refused all the same.

    Args:
        model: The model.
        found: The first direction.
        pairs: Training prompts.
        metric: Refusal log-odds.
        validation: Prompts on which directions are judged.
        n_directions: At most this many, the first included.
        layers: Blocks whose input is looked at; the first direction's by default.
        max_depth: Only layers below this share of the model.
        stop_below: Mean metric below which no refusal counts as left; None to go on whatever is left. What is found
            then may be causal and yet change next to nothing: look at the size.
        seed: Of the random directions.
        progress: Whether to show bars.

    Raises:
        MechsafetyError: ``n_directions`` below 1, no layer below the limit, or too few prompts.
    """
    searched = tuple(found.layers if layers is None else layers)
    limit = int(max_depth * model.n_layers)
    rows = tuple(layer for layer in searched if layer < limit)
    if not rows:
        raise MechsafetyError(f"layers {list(searched)}", expected=f"some below {limit}")
    checked = usable_validation(model, validation, metric)
    n_harmful = len(checked.harmful_scores)
    pick, judge = slice(0, None, 2), slice(1, None, 2)
    if n_harmful < 4:
        raise MechsafetyError(f"{n_harmful} refused validation prompts", expected="at least 4: half choose, half judge")
    generator = torch.Generator().manual_seed(seed)
    basis = torch.zeros(0, model.d_model, device=model.device)
    found_at: list[tuple[int, int]] = []
    rounds: list[tuple[Tensor, ...]] = []
    causal: list[bool] = []
    before = checked.harmful_scores
    for step in range(n_directions):
        positions, at = (found.positions, rows) if step else ((found.position,), (found.layer,))
        vectors = found.vector[None, None].to(model.device)
        if step:
            with project_out(model, basis):
                # which prompts count was decided with the model as it is: all of them here
                raw, _ = mean_differences(model, pairs.harmful, pairs.harmless, n_positions=len(positions))
            vectors = _orthogonal(raw[list(rows)], basis)
        scores = score_directions(model, checked, metric, vectors, at, also=basis, progress=progress)
        cell = smallest(scores.bypass[..., pick].mean(-1), vectors.norm(dim=-1) > 0)
        if cell is None:
            break
        vector, layer = vectors[cell], at[cell[0]]
        noise = torch.randn(1, N_RANDOM, model.d_model, generator=generator).to(vector)
        noise = _orthogonal(noise, basis)
        noise = noise / noise.norm(dim=-1, keepdim=True) * vector.norm()
        random = score_directions(model, checked, metric, noise, [layer], also=basis, progress=False)
        control, added = random.bypass[0].mean(0), random.induce[0].mean(0)
        lost, gained = (scores.bypass[cell] - control)[judge], scores.induce[cell] - added
        found_at.append((layer, positions[cell[1]]))
        parts = (before[judge], scores.bypass[cell][judge], control[judge], scores.kl[cell], scores.induce[cell], added)
        rounds.append((vector, *parts))
        lower, raised = mean_interval(lost.cpu().numpy())[1] < 0, mean_interval(gained.cpu().numpy())[0] > 0
        causal.append(lower and raised)
        before = scores.bypass[cell]
        ended = stop_below is not None and float(before[pick].mean()) < stop_below
        if not causal[-1] or ended:
            break
        basis = orthonormal(torch.cat([basis, vector[None]]))
    vectors, before, bypass, control, kl, induce, added = (torch.stack(part) for part in zip(*rounds, strict=True))
    options = {"n_directions": n_directions, "layers": list(rows), "max_depth": max_depth, "train": len(pairs)}
    options["stop_below"] = stop_below
    return RefusalSubspace(
        model.provenance(seed=seed, options=options),
        metric.to_json(),
        tuple(layer for layer, _ in found_at),
        tuple(position for _, position in found_at),
        vectors,
        before,
        bypass,
        control,
        added,
        kl,
        induce,
        tuple(causal),
    )


def _orthogonal(
    vectors: Float[Tensor, "layer position d_model"], basis: Float[Tensor, "rank d_model"]
) -> Float[Tensor, "layer position d_model"]:
    """Vectors without what lies in the basis; those of which nothing but rounding is left become 0."""
    left = vectors.double()
    q = basis.double()
    left = left - (left @ rearrange(q, "rank d -> d rank")) @ q
    real = left.norm(dim=-1) > 1e-4 * vectors.double().norm(dim=-1)
    return (left * rearrange(real, "layer position -> layer position 1")).float()
