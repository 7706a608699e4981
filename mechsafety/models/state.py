"""Whether a model is unchanged since a run was stored: the same model, the same edits, the same weights."""

import itertools
import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from mechsafety.models.backend import use_of

_NUMBERS = itertools.count(1)
# the dictionary and name under which each parameter is found; walking all modules takes as long as a small model's
# forward
_PLACES: "weakref.WeakKeyDictionary[nn.Module, list[tuple[MutableMapping[str, Any], str]]]" = (
    weakref.WeakKeyDictionary()
)


@contextmanager
def open_edit(module: nn.Module, by_column: bool = False) -> Iterator[None]:
    """Context in which the model counts as edited, whichever of its wrappers is used; see `LensModel.hooks`."""
    edits, edit = use_of(module).edits, (next(_NUMBERS), by_column)
    edits.append(edit)
    try:
        yield
    finally:
        edits.remove(edit)


def open_edits(module: nn.Module) -> tuple[int, ...]:
    """Numbers of the open edits; a process gives each number only once."""
    return tuple(number for number, _ in use_of(module).edits)


def tells_columns_apart(module: nn.Module) -> bool:
    """Whether an open edit may depend on which columns a forward has."""
    with use_of(module).lock:  # under the lock no other thread has an open edit
        return not all(by_column for _, by_column in use_of(module).edits)


@dataclass(frozen=True, slots=True, eq=False)
class ModelState:
    """A model as it is at one moment.

    Attributes:
        module: The model.
        edits: Numbers of its open edits.
        weights: Hash of which parameters it has, and of how often each was written to. A change that autograd does not
            count (through ``parameter.data``) is not seen. Nor is a change of weights that are offloaded.
    """

    module: "weakref.ref[nn.Module]"
    edits: tuple[int, ...]
    weights: int

    @classmethod
    def of(cls, module: nn.Module) -> "ModelState":
        """The state of a model now."""
        return cls(weakref.ref(module), open_edits(module), _weights(module))

    def difference(self, module: nn.Module) -> str:
        """How a model now differs from this state, in words; empty if it does not."""
        if self.module() is not module:
            return "another model made them"
        with use_of(module).lock:  # under the lock no other thread has an open edit
            if self.edits != open_edits(module):
                return "the model was edited, or an edit ended, since they were stored"
            return "" if self.weights == _weights(module) else "the model's weights changed since they were stored"


def _weights(module: nn.Module) -> int:
    places = _PLACES.get(module)
    if places is None:
        every = [part._parameters for part in module.modules()]
        places = _PLACES[module] = [(own, name) for own in every for name in own if own[name] is not None]
    return hash(tuple(map(_mark, (own.get(name) for own, name in places))))


def _mark(parameter: Any) -> tuple[int, int]:
    # accelerate gives an offloaded module another empty parameter after every forward
    if parameter is not None and parameter.is_meta:
        return (0, 0)
    # tensors of inference mode do not count writes
    return (id(parameter), 0 if parameter is None or parameter.is_inference() else parameter._version)
