"""Directions in activation space: adding them, removing them, and projecting on them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pandas as pd
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Prompts, public
from mechsafety.interventions.checks import (
    Where,
    at_positions,
    check_layers,
    check_once,
    check_strength,
    check_vector,
)
from mechsafety.models import LensModel
from mechsafety.models.engine import Hook
from mechsafety.prompts import Tokens
from mechsafety.results import Provenance, Result
from mechsafety.sites import Site, SiteKind

_BATCH = 16


@dataclass(frozen=True, slots=True)
class Direction(Result):
    """Vectors at sites of a model; farther along each vector there is more of one thing, such as refusal.

    Three methods share this interface: the refusal direction (one vector of the residual stream), representation
    reading (one vector per layer) and inference-time intervention (one vector per head).

    Attributes:
        provenance: Model, options, versions.
        name: Name of the direction, for tables.
        sites: Where the vectors stand: inputs of blocks (``resid_pre``), or heads (``z`` with an index).
        vectors: One row per site: what strength 1 adds there.
        everywhere: Whether removal acts on all that is written to the residual stream (one vector only). Otherwise it
            acts only at the direction's own sites.

    Example:
        >>> refusal = direction.direction
        >>> refusal.name, [str(site) for site in refusal.sites]
        ('refusal', ['L1.resid_pre'])
        >>> with refusal.add(model, 4.0):
        ...     model.generate(harmless[:1], 8)
        ['Sorry , I can not help .']
    """

    provenance: Provenance
    name: str
    sites: tuple[Site, ...]
    vectors: Float[Tensor, "site width"]
    everywhere: bool = False

    def __post_init__(self) -> None:
        kinds = {site.kind for site in self.sites}
        if kinds not in ({SiteKind.RESID_PRE}, {SiteKind.Z}) or len(self.sites) != len(self.vectors):
            raise MechsafetyError(
                f"{len(self.vectors)} vectors at {len(self.sites)} sites of kinds {sorted(kinds)}",
                expected="one per site, all at resid_pre or all at z",
            )
        if bool((self.vectors.norm(dim=-1) == 0).any()):
            raise MechsafetyError(f"the direction {self.name!r} holds a zero vector")
        if self.everywhere and (len(self.sites) > 1 or kinds == {SiteKind.Z}):
            raise MechsafetyError("everywhere=True", expected="one vector of the residual stream")
        check_once([str(site) for site in self.sites], "sites")

    def __repr__(self) -> str:
        where = str(self.sites[0]) + (f" and {len(self.sites) - 1} more" if len(self.sites) > 1 else "")
        return f"Direction({self.name} at {where}, mean norm {float(self.vectors.norm(dim=-1).mean()):.3g})"

    @property
    def unit(self) -> Float[Tensor, "site width"]:
        """The vectors at length 1."""
        unit: Tensor = self.vectors / self.vectors.norm(dim=-1, keepdim=True)
        return unit

    def to_dataframe(self) -> pd.DataFrame:
        """One row per site: layer, head, norm of the vector."""
        rows = [
            (str(site), site.layer, site.index, float(v.norm()))
            for site, v in zip(self.sites, self.vectors, strict=True)
        ]
        frame = pd.DataFrame(rows, columns=["site", "layer", "index", "norm"])
        return frame.astype({"index": "Int64"})  # a site without heads has none

    @public
    @contextmanager
    def add(self, model: LensModel, strength: float = 1.0, *, positions: Where = "all") -> Iterator[None]:
        """Context in which ``strength`` times each vector is added at its site (see `steer`)."""
        with steer(model, self, strength, positions=positions):
            yield

    @public
    @contextmanager
    def ablate(self, model: LensModel, strength: float = 1.0) -> Iterator[None]:
        """Context in which the direction is removed: x <- x - strength r r.x with r at length 1.

        With ``everywhere``, it is removed from all that is written to the residual stream (see `project_out`).
        Otherwise it is removed at its own sites.
        """
        with remove_directions(model, [self], strength):
            yield

    @public
    def project(self, model: LensModel, prompts: Prompts | Tokens) -> Float[Tensor, "site prompt"]:
        """How far each prompt's last token lies along each vector (dot product with it at length 1)."""
        self._check(model)
        parts = []
        whole = [Site(site.kind, site.layer) for site in self.sites]
        for tokens in token_batches(model, prompts):
            found = model.read(tokens, list(dict.fromkeys(whole)))
            rows = []
            for site, at, unit in zip(self.sites, whole, self.unit, strict=True):
                last = found[at][:, -1]
                last = last if site.index is None else last[:, site.index]
                rows.append(last.float() @ unit.to(last.device).float())
            parts.append(torch.stack(rows))
        return torch.cat(parts, dim=1)

    def _check(self, model: LensModel) -> None:
        if self.sites[0].kind is SiteKind.Z:
            check_vector(self.vectors, model.d_head, "d_head")
            wrong = [site for site in self.sites if not 0 <= (site.index or 0) < model.n_heads]
            if wrong:
                raise MechsafetyError(f"{wrong[0]} does not exist", expected=f"a head from 0 to {model.n_heads - 1}")
        else:
            check_vector(self.vectors, model.d_model)
        check_layers(model, list(dict.fromkeys(site.layer or 0 for site in self.sites)))  # heads share layers


@runtime_checkable
class Placed(Protocol):
    """What holds a `Direction`, such as a `RefusalDirection`."""

    @property
    def direction(self) -> Direction:
        """The direction."""


Steering = Direction | Placed | Tensor
"""A direction to steer along: one with sites, what holds one, or a vector of the residual stream."""


@public
@contextmanager
def steer(
    model: LensModel,
    direction: Steering | Sequence[Steering],
    strength: float | Sequence[float] = 1.0,
    layers: int | Sequence[int] | None = None,
    positions: Where = "all",
) -> Iterator[None]:
    """Context in which ``strength`` times a direction is added to activations; also with several directions at once.

    The context holds in every forward pass, `LensModel.generate` included. Contexts nest. Nothing is left after an
    exception.

    Args:
        model: The model.
        direction: A `Direction`, a `RefusalDirection`, or a vector of the residual stream; or a list of them.
        strength: Any finite number; 0 leaves the model as it is, below 0 steers away. With several directions, one
            number for all of them or one per direction.
        layers: Blocks at whose input vectors are added; by default a direction's own sites. A single vector is added at
            each of the layers. A tensor with as many rows as layers adds one row at each.
        positions: ``all``, ``last`` (of each forward pass) or ``prompt``.

    Raises:
        MechsafetyError: No direction, a direction of another model's width, a strength that is not finite, another
            number of strengths than of directions, a vector without layers, or layers that the model lacks.

    Example:
        >>> with ms.steer(model, direction.direction, 4.0):
        ...     model.generate(harmless[:1], 8)
        ['Sorry , I can not help .']
    """
    listed: list[Steering] = list(direction) if isinstance(direction, Sequence) else [direction]
    strengths = list(strength) if isinstance(strength, Sequence) else [strength] * len(listed)
    if not listed or len(strengths) != len(listed):
        raise MechsafetyError(
            f"{len(strengths)} strengths of {len(listed)} directions", expected="one strength, or one per direction"
        )
    sizes = [check_strength(one) for one in strengths]
    placed = [_placed(model, one, layers) for one in listed]

    def edit(vector: Tensor, size: float) -> Callable[[Tensor], Tensor]:
        return lambda own: own + size * vector.to(own)

    with ExitStack() as stack:
        for (sites, vectors), size in zip(placed, sizes, strict=True):
            hooks = _at_sites(sites, [edit(vector, size) for vector in vectors], positions)
            stack.enter_context(model.hooks(hooks, by_column=positions == "all"))
        yield


def _placed(
    model: LensModel, direction: Steering, layers: int | Sequence[int] | None
) -> tuple[tuple[Site, ...], Float[Tensor, "site width"]]:
    """Where a direction's vectors are added, and the vectors."""
    own = direction.direction if isinstance(direction, Placed) else direction
    sites: tuple[Site, ...] = ()
    if isinstance(own, Direction):
        own._check(model)
        sites, vectors = own.sites, own.vectors
    else:
        vectors = rearrange(check_vector(own, model.d_model), "... d_model -> (...) d_model")
        if layers is None:
            raise MechsafetyError("a vector without layers", expected="layers=[...] at which to add it")
    if layers is None:
        return sites, vectors
    if sites and (len(vectors) != 1 or sites[0].kind is not SiteKind.RESID_PRE):
        raise MechsafetyError("layers for a direction with sites of its own", expected="a single residual vector")
    sites = tuple(Site(SiteKind.RESID_PRE, layer) for layer in check_layers(model, layers))
    if len(vectors) not in (1, len(sites)):
        raise MechsafetyError(f"{len(vectors)} vectors at {len(sites)} layers", expected="one, or one per layer")
    return sites, vectors if len(vectors) > 1 else repeat(vectors[0], "d_model -> site d_model", site=len(sites))


@public
@contextmanager
def project_out(model: LensModel, directions: Float[Tensor, "*rank d_model"], strength: float = 1.0) -> Iterator[None]:
    """Context in which the span of directions is removed from everything written to the residual stream.

    x <- x - strength Q Q^T x, where Q is an orthonormal basis of the span. This is applied to the embedding and to what
    each attention and each MLP adds (Arditi et al. 2024, section 2.4). The stream is the sum of these. Strength 1
    therefore gives the same as removal at every block's input. A strength below 1 removes the same share everywhere,
    once.

    Args:
        model: The model.
        directions: One vector or several rows.
        strength: Share that is removed, 0 to 1.

    Raises:
        MechsafetyError: Directions of another model's width, a zero vector, or a strength outside 0 to 1.

    Example:
        >>> with ms.interventions.project_out(model, direction.vector):
        ...     model.generate(harmful[:1], 8)
        ['Sure ! here is how .']
    """
    rows = rearrange(check_vector(directions, model.d_model), "... d_model -> (...) d_model")
    share = check_strength(strength, share=True)
    hooks = removal_hooks(model, rearrange(orthonormal(rows), "rank d -> 1 rank d"), share)
    with model.hooks(hooks, by_column=True):
        yield


@public
@contextmanager
def remove_directions(
    model: LensModel, directions: "Sequence[Direction | Placed]", strength: float = 1.0
) -> Iterator[None]:
    """Context in which the span of several directions is removed, each direction where `Direction.ablate` removes it.

    Directions that are removed everywhere, and directions that share a site, are removed together: x <- x - strength Q
    Q^T x, where Q is an orthonormal basis of their span. Removal one after the other would leave a rest of directions
    that are not orthogonal.

    Args:
        model: The model.
        directions: The directions.
        strength: Share that is removed, 0 to 1.

    Raises:
        MechsafetyError: No directions, one of another model's width, linearly dependent ones, or a strength outside 0
            to 1.

    Example:
        >>> with remove_directions(model, [direction]):
        ...     model.generate(harmful[:1], 8)
        ['Sure ! here is how .']
    """
    share = check_strength(strength, share=True)
    listed = [one.direction if isinstance(one, Placed) else one for one in directions]
    if not listed:
        raise MechsafetyError("no directions", expected="at least one")
    everywhere, placed = list[Tensor](), dict[Site, list[Tensor]]()
    for one in listed:
        one._check(model)
        if one.everywhere:
            everywhere.append(one.vectors)
        for site, vector in zip(one.sites, one.vectors, strict=True) if not one.everywhere else ():
            placed.setdefault(site, []).append(vector)

    def edit(basis: Tensor) -> Callable[[Tensor], Tensor]:
        def remove(own: Tensor) -> Tensor:
            rows = basis.to(own)
            return own - share * ((own @ rows.T) @ rows)

        return remove

    hooks = _at_sites(list(placed), [edit(orthonormal(torch.stack(rows))) for rows in placed.values()], "all")
    with ExitStack() as stack:
        if everywhere:
            stack.enter_context(project_out(model, torch.cat(everywhere), strength))
        stack.enter_context(model.hooks(hooks, by_column=True))
        yield


def orthonormal(vectors: Float[Tensor, "rank d_model"]) -> Float[Tensor, "rank d_model"]:
    """Orthonormal basis of the span of linearly independent rows, computed in float64 and returned in float32.

    Raises:
        MechsafetyError: The rows are zero or linearly dependent.
    """
    columns = rearrange(vectors.double(), "rank d_model -> d_model rank")
    norms = columns.norm(dim=0)
    basis, triangle = torch.linalg.qr(columns)
    rank_deficient = vectors.shape[0] > vectors.shape[1] or bool((triangle.diagonal().abs() <= 1e-6 * norms).any())
    if rank_deficient or bool((norms == 0).any()):
        raise MechsafetyError(f"{len(vectors)} directions that are zero or linearly dependent")
    rows: Tensor = rearrange(basis.float(), "d_model rank -> rank d_model")
    return rows


def removal_hooks(model: LensModel, bases: Float[Tensor, "variant rank d_model"], strength: float = 1.0) -> list[Hook]:
    """Hooks that remove each variant's orthonormal basis from the embedding and from all that blocks write.

    The batch's rows are ``variant * prompts + prompt``. The activation's shape gives the number of prompts.
    """

    def remove(own: Tensor) -> Tensor:
        basis = bases.to(own)
        if len(basis) == 1:
            coordinates = einsum(own, basis[0], "row pos d, rank d -> row pos rank")
            return own - strength * einsum(coordinates, basis[0], "row pos rank, rank d -> row pos d")
        rows = rearrange(own, "(variant prompt) pos d -> variant (prompt pos) d", variant=len(basis))
        coordinates = einsum(rows, basis, "variant at d, variant rank d -> variant at rank")
        removed = einsum(coordinates, basis, "variant at rank, variant rank d -> variant at d")
        return rearrange(
            rows - strength * removed, "variant (prompt pos) d -> (variant prompt) pos d", pos=own.shape[1]
        )

    sites = [Site(SiteKind.RESID_PRE, 0)]
    for layer in range(model.n_layers):
        sites += [Site(SiteKind.ATTN_OUT, layer), Site(SiteKind.MLP_OUT, layer)]
    return [(site, remove) for site in sites]


@public
def token_batches(model: LensModel, prompts: Prompts | Tokens) -> Iterator[Tokens]:
    """Prompts as token rows, a few at a time."""
    if isinstance(prompts, Tokens):
        yield from (prompts.rows(slice(k, k + _BATCH)) for k in range(0, len(prompts), _BATCH))
    else:
        yield from (model.tokenize(prompts[k : k + _BATCH]) for k in range(0, len(prompts), _BATCH))


def _at_sites(sites: Sequence[Site], edits: Sequence[Callable[[Tensor], Tensor]], positions: str) -> list[Hook]:
    def hook(site: Site, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def function(own: Tensor) -> Tensor:
            if site.index is None:
                return at_positions(positions, own, edit(own))
            new = own.clone()
            new[:, :, site.index] = edit(own[:, :, site.index])
            return at_positions(positions, own, new)

        return function

    return [(Site(site.kind, site.layer), hook(site, edit)) for site, edit in zip(sites, edits, strict=True)]
