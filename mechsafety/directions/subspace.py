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
from mechsafety.scale.work import sweeps

# number of random directions that each direction is compared with
N_RANDOM = 4


@dataclass(frozen=True, slots=True)
class RefusalSubspace(Result):
    """Orthogonal directions, in the order found, and what removing the first k of them does.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        layers, positions: Where each direction was found.
        vectors: The directions, each orthogonal to all earlier ones.
        before: Metric of harmful validation prompts with all earlier directions removed. Only the half of these prompts
            that did not take part in the choice.
        bypass: The same with this direction removed as well.
        control: The same with a random direction removed instead of this one (mean of several).
        induce_control: Metric of harmless prompts with a random direction of the same norm added (mean of several).
        kl: KL on harmless prompts with this direction and all earlier ones removed.
        induce: Metric of harmless prompts with this direction alone added, at its layer.
        causal: Whether the direction has a causal effect on refusal. Its removal must lower refusal more than a random
            direction's removal. Its addition must raise refusal more than a random direction's addition. Both 95 %
            intervals of the mean difference over prompts must lie on that side of 0.

    Example:
        >>> found = ms.directions.refusal_subspace(model, direction, pairs, metric, pairs, n_directions=2)
        >>> found.dimension, found.vectors.shape
        (1, torch.Size([1, 64]))
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
        """Context in which all directions before the first that is not causal are removed.

        Raises:
            MechsafetyError: The first direction is not causal.
        """
        if not self.dimension:
            raise MechsafetyError("no direction of the subspace is causal", expected="at least one")
        with project_out(model, self.vectors[: self.dimension], strength):
            yield

    def to_dataframe(self) -> pd.DataFrame:
        """One row per direction: where it was found, and mean effects with intervals over prompts."""
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


@sweeps
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
    """Search for more refusal directions, each in what is left when all earlier ones are removed.

    The first round takes ``found``. Each later round looks for a new direction.

    1. Remove the directions found so far, and take the mean differences of what the model then computes. They are
       orthogonal to what is removed.
    2. Remove each difference as well. Choose the one whose removal lowers refusal most on the choosing prompts: every
       other harmful validation prompt.
    3. Compare the chosen direction with random directions. Removal is compared on the harmful prompts that did not take
       part in the choice, addition on all harmless ones.
    4. Stop if the direction does no more than random directions do. Stop also if no refusal is left, that is, if the
       mean metric of the choosing prompts is below ``stop_below``.

    A mean below 0 can hide single prompts that are still refused.

    Args:
        model: The model.
        found: The first direction.
        pairs: Training prompts.
        metric: Refusal log-odds.
        validation: Prompts on which directions are judged.
        n_directions: Largest number of directions, the first included.
        layers: Blocks at whose input directions are sought; by default those of ``found``.
        max_depth: Only layers below this share of the model are searched.
        stop_below: Mean metric below which no refusal counts as left. None continues whatever is left; a direction
            found then may be causal although its effect is close to 0, so look at the effect's size.
        seed: Seed of the random directions.
        progress: Whether to show bars.

    Raises:
        MechsafetyError: ``n_directions`` below 1, no layer below the limit, or too few prompts.

    Example:
        >>> found = ms.directions.refusal_subspace(model, direction, pairs, metric, pairs, n_directions=2)
        >>> found.dimension
        1
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
    rounds: list[_Round] = []
    before = checked.harmful_scores
    for step in range(n_directions):
        if step:
            positions, at = found.positions, rows
            with project_out(model, basis):
                # all training prompts count, whatever the edited model makes of them: no metric is given
                raw, _ = mean_differences(model, pairs.harmful, pairs.harmless, n_positions=len(positions))
            vectors = _orthogonal(raw[list(rows)], basis)
        else:
            positions, at, vectors = (found.position,), (found.layer,), found.vector[None, None].to(model.device)
        scores = score_directions(model, checked, metric, vectors, at, also=basis, progress=progress)
        cell = smallest(scores.bypass[..., pick].mean(-1), vectors.norm(dim=-1) > 0)
        if cell is None:
            break
        vector, layer = vectors[cell], at[cell[0]]
        noise = _orthogonal(torch.randn(1, N_RANDOM, model.d_model, generator=generator).to(vector), basis)
        noise = noise / noise.norm(dim=-1, keepdim=True) * vector.norm()
        random = score_directions(model, checked, metric, noise, [layer], also=basis, progress=False)
        rounds.append(
            _Round(
                layer,
                positions[cell[1]],
                vector,
                before[judge],
                scores.bypass[cell][judge],
                random.bypass[0].mean(0)[judge],
                scores.induce[cell],
                random.induce[0].mean(0),
                scores.kl[cell],
            )
        )
        before = scores.bypass[cell]
        ended = stop_below is not None and float(before[pick].mean()) < stop_below
        if not rounds[-1].causal or ended:
            break
        basis = orthonormal(torch.cat([basis, vector[None]]))
    options = {"n_directions": n_directions, "layers": list(rows), "max_depth": max_depth, "train": len(pairs)}
    options["stop_below"] = stop_below
    return RefusalSubspace(
        model.provenance(seed=seed, options=options),
        metric.to_json(),
        tuple(one.layer for one in rounds),
        tuple(one.position for one in rounds),
        torch.stack([one.vector for one in rounds]),
        torch.stack([one.before for one in rounds]),
        torch.stack([one.bypass for one in rounds]),
        torch.stack([one.control for one in rounds]),
        torch.stack([one.induce_control for one in rounds]),
        torch.stack([one.kl for one in rounds]),
        torch.stack([one.induce for one in rounds]),
        tuple(one.causal for one in rounds),
    )


@dataclass(frozen=True, slots=True)
class _Round:
    """One direction of the search, and what it does.

    Attributes:
        layer, position: Where it was found.
        vector: The direction.
        before: Metric of the judging prompts with all earlier directions removed.
        bypass: The same with this direction removed too.
        control: The same with a random direction removed in its place, mean over directions.
        induce: Metric of the harmless prompts with the direction added.
        induce_control: The same with a random direction added, mean over directions.
        kl: Divergence on the harmless prompts with the direction removed.
    """

    layer: int
    position: int
    vector: Float[Tensor, " d_model"]
    before: Float[Tensor, " harmful"]
    bypass: Float[Tensor, " harmful"]
    control: Float[Tensor, " harmful"]
    induce: Float[Tensor, " harmless"]
    induce_control: Float[Tensor, " harmless"]
    kl: Float[Tensor, " harmless"]

    @property
    def causal(self) -> bool:
        """Whether removing it lowers refusal, and adding it raises refusal, by more than random directions do."""
        lost, gained = self.bypass - self.control, self.induce - self.induce_control
        return bool(mean_interval(lost.cpu().numpy())[1] < 0 and mean_interval(gained.cpu().numpy())[0] > 0)


def _orthogonal(
    vectors: Float[Tensor, "layer position d_model"], basis: Float[Tensor, "rank d_model"]
) -> Float[Tensor, "layer position d_model"]:
    """Vectors without their part in the basis; a vector of which only rounding is left becomes 0."""
    left = vectors.double()
    q = basis.double()
    left = left - (left @ rearrange(q, "rank d -> d rank")) @ q
    real = left.norm(dim=-1) > 1e-4 * vectors.double().norm(dim=-1)
    kept: Tensor = (left * rearrange(real, "layer position -> layer position 1")).float()
    return kept
