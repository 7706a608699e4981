"""`load_model`: one call from a name, folder, GGUF file or pair to a checked `LensModel`."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mechsafety.errors import MechsafetyError, first_line
from mechsafety.models.adapters import apply_adapter, base_and_adapter, check_no_adapter, is_peft, merged_copy
from mechsafety.models.backend import is_wrapped, wrap, wrapped_name
from mechsafety.models.checks import check_model, probe_rows, reference_logits
from mechsafety.models.demo import adapter_folder, base_folder, load_gguf
from mechsafety.models.lens import LensModel
from mechsafety.models.template import PLAIN_TEMPLATE, checked_options

DTYPES = ("float32", "float16", "bfloat16")
DEMO = {"demo": "refusal", "demo-helpful": "helpful", "demo-base": None}


def load_model(
    name_or_path: str | os.PathLike[str] | tuple[Any, Any] | torch.nn.Module,
    adapter: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    *,
    chat_template: str | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> LensModel:
    """Load a chat model, wrap it for TransformerLens, and check what the analyses rely on.

    Args:
        name_or_path: ``"demo"`` (the embedded model with its refusal adapter), ``"demo-helpful"`` (with the one for
            short answers), ``"demo-base"`` (without), a hub id, a local Hugging Face folder, a ``.gguf`` file, the
            folder of a peft adapter (which names its base model), or a ``(model, tokenizer)`` pair. A pair's model is
            wrapped in place: it goes over to eager attention and its blocks become TransformerLens'. (Under
            TransformerLens 3.9 its weights are copied.) Of a `PeftModel` a copy is merged. It may also be
            TransformerLens' own, a `TransformerBridge` (4.x) or a `HookedTransformer` (3.9, with norms folded or not),
            alone if it has its tokenizer.
        adapter: Folder of a peft adapter to merge; not for TransformerLens' own models.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; None keeps the CPU (or a pair's own device).
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``; None means float32 (or a pair's own).
        chat_template: A Jinja chat template, or ``"plain"`` for ``User: ... Assistant:``, for models that bring none.
        template_options: What the chat template is given besides the prompt: ``system``, text of a system turn;
            ``date``, what a template that writes the date takes for today (26 July 2024 by default, so that results
            repeat); and any variable that the template reads, such as ``enable_thinking``. Provenance keeps them.

    Returns:
        The model; never a tuple.

    Raises:
        MechsafetyError: Unknown name, device or dtype; no chat template, or options that it does not take; or a check
            that failed, by its name.
    """
    kind = _dtype(dtype)
    place = _device(device)
    own = base_and_adapter(name_or_path) if isinstance(name_or_path, str | os.PathLike) else None
    if own is not None:
        name, model, tokenizer, adapter = _read_adapted(own, adapter, kind or torch.float32)
    elif isinstance(name_or_path, str | os.PathLike):
        name, model, tokenizer = _read(os.fspath(name_or_path), kind or torch.float32)
    else:
        pair = name_or_path if isinstance(name_or_path, tuple) else (name_or_path, _own_tokenizer(name_or_path))
        model, tokenizer = _pair(pair)
        name = _name(model.get_base_model() if is_peft(model) else model)
    tokenizer = _ready(tokenizer, chat_template, name)
    options = checked_options(tokenizer, template_options)
    if adapter is None and isinstance(name_or_path, str) and DEMO.get(name_or_path):
        shown, adapter = name, adapter_folder(str(DEMO[name_or_path]))
    else:
        # the demo model with another adapter is the base model with it
        shown = "demo-base" if name in DEMO else _public_name(name)
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
    if place is not None:
        model = model.to(place)
    if kind is not None:
        model = model.to(kind)
    # before the model is wrapped
    reference = None if is_wrapped(model) else reference_logits(model, tokenizer, options)
    lens = LensModel(shown, wrap(name, model, tokenizer), tokenizer, options)
    check_model(lens, reference)
    return lens


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
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except MechsafetyError as error:
        problem = f"the base model of the adapter {folder.name!r}: {error.problem}"
        raise MechsafetyError(problem, expected=error.expected, cure=error.cure or cure) from error
    return name, model, tokenizer, folder


def _read(name: str, dtype: Any) -> tuple[str, Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    if name in DEMO:
        source: str = str(base_folder())
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise MechsafetyError(f"no such file: {name}", expected="a GGUF file")
        try:
            return path.stem, *load_gguf(path)
        except Exception as error:  # gguf and transformers raise whatever they meet; the user needs one line
            raise MechsafetyError(f"cannot read {path.name!r} ({first_line(error)})", expected="a GGUF file") from error
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise MechsafetyError(f"{name} holds no config.json", expected="a Hugging Face model folder")
        source = name
    elif path.exists():
        raise MechsafetyError(f"{name} is a file", expected="a model folder, a .gguf file or a hub id")
    else:
        source = name
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the libraries underneath raise many types; the user needs one line
        reason = first_line(error)
        raise MechsafetyError(
            f"cannot load the model {name!r} ({reason})",
            expected="'demo', a hub id that can be reached, a Hugging Face folder or a .gguf file",
        ) from error
    return name, model.eval(), tokenizer


def _pair(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    from torch import nn

    if len(pair) != 2 or not isinstance(pair[0], nn.Module) or not hasattr(pair[1], "apply_chat_template"):
        kinds = tuple(type(item).__name__ for item in pair)
        raise MechsafetyError(f"a tuple of {kinds}", expected="(Hugging Face model, tokenizer)")
    model = pair[0]
    if is_wrapped(model):
        return model, pair[1]
    if any(type(module).__module__.startswith("transformer_lens") for module in model.modules()):
        raise MechsafetyError("this model is wrapped already", cure="pass a fresh model, or copy.deepcopy it first")
    return model.eval(), pair[1]


def _own_tokenizer(model: Any) -> Any:
    """The tokenizer that a TransformerLens model brings."""
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


def _dtype(dtype: str | None) -> Any:
    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise MechsafetyError(f"unknown dtype {dtype!r}", expected=f"one of {DTYPES}")
    return getattr(torch, dtype)


def _device(device: str | None) -> Any:
    if device is None:
        return None
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        known = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        raise MechsafetyError(f"unknown or unavailable device {device!r}", expected=f"one of {known}") from None
    return place


def _public_name(name: str) -> str:
    """A local path is shortened to its last part, so that no machine's folders end up in results."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name
