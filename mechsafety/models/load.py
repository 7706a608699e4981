"""`load_model`: one call from a name, folder, GGUF file or pair to a checked `LensModel`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import public
from mechsafety.models.adapters import (
    apply_adapter,
    base_and_adapter,
    check_fits,
    check_no_adapter,
    is_peft,
    merged_copy,
    read_config,
)
from mechsafety.models.backend import is_wrapped, wrap
from mechsafety.models.chat import ChatTokenizer
from mechsafety.models.checks import check_model, check_start_token, probe_rows, reference_logits
from mechsafety.models.demo import adapter_folder
from mechsafety.models.kinds import check_weights, fold_scales, has_scales, text_part
from mechsafety.models.lens_model import LensModel
from mechsafety.models.parts_adapter import PartsAdapter, is_parts_adapter
from mechsafety.models.placed import check_in_memory, is_dispatched, placement
from mechsafety.models.quantised import quantised, use_exact_kernels
from mechsafety.models.quiet import quiet
from mechsafety.models.sources import DEMO, Source, no_template, open_source, public_name
from mechsafety.models.template import PLAIN_TEMPLATE, check_template, checked_options, tokenizer_copy

DTYPES = ("auto", "float32", "bfloat16", "float16")


@public
@quiet()
def load_model(
    name_or_path: str | os.PathLike[str] | tuple[Any, Any] | torch.nn.Module,
    adapter: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    file: str | None = None,
    chat_template: str | None = None,
    template_options: Mapping[str, Any] | None = None,
    on_tokenizer: Callable[[ChatTokenizer], object] | None = None,
) -> LensModel:
    """Load a chat model, wrap it for TransformerLens, and check what the analyses rely on.

    The arguments are checked before anything is loaded, as far as they can be without the model. While the model loads,
    transformers shows no bars and no warnings.

    Args:
        name_or_path: One of these:

            - ``"demo"`` (the embedded model with its refusal adapter), ``"demo-helpful"`` (with the adapter for short
              answers) or ``"demo-base"`` (without adapter);
            - a hub id, a local Hugging Face folder or a ``.gguf`` file;
            - the folder of a peft adapter, which names its base model;
            - a ``(model, tokenizer)`` pair;
            - TransformerLens' own model: a `TransformerBridge` (4.x) or a `HookedTransformer` (3.9, with norms folded
              or not). It may stand alone if it has its tokenizer.

            A `pathlib.Path` is always a folder or file. The model of a pair is wrapped in place: it switches to eager
            attention, and its blocks become TransformerLens'. Factors on its logits and blocks (Cohere, Granite) move
            from the configuration into the weights. Under TransformerLens 3.9, its weights are copied. A `PeftModel` is
            copied, and the copy is merged. From a multimodal model, the language model is taken.
        adapter: Folder of a peft adapter to merge; not for TransformerLens' own models. Or a ``.safetensors`` file
            with the numbers of fine-tuned parts (`mechsafety.robustness.finetune_parts`): these take the place of the
            model's own, after its own adapter is merged. The model must be the one that they were trained on.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; None keeps the CPU (or a pair's own device).
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype. ``"auto"`` takes the checkpoint's dtype,
            which is float32 for a GGUF file. None means float32. A pair keeps its own dtype under ``"auto"`` and None.
        device_map: For models larger than one device: ``"auto"``, ``"balanced"``, ``"balanced_low_0"``,
            ``"sequential"``, or a mapping from module names to devices, ``"cpu"`` or ``"disk"``, as accelerate takes
            it. It stands in the place of ``device``. Beside a GPU, what is mapped to ``"cpu"`` is kept in memory and
            runs on the GPU. What is mapped to ``"disk"`` is read whenever its module runs. Activations are read on the
            device of the embedding, which is `LensModel.device`.
        max_memory: With ``device_map``: most bytes of weights per device, such as ``{0: "20GiB", "cpu": "60GiB"}``.
        offload_folder: With ``device_map``: folder for offloaded weights that the checkpoint does not hold as they are
            needed. By default a temporary folder, which is removed with the model.
        file: A ``.gguf`` file of the hub repository, or folder, that ``name_or_path`` names.
        chat_template: A Jinja chat template, or ``"plain"`` for ``User: ... Assistant:``, for models without one.
        template_options: Options of the chat template besides the prompt. Provenance keeps them.

            - ``system``: text of a system turn.
            - ``date``: the day that the template writes as today. By default it is 26 July 2024, so that results
              repeat.
            - ``thinking``: how a model that thinks is read. ``"off"`` uses the template's own switch; ``"closed"``
              reads after an empty thinking block. The default is ``"off"`` if the template has a switch. Otherwise it
              is ``"closed"`` if the prompt would end in an open block.
            - Any other variable that the template reads, such as ``enable_thinking``.
        on_tokenizer: Called with the tokenizer as soon as there is one, before any slow step. It is meant for checks of
            prompts, such as `PromptPairs.aligned`. An error that it raises ends the call.

    Returns:
        The model; never a tuple.

    Raises:
        MechsafetyError: The name, device or dtype is unknown; there is no chat template, or it does not take an option;
            the checkpoint does not fit its model; the analyses are not exact on this kind of model; or a check failed,
            which the message names.

    Example:
        >>> one = ms.testbed.planted()
        >>> ms.load_model((one.model, one.tokenizer))
        LensModel(planted-rmsnorm-4x4-0: 4 layers, 4 heads, d_mlp 32, float32)
    """
    kind = _dtype(dtype)
    place = _device(device)
    placing = placement(device_map, max_memory, offload_folder, device)
    if chat_template is not None:
        check_template(chat_template)
    parts, stem, given = None, "", adapter
    if adapter is not None and is_parts_adapter(adapter):
        parts, stem, adapter = PartsAdapter.read(adapter), Path(adapter).stem, None
    if adapter is not None and isinstance(name_or_path, str | os.PathLike) and base_and_adapter(name_or_path) is None:
        read_config(Path(adapter))  # before the model is looked for
    told = on_tokenizer is None

    def prepare(name: str, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
        nonlocal told
        ready, options = _prepared(chat_template, template_options, name, tokenizer)
        if on_tokenizer is not None and not told:  # a GGUF file that is converted now comes here twice
            on_tokenizer(ChatTokenizer(public_name(name), ready, options))
            told = True
        return ready, options

    source = open_source(name_or_path, file, chat_template, prepare)
    tokenizer, options = prepare(source.name, source.tokenizer)
    shown, adapter = _merged(source, adapter)
    if adapter is not None and not source.in_memory:
        check_fits(source.model, adapter)
    # weights that are changed here, by an adapter or by factors of the configuration, are placed afterwards
    changed = source.in_memory or adapter is not None or has_scales(source.model.config)
    if placing is not None and source.in_memory and (is_wrapped(source.model) or is_dispatched(source.model)):
        raise MechsafetyError(
            "device_map for a model that is wrapped or placed already",
            expected="a name, a folder, or a plain Hugging Face model",
            hint="leave device_map out",
        )
    model = source.read(kind or torch.float32, None if changed else placing)
    check_weights(model.get_base_model() if is_peft(model) else model)
    use_exact_kernels(model)
    if adapter is not None or is_peft(model):
        check_in_memory(model, "merging an adapter")
        rows = [row.to(model.device) for row in probe_rows(tokenizer, options)]
        model = merged_copy(model, rows) if adapter is None else apply_adapter(model, adapter, rows)
    check_no_adapter(model)
    whole, model = model, model if is_wrapped(model) else text_part(model)
    if is_dispatched(model) or quantised(model):
        _check_stays(model, place, kind)
    else:
        model = model if place is None else model.to(place)
        model = cast(model, kind) if isinstance(kind, torch.dtype) else model
    # computed before the model is wrapped; for a multimodal model, with the whole model
    reference = None
    if not is_wrapped(model):
        reference = reference_logits(whole, tokenizer, options)
        if has_scales(model.config):
            check_in_memory(model, "multiplying the configuration's factors into weights")
            fold_scales(model)
        if placing is not None and changed:
            placing.dispatch(model)
    lens = LensModel(shown, wrap(source.name, model, tokenizer), tokenizer, options)
    check_model(lens, reference)
    if parts is not None:
        parts.apply(lens)
        lens.name = f"{shown}+{stem}"
    if isinstance(name_or_path, str | os.PathLike):
        lens.recipe = {
            "name_or_path": _from_anywhere(name_or_path),
            "adapter": None if given is None else _from_anywhere(given),
            "device": device,
            "dtype": dtype,
            "device_map": device_map,
            "max_memory": max_memory,
            "offload_folder": None if offload_folder is None else Path(offload_folder).resolve(),
            "file": file,
            "chat_template": chat_template,
            "template_options": template_options,
        }
    return lens


def cast(model: Any, kind: torch.dtype) -> Any:
    """The model with its weights in another dtype; buffers that no checkpoint holds keep theirs.

    Such buffers are the frequencies of rotary embeddings. Models that are read in half precision have them in float32.
    """
    kept = {
        (module, name): module._buffers[name]
        for module in model.modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    }
    model = model.to(kind)
    for (module, name), buffer in kept.items():
        module._buffers[name] = buffer
    return model


def _check_stays(model: Any, place: Any, kind: Any) -> None:
    """Refuse to move or convert a model whose weights accelerate has placed or another library has quantised."""
    wanted = {"device": place, "dtype": kind if isinstance(kind, torch.dtype) and kind != model.dtype else None}
    for name, value in wanted.items():
        if value is not None:
            raise MechsafetyError(
                f"{name}={str(value).removeprefix('torch.')!r} for a model that is placed by accelerate or quantised",
                expected=f"no {name}",
                hint=f"give {name} where it is loaded, or leave it out",
            )


def _from_anywhere(path: str | os.PathLike[str]) -> str | Path:
    """A name as it is; the path of something that exists here, from the root on."""
    return Path(path).resolve() if isinstance(path, os.PathLike) or Path(path).exists() else path


def _prepared(
    chat_template: str | None, template_options: Mapping[str, Any] | None, name: str, tokenizer: Any
) -> tuple[Any, dict[str, Any]]:
    """The tokenizer with its chat template and padding token, and the checked template options."""
    ready = _ready(tokenizer, chat_template, name)
    options = checked_options(ready, template_options)
    check_start_token(ready, options)
    return ready, options


def _merged(source: Source, adapter: str | os.PathLike[str] | None) -> tuple[str, str | os.PathLike[str] | None]:
    """The model's name in results, and the adapter to merge; None if there is none or if a `PeftModel` holds it."""
    if adapter is not None and source.adapter is not None:
        raise MechsafetyError(
            f"the model {source.adapter.name!r} is an adapter, and adapter={adapter!r} was given",
            hint=f"pass the base model and adapter={source.adapter.name!r}",
        )
    if adapter is not None and source.in_memory and (is_wrapped(source.model) or is_peft(source.model)):
        raise MechsafetyError(
            f"an adapter for a {type(source.model).__name__}", hint="merge it before the model is wrapped"
        )
    if adapter is None and source.adapter is None and source.embedded and DEMO[source.name]:
        return source.name, adapter_folder(str(DEMO[source.name]))
    adapter = source.adapter if adapter is None else adapter
    own = source.model.active_adapters if source.in_memory and is_peft(source.model) else []
    names = [source.shown, *([] if adapter is None else [Path(adapter).name]), *own]
    return "+".join(names), adapter


def _ready(tokenizer: Any, chat_template: str | None, name: str) -> Any:
    """The tokenizer with a chat template and a padding token.

    If either is set here, the result is a copy. The caller's tokenizer, and models that were loaded with it, keep
    their own.
    """
    if not tokenizer.is_fast:
        raise MechsafetyError("a slow tokenizer", expected="a fast one (spans need character offsets)")
    if chat_template is not None or (tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None):
        tokenizer = tokenizer_copy(tokenizer)
    if chat_template is not None:
        # a rendered text lacks the start token that the tokenizer would add by itself
        start = "{{ bos_token }}" if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""
        tokenizer.chat_template = start + PLAIN_TEMPLATE if chat_template == "plain" else chat_template
    if not tokenizer.chat_template:
        raise no_template(name)
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
