"""GGUF files as plain float32 Hugging Face models; what transformers would leave unread is understood or an error.

transformers reads the tensors and settings that it has names for and passes over all others without a word. A setting
that changes what the model computes must not get lost that way.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError, first_line, named
from mechsafety.models.kinds import check_kind

# the scaling of Llama 3.1 to 3.3, which differ in the factor alone
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# settings that change what is computed: everything under these heads, and the names below
HEADS = ("rope.", "attention.")
NAMES = ("_scale", "softcapping", "use_parallel_residual")
ROPE_FREQS = "rope_freqs.weight"
WINDOW = "sliding_window"
# settings that transformers has a place for and does not read from files of every architecture
PLACES = {
    f"attention.{WINDOW}": WINDOW,
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
CHECKPOINT = "load the Hugging Face checkpoint that it was made from"


def load_gguf(path: Path) -> tuple[Any, Any]:
    """A GGUF file as a plain float32 Hugging Face (model, tokenizer).

    Raises:
        MechsafetyError: The file is damaged or lacks parts, or holds a tensor or setting that would stay unread.
    """
    file = _open(path)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
        quantised, report = loaded
    except Exception as error:  # gguf and transformers raise whatever they meet; the user needs one line
        raise MechsafetyError(f"cannot read {path.name!r} ({first_line(error)})", expected="a GGUF file") from error
    check_kind(quantised)
    _check_tensors(path.name, file, quantised, report)
    # transformers marks the de-quantised weights as quantised and then refuses to save or convert them
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(quantised.config).from_dict(settings)
    _apply_settings(path.name, file, config)
    _check_settings(path.name, file, config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    return model.eval(), tokenizer


def _open(path: Path) -> Any:
    """The file's table of contents."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MechsafetyError("reading a GGUF file needs the package gguf", cure="run: pip install gguf") from None
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise MechsafetyError(f"{path.name!r} is not a GGUF file", expected="a file that begins with GGUF")
    try:
        file = GGUFReader(path)
        tensors = file.tensors
    except Exception as error:  # gguf raises whatever it meets; the user needs one line
        raise MechsafetyError(
            f"{path.name!r} is cut off or damaged ({first_line(error)})",
            expected="a whole GGUF file",
            cure="download it again",
        ) from error
    if not tensors:
        raise MechsafetyError(f"{path.name!r} holds no tensors", expected="a GGUF file of a model")
    if (_value(file, "split.count") or 1) > 1:
        raise MechsafetyError(f"{path.name!r} is one part of several", cure="merge them: llama-gguf-split --merge")
    if _value(file, "tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.merges" not in file.fields:
        raise MechsafetyError(
            f"{path.name!r} holds no merges (tokenizer.ggml.merges), so its text cannot be tokenized",
            expected="a GGUF file with its whole tokenizer",
            cure="convert the model again with a current llama.cpp",
        )
    return file


def _value(file: Any, key: str) -> Any:
    return file.fields[key].contents() if key in file.fields else None


def _check_tensors(name: str, file: Any, model: Any, report: Mapping[str, Any]) -> None:
    """Every tensor of the file is in the model, and every one of the model was in the file."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    if report["missing_keys"]:
        raise MechsafetyError(
            f"{name!r} lacks {named(report['missing_keys'], 'tensor')}",
            expected=f"every tensor of {type(model).__name__}",
        )
    kinds = {arch: kind for kind, arch in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(kinds[_value(file, "general.architecture")], model.config.num_hidden_layers)
    prefix = f"{model.base_model_prefix}."
    ends = (".weight", ".bias")
    read = {
        names.get_name(key, try_suffixes=ends) or names.get_name(key.removeprefix(prefix), try_suffixes=ends)
        for key in model.state_dict()
    }
    unread = {tensor.name for tensor in file.tensors} - read - {ROPE_FREQS}
    if unread:
        raise MechsafetyError(
            f"{name!r} holds what transformers does not read: {named(unread, 'tensor')}",
            expected="a file whose tensors are all the model's",
            cure=CHECKPOINT,
        )


def _apply_settings(name: str, file: Any, config: Any) -> None:
    """Give the model the settings that transformers has a place for and does not read from the file."""
    arch = _value(file, "general.architecture")
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    for key, field in PLACES.items():
        found = _value(file, f"{arch}.{key}")
        if found is not None and hasattr(config, field) and (field != WINDOW or "sliding_attention" in kinds):
            setattr(config, field, found)
    rope = config.rope_parameters or {}
    theta = _value(file, f"{arch}.rope.freq_base")
    if "rope_theta" in rope:
        rope = {**rope, **({} if theta is None else {"rope_theta": theta})}
        config.rope_parameters = {**rope, **_rope_scaling(name, file, rope["rope_theta"])}


def _rope_scaling(name: str, file: Any, theta: float) -> dict[str, Any]:
    """The scaling of the rotary embedding that a file of Llama 3.1 and later holds as factors of its frequencies."""
    found = next((tensor.data for tensor in file.tensors if tensor.name == ROPE_FREQS), None)
    factors = torch.ones(1).double() if found is None else torch.tensor(found).double().flatten()
    factor = float(factors.max())
    if bool((factors == 1).all()):
        return {}
    if not torch.allclose(factors, _llama3_factors(len(factors), theta, factor), rtol=1e-5):
        raise MechsafetyError(
            f"{name!r} scales its rotary frequencies in a way that is not known here ({ROPE_FREQS})",
            expected=f"the scaling of Llama 3 ({LLAMA3})",
            cure=CHECKPOINT,
        )
    return {**LLAMA3, "rope_type": "llama3", "factor": factor}


def _llama3_factors(n: int, theta: float, factor: float) -> Float[Tensor, " n"]:
    """By what Llama 3's scaling divides each of ``n`` rotary frequencies.

    With w the wavelength of a frequency and s = (original / w - low) / (high - low), kept within 0 and 1, the factor is
    1 / ((1 - s) / factor + s): 1 for short waves, ``factor`` for those that are longer than the original context.
    """
    wavelengths = 2 * math.pi * theta ** (torch.arange(n, dtype=torch.float64) / n)
    low, high, original = LLAMA3.values()
    share = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / factor + share)


def _check_settings(name: str, file: Any, config: Any) -> None:
    """The settings that change what is computed are those of the model that is made."""
    arch = f"{_value(file, 'general.architecture')}."
    known = _known(config)
    for key in file.fields:
        short = key.removeprefix(arch)
        if short == key or not (short.startswith(HEADS) or short.endswith(NAMES)):
            continue
        found = _value(file, key)
        if short not in known or not _same(found, known[short]):
            taken = f"and transformers takes {known[short]}" if short in known else "which transformers does not read"
            raise MechsafetyError(
                f"{name!r} says {key} = {found}, {taken}", expected="settings that carry over", cure=CHECKPOINT
            )


def _same(found: Any, made: Any) -> bool:
    if isinstance(found, float) and isinstance(made, int | float):
        return math.isclose(found, made, rel_tol=1e-6)  # stored in float32
    return found == made


def _known(config: Any) -> dict[str, Any]:
    """GGUF settings as a configuration has them, under the names that llama.cpp gives them."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    local = rope.get("sliding_attention", rope)  # Gemma-3 has one for each kind of attention
    rope = rope.get("full_attention", rope)
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    kind = rope.get("rope_type", "default")
    layers = getattr(config, "layer_types", None) or ()
    known = {
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": d_head,
        "attention.value_length": d_head,
        "attention.causal": True,
        "attention.sliding_window_pattern": [layer == "sliding_attention" for layer in layers],
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": local.get("rope_theta"),
        "rope.dimension_count": round(d_head * rope.get("partial_rotary_factor", 1.0)),
        "rope.scaling.type": "none" if kind == "default" else kind,
        "rope.scaling.factor": rope.get("factor", 1.0),
        "use_parallel_residual": getattr(config, "use_parallel_residual", None),
    }
    known |= {key: getattr(config, field, None) for key, field in PLACES.items()}
    for field in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"):
        if hasattr(config, field):
            known |= dict.fromkeys(
                ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"), getattr(config, field)
            )
    return known
