"""Which kinds of model are accepted; every other kind is refused in one line, before TransformerLens sees it.

TransformerLens also wraps models on which the analyses are not exact. For multimodal models it installs packages.
"""

import math
from typing import Any

import torch

from mechsafety.errors import MechsafetyError, named
from mechsafety.models.placed import fetched, is_offloaded
from mechsafety.models.quantised import quantised, unknown

DECODER = "a decoder whose layers are attention and one MLP each (Llama, Qwen, Mistral, Phi, Gemma, OLMo, GPT ...)"
# names of layer types that are plain attention
ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention", "global", "local"})
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# settings that multiply (1) or divide (-1) the logits, and one that multiplies what each block adds; analyses that read
# weights would not see these factors
LOGIT_SCALES = {"logit_scale": 1, "logits_scaling": -1}
BLOCK_SCALE = "residual_multiplier"
# weights of a block that write to the residual stream, in the classes that have BLOCK_SCALE
OF_ATTENTION = ("self_attn.o_proj.",)
OF_MLP = ("mlp.down_proj.", "block_sparse_moe.experts.down_proj", "shared_mlp.output_linear.")


def check_kind(model: Any) -> None:
    """Refuse a Hugging Face model on which the analyses cannot be exact.

    Raises:
        MechsafetyError: The model is of another kind. The message says what it is and what is accepted.
    """
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise MechsafetyError(f"{name} is an encoder-decoder", expected=DECODER)
    if model.get_output_embeddings() is None:
        raise MechsafetyError(
            f"{name} has no language-model head, so it gives no logits",
            expected="a model such as LlamaForCausalLM",
            hint="load it with transformers.AutoModelForCausalLM",
        )
    if getattr(config, "kv_lora_rank", None):
        raise MechsafetyError(
            f"{name} has latent attention (kv_lora_rank={config.kv_lora_rank}): its heads share compressed keys "
            "and values",
            expected=DECODER,
        )
    others = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION)
    if others:
        raise MechsafetyError(f"{name} has layers without attention heads ({', '.join(others)})", expected=DECODER)
    scales = _scales(config)
    if not scales:
        return
    norm, writers = _final_norm(model), _writers(model)
    for field, factor in scales.items():
        known = isinstance(factor, int | float) and factor != 0  # MPT's factor may be the name of a rule
        if known and (writers if field == BLOCK_SCALE else norm is not None):
            continue
        raise MechsafetyError(
            f"{name} scales its logits or what its blocks add ({field}={factor}), which the analyses do not follow",
            expected=f"a model with {field}=1",
        )


def check_folded(model: Any) -> None:
    """Refuse a model that the user wrapped and whose configuration still multiplies logits or block outputs.

    Raises:
        MechsafetyError: The configuration has such a factor, which the message names.
    """
    for field, factor in _scales(model.config).items():
        raise MechsafetyError(
            f"a wrapped {type(model).__name__} with {field}={factor}, which the analyses do not follow",
            expected="the Hugging Face model, whose weights take the factor over when it is loaded",
            hint="pass load_model((hf_model, tokenizer)), not yet wrapped",
        )


def has_scales(config: Any) -> bool:
    """Whether `fold_scales` would change weights."""
    return bool(_scales(config))


def fold_scales(model: Any) -> None:
    """Move the configuration's factors on logits and block outputs into the weights, where analyses see them.

    Logits are linear in the final norm's weight, and what a block adds is linear in its output weights. The model
    therefore computes the same function, up to rounding. Its configuration then holds factors of 1, so that a second
    call changes nothing.
    """
    scales = _scales(model.config)
    if not scales:
        return
    logits = math.prod(factor ** LOGIT_SCALES[field] for field, factor in scales.items() if field in LOGIT_SCALES)
    written = [(tensor, scales[BLOCK_SCALE]) for tensor in _writers(model)] if BLOCK_SCALE in scales else []
    normed = [(tensor, logits) for tensor in _final_norm(model).parameters()] if logits != 1.0 else []
    with torch.no_grad():
        for tensor, factor in (*written, *normed):
            tensor.mul_(factor)
    for field in scales:
        for module in (model.config, *(module for module in model.modules() if hasattr(module, field))):
            setattr(module, field, 1.0)


def _scales(config: Any) -> dict[str, Any]:
    """The factors of a configuration that differ from 1, by name."""
    found = {field: getattr(config, field, None) for field in (*LOGIT_SCALES, BLOCK_SCALE)}
    return {field: factor for field, factor in found.items() if factor not in (None, 1.0)}


def _final_norm(model: Any) -> Any:
    """The norm before the language-model head if it multiplies by a weight and nothing else follows; otherwise None."""
    norm = getattr(model.base_model, "norm", None)
    return norm if getattr(getattr(norm, "weight", None), "ndim", 0) == 1 else None


def _writers(model: Any) -> list[torch.Tensor]:
    """The weights that write what the blocks add; empty if some attention or MLP has weights of other names."""
    found = []
    for layer in getattr(model.base_model, "layers", ()):
        own = dict(layer.named_parameters())
        for names in (OF_ATTENTION, OF_MLP):
            chosen = [tensor for name, tensor in own.items() if name.startswith(names)]
            if not chosen:
                return []
            found += chosen
    return found


def has_experts(model: torch.nn.Module) -> bool:
    """Whether a model is a mixture of experts in some layer."""
    return any(
        path.rpartition(".")[2] == "experts" or "Experts" in type(module).__name__
        for path, module in model.named_modules()
    )


def is_multimodal(config: Any) -> bool:
    """Whether a configuration holds a text model beside others (images, sound)."""
    return not config.is_encoder_decoder and config.get_text_config(decoder=True) is not config


def text_part(model: Any) -> Any:
    """The language model inside a multimodal model, with the same weights; a text model is returned as it is.

    The caller compares the logits of the language model with those of the whole model (see `load_model`).

    Raises:
        MechsafetyError: transformers has no class for the language model alone.
    """
    if not is_multimodal(model.config):
        return model
    from transformers import AutoModelForCausalLM

    config = model.config.get_text_config(decoder=True)
    kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    inner = getattr(model.base_model, "language_model", None)
    part = None
    if kind is not None and inner is not None:
        with torch.device("meta"):
            part = kind(config)
        prefix = part.base_model_prefix
        if type(getattr(part, prefix, None)) is type(inner):
            setattr(part, prefix, inner)
            part.set_output_embeddings(model.get_output_embeddings())
            part.generation_config = model.generation_config
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    if part is None or any(id(tensor) not in own for tensor in (*part.parameters(), *part.buffers())):
        raise MechsafetyError(
            f"{type(model).__name__} is multimodal, and its language model cannot be taken out alone", expected=DECODER
        )
    return part.eval()


def check_weights(model: Any) -> None:
    """Refuse weights that are not in memory, are quantised in an unknown way, or are not finite.

    Raises:
        MechsafetyError: The model has such weights. The message gives their number and one name.
    """
    parameters = dict(model.named_parameters())
    # accelerate fetches offloaded weights when their module runs
    stored = {id(t) for module in model.modules() if is_offloaded(module) for t in module._parameters.values()}
    absent = [name for name, tensor in parameters.items() if tensor.is_meta and id(tensor) not in stored]
    if absent:
        raise MechsafetyError(
            f"weights that are not in memory (on the meta device): {named(absent, 'tensor')}",
            expected="a model with all its weights loaded",
            hint="load the weights, or let load_model place them: load_model(name, device_map='auto')",
        )
    strange, taken = unknown(model), set(quantised(model))
    if strange:
        kind = strange[min(strange)]
        raise MechsafetyError(
            f"quantised layers: {named(strange, 'layer')}, a {kind}",
            expected="float32, bfloat16 or float16, or only weights of 4 bits (bitsandbytes) or 8 bits (torchao)",
            hint="load the model without quantization_config, or with BitsAndBytesConfig(load_in_4bit=True)",
        )
    packed = [name for name, tensor in parameters.items() if tensor.dtype not in FLOATS and name not in taken]
    packed += [name for name, _ in model.named_buffers() if name.endswith(".qweight")]
    if packed:
        raise MechsafetyError(
            f"quantised weights: {named(packed, 'tensor')}",
            expected="float32, bfloat16 or float16",
            hint="load the model without quantization_config, or from its full-precision checkpoint",
        )
    broken = [name for name, t in parameters.items() if not t.is_meta and name not in taken and not _finite(t)]
    for path, module in model.named_modules():
        if is_offloaded(module):
            with fetched(module):
                broken += [f"{path}.{name}" for name, t in module.named_parameters(recurse=False) if not _finite(t)]
    if broken:
        raise MechsafetyError(
            f"weights that are NaN or infinite: {named(broken, 'tensor')}",
            expected="finite weights",
            hint="save the checkpoint again",
        )


def _finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    ends = torch.stack(torch.aminmax(tensor.detach()))  # NaN if any value is NaN; makes no copy of the tensor
    return bool(torch.isfinite(ends).all())
