"""Sets of neurons as masks: from nodes, from a ranking, and at random with the same number in each layer."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.models import LensModel
from mechsafety.models.parts import check_exists
from mechsafety.nodes import Node, NodeLike, as_nodes

Mask = Bool[Tensor, "layer d_mlp"]


def neuron_mask(model: LensModel, neurons: Tensor | Sequence[NodeLike]) -> Bool[Tensor, "layer d_mlp"]:
    """Neurons as a mask on the CPU.

    Args:
        model: The model they belong to.
        neurons: Nodes of kind ``neuron``, or a boolean tensor [layer d_mlp].

    Raises:
        MechsafetyError: A node that is not a neuron of the model, a tensor of another shape or type, or a mixture of
            experts.

    Example:
        >>> mask = ms.neurons.neuron_mask(model, ["L3.N3", "L3.N13"])
        >>> mask.shape, mask.nonzero().tolist()
        (torch.Size([4, 30]), [[3, 3], [3, 13]])
    """
    model.check_neurons()
    shape = (model.n_layers, model.d_mlp)
    if isinstance(neurons, Tensor):
        if neurons.dtype != torch.bool or tuple(neurons.shape) != shape:
            raise MechsafetyError(
                f"a neuron mask of type {neurons.dtype} and shape {tuple(neurons.shape)}",
                expected=f"a boolean tensor of shape {shape}",
            )
        return neurons.cpu()
    mask = torch.zeros(shape, dtype=torch.bool)
    for node in as_nodes(neurons):
        if node.kind != "neuron":
            raise MechsafetyError(f"{node} is not a neuron of {model!r}")
        check_exists(model, node)
        mask[node.layer, node.index] = True
    return mask


def mask_nodes(mask: Bool[Tensor, "layer d_mlp"]) -> list[Node]:
    """The neurons of a mask, in order.

    Example:
        >>> import torch
        >>> [str(node) for node in mask_nodes(torch.tensor([[False, True], [True, False]]))]
        ['L0.N1', 'L1.N0']
    """
    return [Node("neuron", layer, index) for layer, index in mask.nonzero().tolist()]


def check_ranking(model: LensModel, ranking: Float[Tensor, "layer d_mlp"]) -> Float[Tensor, "layer d_mlp"]:
    """The ranking, if it has one score per neuron of the model.

    Raises:
        MechsafetyError: A ranking of another shape than the model's neurons, or a mixture of experts.
    """
    model.check_neurons()
    shape = (model.n_layers, model.d_mlp)
    if tuple(ranking.shape) != shape:
        raise MechsafetyError(f"a ranking of shape {tuple(ranking.shape)}", expected=f"{shape}, as {model!r} has them")
    return ranking


def top_mask(scores: Float[Tensor, "layer d_mlp"], count: int) -> Bool[Tensor, "layer d_mlp"]:
    """Mask of the ``count`` highest scores over all layers; of equal scores, the earlier neuron is taken.

    Raises:
        MechsafetyError: ``count`` is not between 0 and the number of neurons.

    Example:
        >>> ms.neurons.top_mask(torch.tensor([[0.1, 3.0], [2.0, 0.2]]), 2)
        tensor([[False,  True],
                [ True, False]])
    """
    if not 0 <= count <= scores.numel():
        raise MechsafetyError(f"{count} neurons", expected=f"0 to {scores.numel()}")
    flat = rearrange(scores, "layer d_mlp -> (layer d_mlp)")
    mask = torch.zeros(flat.shape, dtype=torch.bool)
    mask[flat.sort(descending=True, stable=True).indices[:count].cpu()] = True
    return rearrange(mask, "(layer d_mlp) -> layer d_mlp", layer=scores.shape[0])


def share_count(share: float, total: int) -> int:
    """Number of neurons of a share (0 to 1] of all; at least one.

    Raises:
        MechsafetyError: The share is out of range.
    """
    if not 0 < share <= 1:
        raise MechsafetyError(f"a share of {share}", expected="above 0 and at most 1 (5 % is 0.05)")
    return max(1, round(share * total))


def random_masks(
    mask: Bool[Tensor, "layer d_mlp"], count: int, seed: int = 0, *, fill: bool = False
) -> list[Bool[Tensor, "layer d_mlp"]] | None:
    """Random sets with as many neurons in each layer as ``mask``, and no neuron of it.

    Args:
        mask: The chosen neurons.
        count: Number of sets. They are drawn independently, so they may share neurons with each other.
        seed: Seed of the draw.
        fill: Whether to allow chosen neurons where more than half of a layer is chosen. A set then has all other
            neurons of the layer, and random chosen ones up to the number needed.

    Returns:
        The sets. Without ``fill``, None if a layer has fewer neurons left than a set needs. With ``fill``, None if all
        neurons are chosen.

    Example:
        >>> chosen = ranking.top(0.05)
        >>> masks = ms.neurons.random_masks(chosen, count=3)
        >>> [int(mask.sum()) for mask in masks], bool((masks[0] & chosen).any())
        ([6, 6, 6], False)
    """
    wanted = mask.sum(1).tolist()
    if bool(mask.all()) if fill else any(n > mask.shape[1] - n for n in wanted):
        return None
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        drawn = torch.zeros_like(mask)
        for layer, n in enumerate(wanted):
            free, taken = (side.nonzero()[:, 0] for side in (~mask[layer], mask[layer]))
            drawn[layer, free[torch.randperm(len(free), generator=generator)[:n]]] = True
            if n > len(free):
                drawn[layer, taken[torch.randperm(len(taken), generator=generator)[: n - len(free)]]] = True
        out.append(drawn)
    return out
