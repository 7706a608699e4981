"""Token rows of a batch, with the columns that all rows share in front.

Prompts of one chat template begin with the same tokens. A batch is therefore laid out as ``[shared | padding | rest]``.
The shared columns are run once, as one row. Their keys and values are then repeated for all rows. Mask and position ids
make this exact wherever a position's attention does not depend on its column (no sliding window).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechsafety.inputs import PromptLike
from mechsafety.models.engine import shared_columns
from mechsafety.models.lens_model import LensModel
from mechsafety.prompts.spans import Tokens


@dataclass(frozen=True, slots=True)
class Rows:
    """Token rows of one batch, laid out as ``[shared | padding | rest]``.

    Attributes:
        ids: Token ids.
        mask: True at real tokens.
        shared: Number of leading columns that are the same in every row.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    shared: int

    def __len__(self) -> int:
        return len(self.ids)

    def pieces(self) -> list[tuple[Tensor, Tensor]]:
        """(ids, mask) of the shared columns as one row (if there are any), then of the rest."""
        rest = (self.ids[:, self.shared :], self.mask[:, self.shared :])
        return [(self.ids[:1, : self.shared], self.mask[:1, : self.shared]), rest] if self.shared else [rest]


def prompt_rows(model: LensModel, prompts: Sequence[PromptLike]) -> list[list[int]]:
    """Token ids of chat prompts, without padding and without a reply's opener."""
    return token_rows(model.reading(()).tokenize(prompts))


def token_rows(tokens: Tokens) -> list[list[int]]:
    """Token ids of each row, without padding."""
    return [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


def lay_out(model: LensModel, rows: Sequence[Sequence[int]], most: int | None = None) -> Rows:
    """A batch of token rows; their common first tokens become the shared columns where that is exact.

    Args:
        model: The model that will read them.
        rows: Token ids.
        most: Largest number of shared columns; by default all but the last token of the shortest row.
    """
    shared = 0
    if len(rows) > 1 and model.backend.by_position and shared_columns(model, 1):
        first = rows[0][: min(map(len, rows)) - 1 if most is None else most]
        shared = next((k for k, token in enumerate(first) if any(row[k] != token for row in rows)), len(first))
    width = max(map(len, rows))
    pad = model.pad_id
    ids = [[*row[:shared], *[pad] * (width - len(row)), *row[shared:]] for row in rows]
    mask = [[True] * shared + [False] * (width - len(row)) + [True] * (len(row) - shared) for row in rows]
    return Rows(torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device), shared)
