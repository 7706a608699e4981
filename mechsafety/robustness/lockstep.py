"""Two runs that read side by side: at some sites, the one takes values of the other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsafety.models import LensModel
from mechsafety.models.decode import Columns, Cursor
from mechsafety.models.engine import Hook
from mechsafety.sites import Site

Edit = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Side:
    """A model, and the edit inside which it runs.

    Attributes:
        model: The model.
        edit: Function that returns the edit's context manager; None for the model as it is.
    """

    model: LensModel
    edit: Edit | None = None

    @contextmanager
    def hooked(self, hooks: Sequence[Hook]) -> Iterator[None]:
        """Context of one forward: the edit first, so that the hooks see what it makes of a site."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.edit is not None:
                stack.enter_context(self.edit())
            stack.enter_context(self.model.hooks(hooks))
            yield


class Lockstep:
    """Reads columns with a receiver, after a donor has read columns of its own; the receiver takes values of the donor.

    Both have a key-value cache of their own.

    Args:
        receiver: The side whose logits are returned.
        donor: The side whose values are taken; None for the receiver alone.
        edits: Sites at which values are taken, and the function from the donor's value to the edit of the receiver's.
        prompts: What the donor reads in place of the receiver's first columns. By default it reads the same ones.
        untouched: Number of first columns at which nothing is taken. A call of `read` may not reach over their end.
    """

    def __init__(
        self,
        receiver: Side,
        donor: Side | None,
        edits: Sequence[tuple[Site, Callable[[Tensor], Callable[[Tensor], Tensor]]]],
        prompts: Columns | None = None,
        untouched: int = 0,
    ) -> None:
        self.receiver, self.donor, self.edits = receiver, donor, edits
        self.prompts, self.untouched, self.seen = prompts, untouched, 0
        self.cursor = Cursor(receiver.model.backend)
        self.other = None if donor is None else Cursor(donor.model.backend)

    def read(
        self, ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"], keep: int = 1
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Logits of the last ``keep`` of further columns."""
        values: dict[Site, Tensor] = {}

        def store(site: Site) -> Callable[[Tensor], None]:
            return lambda tensor: values.__setitem__(site, tensor.detach().clone())

        def put(site: Site, edit: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
            return lambda own: edit(values[site].to(own))(own)

        edits = self.edits if self.donor is not None and self.seen >= self.untouched else ()
        if self.donor is not None and self.other is not None:
            begin, end = self.seen, self.seen + ids.shape[1]
            own = self.prompts is None or begin >= self.prompts[0].shape[1]
            seen, mask = (ids, real) if own or self.prompts is None else (t[:, begin:end] for t in self.prompts)
            with self.donor.hooked([(site, store(site)) for site, _ in edits]):
                device = self.donor.model.device
                self.other.feed(seen.to(device), mask.to(device))
        self.seen += ids.shape[1]
        with self.receiver.hooked([(site, put(site, edit)) for site, edit in edits]):
            device = self.receiver.model.device
            return self.cursor.feed(ids.to(device), real.to(device), keep).float()

    def last(self, ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
        """Logits of the last of further columns."""
        return self.read(ids, real)[:, -1]
