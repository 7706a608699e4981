"""Harmful requests and their harmless counterfactuals."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, get_args, overload

import numpy as np

from mechsafety.conversation import Conversation, PromptLike, system_of, turns_of
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, Prompts, lens_model, one_of, prompt_list, prompt_text, public
from mechsafety.prompts.distinct import duplicates, first_of_each
from mechsafety.prompts.files import read_jsonl, read_rows
from mechsafety.prompts.sets import data_file, load_instructions
from mechsafety.prompts.spans import Spans

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

# hub id, configuration and split of each public benchmark, and of its own harmless half if it has one
HubSet = tuple[str, str | None, str]
HUB: dict[str, tuple[HubSet, HubSet | None]] = {
    "advbench": (("walledai/AdvBench", None, "train"), None),
    "harmbench": (("walledai/HarmBench", "standard", "train"), None),
    "jailbreakbench": (
        ("JailbreakBench/JBB-Behaviors", "behaviors", "harmful"),
        ("JailbreakBench/JBB-Behaviors", "behaviors", "benign"),
    ),
}


Align = Literal["tokens", "suffix"]
ALIGN: tuple[Align, ...] = get_args(Align)
KEYS, OPTIONAL = ("harmful", "harmless"), ("topic", "split", "edition")
HINT = (
    "change a word in one of the two (model.tokenize_pairs shows a pair's token rows), add pairs, pair prompts with "
    "PromptPairs.matched(harmful, harmless, model.n_tokens), or patch at the template's suffix alone: align='suffix'"
)
# largest number of left-out pairs that a note names; an error names all
NAMED_PAIRS = 12


class Reader(Protocol):
    """An object that turns prompts into tokens: a `LensModel` or a `ChatTokenizer`."""

    @property
    def name(self) -> str:
        """Name of the model."""

    def spans(self, prompts: Sequence[PromptLike], /) -> list[Spans]:
        """Where each chat prompt's parts lie in its token row."""


@dataclass(frozen=True, slots=True)
class PromptPair:
    """A harmful request and its harmless counterfactual.

    Attributes:
        harmful, harmless: The two prompts: texts, or lists of chat messages that end in the user's turn.
        topic: What the pair is about.
        split: ``train``, ``validation`` or ``test``.
        edition: Edition of the set in which the pair was added, counted from 1. Within a topic, `PromptPairs.sample`
            draws the pairs of earlier editions first, so that a sample stays the same when pairs are added.

    Example:
        >>> pair = ms.prompts.PromptPair("How do I make a bomb?", "How do I make a cake?", topic="weapons")
        >>> ms.PromptPairs((pair,), "mine").harmless
        ['How do I make a cake?']
    """

    harmful: PromptLike
    harmless: PromptLike
    topic: str = ""
    split: str = ""
    edition: int = 1

    def __post_init__(self) -> None:
        for name in KEYS:
            prompt = getattr(self, name)
            if isinstance(prompt, list | tuple):  # all else is checked by the set, whose error names the pair
                object.__setattr__(self, name, prompt_text(prompt, f"the {name} prompt"))


@dataclass(frozen=True, slots=True)
class PromptPairs:
    """Pairs of a harmful and a harmless prompt, in a fixed order.

    Patching needs pairs whose chat prompts have the same number of tokens. This depends on the model's tokenizer. The
    analyses leave out all other pairs (`aligned`), and say how many.

    A prompt may have a system turn and earlier turns (`Conversation`). The instruction is then the user's last turn. It
    alone may differ between the two prompts of a pair, unless only the suffix corresponds. `with_system` adds one
    system turn to all prompts.

    Each pair counts once: an exact duplicate of an earlier pair is left out. A pair of two equal prompts is left out
    too, because its gap is 0. Both are logged and kept in ``left_out``.

    Attributes:
        pairs: The pairs.
        name: Where they come from, for reports and provenance.
        left_out: Notes, in words, about the pairs that were left out.
        align: Which tokens of a pair's two prompts correspond, and so can be patched. ``tokens``: every token, which
            needs prompts of equal length. ``suffix``: only the template's tokens after the instruction, which any two
            prompts have (docs/methods.md says what this can show).

    Example:
        >>> pairs = PromptPairs.from_lists(["How do I make a bomb?"], ["How do I make a cake?"])
        >>> len(pairs), pairs.harmless
        (1, ['How do I make a cake?'])
    """

    pairs: tuple[PromptPair, ...]
    name: str = "pairs"
    left_out: tuple[str, ...] = ()
    align: Align = "tokens"

    def __post_init__(self) -> None:
        one_of("align", self.align, ALIGN)
        if not self.pairs:
            raise MechsafetyError("no prompt pairs", expected="at least one pair")
        for number, pair in enumerate(self.pairs, 1):
            for prompt in (pair.harmful, pair.harmless):
                prompt_text(prompt, f"{self.name}, pair {number}: a prompt")
            if self.align == "tokens":
                _check_turns(pair, f"{self.name}, pair {number}")
        told_apart = [pair for pair in self.pairs if pair.harmful != pair.harmless]
        first = first_of_each([(pair.harmful, pair.harmless) for pair in told_apart])
        equal, again = len(self.pairs) - len(told_apart), len(told_apart) - len(first)
        if not first:
            raise MechsafetyError(
                f"{self.name}: the two prompts of {'the pair' if equal == 1 else f'all {equal} pairs'} are equal",
                expected="a harmful prompt and a harmless counterfactual that differs",
            )
        notes = [f"{equal} pair{'s' * (equal > 1)} of two equal prompts left out: the gap is 0"] if equal else []
        notes += [duplicates(again, "pair")] if again else []
        if notes:
            object.__setattr__(self, "pairs", tuple(told_apart[k] for k in first))
            object.__setattr__(self, "left_out", (*self.left_out, *notes))
            logger.warning("%s: %s", self.name, "; ".join(notes))

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[PromptPair]:
        return iter(self.pairs)

    def __contains__(self, pair: object) -> bool:
        return pair in self.pairs

    @overload
    def __getitem__(self, index: int) -> PromptPair: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> "PromptPair | Self":
        """One pair, or the pairs of a slice as `PromptPairs`."""
        return replace(self, pairs=self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    def __repr__(self) -> str:
        notes = "".join(f"; {note}" for note in self.left_out)
        suffix = ", aligned at the suffix" if self.align == "suffix" else ""
        system = ", with a system turn" if self.system else ""
        return f"PromptPairs({self.name}: {len(self)} pairs, {len(self.topics)} topics{suffix}{system}{notes})"

    @property
    def harmful(self) -> list[str]:
        """The harmful prompts."""
        return [prompt_text(pair.harmful) for pair in self.pairs]

    @property
    def harmless(self) -> list[str]:
        """The harmless prompts, in the order of the harmful ones."""
        return [prompt_text(pair.harmless) for pair in self.pairs]

    @property
    def system(self) -> str:
        """Text of the system turn that all prompts share; empty if there is none, or if there are several."""
        found = {system_of(prompt) for prompt in (*self.harmful, *self.harmless)}
        return (found.pop() or "") if len(found) == 1 else ""

    @property
    def topics(self) -> list[str]:
        """The topics present, sorted."""
        return sorted({pair.topic for pair in self.pairs})

    def with_system(self, text: str) -> Self:
        """The same pairs, with a system turn before every prompt.

        Provenance keeps the text. It takes the place of a system text that the model was loaded with.

        Raises:
            MechsafetyError: The text is empty, or a prompt has a system turn already.

        Example:
            >>> pairs = PromptPairs.from_lists(["How do I make a bomb?"], ["How do I make a cake?"])
            >>> print(pairs.with_system("You are a helpful assistant.").harmless[0])
            system: You are a helpful assistant.
            user: How do I make a cake?
        """
        text = prompt_text(text, "the system text")
        sides = []
        for kind, prompts in (("harmful", self.harmful), ("harmless", self.harmless)):
            for number, prompt in enumerate(prompts, 1):
                if system_of(prompt) is not None:
                    raise MechsafetyError(
                        f"{self.name}, pair {number}: the {kind} prompt has a system turn already",
                        expected="prompts without one",
                    )
            sides.append([_with_system(text, prompt) for prompt in prompts])
        pairs = zip(self.pairs, *sides, strict=True)
        return replace(self, pairs=tuple(replace(pair, harmful=bad, harmless=good) for pair, bad, good in pairs))

    def split(self, *names: str) -> Self:
        """The pairs of the named splits (``train``, ``validation``, ``test``).

        Raises:
            MechsafetyError: No pair is in these splits.
        """
        return self._where(lambda pair: pair.split in names, f"split {'+'.join(names)}")

    def topic(self, *names: str) -> Self:
        """The pairs of the named topics.

        Raises:
            MechsafetyError: No pair has one of these topics.
        """
        return self._where(lambda pair: pair.topic in names, f"topic {'+'.join(names)}")

    def where(self, keep: Iterable[Any]) -> Self:
        """The pairs for which ``keep`` is true, such as those that the model treats as expected (`check_behaviour`).

        Args:
            keep: One true or false per pair; a tensor or an array works too.

        Raises:
            MechsafetyError: Not one entry per pair, or none of them is true.

        Example:
            >>> pairs = PromptPairs.from_lists(["Make a bomb?", "Rob a bank?"], ["Make a cake?", "Paint a bank?"])
            >>> pairs.where([False, True]).harmless
            ['Paint a bank?']
        """
        flags = [bool(flag) for flag in keep]
        if len(flags) != len(self.pairs):
            raise MechsafetyError(f"{len(flags)} entries for {len(self)} pairs", expected="one true or false per pair")
        kept = tuple(compress(self.pairs, flags))
        if not kept:
            raise MechsafetyError(f"no entry is true for the {len(self)} pairs", expected="at least one pair to keep")
        return replace(self, pairs=kept)

    @public
    def sample(self, n: Count, seed: Amount = 0) -> Self:
        """At most ``n`` pairs, drawn without replacement and taken evenly over the topics; order is kept.

        Within a topic, the pairs of earlier editions come first. With the same seed, a smaller sample is part of a
        larger one.
        """
        generator, order = np.random.default_rng(seed), []
        for edition in sorted({pair.edition for pair in self.pairs}):
            of_it = [index for index, pair in enumerate(self.pairs) if pair.edition == edition]
            order += [of_it[place] for place in generator.permutation(len(of_it)).tolist()]
        rank: dict[str, int] = {}
        keyed = []
        for index in order:
            topic = self.pairs[index].topic
            rank[topic] = rank.get(topic, -1) + 1
            keyed.append((rank[topic], index))
        # the first pair of each topic, then the second of each, and so on; sort is stable, so the draw stays random
        chosen = sorted(index for _, index in sorted(keyed, key=lambda item: item[0])[:n])
        return replace(self, pairs=tuple(self.pairs[index] for index in chosen))

    def halves(self) -> tuple[Self, Self]:
        """Two parts for discovery and for held-out checks.

        If there are several topics, whole topics go to one part or the other. Otherwise the pairs go to the two parts
        in turn.

        Raises:
            MechsafetyError: There is only one pair.
        """
        if len(self) < 2:
            raise MechsafetyError("one pair cannot be halved", expected="at least 2 pairs")
        topics = self.topics
        if len(topics) > 1:
            size = {topic: sum(pair.topic == topic for pair in self.pairs) for topic in topics}
            first: list[str] = []
            for topic in topics:
                if sum(size[name] for name in first) + size[topic] <= (len(self) + 1) // 2 or not first:
                    first.append(topic)
            chosen = [pair.topic in first for pair in self.pairs]
        else:
            chosen = [index % 2 == 0 for index in range(len(self))]
        picked = tuple(pair for pair, here in zip(self.pairs, chosen, strict=True) if here)
        others = tuple(pair for pair, here in zip(self.pairs, chosen, strict=True) if not here)
        return replace(self, pairs=picked), replace(self, pairs=others)

    def without_shared_prompts(self) -> Self:
        """The pairs that share no prompt with an earlier pair, so that no prompt can be on both sides of a split.

        The number of left-out pairs is logged and kept in ``left_out``.
        """
        seen: set[tuple[str, str]] = set()
        kept = []
        for pair, bad, good in zip(self.pairs, self.harmful, self.harmless, strict=True):
            prompts = {("harmful", bad), ("harmless", good)}
            if not prompts & seen:
                kept.append(pair)
            seen |= prompts
        gone = len(self.pairs) - len(kept)
        if not gone:
            return self
        note = f"{gone} pair{'s' * (gone > 1)} left out, a prompt of which is in an earlier pair"
        logger.warning("%s: %s", self.name, note)
        return replace(self, pairs=tuple(kept), left_out=(*self.left_out, note))

    def alignment(self, model: Reader) -> "pd.DataFrame":
        """One row per pair: its number (from 1), topic, split, tokens of both chat prompts, and whether they align.

        Two chat prompts align if their instructions begin and end at the same tokens, and the same number of tokens
        follows. With ``align="suffix"``, they align if each has as many tokens after the instruction as most prompts
        have.

        Args:
            model: A `LensModel`, or the `ChatTokenizer` of a model whose weights are not needed.

        Raises:
            MechsafetyError: The chat template or the tokenizer cannot take a prompt.
        """
        import pandas as pd

        model = model if hasattr(model, "spans") else lens_model(model)  # its error says what was expected
        harmful, harmless = model.spans(self.harmful), model.spans(self.harmless)
        usual = Counter(span.n_suffix for span in (*harmful, *harmless)).most_common(1)[0][0]

        def fit(bad: Spans, good: Spans) -> bool:
            return bad == good if self.align == "tokens" else bad.n_suffix == good.n_suffix == usual > 0

        rows = [
            (number, pair.topic, pair.split, bad.length, good.length, fit(bad, good))
            for number, (pair, bad, good) in enumerate(zip(self.pairs, harmful, harmless, strict=True), 1)
        ]
        return pd.DataFrame(rows, columns=["pair", "topic", "split", "harmful", "harmless", "aligned"])

    def aligned(self, model: Reader, least: int = 1) -> Self:
        """The pairs whose chat prompts align under a model's tokenizer; only these can be patched.

        The number of left-out pairs is logged and kept in ``left_out``. `alignment` lists every pair. If all pairs
        align, this object is returned.

        Args:
            model: A `LensModel`, or the `ChatTokenizer` of a model whose weights are not needed.
            least: Smallest number of pairs that must align.

        Raises:
            MechsafetyError: Fewer than ``least`` pairs align. The message names every pair that does not. Or as
                `alignment`.
        """
        table = self.alignment(model)
        fits = table["aligned"].tolist()
        n, out = sum(fits), table.loc[~table["aligned"], "pair"].tolist()
        if n < least:
            problem = f"{n} of {len(self)} pairs of {self.name} align under the tokenizer of {model.name}"
            what = "number of tokens" if self.align == "tokens" else "tokens after the instruction"
            problem += f"; the two chat prompts of {_numbers(out)} differ in their {what}" if out else ""
            hint = HINT if out and self.align == "tokens" else "add pairs"
            raise MechsafetyError(problem, expected=f"at least {least}", hint=hint, page="pairs-do-not-align")
        if not out:
            return self
        note = f"{len(out)} of {len(self)} pairs left out, which do not align under the tokenizer of {model.name}"
        note += f" ({_numbers(out, NAMED_PAIRS)})"
        logger.warning("%s: %s", self.name, note)
        kept = tuple(pair for pair, fit in zip(self.pairs, fits, strict=True) if fit)
        return replace(self, pairs=kept, left_out=(*self.left_out, note))

    @classmethod
    def builtin(cls, split: str | None = None, *, edition: int | None = None) -> Self:
        """The project's own pairs, whose two prompts have equal token lengths under the demo model's tokenizer.

        Under other tokenizers, at least four in five pairs have equal lengths (docs/models.md).

        Args:
            split: ``train``, ``validation`` or ``test``; all of them by default. No topic is in two splits.
            edition: Leave out the pairs of later editions. The demo model was trained on the training split of edition
                1. Its results are on the other splits of edition 1.

        Example:
            >>> len(PromptPairs.builtin().topics) >= 8
            True
        """
        pairs = cls.from_jsonl(data_file("pairs"))
        pairs = replace(pairs, name="builtin")
        if edition is not None:
            pairs = pairs._where(lambda pair: pair.edition <= edition, f"edition {edition} or earlier")
        return pairs if split is None else pairs.split(split)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], align: Align = "tokens") -> Self:
        """Pairs from a ``.jsonl``, ``.json`` or ``.csv`` file.

        Every row holds ``harmful`` and ``harmless``: texts, or lists of chat messages (not in ``.csv``). ``topic``,
        ``split`` and ``edition`` are optional. A ``.jsonl``
        file has one object per line, a ``.json`` file one array of objects, a ``.csv`` file a line of column names and
        then the rows.

        Raises:
            MechsafetyError: As `mechsafety.prompts.read_rows`; the message names the line.
        """
        return cls._from_rows(read_rows(path, KEYS), path, align)

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], align: Align = "tokens") -> Self:
        """Pairs from a file with one ``{"harmful": "...", "harmless": "..."}`` per line, whatever its suffix.

        Each side is a text or a list of chat messages, ``[{"role": "user", "content": "..."}]``.

        Raises:
            MechsafetyError: As `mechsafety.prompts.read_jsonl`.
        """
        return cls._from_rows(read_jsonl(path, KEYS), path, align)

    @classmethod
    def _from_rows(cls, rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], align: Align) -> Self:
        pairs = (PromptPair(*(row[key] for key in KEYS), **{k: row[k] for k in OPTIONAL if k in row}) for row in rows)
        return cls(tuple(pairs), os.path.basename(os.fspath(path)), align=align)

    @classmethod
    @public
    def from_lists(cls, harmful: Prompts, harmless: Prompts, name: str = "lists", align: Align = "tokens") -> Self:
        """Pairs from two lists of the same length.

        Args:
            harmful: Harmful prompts.
            harmless: Their counterfactuals; or, with ``align="suffix"``, any harmless prompts.
            name: Where they come from.
            align: What can be patched in a pair. ``tokens``: every token, in pairs of equal length. ``suffix``: the
                template's tokens after the instruction, in any two prompts.

        Raises:
            MechsafetyError: The lengths differ, or a list is a single string.
        """
        if len(harmful) != len(harmless):
            raise MechsafetyError(
                f"{len(harmful)} harmful and {len(harmless)} harmless prompts",
                expected="lists of the same length",
                hint="use PromptPairs.matched(harmful, harmless, length) to pair them by token length",
            )
        return cls(tuple(PromptPair(a, b) for a, b in zip(harmful, harmless, strict=True)), name, align=align)

    @classmethod
    @public
    def matched(
        cls, harmful: Prompts, harmless: Prompts, length: Callable[[PromptLike], int], name: str = "matched"
    ) -> Self:
        """Pair each harmful prompt with an unused harmless one of the same ``length`` (e.g. ``model.n_tokens``).

        Harmful prompts without a partner are left out.

        Raises:
            MechsafetyError: No two prompts have the same length.
        """
        shelf: dict[int, list[PromptLike]] = {}
        for text in reversed(harmless):
            shelf.setdefault(length(text), []).append(text)
        pairs = []
        for text in harmful:
            partners = shelf.get(length(text))
            if partners:
                pairs.append(PromptPair(text, partners.pop()))
        if not pairs:
            raise MechsafetyError("no harmful and harmless prompt have the same length", hint="give more prompts")
        return cls(tuple(pairs), name)

    @classmethod
    @public
    def from_hub(
        cls,
        name: str,
        harmless: Prompts | str | None = None,
        length: Callable[[PromptLike], int] | None = None,
        align: Align = "tokens",
    ) -> Self:
        """Pairs from a public benchmark: ``advbench``, ``harmbench``, ``jailbreakbench``, a hub id or a local file.

        Args:
            name: Source of the harmful instructions: a benchmark by its name or hub id, any other hub id (its ``train``
                split), or a local file.
            harmless: Harmless prompts, or their source, named in the same way. JailbreakBench has its own.
            length: If given, prompts of equal length are paired (see `matched`). Otherwise prompts are paired in file
                order.
            align: ``suffix`` for pairs of any lengths, which are patched at the template's suffix alone.

        Raises:
            MechsafetyError: A source cannot be read, or there are no harmless prompts.
        """
        bad = _read(_benchmark(name)[0])
        if harmless is None or isinstance(harmless, str):
            good = _read(_harmless_half(name if harmless is None else harmless, required=harmless is None))
        else:
            good = prompt_list(harmless)
        if length is not None:
            return cls.matched(bad, good, length, name)
        n = min(len(bad), len(good))
        return cls.from_lists(bad[:n], good[:n], name, align)

    def _where(self, keep: Callable[[PromptPair], bool], what: str) -> Self:
        kept = tuple(pair for pair in self.pairs if keep(pair))
        if not kept:
            raise MechsafetyError(
                f"{self.name} has no pair of {what}",
                expected=f"topics {self.topics}, splits {sorted({pair.split for pair in self.pairs})}",
            )
        return replace(self, pairs=kept)


def omissions(pairs: object) -> dict[str, Any]:
    """Options of a result's provenance: what was left out of its pairs, how they align, and their system turn.

    ``left_out`` is given if pairs were left out. ``align`` is given if only the suffix of the pairs corresponds.
    ``system`` is given if all prompts share a system turn.

    Example:
        >>> ms.prompts.omissions(pairs)  # nothing was left out
        {}
        >>> ms.prompts.omissions(pairs.with_system("be kind"))
        {'system': 'be kind'}
    """
    usual = {"left_out": (), "align": "tokens", "system": ""}
    found = {name: getattr(pairs, name, value) for name, value in usual.items()}
    return {name: list(value) if name == "left_out" else value for name, value in found.items() if value != usual[name]}


def _check_turns(pair: PromptPair, where: str) -> None:
    """Refuse a pair to be patched at every token whose prompts differ before the user's last turn."""
    bad, good = (turns_of(prompt_text(prompt))[:-1] for prompt in (pair.harmful, pair.harmless))
    if bad != good:
        raise MechsafetyError(
            f"{where}: the two prompts differ before the user's last turn",
            expected="the same system turn and the same earlier turns in both",
            hint="pairs that differ elsewhere can be patched at the template's suffix alone: align='suffix'",
        )


def _with_system(text: str, prompt: str) -> Conversation:
    turns = (("system", text), *turns_of(prompt))
    return Conversation([{"role": role, "content": content} for role, content in turns])


def _numbers(found: Sequence[int], most: int | None = None) -> str:
    """Pairs by their numbers; consecutive numbers become a range.

    Example:
        >>> _numbers([3]), _numbers([1, 2, 3, 7, 9]), _numbers([1, 2, 5, 6], most=2)
        ('pair 3', 'pairs 1-3, 7, 9', 'pairs 1-2 and 2 more')
    """
    shown = found[:most]
    runs: list[list[int]] = []
    for number in shown:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    rest = len(found) - len(shown)
    return f"pair{'s' * (len(found) > 1)} {text}" + (f" and {rest} more" if rest else "")


def _benchmark(name: str) -> tuple[HubSet, HubSet | None]:
    """The entry of `HUB` for a benchmark's name or hub id; for any other source, its ``train`` split."""
    known = (sets for short, sets in HUB.items() if name.lower() in (short, sets[0][0].lower()))
    return next(known, ((name, None, "train"), None))


def _harmless_half(name: str, *, required: bool) -> HubSet:
    """The harmless half of a benchmark; for any other source the whole of it, unless a half is required."""
    source, own = _benchmark(name)
    if own is None and (required or source in [sets[0] for sets in HUB.values()]):
        raise MechsafetyError(f"{name} has no harmless half", hint="pass harmless=[...] or harmless='tatsu-lab/alpaca'")
    return own or source


def _read(source: HubSet) -> list[str]:
    name, config, split = source
    return load_instructions(name, config=config, split=split)
