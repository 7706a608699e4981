"""Token rows of chat prompts: which tokens are template, which are the instruction."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechsafety.errors import MechsafetyError

SPANS = ("prefix", "instruction", "suffix")


@dataclass(frozen=True, slots=True)
class Spans:
    """Where a chat prompt's parts lie in its own (unpadded) token row, as half-open ranges.

    Attributes:
        instruction: Start and end of the user's request; of several turns, of the last one.
        length: Number of tokens. The ``prefix`` (system turn, earlier turns and template) lies before the instruction.
            The ``suffix`` (template tokens) lies after it. At the suffix's last token, the model decides how to begin
            its reply.

    Example:
        >>> spans = model.spans(harmful[:1])[0]
        >>> spans.range("instruction"), spans.n_suffix
        ((2, 8), 2)
    """

    instruction: tuple[int, int]
    length: int

    @property
    def n_suffix(self) -> int:
        """Number of tokens after the instruction."""
        return self.length - self.instruction[1]

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
    """One token of a chat prompt: where it stands, its id, its span and its text.

    Example:
        >>> row = model.explain_tokens(harmful[0]).rows[-1]
        >>> row.position, row.span
        (9, 'suffix')
    """

    position: int
    id: int
    span: str
    text: str


@dataclass(frozen=True, slots=True, repr=False)
class TokenTable:
    """The tokens of one chat prompt, shown as one line per token.

    Example:
        >>> model.explain_tokens(harmful[0])
        position    id  span         text
           0        2  prefix       '<s>'
           1        3  prefix       '<user>'
           2       41  instruction  'bombs'
           3       37  instruction  'are'
           4       38  instruction  'what'
           5        8  instruction  'I'
           6       39  instruction  'need'
           7       40  instruction  'today'
           8        5  suffix       '<end>'
           9        4  suffix       '<assistant>'
    """

    rows: tuple[TokenRow, ...]

    def __repr__(self) -> str:
        rows = [f"{row.position:8d}  {row.id:6d}  {row.span:11s}  {row.text!r}" for row in self.rows]
        return "\n".join(["position      id  span         text", *rows])


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
        spans: Spans of each prompt in its unpadded row; `span_mask` shifts them by the padding.
        opener_ids: Tokens of a reply's opener, which end every row and belong to the suffix (`LensModel.reading`).

    Example:
        >>> tokens = model.tokenize(harmful[:2])
        >>> tokens.ids.shape, tokens.spans[0].n_suffix
        (torch.Size([2, 12]), 2)
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    spans: tuple[Spans, ...]
    opener_ids: tuple[int, ...] = ()

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
        """Some prompts of the batch, without the columns that are padding in all of them."""
        chosen = list(range(len(self))[keep] if isinstance(keep, slice) else keep)
        spans = tuple(self.spans[k] for k in chosen)
        width = max(span.length for span in spans)
        return replace(self, ids=self.ids[chosen, -width:], mask=self.mask[chosen, -width:], spans=spans)

    def widened(self, width: int) -> "Tokens":
        """The same prompts, padded on the left to ``width`` columns."""
        more = width - self.ids.shape[1]
        pad = torch.nn.functional.pad
        return replace(self, ids=pad(self.ids, (more, 0)), mask=pad(self.mask, (more, 0)))

    def joined(self, other: "Tokens") -> "Tokens":
        """The prompts of both batches, which must have equally many columns."""
        ids, masks = torch.cat([self.ids, other.ids]), torch.cat([self.mask, other.mask])
        return replace(self, ids=ids, mask=masks, spans=(*self.spans, *other.spans))


@dataclass(frozen=True, slots=True)
class TokenPairs:
    """Aligned token rows of harmful prompts and their harmless counterfactuals.

    Attributes:
        harmful, harmless: The two sides, of equal shapes. Masks and spans are equal too, unless only the suffix
            corresponds.
        start: First column in which any pair differs. If only the suffix corresponds, it is the suffix's first column.
        common: Whether all columns before ``start`` are common to both prompts of each pair.

    Example:
        >>> tokens = model.tokenize_pairs(pairs)
        >>> len(tokens), tokens.start  # the first column in which a pair differs
        (8, 5)
    """

    harmful: Tokens
    harmless: Tokens
    start: int
    common: bool = True

    def __len__(self) -> int:
        return len(self.harmful)

    @property
    def opener_ids(self) -> tuple[int, ...]:
        """Tokens of a reply's opener that end every row."""
        return self.harmful.opener_ids

    @property
    def first_differences(self) -> Int[Tensor, " pair"]:
        """Column in which the prompts of each pair first differ; 0 for two prompts that are the same."""
        return (self.harmful.ids != self.harmless.ids).int().argmax(1)

    def rows(self, keep: slice | Sequence[int]) -> "TokenPairs":
        """A part of the pairs."""
        sides = self.harmful.rows(keep), self.harmless.rows(keep)
        return self.of(*sides) if self.common else self.at_suffix(*sides)

    @classmethod
    def at_suffix(cls, harmful: Tokens, harmless: Tokens) -> "TokenPairs":
        """Pair prompts of any lengths, in which only the template's tokens after the instruction correspond.

        Raises:
            MechsafetyError: These tokens are not the same in all prompts, or there are none.
        """
        width = max(harmful.ids.shape[1], harmless.ids.shape[1])
        sides = harmful.widened(width), harmless.widened(width)
        sizes = {span.n_suffix for side in sides for span in side.spans}
        if len(sizes) > 1:
            raise MechsafetyError(
                f"suffixes of {min(sizes)} to {max(sizes)} tokens", expected="the same template after every instruction"
            )
        size = min(sizes)
        if size == 0:
            raise MechsafetyError(
                "the chat template writes nothing after the instruction",
                expected="a template with a suffix for align='suffix'",
            )
        ends = torch.cat([side.ids[:, width - size :] for side in sides])
        if bool((ends != ends[:1]).any()):
            raise MechsafetyError(
                "the template's tokens after the instruction differ between prompts",
                expected="the same ones, for align='suffix'",
            )
        return cls(*sides, width - size, common=False)

    @classmethod
    def of(cls, harmful: Tokens, harmless: Tokens) -> "TokenPairs":
        """Pair two aligned batches and find their first difference."""
        differs = (harmful.ids != harmless.ids).any(dim=0).nonzero()
        width = harmful.ids.shape[1]
        return cls(harmful, harmless, min(int(differs[0]) if len(differs) else width - 1, width - 1))
