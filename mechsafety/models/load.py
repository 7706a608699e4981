"""`load_model`: one call from a name, folder, GGUF file or pair to a checked `LensModel`."""

import copy
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mechsafety.errors import MechsafetyError, first_line, named
from mechsafety.inputs import public
from mechsafety.models.adapters import apply_adapter, base_and_adapter, check_no_adapter, is_peft, merged_copy
from mechsafety.models.backend import is_wrapped, wrap, wrapped_name
from mechsafety.models.chat import ChatTokenizer
from mechsafety.models.checks import check_model, probe_rows, reference_logits
from mechsafety.models.demo import adapter_folder, base_folder
from mechsafety.models.gguf import load_gguf
from mechsafety.models.kinds import DECODER, check_kind, check_weights, is_multimodal, text_part
from mechsafety.models.lens import LensModel
from mechsafety.models.template import PLAIN_TEMPLATE, checked_options

DTYPES = ("auto", "float32", "bfloat16", "float16")
WANTED = "'demo', a hub id, a Hugging Face folder, a .gguf file, (model, tokenizer) or a TransformerLens model"
# buffers of older checkpoints that today's models make for themselves, and the value head that trainers leave behind
HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|inv_freq|position_ids|attn\.(masked_bias|embed_positions)"
    r"|attention\.(masked_bias|embed_positions)|(attn|attention)\.bias|scale_attn)$|^v_head\."
)
DEMO = {"demo": "refusal", "demo-helpful": "helpful", "demo-base": None}


@public
def load_model(
    name_or_path: str | os.PathLike[str] | tuple[Any, Any] | torch.nn.Module,
    adapter: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    chat_template: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    on_tokenizer: Callable[[ChatTokenizer], object] | None = None,
) -> LensModel:
    """Load a chat model, wrap it for TransformerLens, and check what the analyses rely on.

    Args:
        name_or_path: ``"demo"`` (the embedded model with its refusal adapter), ``"demo-helpful"`` (with the one for
            short answers), ``"demo-base"`` (without), a hub id, a local Hugging Face folder, a ``.gguf`` file, the
            folder of a peft adapter (which names its base model), or a ``(model, tokenizer)`` pair. A `pathlib.Path`
            is always a folder or file. A pair's model is wrapped in place: it goes over to eager attention and its
            blocks become TransformerLens'. (Under TransformerLens 3.9 its weights are copied.) Of a `PeftModel` a copy
            is merged. It may also be TransformerLens' own, a `TransformerBridge` (4.x) or a `HookedTransformer` (3.9,
            with norms folded or not), alone if it has its tokenizer. Of a multimodal model the language model is taken.
        adapter: Folder of a peft adapter to merge; not for TransformerLens' own models.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; None keeps the CPU (or a pair's own device).
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or torch's own; ``"auto"`` is the checkpoint's (of a GGUF
            file float32); None means float32. A pair keeps its own under ``"auto"`` and None.
        chat_template: A Jinja chat template, or ``"plain"`` for ``User: ... Assistant:``, for models that bring none.
        template_options: What the chat template is given besides the prompt: ``system``, text of a system turn;
            ``date``, what a template that writes the date takes for today (26 July 2024 by default, so that results
            repeat); and any variable that the template reads, such as ``enable_thinking``. Provenance keeps them.
        on_tokenizer: Called with the tokenizer as soon as there is one, before anything slow, for checks of prompts
            such as `PromptPairs.aligned`; an error that it raises ends the call.

    Returns:
        The model; never a tuple.

    Raises:
        MechsafetyError: Unknown name, device or dtype; no chat template, or options that it does not take; a
            checkpoint that does not fit its model; a kind of model that the analyses are not exact on; or a check that
            failed, by its name.
    """
    kind = _dtype(dtype)
    place = _device(device)
    embedded = _is_embedded(name_or_path)
    own = None
    if isinstance(name_or_path, str | os.PathLike) and not embedded:
        own = base_and_adapter(name_or_path)
    if own is not None:
        name, model, tokenizer, adapter = _read_adapted(own, adapter, kind or torch.float32)
    elif isinstance(name_or_path, str | os.PathLike):
        name, model, tokenizer = _read(name_or_path, kind or torch.float32)
    else:
        model, tokenizer = _pair(name_or_path)
        name = _name(model.get_base_model() if is_peft(model) else model)
    _check_given(model)
    tokenizer = _ready(tokenizer, chat_template, name)
    options = checked_options(tokenizer, template_options)
    if on_tokenizer is not None:
        on_tokenizer(ChatTokenizer(_public_name(name), tokenizer, options))
    if adapter is None and embedded and DEMO[name]:
        shown, adapter = name, adapter_folder(str(DEMO[name]))
    else:
        # the demo model with another adapter is the base model with it
        read_as_path = own is None and isinstance(name_or_path, os.PathLike)
        shown = "demo-base" if name in DEMO and not read_as_path else _public_name(name)
        shown += f"+{Path(adapter).name}" if adapter is not None else ""
    if adapter is not None or is_peft(model):
        if adapter is not None and (is_wrapped(model) or is_peft(model)):
            raise MechsafetyError(
                f"an adapter for a {type(model).__name__}", cure="merge it before the model is wrapped"
            )
        shown += "" if adapter is not None else "+" + "+".join(model.active_adapters)
        rows = [row.to(model.device) for row in probe_rows(tokenizer, options)]
        model = merged_copy(model, rows) if adapter is None else apply_adapter(model, adapter, rows)
    check_no_adapter(model)
    whole, model = model, model if is_wrapped(model) else text_part(model)
    if place is not None:
        model = model.to(place)
    if isinstance(kind, torch.dtype):
        model = model.to(kind)
    # before the model is wrapped; a multimodal model's logits are those of the whole
    reference = None if is_wrapped(model) else reference_logits(whole, tokenizer, options)
    lens = LensModel(shown, wrap(name, model, tokenizer), tokenizer, options)
    check_model(lens, reference)
    return lens


def _check_given(model: Any) -> None:
    """Refuse kinds and weights that no later step can work with, before anything runs."""
    base = model.get_base_model() if is_peft(model) else model
    if not is_wrapped(base):
        check_kind(text_part(base))
    check_weights(base)


def _is_embedded(given: Any) -> bool:
    """Whether this is a name of the embedded model; a Path never is."""
    return isinstance(given, str) and given in DEMO


def _read_adapted(own: tuple[str, Path], adapter: Any, dtype: Any) -> tuple[str, Any, Any, Path]:
    """Base model, tokenizer and folder of an adapter that was given as the model."""
    from transformers import AutoTokenizer

    base, folder = own
    cure = f"pass the base model and adapter={folder.name!r}"
    if adapter is not None:
        raise MechsafetyError(f"the model {folder.name!r} is an adapter, and adapter={adapter!r} was given", cure=cure)
    try:
        name, model, tokenizer = _read(base, dtype)
        if (folder / "tokenizer_config.json").is_file():  # what it was trained with
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except MechsafetyError as error:
        problem = f"the base model of the adapter {folder.name!r}: {error.problem}"
        raise MechsafetyError(problem, expected=error.expected, cure=error.cure or cure) from error
    return name, model, tokenizer, folder


def _read(given: str | os.PathLike[str], dtype: torch.dtype | str) -> tuple[str, Any, Any]:
    """Name, model and tokenizer of a name, folder or file."""
    if _is_embedded(given):
        return str(given), *_pretrained(str(given), str(base_folder()), dtype)
    path = Path(given).expanduser()
    name = str(given) if isinstance(given, str) else os.fspath(path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise MechsafetyError(f"no such file: {name}", expected="a GGUF file")
        return path.stem, *load_gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MechsafetyError(f"{name} holds no config.json", expected="a Hugging Face model folder")
        return name, *_pretrained(name, str(path), dtype)
    if path.exists():
        raise MechsafetyError(f"{name} is a file", expected="a model folder, a .gguf file or a hub id")
    if not isinstance(given, str):
        raise MechsafetyError(
            f"no such folder or file: {name}", expected="a local path", cure="pass a name or hub id as a string"
        )
    return name, *_pretrained(name, name, dtype)


def _pretrained(name: str, source: str, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """Model and tokenizer of a Hugging Face folder or hub id, once its tensors are known to fit."""
    from transformers import AutoConfig, AutoTokenizer

    # code that comes with a checkpoint is not run, and nobody is asked whether it should be
    own_code = {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **own_code)
        if config.is_encoder_decoder:
            raise MechsafetyError(f"{name} is an encoder-decoder ({config.model_type})", expected=DECODER)
        model, report = _auto_class(config).from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **own_code
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **own_code)
    except MechsafetyError:
        raise
    except Exception as error:  # the libraries underneath raise many types; the user needs one line
        raise MechsafetyError(f"cannot load the model {name!r} ({first_line(error)})", expected=WANTED) from error
    check_complete(name, model, report)
    return model.eval(), tokenizer


def _auto_class(config: Any) -> Any:
    """The class of transformers that loads a checkpoint; for a multimodal model that of the whole."""
    import transformers

    named = (config.architectures or [""])[0]
    if is_multimodal(config) and type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        return getattr(transformers, named, transformers.AutoModelForCausalLM)
    return transformers.AutoModelForCausalLM


def check_complete(name: str, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not those of its model: transformers fills gaps with random numbers.

    Args:
        name: What the user gave.
        model: The loaded model.
        report: What `from_pretrained` says under ``output_loading_info``.

    Raises:
        MechsafetyError: How many tensors are missing, unread or of another shape, with the name of one of each.
    """
    unread = [key for key in report["unexpected_keys"] if not HARMLESS.search(key)]
    shapes = {key: f"{key} {tuple(found)} for {tuple(wanted)}" for key, found, wanted in report["mismatched_keys"]}
    problems = [
        f"{what} {named(keys, 'tensor')}"
        for what, keys in (
            ("it lacks", set(report["missing_keys"]) - set(shapes)),
            ("the model does not read", unread),
            ("of another shape are", shapes.values()),
        )
        if keys
    ]
    if problems:
        raise MechsafetyError(
            f"the checkpoint of {name} does not fit {type(model).__name__}: {'; '.join(problems)}",
            expected="every tensor of the model and no other",
            cure="save it again with save_pretrained, under a config.json of the same model",
        )


def _pair(given: Any) -> tuple[Any, Any]:
    """Model and tokenizer of what was handed over in memory."""
    if isinstance(given, LensModel):
        raise MechsafetyError(f"{given.name} is loaded already", cure="use it as it is")
    alone = not isinstance(given, tuple)
    model, tokenizer = (given, _own_tokenizer(given)) if alone else (given if len(given) == 2 else (None, None))
    if not isinstance(model, torch.nn.Module) or not hasattr(tokenizer, "apply_chat_template"):
        kinds = f"a tuple of {tuple(type(item).__name__ for item in given)}"
        raise MechsafetyError(kinds, expected="(Hugging Face model, tokenizer)")
    if not hasattr(tokenizer, "convert_ids_to_tokens"):  # of a multimodal model
        raise MechsafetyError(f"a {type(tokenizer).__name__} as tokenizer", cure="pass processor.tokenizer")
    if is_wrapped(model):
        return model, tokenizer
    if any(type(module).__module__.startswith("transformer_lens") for module in model.modules()):
        raise MechsafetyError("this model is wrapped already", cure="pass a fresh model, or copy.deepcopy it first")
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) and not is_peft(model):
        inner = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
        held = inner.get(type(model).__name__)
        raise MechsafetyError(
            f"a {type(model).__name__}", expected="a Hugging Face model", cure=f"pass model.{held}" if held else ""
        )
    return model.eval(), tokenizer


def _own_tokenizer(model: Any) -> Any:
    """The tokenizer that a TransformerLens model brings."""
    if not isinstance(model, torch.nn.Module):
        cure = "write (model, tokenizer)" if isinstance(model, list) else ""
        raise MechsafetyError(f"a {type(model).__name__} was given as the model", expected=WANTED, cure=cure)
    if not is_wrapped(model) or model.tokenizer is None:
        raise MechsafetyError(f"a {type(model).__name__} without a tokenizer", cure="pass (model, tokenizer)")
    return model.tokenizer


def _name(model: Any) -> str:
    """What a model that was handed over is called."""
    own = wrapped_name(model) if is_wrapped(model) else getattr(model.config, "_name_or_path", "")
    return own or type(model).__name__


def _ready(tokenizer: Any, chat_template: str | None, name: str) -> Any:
    """The tokenizer with a chat template and a padding token.

    A copy where either is set: the caller's own, and the models that were loaded with it, keep theirs.
    """
    if not tokenizer.is_fast:
        raise MechsafetyError("a slow tokenizer", expected="a fast one (spans need character offsets)")
    if chat_template is not None or (tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None):
        tokenizer = copy.deepcopy(tokenizer)
    if chat_template is not None:
        # a start token that the tokenizer would add by itself is not in a rendered text
        start = "{{ bos_token }}" if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
        tokenizer.chat_template = start + PLAIN_TEMPLATE if chat_template == "plain" else chat_template
    if not tokenizer.chat_template:
        raise MechsafetyError(
            f"{name} has no chat template",
            expected="a chat model",
            cure="pass chat_template='plain' (command: --chat-template plain) for 'User: ... Assistant:'",
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def _dtype(dtype: Any) -> torch.dtype | str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise MechsafetyError(f"unknown dtype {dtype!r}", expected=f"one of {DTYPES}, or torch's own")
    return name if name == "auto" else getattr(torch, name)


def _device(device: str | None) -> Any:
    if device is None:
        return None
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        known = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        raise MechsafetyError(f"unknown or unavailable device {device!r}", expected=f"one of {known}") from None
    return place


def _public_name(name: str) -> str:
    """A local path is shortened to its last part, so that no machine's folders end up in results."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name
