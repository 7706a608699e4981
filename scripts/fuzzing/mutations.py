"""Spoil a file: its bytes, its JSON values, or the header of its safetensors."""

import base64
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

# values that a field may not expect
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 1e308, 5e-324, 0.5, -0.0),
    *(
        "",
        " ",
        "a",
        "\x00",
        "\x1b[2J",
        "\ud800",
        "\u202eabc",
        "🙂",
        "é" * 300,
        "x" * 5000,
        "\n",
        "../../outside/canary",
    ),
    *(
        "/etc/passwd",
        "/dev/zero",
        "file:///etc/passwd",
        "__class__",
        "{{ 7 * 7 }}",
        "<script>alert(1)</script>",
        "%s%n",
    ),
    *([], {}, [[]], [None], {"": None}, {"float": "nan"}, {"float": "inf"}, {"float": "-inf"}, {"float": "x"}),
    *({"tensor": "x"}, {"tensor": None}, {"type": "Node"}, {"__reduce__": ["os.system", "id"]}, [0] * 3000),
)
# texts that stand for a value in JSON and that no Python value is written as
RAW = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "9" * 5000, "0." + "0" * 400 + "1", "-0"),
    *(
        "[" * 90 + "]" * 90,
        "[" * 3000 + "]" * 3000,
        '{"a":' * 900 + "1" + "}" * 900,
        '"\\ud800"',
        '"\\u0000"',
        "01",
        "'a'",
    ),
)
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "U64",
    "C64",
    "F4",
    "X",
    "",
    None,
    7,
)
SIZES = (0, 1, 7, 8, 100, 2**20, 100_000_001, 2**31, 2**40, 2**63 - 1, 2**64 - 1)
FORMAT_CHARS = b'{}[]":,\\\x00\xff\n 0123456789eE+-.'


def spoilt(rng: random.Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """The content with one to three changes.

    Args:
        rng: What decides.
        content: Of a file.
        others: Contents of other files, of which parts may be taken.
    """
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        ways: list[Callable[..., bytes]] = [bytes_changed]
        if content[:1] in (b"{", b"["):
            ways += [json_changed] * 5 + [lines_changed]
        elif is_safetensors(content):
            ways += [safetensors_changed] * 4
        content = rng.choice(ways)(rng, content, others)
    return content


def bytes_changed(rng: random.Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Bits flipped, a part cut, doubled, overwritten or taken from another file."""
    data, size = bytearray(content), len(content)
    at = rng.randrange(size + 1)
    end = min(size, at + rng.choice((1, 2, 8, 64, 1000)))
    way = rng.randrange(8)
    if way == 0 and size:
        for _ in range(rng.choice((1, 1, 3, 20))):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif way == 1:
        del data[at:]
    elif way == 2:
        del data[at:end]
    elif way == 3:
        data[at:at] = data[at:end] * rng.choice((1, 2, 50))
    elif way == 4:
        data[at:end] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 30))))
    elif way == 5:
        data[at:at] = bytes(rng.choice(FORMAT_CHARS) for _ in range(rng.choice((1, 2, 9))))
    elif way == 6 and others:
        other = rng.choice(others)
        data[at:] = other[rng.randrange(len(other) + 1) :]
    else:
        data[:0] = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b\x08", b"PK\x03\x04", b"\x80\x04K\x01.", b"\n"))
    return bytes(data)


def lines_changed(rng: random.Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One line of several spoilt, doubled or left out."""
    del others
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at : at + 1] = rng.choice(([], [lines[at]] * 2, [json_changed(rng, lines[at])], [b""], [b"null"]))
    return b"\n".join(lines)


def json_changed(rng: random.Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One value of JSON replaced, removed, renamed, doubled or exchanged; tensors in it are changed as such."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return bytes_changed(rng, content, others)
    raws: dict[str, str] = {}
    places = list(inner(data))
    if not places:
        return json.dumps(rng.choice(ODD), allow_nan=True).encode()
    holder, key = rng.choice(places)
    way = rng.randrange(8)
    if isinstance(holder[key], str) and len(holder[key]) > 40 and way < 6 and (found := in_base64(rng, holder[key])):
        holder[key] = found
    elif way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[rng.choice((str(key) + "x", "", "__proto__", "../" + str(key), "é\ud800"))] = holder.pop(key)
    elif way == 2 and isinstance(holder, list):
        holder[key:key] = [holder[key]] * rng.choice((1, 1, 2, 500))
    elif way == 3:
        other, name = rng.choice(places)
        holder[key], other[name] = other[name], holder[key]
    elif way in (4, 5):
        raws["raw value"] = rng.choice(RAW)
        holder[key] = "raw value"
    else:
        holder[key] = rng.choice(ODD)
    try:
        text = json.dumps(data, allow_nan=True)
    except (ValueError, RecursionError):  # exchanged with what holds it
        return bytes_changed(rng, content, others)
    for mark, raw in raws.items():
        text = text.replace(f'"{mark}"', raw)
    if rng.random() < 0.05:  # a key twice
        text = text.replace("{", '{"format": 1, "version": [],', 1)
    return text.encode()


def inner(data: Any) -> Any:
    """Each value of JSON data, as what holds it and its key."""
    keys = data.keys() if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in list(keys):
        yield data, key
        yield from inner(data[key])


def in_base64(rng: random.Random, text: str) -> str:
    """Safetensors in base64, changed; empty if it is no such text."""
    try:
        stored = base64.b64decode(text, validate=True)
    except ValueError:
        return ""
    return base64.b64encode(safetensors_changed(rng, stored)).decode() if is_safetensors(stored) else ""


def is_safetensors(content: bytes) -> bool:
    return content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= len(content)


def safetensors_changed(rng: random.Random, content: bytes, others: Sequence[bytes] = ()) -> bytes:
    """The header's length, a dtype, a shape, an offset, a name, the JSON in its metadata, or the numbers changed."""
    size = int.from_bytes(content[:8], "little")
    body = content[8 + size :]
    try:
        header = json.loads(content[8 : 8 + size])
        names = [name for name in header if name != "__metadata__"]
        about = header.get("__metadata__") or {}
        way = rng.randrange(9)
        if way == 0:
            return rng.choice(SIZES).to_bytes(8, "little") + content[8:]
        if way == 1:
            return content[: 8 + size] + bytes_changed(rng, body, others)
        if way == 2 and names and len(body) >= 4:  # numbers that are none
            at = 4 * rng.randrange(len(body) // 4)
            odd = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"))
            return content[: 8 + size] + body[:at] + odd + body[at + 4 :]
        if way in (3, 4) and names:
            row = header[rng.choice(names)]
            key = rng.choice(list(row))
            shapes = ([], [0], [-1], [2**62, 0], [2**40], [1] * 70, [*row["shape"], 1], row["shape"][::-1], None, "x")
            ends = ([0, 2**40], [8, 0], [0], [-4, 4], [0, 2**64], [0, len(body)], None)
            row[key] = rng.choice({"dtype": DTYPES, "shape": shapes, "data_offsets": ends}.get(key, ODD))
        elif way == 5 and names:
            header[rng.choice((*ODD[14:31], "../x"))] = header.pop(rng.choice(names))
        elif way == 6 and names:
            del header[rng.choice(names)]
        elif about:
            key = rng.choice(list(about))
            text = str(about[key]).encode(errors="surrogatepass")
            about[key] = spoilt(rng, text).decode("utf-8", "surrogateescape") if rng.random() < 0.9 else rng.choice(ODD)
        else:
            header[rng.choice(("__metadata__", "new"))] = rng.choice(ODD)
        text = json.dumps(header, allow_nan=True).encode()
    except (ValueError, RecursionError, TypeError, AttributeError, LookupError):
        return bytes_changed(rng, content, others)
    return len(text).to_bytes(8, "little") + text + body
