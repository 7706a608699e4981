"""Convert GGUF files to plain float32 Hugging Face folders, without losing a setting that transformers does not read.

transformers reads the tensors and settings for which it has names, and skips all others silently. A skipped setting may
change what the model computes. This module applies such a setting itself or raises an error.

A file is converted once, into a folder that is kept (see `mechsafety.models.kept`).
"""

import errno
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.codec import read_json
from mechsafety.errors import MechsafetyError, first_line, named
from mechsafety.models.gguf_file import AGAIN, Header, fill_part, numbers, write_parts
from mechsafety.models.kept import kept_folder, sha256_of
from mechsafety.models.kinds import check_kind, check_weights
from mechsafety.progress import drawn

logger = logging.getLogger(__name__)

# the scaling of Llama 3.1 to 3.3, which differ in the factor alone
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# settings that change what a model computes: their names begin with one of HEADS or end with one of NAMES
HEADS = ("rope.", "attention.")
NAMES = ("_scale", "softcapping", "use_parallel_residual")
ROPE_FREQS = "rope_freqs.weight"
WINDOW = "sliding_window"
# settings for which transformers' configurations have a field, but which it does not read for every architecture
PLACES = {
    f"attention.{WINDOW}": WINDOW,
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
CHECKPOINT = "load the Hugging Face checkpoint that it was made from"
TEMPLATE = "tokenizer.chat_template"
# names of the two parts into which a file is split for transformers
VOCABULARY, WEIGHTS = "vocabulary.gguf", "weights.gguf"
# raised by 1 when folders that earlier code made may no longer be used
FORMAT = 1


def gguf_folder(header: Header, check: Callable[[Any, Any], None] | None = None) -> Path:
    """The Hugging Face folder of a GGUF file, which is made once per file content and kept.

    Args:
        header: The file's header, from `read_header`.
        check: Called with the model (its weights not read yet) and the tokenizer before the weights are de-quantised.
            Its errors are passed on.

    Raises:
        MechsafetyError: The file holds a tensor or setting that would stay unread, or lacks one; its model is of a kind
            that is not accepted; or its weights are not finite.
    """
    parts = (sha256_of(header.path)[:32], f"transformers-{version('transformers')}", f"gguf-{version('gguf')}")
    size = 4 * sum(math.prod(tensor.shape) for tensor in header.tensors)
    return kept_folder(
        "-".join(("gguf", str(FORMAT), *parts)),
        lambda folder: _convert(header, folder, check),
        size + header.tensors[-1].end + 2**27,
    )


def _convert(header: Header, folder: Path, check: Callable[[Any, Any], None] | None) -> None:
    """Fill a folder with the plain float32 model of a file and its tokenizer."""
    from transformers import AutoModelForCausalLM

    parts = folder / "parts"
    parts.mkdir()
    try:
        write_parts(header, parts / VOCABULARY, parts / WEIGHTS)
        config = _config(header, parts)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        check_kind(model)
        _check_tensors(header, model)
        _apply_settings(header, model.config)
        _check_settings(header, model.config)
        tokenizer = _tokenizer(header, parts, config)
        if check is not None:
            check(model, tokenizer)
        _keep_tokenizer(tokenizer, folder)
        fill_part(header, parts / WEIGHTS)
        model.load_state_dict(_weights(header, parts, config), assign=True)
        ends = {header.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")} - {None}
        if len(ends) > 1:
            model.generation_config.eos_token_id = sorted(ends)
        try:
            model.save_pretrained(folder)
        except Exception as error:  # safetensors raises its own type if the disk is full
            raise OSError(errno.EIO, first_line(error)) from error
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def _config(header: Header, parts: Path) -> Any:
    """The configuration that transformers makes of a file's settings."""
    from transformers import AutoConfig

    try:
        try:
            made: Any = AutoConfig.from_pretrained(parts, gguf_file=WEIGHTS)
        except KeyError:  # for some architectures transformers reads the vocabulary here, so it gets the whole file
            made = AutoConfig.from_pretrained(header.path.parent, gguf_file=header.path.name)
    except Exception as error:  # gguf and transformers raise whatever they meet; the user needs one line
        raise _unreadable(header, error) from error
    # transformers marks the de-quantised weights as quantised and then refuses to save or convert them
    settings = made.to_dict()
    settings.pop("quantization_config", None)
    return type(made).from_dict(settings)


def _tokenizer(header: Header, parts: Path, config: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        try:
            # the model type is known, so transformers need not read the settings again
            return AutoTokenizer.from_pretrained(parts, gguf_file=VOCABULARY, tokenizer_type=config.model_type)
        except Exception:  # this model type has no tokenizer class, or its class reads other files
            return AutoTokenizer.from_pretrained(parts, gguf_file=VOCABULARY)
    except Exception as error:  # as above
        raise _unreadable(header, error) from error


def _keep_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer as a plain fast tokenizer.

    A class of the model's own would rebuild the tokenizer at every load, perhaps from other parts.
    """
    tokenizer.save_pretrained(folder)
    place = folder / "tokenizer_config.json"
    settings = read_json(place.read_bytes())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    place.write_text(json.dumps(settings, indent=1, allow_nan=False), encoding="utf-8")


def _weights(header: Header, parts: Path, config: Any) -> dict[str, Tensor]:
    """The de-quantised weights by transformers' names."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    logger.info("de-quantising %s once", header.path.name)
    shown = hf_logging.is_progress_bar_enabled()
    if drawn():
        hf_logging.enable_progress_bar()  # it takes a while, and happens once
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            parts, gguf_file=WEIGHTS, config=config, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # as above
        raise _unreadable(header, error) from error
    finally:
        if not shown:
            hf_logging.disable_progress_bar()
    model, report = loaded
    if report["missing_keys"]:
        raise _lacks(header, report["missing_keys"], model)
    check_weights(model)
    return dict(model.state_dict())


def _unreadable(header: Header, error: Exception) -> MechsafetyError:
    return MechsafetyError(f"cannot read {str(header.path)!r} ({first_line(error)})", expected="a GGUF file of a model")


def _lacks(header: Header, names: Iterable[str], model: Any) -> MechsafetyError:
    return MechsafetyError(
        f"{str(header.path)!r} lacks {named(names, 'tensor')}", expected=f"every tensor of {type(model).__name__}"
    )


def _check_tensors(header: Header, model: Any) -> None:
    """Check that file and model have the same tensors, each with the same number of values."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = {arch: kind for kind, arch in MODEL_ARCH_NAMES.items()}
    if header.architecture not in kinds:
        raise _unreadable(header, ValueError(f"the package gguf does not know {header.architecture!r}"))
    names = get_tensor_name_map(kinds[header.architecture], model.config.num_hidden_layers)
    prefix, ends = f"{model.base_model_prefix}.", (".weight", ".bias")
    found = {tensor.name: tensor for tensor in header.tensors}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    stored, wanted = model.state_dict().keys(), dict[int, list[tuple[str | None, Any]]]()
    for key, tensor in ((key, tensor) for key, tensor in tensors if key in stored):
        # GGUF names per tensor; the file may hold a tied tensor under any one of its names
        name = names.get_name(key, try_suffixes=ends) or names.get_name(key.removeprefix(prefix), try_suffixes=ends)
        wanted.setdefault(id(tensor), []).append((name, tensor))
    read = {name for places in wanted.values() for name, _ in places}
    unread = found.keys() - read - {ROPE_FREQS}
    if unread:
        raise MechsafetyError(
            f"{str(header.path)!r} holds what transformers does not read: {named(unread, 'tensor')}",
            expected="a file whose tensors are all the model's",
            hint=CHECKPOINT,
        )
    lost = [places[0][0] for places in wanted.values() if places[0][0] and not any(name in found for name, _ in places)]
    if lost:
        raise _lacks(header, [str(name) for name in lost], model)
    for places in wanted.values():
        for name, tensor in places:
            if name in found and math.prod(found[name].shape) != tensor.numel():
                raise MechsafetyError(
                    f"{str(header.path)!r} holds {name} of the shape {found[name].shape}",
                    expected=f"{tuple(tensor.shape)}, as {type(model).__name__} has it by the file's settings",
                    hint=AGAIN,
                )


def _apply_settings(header: Header, config: Any) -> None:
    """Copy into the configuration the settings that have a field there and that transformers does not read."""
    arch, values = header.architecture, header.values
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    for key, field in PLACES.items():
        found = values.get(f"{arch}.{key}")
        if found is not None and hasattr(config, field) and (field != WINDOW or "sliding_attention" in kinds):
            setattr(config, field, found)
    rope = config.rope_parameters or {}
    theta = values.get(f"{arch}.rope.freq_base")
    if "rope_theta" in rope:
        rope = {**rope, **({} if theta is None else {"rope_theta": theta})}
        config.rope_parameters = {**rope, **_rope_scaling(header, rope["rope_theta"])}


def _rope_scaling(header: Header, theta: float) -> dict[str, Any]:
    """Settings of the rotary scaling, which files of Llama 3.1 and later hold as one factor per frequency."""
    found = next((tensor for tensor in header.tensors if tensor.name == ROPE_FREQS), None)
    factors = torch.ones(1).double() if found is None else numbers(header, found).double()
    factor = float(factors.max())
    if bool((factors == 1).all()):
        return {}
    if not torch.allclose(factors, _llama3_factors(len(factors), theta, factor), rtol=1e-5):
        raise MechsafetyError(
            f"{str(header.path)!r} scales its rotary frequencies in a way that is not known here ({ROPE_FREQS})",
            expected=f"the scaling of Llama 3 ({LLAMA3})",
            hint=CHECKPOINT,
        )
    return {**LLAMA3, "rope_type": "llama3", "factor": factor}


def _llama3_factors(n: int, theta: float, factor: float) -> Float[Tensor, " n"]:
    """The number by which Llama 3's scaling divides each of ``n`` rotary frequencies.

    For a frequency of wavelength w, let s = (original / w - low) / (high - low), clipped to the range 0 to 1. The
    frequency is divided by 1 / ((1 - s) / factor + s). This is 1 for short waves, and ``factor`` for waves longer than
    the original context. ``low``, ``high`` and ``original`` are the three values of `LLAMA3`.
    """
    wavelengths = 2 * math.pi * theta ** (torch.arange(n, dtype=torch.float64) / n)
    low, high, original = LLAMA3.values()
    share = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / factor + share)


def _check_settings(header: Header, config: Any) -> None:
    """Check that the model has the file's value of every setting that changes what is computed."""
    arch, known = f"{header.architecture}.", _known(config)
    for key, found in header.values.items():
        short = key.removeprefix(arch)
        if short == key or not (short.startswith(HEADS) or short.endswith(NAMES)):
            continue
        if short not in known or not _same(found, known[short]):
            taken = f"and transformers takes {known[short]}" if short in known else "which transformers does not read"
            raise MechsafetyError(
                f"{str(header.path)!r} says {key} = {found}, {taken}",
                expected="settings that carry over",
                hint=CHECKPOINT,
            )


def _same(found: Any, made: Any) -> bool:
    if isinstance(found, float) and isinstance(made, int | float):
        return math.isclose(found, made, rel_tol=1e-6)  # stored in float32
    return bool(found == made)


def _known(config: Any) -> dict[str, Any]:
    """A configuration's settings under llama.cpp's names for them."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    local = rope.get("sliding_attention", rope)  # Gemma-3 has one per kind of attention
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
