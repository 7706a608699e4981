"""Linear layers with weights of 4 or 8 bits (bitsandbytes, torchao): which are accepted, and their numbers.

In an accepted layer only the weights are rounded. The layer then computes ``x W'`` with fixed numbers ``W'``, which
this module gives. If activations are rounded as well, no such ``W'`` exists. Such layers are refused.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mechsafety.errors import MechsafetyError


def _kind(module: nn.Module) -> str:
    """Class of a layer, or of its weight, that another library has quantised; empty if none has."""
    found: tuple[type, ...] = (type(module), type(module._parameters.get("weight")))
    for kind in found:
        if kind.__module__.startswith(("bitsandbytes", "torchao", "torch.ao.nn.quantized")):
            return kind.__name__
    return ""


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weights are of 4 or 8 bits, and are the only thing that is rounded."""
    # torchao's tensor of 8 bits rounds activations only where it was told to
    return _kind(module) == "Linear4bit" or (
        _kind(module) == "Int8Tensor" and getattr(module.weight, "act_quant_kwargs", None) is None
    )


def quantised(model: nn.Module) -> list[str]:
    """Names of the weights that are quantised in an accepted way."""
    return [f"{path}.weight" for path, module in model.named_modules() if is_quantised(module)]


def unknown(model: nn.Module) -> dict[str, str]:
    """Names of layers that are quantised in another way, with their classes."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if _kind(module) and not is_quantised(module) and path.rpartition(".")[0] not in found:
            found[path] = _kind(module)
    return found


def use_exact_kernels(model: nn.Module) -> None:
    """Let layers of 4 bits on a CPU compute in the dtype that they were made with.

    On some CPUs bitsandbytes takes a faster kernel in bfloat16, without gradients only: edits and gradients would then
    be of two different functions.

    Raises:
        MechsafetyError: The model has run with the faster kernel, which has rearranged its bits.
    """
    for path, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise MechsafetyError(
                    f"4-bit weights that bitsandbytes has rearranged in a run on this CPU: {path}",
                    expected="a model that has not run yet",
                    hint="load it again, and pass it to load_model first",
                )
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def dequantised(module: Any) -> Tensor:
    """The numbers [out in] that an accepted layer computes with: what it makes of the unit vectors.

    Each library stores the bits in its own way, which may differ from one processor to the next.
    """
    weight, bias = module.weight, module.bias
    dtype = getattr(module, "compute_dtype", None) or (weight.dtype if weight.is_floating_point() else torch.float32)
    rows = module(torch.eye(module.in_features, dtype=dtype, device=weight.device))
    return (rows if bias is None else rows - bias).T


def stored_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a weight: several where another library stores factors beside it."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    inner = [getattr(tensor, name, None) for name in flatten()[0]]
    return [plain for part in inner if isinstance(part, torch.Tensor) for plain in stored_tensors(part)]
