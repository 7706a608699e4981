"""How many of the built-in pairs align under other tokenizers: docs/results/alignment.json.

Patching needs pairs whose two prompts have as many tokens, which depends on the tokenizer. Tokenizers are not shipped,
so their paths are arguments; what was measured before stays as long as the pairs are the same.

Run: python scripts/alignment.py NAME=PATH ... (a minute for ten tokenizers). The tables are in docs/models.md. PATH is
a ``tokenizer.json``, a sentencepiece ``.model`` file (needs the package sentencepiece), a ``tekken.json`` (needs
tiktoken), or a folder with GPT-2's ``encoder.json`` and ``vocab.bpe``.
"""

import base64
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pages.page import RESULTS
from pages.render import PAGES, redraw

import mechsafety as ms
from mechsafety.output import write_text
from mechsafety.prompts.sets import data_file

STORE = RESULTS / "alignment.json"

Encode = Callable[[Sequence[str]], list[int]]


def main(arguments: Sequence[str]) -> None:
    """Measure the named tokenizers and store the result."""
    given = dict(argument.split("=", 1) for argument in arguments)
    write_text(STORE, json.dumps(measured(given), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    redraw(PAGES["models"])


def measured(given: dict[str, str]) -> dict[str, Any]:
    """What is stored, with the given tokenizers (by name, their path) measured anew."""
    digest = hashlib.sha256(data_file("pairs").read_bytes()).hexdigest()
    before = load() if STORE.is_file() else {"tokenizers": {}}
    known = before["tokenizers"] if before.get("pairs_sha256") == digest else {}
    found = known | {name: measure(Path(path)) for name, path in given.items()}
    return {"pairs_sha256": digest, "tokenizers": dict(sorted(found.items()))}


def measure(path: Path) -> dict[str, Any]:
    """Pairs that align and all pairs, by split and by topic, under one tokenizer."""
    lengths, pairs = encoder(path), ms.PromptPairs.builtin()
    fits = [a == b for a, b in zip(lengths(pairs.harmful), lengths(pairs.harmless), strict=True)]
    counts: dict[str, dict[str, list[int]]] = {"splits": {}, "topics": {}}
    for pair, fit in zip(pairs, fits, strict=True):
        for kind, label in (("splits", pair.split), ("topics", pair.topic)):
            cell = counts[kind].setdefault(label, [0, 0])
            cell[0] += fit
            cell[1] += 1
    file = path / "encoder.json" if path.is_dir() else path
    return {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), **counts}


def encoder(path: Path) -> Encode:
    """A function from texts to their numbers of tokens.

    Raises:
        SystemExit: A file that is none of those that the module's docstring names.
    """
    if path.is_dir():
        from tokenizers import ByteLevelBPETokenizer

        bytewise = ByteLevelBPETokenizer(str(path / "encoder.json"), str(path / "vocab.bpe"))
        return lambda texts: [len(row.ids) for row in bytewise.encode_batch(list(texts))]
    if "tekken" in path.name:
        import tiktoken

        stored = json.loads(path.read_text(encoding="utf-8"))
        config = stored["config"]
        n = config["default_vocab_size"] - config["default_num_special_tokens"]
        ranks = {base64.b64decode(row["token_bytes"]): row["rank"] for row in stored["vocab"][:n]}
        tekken = tiktoken.Encoding("tekken", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})
        return lambda texts: [len(tekken.encode(text)) for text in texts]
    if ".model" in path.name:
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(str(path))
        return lambda texts: [len(row) for row in pieces.encode(list(texts))]
    if path.suffix == ".json":
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(path))
        return lambda texts: [len(row.ids) for row in fast.encode_batch(list(texts), add_special_tokens=False)]
    raise SystemExit(f"{path} is no tokenizer file that this script reads")


def load() -> dict[str, Any]:
    """What was stored."""
    return json.loads(STORE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
