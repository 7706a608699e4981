"""The outcome of one work item as bytes, with what it belongs to and a checksum."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from mechsafety.codec import decode, encode, read_json
from mechsafety.errors import MechsafetyError
from mechsafety.output import json_text

FORMAT = "mechsafety.item"
VERSION = "1"


@dataclass(frozen=True, slots=True)
class Place:
    """Which item an outcome is of.

    Attributes:
        run: Hash of the call and of the machine's settings.
        sweep: Hash of the sweep.
        item: Number of the item in its sweep.
    """

    run: str
    sweep: str
    item: int

    def to_json(self) -> dict[str, str]:
        """As stored."""
        return {"run": self.run, "sweep": self.sweep, "item": str(self.item)}


def pack(kind: Any, value: Any, place: Place) -> bytes:
    """A value as the bytes of one safetensors file.

    Args:
        kind: The value's annotation, as `mechsafety.codec` reads it.
        value: The value.
        place: What it is the outcome of.
    """
    from safetensors.torch import save

    tensors: dict[str, Any] = {}
    text = json_text(encode(kind, value, "value", tensors), None)
    about = {"format": FORMAT, "version": VERSION, **place.to_json(), "value": text}
    return bytes(save(tensors, {**about, "sha256": _checksum(about, tensors)}))


def unpack(kind: Any, data: bytes, place: Place) -> Any:
    """Inverse of `pack`.

    Raises:
        MechsafetyError: Damaged bytes, or the outcome of another item.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        size = int.from_bytes(data[:8], "little")
        about = dict(read_json(data[8 : 8 + size])["__metadata__"])
        tensors = load(data)
        given = about.pop("sha256")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MechsafetyError(f"damaged ({type(error).__name__})", expected="an item of a run") from None
    if about.get("format") != FORMAT or about.get("version") != VERSION or _checksum(about, tensors) != given:
        raise MechsafetyError("damaged (its checksum is another)", expected="an item of a run")
    if {name: about.get(name) for name in place.to_json()} != place.to_json():
        raise MechsafetyError("of another run", expected="an item of this run")
    return decode(kind, read_json(about["value"]), "value", tensors)


def _checksum(about: dict[str, Any], tensors: dict[str, Any]) -> str:
    """Hash of all that a file holds besides the hash itself."""
    import torch

    digest = hashlib.sha256(json.dumps(about, sort_keys=True, allow_nan=False).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(torch.atleast_1d(tensor).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
