"""Which kinds of model are taken; every other one is refused in one line, before TransformerLens sees it.

TransformerLens wraps more than the analyses are exact on, and for multimodal models it installs packages.
"""

from typing import Any

import torch

from mechsafety.errors import MechsafetyError, named

DECODER = "a decoder whose layers are attention and one MLP each (Llama, Qwen, Mistral, Phi, Gemma, OLMo, GPT ...)"
# what a layer may be called that is plain attention
ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention", "global", "local"})
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# what a configuration may multiply logits or block outputs by, unseen by analyses that read the weights
MULTIPLIERS = {
    "logit_scale": "its logits",
    "logits_scaling": "its logits",
    "residual_multiplier": "what its blocks add",
}


def check_kind(model: Any) -> None:
    """Refuse a Hugging Face model on which the analyses cannot be exact.

    Raises:
        MechsafetyError: What it is, and what is taken.
    """
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise MechsafetyError(f"{name} is an encoder-decoder", expected=DECODER)
    if model.get_output_embeddings() is None:
        raise MechsafetyError(
            f"{name} has no language-model head, so it gives no logits",
            expected="a model such as LlamaForCausalLM",
            cure="load it with transformers.AutoModelForCausalLM",
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
    for field, what in MULTIPLIERS.items():
        factor = getattr(config, field, None)
        if factor not in (None, 1.0):
            raise MechsafetyError(
                f"{name} scales {what} ({field}={factor}), which the analyses do not follow",
                expected=f"a model with {field}=1",
            )


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
    """The language model inside a multimodal one, of the same weights; a text model as it is.

    The caller compares the part's logits with the whole model's (see `load_model`).

    Raises:
        MechsafetyError: transformers has no class for the part alone.
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
    """Refuse weights that are not there, not plain numbers, or not finite.

    Raises:
        MechsafetyError: How many they are, and the name of one.
    """
    parameters = dict(model.named_parameters())
    absent = [name for name, tensor in parameters.items() if tensor.is_meta]
    if absent:
        raise MechsafetyError(
            f"weights that are not in memory (on the meta device): {named(absent, 'tensor')}",
            expected="a model with all its weights loaded",
            cure="load it without device_map and without offloading",
        )
    packed = [name for name, tensor in parameters.items() if tensor.dtype not in FLOATS]
    packed += [name for name, _ in model.named_buffers() if name.endswith(".qweight")]
    if packed:
        raise MechsafetyError(
            f"quantised weights: {named(packed, 'tensor')}",
            expected="float32, bfloat16 or float16",
            cure="load the model without quantization_config, or from its full-precision checkpoint",
        )
    broken = [name for name, tensor in parameters.items() if not _finite(tensor)]
    if broken:
        raise MechsafetyError(
            f"weights that are NaN or infinite: {named(broken, 'tensor')}",
            expected="finite weights",
            cure="save the checkpoint again",
        )


def _finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    ends = torch.stack(torch.aminmax(tensor.detach()))  # NaN if any is; makes no copy of the tensor
    return bool(torch.isfinite(ends).all())
