"""The numbers of a model that belong to chosen heads, neurons and MLPs: to read them, to change them, to undo that."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechsafety.errors import MechsafetyError
from mechsafety.models.lens_model import LensModel
from mechsafety.models.placed import check_in_memory
from mechsafety.nodes import Node

# a layer's weights and biases by TransformerLens' names, and the axis along which heads (or neurons) lie; None: one
# tensor that all heads (or neurons) share
HEADS: dict[str, int | None] = {"W_Q": 0, "b_Q": 0, "W_K": 0, "b_K": 0, "W_V": 0, "b_V": 0, "W_O": 0, "b_O": None}
NEURONS: dict[str, int | None] = {"W_in": 1, "b_in": 0, "W_gate": 1, "b_gate": 0, "W_out": 0, "b_out": None}
_GROUPED = ("W_K", "b_K", "W_V", "b_V")


@dataclass(frozen=True, slots=True)
class Slice:
    """Some numbers of one parameter: the rows or columns of chosen heads or neurons, or all of it.

    Attributes:
        name: Layer and TransformerLens' name, such as ``L3.W_Q``; for a whole parameter, the parameter's own name.
        parameter: Name of the parameter in the model's module.
        size, stride, offset: How TransformerLens' tensor lies in the parameter's memory.
        axis: Axis of that tensor along which heads or neurons lie; None if all of it is meant.
        index: The chosen heads, key-value heads or neurons.
    """

    name: str
    parameter: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    axis: int | None = None
    index: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the chosen numbers."""
        return tuple(len(self.index) if axis == self.axis else n for axis, n in enumerate(self.size))

    @property
    def numel(self) -> int:
        """Number of the chosen numbers."""
        return math.prod(self.shape)

    def read(self, of: Tensor) -> Tensor:
        """A copy of the chosen numbers of the parameter, or of a tensor with its strides."""
        view = self._view(of)
        return view.clone() if self.axis is None else view.index_select(self.axis, self._places(of))

    @torch.no_grad()
    def write(self, to: Tensor, values: Tensor) -> None:
        """Put numbers in the places of the chosen ones; all others keep their bits."""
        view, new = self._view(to), values.detach().to(to)
        if self.axis is None:
            view.copy_(new)
        else:
            view.index_copy_(self.axis, self._places(to), new)

    def _view(self, of: Tensor) -> Tensor:
        return of.detach().as_strided(self.size, self.stride, of.storage_offset() + self.offset)

    def _places(self, of: Tensor) -> Tensor:
        return torch.tensor(self.index, device=of.device)


def part_slices(model: LensModel, nodes: Sequence[Node]) -> tuple[tuple[Slice, ...], tuple[str, ...]]:
    """The numbers that belong to heads, neurons and MLPs alone.

    A head has its rows and columns of W_Q, W_K, W_V and W_O and of their biases. A neuron has its column of W_in (and
    of W_gate), its bias, and its row of W_out. An MLP has all its neurons. What several parts share is taken if all of
    them are chosen: keys and values of the heads of one group, the attention's output bias, the MLP's output bias. The
    norms belong to no part.

    Args:
        model: The model.
        nodes: Heads, neurons and MLPs that the model has, each once.

    Returns:
        The slices, one per layer and tensor; and what was left out because other parts share it, in words.

    Raises:
        MechsafetyError: An MLP of a mixture of experts, or weights that the model computes from others.
    """
    names = {id(parameter): name for name, parameter in model.hf_model.named_parameters()}
    group = model.n_heads // model.n_kv_heads
    found: list[Slice] = []
    shared: list[str] = []
    for layer in sorted({node.layer for node in nodes if node.layer is not None}):
        tensors = model.backend.part_weights(layer)
        for axes, needed, index, n in (
            (HEADS, ("W_Q", "W_K", "W_V", "W_O"), _chosen(nodes, layer, "head", 0), model.n_heads),
            (NEURONS, ("W_in", "W_out"), _chosen(nodes, layer, "neuron", model.d_mlp), model.d_mlp),
        ):
            if index and not set(needed) <= set(tensors):
                model.check_neurons("heads")  # a whole MLP is its neurons here
                raise MechsafetyError(
                    f"{model.name} computes layer {layer} with weights of an unknown form",
                    expected="one linear layer each for queries, keys, values, outputs and the MLP's two sides",
                )
            for name, axis in axes.items():
                if name not in tensors or not index:
                    continue
                own = _own(name, axis, index, n, group)
                if len(own) * (group if name in _GROUPED else 1) < len(index):
                    shared.append(f"L{layer}.{name}")
                if own:
                    parameter, view = tensors[name]
                    offset = int(view.storage_offset() - parameter.storage_offset())
                    places = () if axis is None else tuple(own)
                    size, stride = tuple(view.shape), tuple(view.stride())
                    found.append(Slice(f"L{layer}.{name}", names[id(parameter)], size, stride, offset, axis, places))
    return tuple(found), tuple(shared)


def whole_slices(model: LensModel) -> tuple[Slice, ...]:
    """All numbers that the model computes with, one slice per parameter."""
    return tuple(Slice(name, name, tuple(p.shape), tuple(p.stride()), 0) for name, p in _running(model).items())


def n_parameters(model: LensModel) -> int:
    """Number of the model's parameters; tied ones count once."""
    # parts of a fused layer share its memory
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in _running(model).values()}
    return sum(memory.values()) // model.dtype.itemsize


def values_of(model: LensModel, slices: Sequence[Slice]) -> dict[str, Tensor]:
    """A copy of the slices' numbers, by the slice's name."""
    parameters = dict(model.hf_model.named_parameters())
    return {part.name: part.read(parameters[part.parameter]) for part in slices}


@contextmanager
def on_copies(model: LensModel, slices: Sequence[Slice]) -> Iterator[dict[str, nn.Parameter]]:
    """Context in which the parameters that hold the slices are copies; at the end the original objects are back.

    Whatever is written to the copies, the original numbers cannot change. The model's hash is computed anew inside.

    Yields:
        The copies, by parameter name.
    """
    plain = model.reading(())
    _ = plain.weights_sha256  # of the original weights, which the model keeps
    with plain.lock, ExitStack() as restore:
        originals = dict(plain.hf_model.named_parameters())
        copies: dict[str, nn.Parameter] = {}
        for name in dict.fromkeys(part.parameter for part in slices):
            old = originals[name]
            copies[name] = nn.Parameter(in_layout_of(old, old.detach()), requires_grad=False)
        by_id = {id(originals[name]): copy for name, copy in copies.items()}
        for module in plain.hf_model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in by_id:
                    restore.callback(module._parameters.__setitem__, key, parameter)
                    module._parameters[key] = by_id[id(parameter)]
        for cached in ("_weights_sha256", "_W_U"):
            _set_aside(plain, cached, restore)
        yield copies


def in_layout_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a tensor with the strides of a parameter, which its slices rest on."""
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
        tensor
    )


@contextmanager
def replaced(model: LensModel, slices: Sequence[Slice], values: Mapping[str, Tensor]) -> Iterator[LensModel]:
    """Context in which the slices hold other numbers."""
    with on_copies(model, slices) as copies:
        for part in slices:
            part.write(copies[part.parameter], values[part.name])
        yield model


def check_values(slices: Sequence[Slice], values: Mapping[str, Tensor], what: str) -> None:
    """Refuse numbers that do not fit the slices.

    Raises:
        MechsafetyError: A slice without numbers, numbers of another shape, or numbers that are not finite.
    """
    for part in slices:
        found = values.get(part.name)
        if found is None or tuple(found.shape) != part.shape:
            shape = "nothing" if found is None else f"numbers of shape {tuple(found.shape)}"
            raise MechsafetyError(f"{what} has {shape} for {part.name}", expected=f"shape {part.shape}")
        if not bool(found.isfinite().all()):
            raise MechsafetyError(f"{what} has NaN or infinite numbers in {part.name}", expected="finite numbers")
    more = sorted(set(values) - {part.name for part in slices})
    if more:
        raise MechsafetyError(f"{what} has numbers for {more[0]}", expected="those of its own parts")


def _running(model: LensModel) -> dict[str, nn.Parameter]:
    """The parameters by name, without those of fused layers that TransformerLens has split and no longer runs."""
    check_in_memory(model.hf_model, "reading and writing all weights")
    weights = model.backend.weights()
    return {name: parameter for name, parameter in model.hf_model.named_parameters() if name in weights}


def _chosen(nodes: Sequence[Node], layer: int, kind: str, d_mlp: int) -> list[int]:
    """Indices of a layer's chosen heads or neurons; an MLP stands for all its neurons."""
    here = [node for node in nodes if node.layer == layer]
    if kind == "neuron" and any(node.kind == "mlp" for node in here):
        return list(range(d_mlp)) or [0]  # a mixture of experts has none, and is refused
    return sorted(node.index for node in here if node.kind == kind and node.index is not None)


def _own(name: str, axis: int | None, index: Sequence[int], n: int, group: int) -> list[int]:
    """Entries of a tensor that belong to the chosen parts alone; none if other parts share it."""
    if name in _GROUPED:
        return _whole_groups(index, group)
    return list(index) if axis is not None or len(index) == n else []


def _whole_groups(heads: Sequence[int], size: int) -> list[int]:
    """Key-value heads all of whose query heads are chosen.

    Example:
        >>> _whole_groups([0, 1, 2], 2)
        [0]
    """
    groups = [head // size for head in heads]
    return sorted({group for group in groups if groups.count(group) == size})


def _set_aside(model: LensModel, name: str, restore: ExitStack) -> None:
    """Forget a cached attribute, to be computed anew; at the end the old value is back."""
    kept: dict[str, Any] = vars(model)
    old = kept.pop(name, None)
    if old is not None:
        restore.callback(kept.__setitem__, name, old)
    restore.callback(kept.pop, name, None)  # callbacks run in reverse order
