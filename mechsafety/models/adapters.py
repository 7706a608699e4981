"""Merge adapters, so that the analyses see one plain model that computes what peft computes."""

import copy
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechsafety.codec import read_json
from mechsafety.errors import MechsafetyError, first_line

logger = logging.getLogger(__name__)

CONFIG, STORED, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MERGEABLE = "an adapter that changes weights, such as LoRA, DoRA, VeRA or (IA)3"
# how far a merged layer's output may be from peft's, as a share of the output's norm
LAYER_ROUNDING = {"float64": 1e-5, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
# how far a logit may be from peft's, for logits of up to 50; half precision has no entry, because rounding alone moves
# logits of the demo model by 1.6 there
LOGIT_ROUNDING = {"float64": 1e-5, "float32": 1e-3}


def apply_adapter(model: Any, adapter: str | os.PathLike[str], probes: Sequence[Int[Tensor, "1 _"]]) -> Any:
    """Merge a peft adapter into a plain Hugging Face model, in place, and compare with peft's own output.

    An (IA)3 adapter on ``down_proj`` scales the MLP neurons' activations. If the MLP is gated (act(gate) * up), the
    scales are folded into the rows of ``up_proj``, which multiplies the same activations. The model then computes the
    same function. The scaled value stands at the input of ``down_proj``, where the safety-neuron method (Chen et al.
    2024) reads and patches. If the scales were folded into ``down_proj`` itself, the base and the aligned model would
    differ in weights that patching cannot reach.

    peft merges everything else. If two places share a weight (a tied unembedding, replicated layers) and an adapter
    changes one of them, the weight is copied first.

    Args:
        model: The base model.
        adapter: Folder that peft wrote.
        probes: Token ids on which the merged model is compared with peft's.

    Raises:
        MechsafetyError: The folder holds no adapter; the adapter changes no weights or does not fit the model; or the
            merged model computes something else than peft.
    """
    folder = Path(adapter)
    name, config = folder.name, read_config(folder)
    try:
        from peft import get_peft_model

        options = _options(folder)
        _check_kind(name, options)
        tokens = _trained_tokens(options)
        rows = [*probes, *([torch.tensor([tokens], device=model.device)] if tokens else [])]
        before = _logits(model, rows)
        options.inference_mode = True
        wrapped = get_peft_model(model, options)
    except MechsafetyError:
        raise
    except Exception as error:  # peft raises many types; the user needs one line
        raise _misfit(name, model, config, error) from error
    try:
        _load_weights(wrapped, folder)
    except Exception as error:
        wrapped.unload()
        raise _misfit(name, model, config, error) from error
    return _merge(wrapped, name, rows, before)


def check_fits(model: Any, adapter: str | os.PathLike[str]) -> None:
    """Refuse an adapter for another base model before the base model's weights are read.

    `apply_adapter` checks what only the weights can show.

    Args:
        model: The base model without weights (on the meta device); the adapter's layers are put into it.
        adapter: Folder that peft wrote.

    Raises:
        MechsafetyError: The folder holds no adapter, or one that does not fit the model.
    """
    folder = Path(adapter)
    name, config = folder.name, read_config(folder)
    from peft import get_peft_model, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        wrapped = get_peft_model(model, _options(folder))
        stored = load_peft_weights(str(folder), device="cpu")
    except Exception as error:
        if "not found in the base model" in str(error):
            raise _misfit(name, model, config, error) from error
        return  # the missing weights may be the cause: `apply_adapter` will find out
    for key, tensor in get_peft_model_state_dict(wrapped, save_embedding_layers=False).items():
        if key in stored and stored[key].shape != tensor.shape:
            shapes = f"{tuple(stored[key].shape)} for {tuple(tensor.shape)}"
            raise _misfit(name, model, config, ValueError(f"size mismatch for {key}: {shapes}"))


def _options(folder: Path) -> Any:
    """An adapter's configuration without its base model's name, because peft warns if the model's name differs."""
    from peft import PeftConfig

    options = PeftConfig.from_pretrained(str(folder))
    options.base_model_name_or_path = None
    return options


def merged_copy(wrapped: Any, probes: Sequence[Int[Tensor, "1 _"]]) -> Any:
    """A plain model that computes what a `PeftModel` computes with its active adapters; the original is unchanged."""
    name = "+".join(wrapped.active_adapters)
    _check_kind(name, wrapped.active_peft_config)
    return _merge(copy.deepcopy(wrapped).eval(), name, probes, None)


def base_and_adapter(given: str | os.PathLike[str]) -> tuple[str, Path] | None:
    """Base model and folder of an adapter that was given as the model; None if it is not an adapter.

    The base is a hub id or a local folder. A relative folder is looked up from the working folder, then from the
    adapter's folder.

    Raises:
        MechsafetyError: The adapter names no base model, or a folder that does not exist.
    """
    folder = Path(given).expanduser()
    if not (folder / CONFIG).is_file():
        return None
    base, hint = read_config(folder).get("base_model_name_or_path"), f"pass the base model and adapter={folder.name!r}"
    if not base:
        raise MechsafetyError(f"the adapter {folder.name!r} names no base model", hint=hint)
    for place in (Path(base).expanduser(), folder / base):
        if place.exists():
            return str(place), folder
    if looks_local(base):
        raise MechsafetyError(
            f"the base model {base!r} of the adapter {folder.name!r} is not there",
            expected="a model folder or a hub id",
            hint=hint,
        )
    return base, folder


def looks_local(name: str) -> bool:
    """Whether a name can only be a path on this machine; a hub id has at most one slash.

    Example:
        >>> looks_local("./mine"), looks_local("models/mine/last"), looks_local("owner/name")
        (True, True, False)
    """
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or "\\" in name


def is_peft(model: Any) -> bool:
    """Whether this is a `PeftModel`."""
    return any(kind.__name__ == "PeftModel" and kind.__module__.startswith("peft") for kind in type(model).__mro__)


def check_no_adapter(model: Any) -> None:
    """Refuse adapter layers inside a plain model, as transformers' own ``load_adapter`` puts them."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise MechsafetyError(
            f"a {type(model).__name__} with adapter layers that are not merged",
            expected="a plain model, or a PeftModel",
            hint="load the base model and pass adapter=FOLDER",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter folder.

    Raises:
        MechsafetyError: The folder has no configuration, or peft did not write it.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise MechsafetyError(f"no adapter in {folder}", expected=f"a folder with {CONFIG} (peft format)")
    try:
        config = read_json(path.read_bytes())
    except ValueError as error:
        raise MechsafetyError(f"{path} is not JSON ({first_line(error)})", expected="peft's own file") from None
    if not isinstance(config, dict) or not config.get("peft_type"):
        raise MechsafetyError(f"{path} names no peft_type", expected="peft's own file")
    if (folder / PICKLED).is_file() and not (folder / STORED).is_file():
        raise MechsafetyError(
            f"the adapter {folder.name!r} holds {PICKLED}, which is a pickle",
            expected=STORED,
            hint="load it with peft where it was made, and save it again",
        )
    return config


def _check_kind(name: str, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt or kind == "XLORA":
        raise MechsafetyError(f"the adapter {name!r} is {kind}, which changes no weights", expected=MERGEABLE)


def _misfit(name: str, model: Any, config: dict[str, Any], error: Exception) -> MechsafetyError:
    base = config.get("base_model_name_or_path")
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    reason = lines[0][:200] if lines else first_line(error)
    return MechsafetyError(
        f"the adapter {name!r} does not fit the model ({reason})",
        expected="an adapter that was trained for this model" + (f" (it names {base!r})" if base else ""),
    )


def _trained_tokens(config: Any) -> list[int]:
    """Tokens whose embedding rows an adapter trains, at most 64; only prompts with these tokens show its effect."""
    found = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    lists = found.values() if isinstance(found, dict) else [found]
    return sorted({int(token) for tokens in lists for token in tokens})[:64]


def _load_weights(wrapped: Any, folder: Path) -> None:
    """Load an adapter's tensors; a missing or unused tensor is an error here, while peft at most warns."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    mapping = getattr(wrapped.get_base_model(), "_checkpoint_conversion_mapping", {})
    try:
        result = wrapped.load_adapter(str(folder), "default", torch_device=str(wrapped.device), key_mapping=mapping)
    except KeyError as error:  # a module that the adapter saves whole is missing
        raise ValueError(f"it lacks {error.args[0]}") from None
    stored = load_peft_weights(str(folder), device="cpu")
    broken = [name for name, tensor in stored.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{len(broken)} of its weights are NaN or infinite, such as {min(broken)}")
    biases = {name for name in get_peft_model_state_dict(wrapped, save_embedding_layers=False) if name.endswith("bias")}
    state = wrapped.state_dict()
    found = {state[name].data_ptr() for name in state.keys() - set(result.missing_keys)}
    # a tensor that many layers share (VB-LoRA) is stored once
    lost = {name for name in result.missing_keys if state[name].data_ptr() not in found} | (biases - set(stored))
    for problem, names in (("lacks", lost), ("has besides", result.unexpected_keys)):
        if names:
            raise ValueError(f"it {problem} {len(names)} weights, such as {min(names)}")


@torch.no_grad()
def _merge(wrapped: Any, name: str, probes: Sequence[Tensor], before: Sequence[Tensor] | None) -> Any:
    """Merge an adapter, and check that the merged layers and logits are peft's.

    Args:
        wrapped: The `PeftModel`, not merged.
        name: The adapter's name.
        probes: Token ids.
        before: The base model's logits on the probes, to check that the adapter has an effect; None skips that check.
    """
    calls: list[_Call] = []
    with ExitStack() as stack:
        for path, layer in _layers(wrapped).items():
            stack.callback(layer.register_forward_hook(_recorder(path, layer, calls), with_kwargs=True).remove)
        expected = _logits(wrapped, probes)
    idle = before is not None and all(torch.equal(one, other) for one, other in zip(before, expected, strict=True))
    bases = [layer.get_base_layer() for layer in _layers(wrapped).values()] if idle else []
    old = [[tensor.clone() for tensor in base.parameters()] for base in bases]
    _copy_shared(wrapped)
    folded = _fold_feedforward_scales(wrapped)
    try:
        merged = wrapped.merge_and_unload().eval()
    except Exception as error:
        raise MechsafetyError(
            f"the adapter {name!r} cannot be merged into the weights ({first_line(error)})", expected=MERGEABLE
        ) from error
    for call in calls:
        if call.path not in folded:
            _check_gap(name, f"in {call.path}", call.gap(), LAYER_ROUNDING[_kind(call.out)])
    for found, wanted in zip(_logits(merged, probes), expected, strict=True) if _kind(merged) in LOGIT_ROUNDING else ():
        size = max(1.0, float(wanted.abs().max()) / 50)  # rounding grows with the logits
        _check_gap(name, "in its logits", float((found - wanted).abs().max()) / size, LOGIT_ROUNDING[_kind(merged)])
    if idle:
        new = [list(base.parameters()) for base in bases]
        if any(not torch.equal(a, b) for one, two in zip(old, new, strict=True) for a, b in zip(one, two, strict=True)):
            raise MechsafetyError(
                f"the adapter {name!r} changes weights and no logit of {len(probes)} prompts",
                expected="an adapter that has an effect",
            )
        logger.warning("the adapter %r changes nothing, as one that was not trained", name)
    return merged


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of an adapted layer before the merge: its arguments and its output."""

    path: str
    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor

    def gap(self) -> float:
        """Distance of the merged layer's output from the stored one, as a share of the stored output's norm."""
        found = self.layer.get_base_layer()(*self.args, **self.kwargs)
        return float((found - self.out).float().norm() / self.out.float().norm().clamp(min=1e-9))


def _recorder(path: str, layer: Any, calls: list[_Call]) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if isinstance(out, Tensor):
            # store copies: a block may add to the input or the output in place (Falcon)
            read = tuple(value.clone() if isinstance(value, Tensor) else value for value in args)
            calls.append(_Call(path, layer, read, kwargs, out.clone()))

    return hook


def _check_gap(name: str, where: str, gap: float, allowed: float) -> None:
    if not gap <= allowed:
        raise MechsafetyError(
            f"the merged adapter {name!r} computes something else than peft: off by {gap:.2g} {where}",
            expected=f"at most {allowed:.0e}, which is rounding",
        )


def _kind(holder: Any) -> str:
    return str(holder.dtype).removeprefix("torch.")


@torch.no_grad()
def _logits(model: Any, rows: Sequence[Tensor]) -> list[Tensor]:
    return [model(input_ids=row, return_dict=True).logits[0].float() for row in rows]


def _layers(wrapped: Any) -> dict[str, Any]:
    """The layers that adapters are merged into, by name; a layer inside another such layer is left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, Any] = {}
    for path, module in wrapped.named_modules():
        if isinstance(module, BaseTunerLayer) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return found


def _copy_shared(wrapped: Any) -> None:
    """Copy weights that an adapted layer shares with others, so that merging changes the adapted layer alone."""
    owners: dict[int, list[tuple[Any, str]]] = {}
    for module in wrapped.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    merged = {id(layer.get_base_layer()) for layer in _layers(wrapped).values()}
    for places in owners.values():
        if len(places) > 1 and any(id(module) in merged for module, _ in places):
            for module, name in places[1:]:
                old = module._parameters[name]
                module._parameters[name] = torch.nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)


def _fold_feedforward_scales(wrapped: Any) -> set[str]:
    """Move (IA)3 scales from ``down_proj`` inputs to ``up_proj`` rows; return the names of the changed layers."""
    folded: set[str] = set()
    for path, mlp in wrapped.named_modules():
        up: Any = getattr(mlp, "up_proj", None)
        down: Any = getattr(mlp, "down_proj", None)
        if up is not None and hasattr(down, "ia3_l") and down.is_feedforward and _fold(mlp, up, down):
            folded |= {f"{path}.up_proj", f"{path}.down_proj"}
    return folded


def _fold(mlp: Any, up: Any, down: Any) -> bool:
    """Fold one MLP's scales, and return whether that worked.

    The fold is undone if the MLP then computes something else, for example because a nonlinearity follows ``up_proj``.
    """
    weight, bias = up.weight, up.bias
    names = [name for name in down.active_adapters if name in down.ia3_l]
    probe = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    kept = [tensor.detach().clone() for tensor in (weight, *([] if bias is None else [bias]))]
    scales = {name: down.ia3_l[name].data.clone() for name in names}
    wanted = mlp(probe)
    for name in names:
        scale = scales[name].flatten().to(weight)
        weight.mul_(scale[:, None])
        if bias is not None:
            bias.mul_(scale)
        down.ia3_l[name].data.fill_(1.0)
    gap = float((mlp(probe) - wanted).float().norm() / wanted.float().norm().clamp(min=1e-9))
    if gap <= LAYER_ROUNDING[_kind(weight)]:
        return True
    for tensor, old in zip((weight, bias), kept, strict=False):
        tensor.copy_(old)
    for name in names:
        down.ia3_l[name].data.copy_(scales[name])
    return False
