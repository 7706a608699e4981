"""A small file with the new numbers of some heads, neurons and MLPs of one model, which `load_model` applies."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechsafety.codec import decode, encode, parse
from mechsafety.errors import MechsafetyError, first_line
from mechsafety.models.lens_model import LensModel
from mechsafety.models.parts import check_exists
from mechsafety.models.slices import check_values, part_slices
from mechsafety.nodes import Node
from mechsafety.output import json_text, output_file

FORMAT, VERSION = "mechsafety.parts_adapter", 1
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class PartsAdapter:
    """New numbers of some parts of one model.

    Attributes:
        model: Name of the model whose parts they are.
        weights_sha256: Hash of that model's weights. The numbers take the place of its own, so that no other fits.
        dtype: Data type of these weights.
        objective: What the numbers were trained for.
        parts: The heads, neurons and MLPs.
        values: The new numbers by layer and tensor, such as ``L3.W_Q`` (see `mechsafety.models.slices.part_slices`).
    """

    model: str
    weights_sha256: str
    dtype: str
    objective: str
    parts: tuple[Node, ...]
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def _write(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, whole or not at all. The same numbers give the same bytes.

        Raises:
            MechsafetyError: The name does not end in ``.safetensors``, or the place cannot be written to.
        """
        from safetensors.torch import save

        if Path(path).suffix != SUFFIX:
            raise MechsafetyError(f"an adapter called {Path(path).name!r}", expected=f"a name that ends in {SUFFIX}")
        tensors = {name: values.detach().cpu().contiguous() for name, values in self.values.items()}
        data = {"format": FORMAT, "version": VERSION, "adapter": encode(type(self), _without_values(self))}
        content = save(tensors, {FORMAT: json_text(data, None)})
        with output_file(path) as scratch:
            scratch.write_bytes(content)
        return Path(path)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "PartsAdapter":
        """Read the file.

        Raises:
            MechsafetyError: There is no such file, or it is no such adapter.
        """
        from safetensors import SafetensorError, safe_open

        name = Path(path).name
        if not Path(path).is_file():
            raise MechsafetyError(f"no such file: {path}", expected="an adapter that save_adapter wrote")
        try:
            with safe_open(str(path), framework="pt") as file:
                about = (file.metadata() or {}).get(FORMAT)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise MechsafetyError(
                f"{name} cannot be read ({first_line(error)})", expected="an adapter that save_adapter wrote"
            ) from None
        if about is None:
            raise MechsafetyError(
                f"{name} holds no parts of a model",
                expected="an adapter that save_adapter wrote",
                hint="give a peft adapter as its folder",
            )
        try:
            row: Any = parse(about, FORMAT, VERSION, VERSION)
            found: PartsAdapter = decode(cls, row.get("adapter"), "adapter")
        except MechsafetyError as error:
            raise MechsafetyError(f"{name}: {error.problem}", expected=error.expected, hint=error.hint) from None
        return cls(found.model, found.weights_sha256, found.dtype, found.objective, found.parts, tensors)

    def check_fits(self, model: LensModel) -> None:
        """Refuse another model than the one that the numbers were trained on.

        Raises:
            MechsafetyError: The weights are not those of the adapter's model, or the numbers do not fit its parts.
        """
        what = f"the adapter for {self.model}"
        if model.dtype_name != self.dtype:
            raise MechsafetyError(
                f"{what} was trained in {self.dtype}, and {model.name} is {model.dtype_name}",
                expected="the same data type",
                hint=f"load_model(..., dtype={self.dtype!r})",
            )
        if model.weights_sha256 != self.weights_sha256:
            raise MechsafetyError(
                f"{what} does not fit {model.name}: the weights have the hash {model.weights_sha256[:12]}",
                expected=f"{self.weights_sha256[:12]}, the model that it was trained on",
            )
        for node in self.parts:
            check_exists(model, node)
        check_values(part_slices(model, self.parts)[0], self.values, what)

    @torch.no_grad()
    def apply(self, model: LensModel) -> None:
        """Put the numbers into the model's weights, for good.

        Raises:
            MechsafetyError: As `check_fits`; nothing is changed then.
        """
        self.check_fits(model)
        parameters = dict(model.hf_model.named_parameters())
        for part in part_slices(model, self.parts)[0]:
            part.write(parameters[part.parameter], self.values[part.name])
        vars(model.reading(())).pop("_weights_sha256", None)  # computed anew when it is asked for


def is_parts_adapter(adapter: str | os.PathLike[str] | None) -> bool:
    """Whether an adapter was given as a file of this kind; peft's are folders."""
    return adapter is not None and Path(adapter).suffix == SUFFIX and not Path(adapter).is_dir()


def _without_values(adapter: PartsAdapter) -> PartsAdapter:
    return PartsAdapter(adapter.model, adapter.weights_sha256, adapter.dtype, adapter.objective, adapter.parts)
