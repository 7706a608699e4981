"""Decoding: the one loop that every reply comes from, greedy or sampled."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.models.backend import Backend, Hook

T = TypeVar("T")
# token ids [batch pos], and a mask that is True at real tokens
Columns = tuple[Tensor, Tensor]


class Cursor:
    """How far a model has read a batch: the tokens so far, and their key-value cache.

    Args:
        backend: The model.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._cache = backend.new_cache(1)
        self._rotation: tuple[Any, ...] = ()

    def feed(
        self, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], keep: int = 1
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Read further columns; return logits of the last ``keep`` of them (of all, if there are fewer).

        The first call may pass one row of columns, which all rows of later calls then share.
        """
        rows, keep = len(ids), min(keep, ids.shape[1])
        if self._ids is None or self._mask is None:
            self._ids, self._mask, self._cache = ids[:, :0], mask[:, :0], self.backend.new_cache(rows)
        elif len(self._ids) < rows:
            self.backend.repeat_cache(self._cache, rows)
            self._ids, self._mask = (repeat(seen, "1 pos -> batch pos", batch=rows) for seen in (self._ids, self._mask))
            self._rotation *= rows
        first = self._ids.shape[1] == 0
        self._ids, self._mask = torch.cat([self._ids, ids], 1), torch.cat([self._mask, mask], 1)
        rotation = self.backend.rotation(self._mask.sum(1))
        if rotation != self._rotation and not first:  # stored keys are rotated for another length: read all again
            self._cache, ids = self.backend.new_cache(rows), self._ids
        self._rotation = rotation
        return self.backend.feed(self._cache, ids, self._mask, keep)


def most_probable(logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
    """The token that greedy decoding takes in each row."""
    return logits.argmax(-1)


class Sampler:
    """Draws each row's next token from the softmax of its logits over a temperature.

    Every prompt has its own stream of random numbers. Its reply therefore depends on the seed and on the prompt's
    number alone, not on the batch that it is in.

    Args:
        temperature: Above 0; below 1 the probable tokens become more probable.
        seed: Of the random numbers.
        numbers: Number of each row's prompt.
    """

    def __init__(self, temperature: float, seed: int, numbers: Sequence[int]) -> None:
        self.temperature = temperature
        # a seed of 64 bits from both numbers, so that neighbouring prompts and seeds share no stream
        mixed = (np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] for number in numbers)
        self.streams = [torch.Generator().manual_seed(int(state) >> 1) for state in mixed]

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
        """One token per row; every call draws the next numbers of each stream."""
        # the largest becomes 0 first: over a tiny temperature it would be infinite
        below = logits.double() - logits.double().amax(-1, keepdim=True)
        weights = (below / self.temperature).softmax(-1).cpu()
        drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(weights, self.streams, strict=True)]
        return torch.cat(drawn).to(logits.device)


@dataclass(frozen=True, slots=True)
class ReplyToken:
    """One token of a reply that is being generated.

    Attributes:
        id: Token id.
        text: What it adds to the reply's text. Empty for special tokens, for blanks until a word follows them, and for
            a part of a character; the token that completes the character has it whole.

    Example:
        >>> [token.text for token in model.stream(harmful[0], 8)]
        ['Sorry', ' ,', ' I', ' can', ' not', ' help', ' .', '']
    """

    id: int
    text: str


class Speech:
    """The text of a reply as its tokens come.

    Args:
        decode: Function from all token ids so far to their text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._said = ""

    def add(self, token: int, last: bool = False) -> ReplyToken:
        """The next token; the last one brings what was held back."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if (text.endswith("\ufffd") and not last) or not text.startswith(self._said):
            return ReplyToken(token, "")
        said, self._said = self._said, text
        return ReplyToken(token, text[len(said) :])


class Watch(Protocol):
    """Reads activations while replies are generated, in the forwards of the generation itself, and may end a reply."""

    def begin(self, numbers: Sequence[int]) -> None:
        """Called before the first forward of some prompts, with their numbers; each number comes once per call."""

    def hooks(self) -> Sequence[Hook]:
        """Sites to read, and the functions that read them; they may change nothing."""

    def ended(self, numbers: Sequence[int], running: Collection[int]) -> Collection[int]:
        """Called after each forward, before any token is chosen from its logits.

        Args:
            numbers: Number of each row's prompt.
            running: Rows whose replies go on.

        Returns:
            Rows whose replies end here, without a further token.
        """


def reply_steps(
    read: Callable[[Tensor, Tensor], Float[Tensor, "batch d_vocab"]],
    prompts: Sequence[Columns],
    ends: Collection[int],
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor] = most_probable,
    ended: Callable[[Collection[int]], Collection[int]] = lambda running: (),
) -> Iterator[tuple[Float[Tensor, "batch d_vocab"], dict[int, int]]]:
    """Replies token by token; by default each step takes the most probable token, and nothing but the logits decides.

    A step's forward is run when the step is asked for.

    Args:
        read: Reads further columns (ids and mask), and returns the next-token logits of the last column.
        prompts: The prompts' columns, in one or more pieces.
        ends: Tokens that end a reply.
        max_new_tokens: Longest reply, at least 1.
        choose: Function from next-token logits to each row's token.
        ended: Function from the rows that go on to those of them whose replies end before this step's token.

    Yields:
        One pair per step: the logits; and the new token of each row whose reply goes on. An end token is among them.
    """
    for ids, real in prompts:
        last = read(ids, real)
    running = set(range(len(last)))
    for step in range(max_new_tokens):
        running -= set(ended(running))
        chosen = choose(last)
        new = {row: token for row, token in enumerate(chosen.tolist()) if row in running}
        running -= {row for row, token in new.items() if token in ends}
        yield last, new
        if not running or step + 1 == max_new_tokens:
            return
        # a finished row goes on generating, and nothing reads its further tokens
        columns = rearrange(chosen, "batch -> batch 1")
        last = read(columns, torch.ones_like(columns, dtype=torch.bool))


def decode_replies(
    read: Callable[[Tensor, Tensor], Float[Tensor, "batch d_vocab"]],
    prompts: Sequence[Columns],
    ends: Collection[int],
    max_new_tokens: int,
    keep: int = 0,
    said: Callable[[], object] = lambda: None,
    choose: Callable[[Tensor], Tensor] = most_probable,
    ended: Callable[[Collection[int]], Collection[int]] = lambda running: (),
) -> tuple[list[list[int]], list[Float[Tensor, "batch d_vocab"]]]:
    """Whole replies of `reply_steps`.

    Args:
        read: As for `reply_steps`.
        prompts: As for `reply_steps`.
        ends: Tokens that end a reply.
        max_new_tokens: Longest reply, at least 1.
        keep: Number of first steps whose logits are returned.
        said: Called after each new column.
        choose: As for `reply_steps`.
        ended: As for `reply_steps`.

    Returns:
        Token ids of each row's reply, up to and including its end token. Then the logits of the first ``keep`` steps
        that were run; the first of them are the logits after the prompt.
    """
    replies: list[list[int]] = [[] for _ in range(max(len(ids) for ids, _ in prompts))]
    logits: list[Tensor] = []
    for step, (last, new) in enumerate(reply_steps(read, prompts, ends, max_new_tokens, choose, ended)):
        if step < keep:
            logits.append(last)
        for row, token in new.items():
            replies[row].append(token)
        said()
    return replies, logits


def reply_room(backend: Backend, longest: int) -> int:
    """How many tokens of a reply fit after a prompt of this many; the reply's last token is not read."""
    return backend.sizes.n_ctx - longest + 1


def check_room(backend: Backend, longest: int, max_new_tokens: int) -> None:
    """Refuse replies that may grow beyond the model's positions.

    Args:
        backend: The model.
        longest: Tokens of the longest prompt.
        max_new_tokens: Longest reply. Its last token is not read.

    Raises:
        MechsafetyError: Prompt and reply together may need more positions than the model has.
    """
    room = reply_room(backend, longest)
    if max_new_tokens > room:
        raise MechsafetyError(
            f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens",
            expected=f"at most {backend.sizes.n_ctx} positions together",
            hint=f"pass max_new_tokens={room}" if room > 0 else "shorten the prompt",
        )


def loss_along(
    tokenizer: Any,
    keys: Sequence[T],
    replies: Sequence[str],
    read: Callable[[T, Int[Tensor, "1 token"]], Float[Tensor, "token d_vocab"]],
) -> Float[Tensor, " prompt"]:
    """Mean loss per token of given replies, in nats, from logits that are read in any way; NaN for an empty reply.

    Args:
        tokenizer: The model's tokenizer.
        keys: What ``read`` knows each prompt by.
        replies: One reply per prompt.
        read: Function of a key and the reply's token ids, which lie on the CPU. It returns the logits that predict each
            of these tokens.
    """
    losses = []
    for key, reply in zip(keys, replies, strict=True):
        ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        if not ids:
            losses.append(torch.tensor(torch.nan))
            continue
        said = torch.tensor([ids])
        logits = read(key, said).float()
        losses.append(torch.nn.functional.cross_entropy(logits, said[0].to(logits.device)).cpu())
    return torch.stack(losses)
