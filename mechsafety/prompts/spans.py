"""Token rows of chat prompts: which tokens are template, which are the instruction."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechsafety.errors import MechsafetyError

SPANS = ("prefix", "instruction", "suffix")


@dataclass(frozen=True, slots=True)
class Spans:
    """Where a chat prompt's parts lie in its own (unpadded) token row, as half-open ranges.

    Attributes:
        instruction: Start and end of the user's request.
        length: Number of tokens. Before the instruction lies the ``prefix`` (system turn and template), after it the
            ``suffix`` (template tokens), at whose last token the model decides how to begin its reply.
    """

    instruction: tuple[int, int]
    length: int

    def range(self, span: str) -> tuple[int, int]:
        """Half-open token range of ``prefix``, ``instruction`` or ``suffix``.

        Example:
            >>> Spans((3, 5), 9).range("suffix")
            (5, 9)
        """
        start, end = self.instruction
        ranges = {"prefix": (0, start), "instruction": (start, end), "suffix": (end, self.length)}
        if span not in ranges:
            raise MechsafetyError(f"no span is called {span!r}", expected=f"one of {SPANS}")
        return ranges[span]


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One token of a chat prompt: where it stands, its id, its span and its text."""

    position: int
    id: int
    span: str
    text: str


@dataclass(frozen=True, slots=True, repr=False)
class TokenTable:
    """The tokens of one chat prompt, one a line when shown."""

    rows: tuple[TokenRow, ...]

    def __repr__(self) -> str:
        return "\n".join(f"{row.position:4d}  {row.id:7d}  {row.span:11s}  {row.text!r}" for row in self.rows)


def positions(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Position of each token in its own row; 0 at padding (which the mask hides).

    Args:
        mask: True at real tokens.
    """
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A batch of rendered prompts, padded on the left so that the last token of every prompt is in the last column.

    Attributes:
        ids: Token ids.
        mask: True at real tokens.
        spans: Of each prompt, in its unpadded row; `span_mask` shifts them by the padding.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    spans: tuple[Spans, ...]

    @property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """Position of each token in its own row; 0 at padding (which the mask hides)."""
        return positions(self.mask)

    def __len__(self) -> int:
        return len(self.spans)

    def span_mask(self, span: str) -> Bool[Tensor, "batch pos"]:
        """True at the tokens of a span (``all`` for every real token)."""
        if span == "all":
            return self.mask
        out = torch.zeros_like(self.mask)
        width = self.ids.shape[1]
        for row, spans in enumerate(self.spans):
            start, end = spans.range(span)
            pad = width - spans.length
            out[row, pad + start : pad + end] = True
        return out

    def rows(self, keep: slice | Sequence[int]) -> "Tokens":
        """A part of the batch, without columns that are padding for all of it."""
        chosen = list(range(len(self))[keep] if isinstance(keep, slice) else keep)
        spans = tuple(self.spans[k] for k in chosen)
        width = max(span.length for span in spans)
        return type(self)(self.ids[chosen, -width:], self.mask[chosen, -width:], spans)

    def joined(self, other: "Tokens") -> "Tokens":
        """The prompts of both batches, which are equally wide."""
        masks = torch.cat([self.mask, other.mask])
        return type(self)(torch.cat([self.ids, other.ids]), masks, (*self.spans, *other.spans))


@dataclass(frozen=True, slots=True)
class TokenPairs:
    """Aligned token rows of harmful prompts and their harmless twins.

    Attributes:
        harmful, harmless: Equal shapes, masks and spans.
        start: First column in which any pair differs; all columns before are common to both prompts of each pair.
    """

    harmful: Tokens
    harmless: Tokens
    start: int

    def __len__(self) -> int:
        return len(self.harmful)

    def rows(self, keep: slice | Sequence[int]) -> "TokenPairs":
        """A part of the pairs."""
        return self.of(self.harmful.rows(keep), self.harmless.rows(keep))

    @classmethod
    def of(cls, harmful: Tokens, harmless: Tokens) -> "TokenPairs":
        """Pair two aligned batches and find their first difference."""
        differs = (harmful.ids != harmless.ids).any(dim=0).nonzero()
        width = harmful.ids.shape[1]
        return cls(harmful, harmless, min(int(differs[0]) if len(differs) else width - 1, width - 1))
