"""Checks of what interventions are given: parts of the model, widths of vectors, strengths, positions."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.models import LensModel
from mechsafety.models.parts import check_exists
from mechsafety.nodes import NODE_SITES, Node, NodeLike, as_nodes

Where = Literal["all", "last", "prompt"]


def check_nodes(model: LensModel, nodes: NodeLike | Sequence[NodeLike]) -> tuple[Node, ...]:
    """The nodes, if the model has each of them and none is listed twice.

    Raises:
        MechsafetyError: No nodes; a node that cannot be edited, does not exist or is given twice; or a neuron of a
            mixture of experts.
    """
    chosen = as_nodes(nodes)
    if not chosen:
        raise MechsafetyError("no nodes", expected="at least one head, MLP or neuron")
    for node in chosen:
        if node.kind not in NODE_SITES:
            raise MechsafetyError(f"{node} cannot be edited", expected="heads, MLPs or neurons")
        check_exists(model, node)
    check_once([str(node) for node in chosen], "nodes")
    return chosen


def check_once(names: Sequence[str], what: str) -> None:
    """Check that nothing is listed twice.

    Raises:
        MechsafetyError: A name is there twice; the message begins with ``what``.
    """
    twice = sorted(name for name, n in Counter(names).items() if n > 1)
    if twice:
        raise MechsafetyError(f"{what} {twice} are given twice", expected="each once")


def check_layers(model: LensModel, layers: int | Sequence[int]) -> tuple[int, ...]:
    """The layers, if the model has them; a single one counts as one.

    Raises:
        MechsafetyError: No layers, or a layer that does not exist or is given twice.
    """
    chosen = (layers,) if isinstance(layers, int) else tuple(layers)
    wrong = [layer for layer in chosen if not 0 <= layer < model.n_layers]
    if wrong or not chosen:
        raise MechsafetyError(f"layers {wrong or list(chosen)}", expected=f"some of 0 to {model.n_layers - 1}")
    if len(set(chosen)) < len(chosen):
        raise MechsafetyError(f"layers {list(chosen)}", expected="each once")
    return chosen


def check_strength(strength: float, *, share: bool = False) -> float:
    """The strength, if it is a finite number (between 0 and 1 with ``share``).

    Raises:
        MechsafetyError: A strength that is NaN, infinite or not a number, or a share outside 0 to 1.
    """
    number = isinstance(strength, int | float) and math.isfinite(strength)
    if not number or (share and not 0 <= strength <= 1):
        raise MechsafetyError(f"strength={strength!r}", expected="a number from 0 to 1" if share else "a finite number")
    return float(strength)


def check_vector(vector: Tensor, width: int, what: str = "d_model") -> Tensor:
    """The vector or rows of vectors, if their width fits and all entries are finite.

    Raises:
        MechsafetyError: A vector of another width, or with NaN or infinite entries.
    """
    if not isinstance(vector, torch.Tensor) or vector.ndim == 0 or vector.shape[-1] != width:
        shape = tuple(vector.shape) if isinstance(vector, torch.Tensor) else type(vector).__name__
        raise MechsafetyError(
            f"a direction of width {shape[-1] if isinstance(shape, tuple) and shape else shape}",
            expected=f"this model's {what}, {width}",
            hint="compute it on this model",
        )
    if not bool(torch.isfinite(vector).all()):
        raise MechsafetyError("a direction with entries that are not finite")
    return vector


def at_positions(positions: str, old: Tensor, new: Tensor) -> Tensor:
    """``new`` at the chosen positions of a [batch pos ...] activation, ``old`` elsewhere.

    ``all``: every position. ``last``: the last position of each forward pass; in generation, these are the prompt's
    last token and every token after it. ``prompt``: forward passes of more than one position; in generation, only the
    prompt's pass is one.
    """
    if positions == "last":
        return torch.cat([old[:, :-1], new[:, -1:]], dim=1)
    if positions == "prompt" and old.shape[1] == 1:
        return old
    return new
