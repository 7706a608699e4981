"""Merging adapters, so that the analyses see one plain model."""

import json
import os
from pathlib import Path
from typing import Any

from mechsafety.errors import MechsafetyError, first_line


def apply_adapter(model: Any, adapter: str | os.PathLike[str]) -> Any:
    """Merge a peft adapter into a plain Hugging Face model, in place.

    An (IA)3 adapter on ``down_proj`` scales the MLP neurons' activations. It is folded into the rows of ``up_proj``,
    which multiplies the same activations: the function computed is the same, and the scaled value is what stands at the
    input of ``down_proj``, where the safety-neuron method (Chen et al. 2024) reads and patches. Folded into
    ``down_proj`` itself, the base and the aligned model would differ in weights that patching cannot reach.
    Other adapters are merged by peft.

    Raises:
        MechsafetyError: The folder holds no adapter, or one that does not fit the model.
    """
    folder = Path(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise MechsafetyError(f"no adapter in {adapter}", expected="a folder with adapter_config.json (peft format)")
    from peft import PeftModel

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        wrapped = PeftModel.from_pretrained(model, str(folder))
        _check_complete(wrapped, folder)
    except Exception as error:  # peft raises many types; the user needs one line
        raise MechsafetyError(
            f"the adapter {folder.name!r} does not fit the model ({first_line(error)})",
            expected="an adapter that was trained for this model",
        ) from error
    if config.get("peft_type") == "IA3":
        _fold_feedforward_scales(wrapped)
    return wrapped.merge_and_unload().eval()


def _check_complete(wrapped: Any, folder: Path) -> None:
    """Refuse an adapter of a model with other layers, which peft loads in part with a warning at most."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    stored = {name for name in load_peft_weights(str(folder), device="cpu") if wrapped.base_model.prefix in name}
    expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    for problem, names in (("lacks", expected - stored), ("has besides", stored - expected)):
        if names:
            raise ValueError(f"it {problem} {len(names)} weights, such as {min(names)}")


def _fold_feedforward_scales(wrapped: Any) -> None:
    """Move (IA)3 scales from ``down_proj`` inputs to ``up_proj`` rows where the MLP is gated (act(gate) * up)."""
    import torch

    for module in wrapped.modules():
        up: Any = getattr(module, "up_proj", None)
        down: Any = getattr(module, "down_proj", None)
        if up is None or not hasattr(down, "ia3_l") or not down.is_feedforward:
            continue
        for name in down.active_adapters:
            scales = down.ia3_l[name].data.flatten()
            with torch.no_grad():
                up.weight.mul_(scales.to(up.weight)[:, None])
                if up.bias is not None:
                    up.bias.mul_(scales.to(up.bias))
                down.ia3_l[name].data.fill_(1.0)
