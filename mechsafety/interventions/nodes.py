"""Ablating and scaling heads, MLPs and neurons."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mechsafety.conversation import PromptLike
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Prompts, public
from mechsafety.interventions.checks import Where, at_positions, check_nodes, check_strength
from mechsafety.models import LensModel
from mechsafety.models.engine import Hook
from mechsafety.nodes import NODE_SITES, Node, NodeLike
from mechsafety.sites import Site

# number of prompts read in one forward pass
_BATCH = 16


@public
@contextmanager
def ablate(
    model: LensModel,
    nodes: NodeLike | Sequence[NodeLike],
    strength: float = 1.0,
    source: Literal["mean", "zero", "resample"] = "mean",
    *,
    prompts: Prompts | None = None,
    values: Mapping[Site, Tensor] | None = None,
    positions: Where = "all",
    seed: Amount = 0,
) -> Iterator[None]:
    """Context in which nodes lose what they compute: value <- (1 - strength) own + strength source.

    The value of a head is its mixed values ``z``; of an MLP, what it adds to the residual stream; of a neuron, its
    activation. Contexts nest. For different nodes, their order does not matter. They hold in every forward pass,
    `LensModel.generate` included. Nothing of them is left afterwards, even after an exception. Inside the context,
    stored runs from outside it are refused.

    Args:
        model: The model.
        nodes: Heads, MLPs and neurons, each as a `Node` or by its name (``"L14.H2"``).
        strength: 0 leaves the model as it is, 1 replaces the value wholly.
        source: What replaces the value. ``mean``: its mean over all tokens of ``prompts``. ``zero``: zero.
            ``resample``: its value at a token drawn from ``prompts``, a new one for each position; all nodes of one
            layer and kind share the token. Draws follow the order of forward passes, so the same prompt in another
            batch gets other draws.
        prompts: Reference prompts (usually harmless ones) for ``mean`` and ``resample``.
        values: What `reference_values` has read of such prompts, in their place, for many ablations with the same ones.
        positions: ``all``; ``last``, the last position of each forward pass, that is, the prompt's last token and each
            generated token; or ``prompt``.
        seed: Seed of ``resample``.

    Raises:
        MechsafetyError: Unknown option, missing prompts, or a node that the model lacks.

    Example:
        >>> with ms.ablate(model, "L0.H1", source="zero"):
        ...     model.generate(harmful[:1], 8)
        ['Sure ! here is how .']
    """
    groups = by_site(check_nodes(model, nodes))
    share = check_strength(strength, share=True)
    if source != "zero" and prompts is None and values is None:
        raise MechsafetyError(
            f"source={source!r} without prompts", expected="prompts=[...] to take it from", hint="or source='zero'"
        )
    pools: Mapping[Site, Tensor] = values or {}
    if source != "zero" and values is None and prompts is not None:
        pools = reference_values(model, list(groups), prompts)
    missing = [str(site) for site in groups if site not in pools] if source != "zero" else []
    if missing:
        raise MechsafetyError(f"no reference values at {missing[0]}", expected="values at the site of each node")
    generator = torch.Generator().manual_seed(seed)

    def replacement(site: Site, own: Tensor) -> Tensor:
        if source == "zero":
            return torch.zeros_like(own)
        pool = pools[site].to(own)
        if source == "mean":
            return pool.mean(0).expand_as(own)
        rows = torch.randint(len(pool), own.shape[:2], generator=generator)
        return pool[rows.to(pool.device)]

    def edit(site: Site, own: Tensor) -> Tensor:
        return own + share * (replacement(site, own) - own)

    with model.hooks(node_hooks(groups, edit, positions), by_column=positions == "all" and source != "resample"):
        yield


@public
@contextmanager
def scale(
    model: LensModel, nodes: NodeLike | Sequence[NodeLike], factor: float, *, positions: Where = "all"
) -> Iterator[None]:
    """Context in which the values of nodes are multiplied by ``factor``; otherwise as `ablate`.

    Args:
        model: The model.
        nodes: Heads, MLPs and neurons.
        factor: 0 is ablation by zero, 1 leaves the model as it is, above 1 amplifies.
        positions: ``all``, ``last`` or ``prompt``.

    Raises:
        MechsafetyError: A factor that is not finite, or a node that the model lacks.

    Example:
        >>> with ms.interventions.scale(model, "L3.MLP", 0.0):
        ...     bool((metric.scores(model, harmful) > 0).any())
        False
    """
    groups, size = by_site(check_nodes(model, nodes)), check_strength(factor)
    with model.hooks(node_hooks(groups, lambda site, own: size * own, positions), by_column=positions == "all"):
        yield


def reference_values(model: LensModel, sites: Sequence[Site], prompts: Sequence[PromptLike]) -> dict[Site, Tensor]:
    """Activations at the sites [token ...] at every real token of the prompts."""
    if not prompts:
        raise MechsafetyError("no reference prompts", expected="a list of at least one")
    rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(prompts), _BATCH):
        tokens = model.tokenize(prompts[start : start + _BATCH])
        for site, found in model.read(tokens, sites).items():
            rows[site].append(found[tokens.mask])
    return {site: torch.cat(parts) for site, parts in rows.items()}


def by_site(nodes: Sequence[Node]) -> dict[Site, list[int]]:
    """Nodes by the site that holds them, with their indices (none for a whole MLP)."""
    groups: dict[Site, list[int]] = {}
    for node in nodes:
        found = groups.setdefault(Site(NODE_SITES[node.kind], node.layer), [])
        found += [] if node.index is None else [node.index]
    return groups


def node_hooks(groups: dict[Site, list[int]], edit: Callable[[Site, Tensor], Tensor], positions: str) -> list[Hook]:
    """Hooks that edit the given heads or neurons of each site; the whole site where none is given."""
    return [(site, only(index, partial(edit, site), positions)) for site, index in groups.items()]


def only(index: Sequence[int], edit: Callable[[Tensor], Tensor], positions: str = "all") -> Callable[[Tensor], Tensor]:
    """An edit of a whole site, limited to some of its heads or neurons; the whole site if ``index`` is empty."""

    def function(own: Tensor) -> Tensor:
        new = edit(own)
        if index:
            chosen = torch.zeros(own.shape[2], dtype=torch.bool, device=own.device)
            chosen[index] = True
            new = torch.where(chosen[:, None] if own.ndim == 4 else chosen, new, own)
        return at_positions(positions, own, new)

    return function
