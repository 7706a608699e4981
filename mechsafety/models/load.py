"""`load_model`: one call from a name, folder, GGUF file or pair to a checked `LensModel`."""

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch

from mechsafety.errors import MechsafetyError, first_line
from mechsafety.models.adapters import apply_adapter
from mechsafety.models.checks import check_model, reference_logits
from mechsafety.models.demo import adapter_folder, base_folder, load_gguf
from mechsafety.models.lens import PLAIN_TEMPLATE, LensModel

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16")
DEMO = {"demo": "refusal", "demo-helpful": "helpful", "demo-base": None}


def load_model(
    name_or_path: str | os.PathLike[str] | tuple[Any, Any],
    adapter: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    *,
    chat_template: str | None = None,
) -> LensModel:
    """Load a chat model, wrap it for TransformerLens, and check what the analyses rely on.

    Args:
        name_or_path: ``"demo"`` (the embedded model with its refusal adapter), ``"demo-helpful"`` (with the one for
            short answers), ``"demo-base"`` (without), a hub id, a local Hugging Face folder, a ``.gguf`` file, or a
            ``(model, tokenizer)`` pair. A pair's model is wrapped in place: it goes over to eager attention and its
            blocks become TransformerLens'.
        adapter: Folder of a peft adapter to merge.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; None keeps the CPU (or a pair's own device).
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``; None means float32 (or a pair's own).
        chat_template: A Jinja chat template, or ``"plain"`` for ``User: ... Assistant:``, for models that bring none.

    Returns:
        The model; never a tuple.

    Raises:
        MechsafetyError: Unknown name, device or dtype; no chat template; or a check that failed, by its name.
    """
    kind = _dtype(dtype)
    place = _device(device)
    if isinstance(name_or_path, tuple):
        name, (model, tokenizer) = "pair", _pair(name_or_path)
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    else:
        name, model, tokenizer = _read(os.fspath(name_or_path), kind or torch.float32)
    if adapter is None and isinstance(name_or_path, str) and DEMO.get(name_or_path):
        shown, adapter = name, adapter_folder(str(DEMO[name_or_path]))
    else:
        # the demo model with another adapter is the base model with it
        shown = "demo-base" if name in DEMO else _public_name(name)
        shown += f"+{Path(adapter).name}" if adapter is not None else ""
    if adapter is not None:
        model = apply_adapter(model, adapter)
    if place is not None:
        model = model.to(place)
    if kind is not None:
        model = model.to(kind)
    _set_template(tokenizer, chat_template, name)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    reference = reference_logits(model, tokenizer)
    lens = LensModel(shown, _boot(name, model, tokenizer), tokenizer)
    check_model(lens, reference)
    return lens


def _boot(name: str, model: Any, tokenizer: Any) -> Any:
    logging_level = logging.getLogger().level
    from transformer_lens.model_bridge import TransformerBridge

    logging.getLogger().setLevel(logging_level)  # importing TransformerLens changes the root logger
    device = str(next(model.parameters()).device)
    # TransformerLens would read the tokenizer again from where it came, with a start token added: from the hub, or not
    # at all for one made in memory. Prompts are rendered and tokenized here, so its copy is marked as having one.
    copied = copy.deepcopy(tokenizer)
    if not model.config.architectures:  # of a model made in memory; TransformerLens goes by this name
        model.config.architectures = [type(model).__name__]
    copied.init_kwargs = {**tokenizer.init_kwargs, "name_or_path": name, "add_bos_token": True}
    try:
        bridge = TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=copied, device=device)
    except Exception as error:  # adapters raise whatever they meet; the user needs one line
        raise MechsafetyError(
            f"TransformerLens cannot wrap a {type(model).__name__} ({first_line(error)})",
            expected="an architecture that TransformerBridge knows",
        ) from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # analyses differentiate activations, never weights
    return bridge


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
    if any(type(module).__module__.startswith("transformer_lens") for module in model.modules()):
        raise MechsafetyError("this model is wrapped already", cure="pass a fresh model, or copy.deepcopy it first")
    return model.eval(), pair[1]


def _set_template(tokenizer: Any, chat_template: str | None, name: str) -> None:
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
    if not tokenizer.is_fast:
        raise MechsafetyError("a slow tokenizer", expected="a fast one (spans need character offsets)")


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
