"""Read a GGUF file's header once, and split the file into two parts that transformers reads quickly.

gguf's own reader keeps every text of a vocabulary as several arrays, and transformers calls this reader several times.
For a vocabulary of 150,000 tokens, that takes half a minute. This module reads the header in one pass. It then gives
transformers two files: the vocabulary without tensors, and the tensors without the vocabulary.
"""

import math
import mmap
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError, first_line, named

AGAIN = "download it again"
TOKENS = "tokenizer.ggml.tokens"
# lists with one entry per token or per merge
LISTS = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges"))
# struct format of a setting's value, by its type number in the file; type 8 is a text, type 9 a list
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST, _WHOLE_NUMBER = 8, 9, 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in a file.

    Attributes:
        name: Its name in the file.
        shape: Its shape in torch's order.
        kind: ggml's number for the format of its values.
        start, end: Its bytes in the file, from ``start`` to before ``end``.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """Everything before the tensors of a GGUF file.

    Attributes:
        path: The file.
        values: Settings by name. A list of texts (the vocabulary) is represented by its length only.
        places: Byte range of each setting, from the start of its name.
        table: Byte range of the list of tensors.
        tensors: The tensors.
        data: Byte at which the tensors' values begin.
    """

    path: Path
    values: Mapping[str, Any]
    places: Mapping[str, tuple[int, int]]
    table: tuple[int, int]
    tensors: tuple[TensorInfo, ...]
    data: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.values["general.architecture"])


class _Reader:
    """Reads a header from its beginning on; raises struct.error or EOFError if the file ends too soon."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, kinds: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{kinds}", self.data, self.at)
        self.at += struct.calcsize(f"<{kinds}")
        return found

    def text(self) -> str:
        (length,) = self.take("Q")
        raw = self.data[self.at : self.at + length]
        if len(raw) < length:
            raise EOFError("a text goes on behind the end of the file")
        self.at += length
        return raw.decode()

    def value(self, kind: int) -> Any:
        """A setting's value; for a list of texts, its length."""
        if kind in _FORMATS:
            return self.take(_FORMATS[kind])[0]
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            raise ValueError(f"a setting has the unknown type {kind}")
        inner, count = self.take("IQ")
        if inner in _FORMATS:
            return list(self.take(f"{count}{_FORMATS[inner]}"))
        if inner != _TEXT:
            return [self.value(inner) for _ in range(count)]
        data, at, length = self.data, self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + length(data, at)[0]
        self.at = at
        return count


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        MechsafetyError: The package gguf is missing or cannot be used; or the file is not a GGUF file, is cut off or
            damaged, or lacks something that a model needs.
    """
    try:
        from gguf import GGML_QUANT_SIZES  # noqa: F401
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "gguf":
            raise MechsafetyError("reading a GGUF file needs the package gguf", hint="run: pip install gguf") from None
        raise MechsafetyError(
            f"the package gguf cannot be used ({first_line(error)})",
            expected="gguf 0.17 or newer",
            hint="rename your own file if it is called gguf.py; otherwise run: pip install --upgrade gguf",
        ) from None
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise MechsafetyError(f"{str(path)!r} is not a GGUF file", expected="a file that begins with GGUF")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parsed(path, _Reader(data))
            except (struct.error, EOFError):
                raise MechsafetyError(
                    f"{str(path)!r} is cut off within its header, after {len(data)} bytes",
                    expected="a whole GGUF file",
                    hint=AGAIN,
                ) from None
            except (ValueError, ArithmeticError, MemoryError) as error:
                raise MechsafetyError(
                    f"{str(path)!r} is damaged ({first_line(error)})", expected="a whole GGUF file", hint=AGAIN
                ) from error
            _check_whole(header, len(data))
    return header


def _parsed(path: Path, reader: _Reader) -> Header:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    _, number, n_tensors, n_values = reader.take("IIQQ")
    if number not in (2, 3):
        raise ValueError(f"its format has the number {number}, and 2 and 3 are known")
    values: dict[str, Any] = {}
    places: dict[str, tuple[int, int]] = {}
    for _ in range(n_values):
        start, key = reader.at, reader.text()
        values[key] = reader.value(reader.take("I")[0])
        places[key] = (start, reader.at)
    found, start = [], reader.at
    for _ in range(n_tensors):
        name = reader.text()
        shape = reader.take(f"{reader.take('I')[0]}Q")[::-1]
        found.append((name, shape, *reader.take("IQ")))
    table, data, tensors = (start, reader.at), _aligned(reader.at, values), []
    for name, shape, kind, offset in found:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        begin = data + offset
        tensors.append(TensorInfo(name, shape, kind, begin, begin + math.prod(shape) // block * size))
    return Header(path, values, places, table, tuple(tensors), data)


def _aligned(at: int, values: Mapping[str, Any]) -> int:
    """Byte at which the tensors' values begin, after a header that ends at byte ``at``."""
    step = int(values.get("general.alignment", 32))
    return -(-at // step) * step


def _check_whole(header: Header, size: int) -> None:
    """Check that the file holds all that its header promises and all that a model needs."""
    name, values = str(header.path), header.values
    if "general.architecture" not in values:
        raise MechsafetyError(
            f"{name!r} names no architecture (general.architecture)", expected="a GGUF file of a model"
        )
    if not header.tensors:
        raise MechsafetyError(f"{name!r} holds no tensors", expected="a GGUF file of a model")
    lost = [tensor.name for tensor in header.tensors if tensor.end > size]
    if lost:
        whole = max(tensor.end for tensor in header.tensors)
        raise MechsafetyError(
            f"{name!r} is cut off: it holds {size} of {whole} bytes and not the whole of {named(lost, 'tensor')}",
            expected="a whole GGUF file",
            hint=AGAIN,
        )
    if (values.get("split.count") or 1) > 1:
        raise MechsafetyError(f"{name!r} is one part of several", hint="merge them: llama-gguf-split --merge")
    if values.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.merges" not in values:
        raise MechsafetyError(
            f"{name!r} holds no merges (tokenizer.ggml.merges), so its text cannot be tokenized",
            expected="a GGUF file with its whole tokenizer",
            hint="convert the model again with a current llama.cpp",
        )


def write_parts(header: Header, vocabulary: Path, weights: Path) -> None:
    """Write a file in two parts, the second with zeros instead of its tensors' values.

    The zeros take no room on most disks. `fill_part` replaces them.

    Args:
        header: The file's header.
        vocabulary: Path of the first part, with all settings and no tensors.
        weights: Path of the second part, with all tensors, and all settings except the vocabulary's lists.
    """
    size, added = f"{header.architecture}.vocab_size", b""
    if TOKENS in header.values and size not in header.values:
        added = struct.pack(f"<Q{len(size)}sII", len(size), size.encode(), _WHOLE_NUMBER, header.values[TOKENS])
    with header.path.open("rb") as stream:
        every = {key: _bytes(stream, *place) for key, place in header.places.items()}
        table = _bytes(stream, *header.table)
    few = [setting for key, setting in every.items() if key not in LISTS]
    vocabulary.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(every)) + b"".join(every.values()))
    with weights.open("wb") as out:
        out.write(struct.pack("<4sIQQ", b"GGUF", 3, len(header.tensors), len(few) + bool(added)))
        out.write(b"".join(few) + added + table)
        out.truncate(_aligned(out.tell(), header.values) + _n_bytes(header))


def fill_part(header: Header, weights: Path) -> None:
    """Copy the tensors' values into the part that `write_parts` filled with zeros."""
    with header.path.open("rb") as stream, weights.open("r+b") as out:
        stream.seek(header.data)
        out.seek(-_n_bytes(header), os.SEEK_END)
        shutil.copyfileobj(stream, out, 2**24)


def _n_bytes(header: Header) -> int:
    return max(tensor.end for tensor in header.tensors) - header.data


def _bytes(stream: IO[bytes], start: int, end: int) -> bytes:
    stream.seek(start)
    return stream.read(end - start)


def numbers(header: Header, tensor: TensorInfo) -> Float[Tensor, " n"]:
    """The de-quantised values of a small tensor."""
    from gguf import GGMLQuantizationType, dequantize

    with header.path.open("rb") as stream:
        raw = np.frombuffer(_bytes(stream, tensor.start, tensor.end), np.uint8)
    return torch.tensor(dequantize(raw, GGMLQuantizationType(tensor.kind))).flatten()
