"""What may be given as a model: a name, a folder, a file, an adapter, or a model in memory.

Each is opened without its weights. If a configuration, a tokenizer or a file's header already shows that it cannot be
used, the error comes before any weight is read.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mechsafety.errors import MechsafetyError, first_line, named
from mechsafety.models.adapters import base_and_adapter, is_peft, looks_local
from mechsafety.models.backend import check_known, is_wrapped, wrapped_name
from mechsafety.models.demo import base_folder
from mechsafety.models.gguf import TEMPLATE, gguf_folder
from mechsafety.models.gguf_file import read_header
from mechsafety.models.kinds import DECODER, check_kind, is_multimodal, text_part
from mechsafety.models.lens_model import LensModel
from mechsafety.models.placed import Placement, keep_with, temporary_folder

WANTED = "'demo', a hub id, a Hugging Face folder, a .gguf file, (model, tokenizer) or a TransformerLens model"
# tensors that a checkpoint may hold although the model does not read them: buffers that today's models make themselves,
# and the value head that trainers leave behind
HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|inv_freq|position_ids|attn\.(masked_bias|embed_positions)"
    r"|attention\.(masked_bias|embed_positions)|(attn|attention)\.bias|scale_attn)$|^v_head\."
)
# names of the embedded model, each with the adapter that is merged into it
DEMO = {"demo": "refusal", "demo-helpful": "helpful", "demo-base": None}
# code that comes with a checkpoint is never run, and the user is not asked about it
_OWN_CODE = {"trust_remote_code": False}


# called with a model's name and its tokenizer; raises an error if they cannot be used
Prepare = Callable[[str, Any], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A model as it was given.

    Attributes:
        name: The name, folder or file that was given.
        shown: Its name in results, which holds no folders of this machine.
        model: The model. A model that was given in memory has its weights. Any other has none (it is on the meta
            device) and serves for checks.
        tokenizer: Its tokenizer.
        read: Reads the model with its weights, in a dtype or ``"auto"``, and places them if it gets a `Placement`.
        adapter: Folder of the adapter, if an adapter was given as the model.
        embedded: Whether it is the embedded model.
        in_memory: Whether it was given in memory.
    """

    name: str
    shown: str
    model: Any
    tokenizer: Any
    read: Callable[..., Any]
    adapter: Path | None = None
    embedded: bool = False
    in_memory: bool = False


def open_source(given: Any, file: str | None, chat_template: str | None, prepare: Prepare) -> Source:
    """Open what was given as a model.

    Args:
        given: As `load_model` takes it.
        file: A GGUF file of the hub repository or folder that ``given`` names.
        chat_template: As `load_model` takes it. It must be given if a GGUF file has none.
        prepare: Checks the tokenizer of a GGUF file before the file is de-quantised.

    Raises:
        MechsafetyError: ``given`` is not a model, or the analyses are not exact on it.
    """
    if file is not None:
        return _open_gguf(*_file_of(given, file), chat_template, prepare)
    if is_embedded(given):
        return replace(_open_folder(given, str(base_folder())), shown="demo-base", embedded=True)
    if not isinstance(given, str | os.PathLike):
        return _open_memory(given)
    own = base_and_adapter(given)
    if own is not None:
        return _open_adapted(*own, chat_template, prepare)
    path = Path(given).expanduser()
    name = str(given) if isinstance(given, str) else os.fspath(path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise MechsafetyError(f"no such file: {name}", expected="a GGUF file")
        return _open_gguf(path.stem, path, chat_template, prepare)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MechsafetyError(f"{name} holds no config.json", expected="a Hugging Face model folder")
        return _open_folder(name, str(path))
    if path.exists():
        raise MechsafetyError(f"{name} is a file", expected="a model folder, a .gguf file or a hub id")
    if not isinstance(given, str) or looks_local(given):
        hint = "" if isinstance(given, str) else "pass a name or hub id as a string"
        raise MechsafetyError(
            f"no such folder or file: {name}", expected=WANTED if isinstance(given, str) else "a local path", hint=hint
        )
    return _open_folder(name, name)


def is_embedded(given: Any) -> bool:
    """Whether this is a name of the embedded model; a Path never is."""
    return isinstance(given, str) and given in DEMO


# --- folders and hub ids ----------------------------------------------------------------------------------------------


def _open_folder(name: str, source: str, tokenizer_from: Any = None) -> Source:
    """A Hugging Face folder or hub id."""
    from transformers import AutoConfig, AutoTokenizer

    with _named(name):
        config = AutoConfig.from_pretrained(source, **_OWN_CODE)
        if config.is_encoder_decoder:
            raise MechsafetyError(f"{name} is an encoder-decoder ({config.model_type})", expected=DECODER)
        kind = _auto_class(config)
        with torch.device("meta"):
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
        check_class(model)
        tokenizer = (tokenizer_from or AutoTokenizer).from_pretrained(source, **_OWN_CODE)

    return Source(name, public_name(name), model, tokenizer, partial(_read_folder, name, source, kind))


def _read_folder(name: str, source: str, kind: Any, dtype: torch.dtype | str, place: Placement | None = None) -> Any:
    """The model with its weights; every weight comes from the checkpoint."""
    options, folder = {} if place is None else place.arguments(), None
    if place is not None and place.folder is None:
        folder = temporary_folder()
        options["offload_folder"] = folder.name
    with _named(name):
        model, report = kind.from_pretrained(
            source,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            **options,
            **_OWN_CODE,
        )
    if folder is not None:
        keep_with(model, folder)
    _check_complete(name, model, report)
    return model.eval()


def check_class(model: Any) -> None:
    """Refuse a Hugging Face model on which the analyses are not exact, or that TransformerLens does not know.

    Raises:
        MechsafetyError: The model is such a model. The message says what it is and what is accepted.
    """
    part = text_part(model)
    check_kind(part)
    check_known(part)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Context that turns an error of another library into a `MechsafetyError` of one line."""
    try:
        yield
    except MechsafetyError:
        raise
    except Exception as error:  # they raise many types
        raise MechsafetyError(
            f"cannot load the model {name!r} ({first_line(error)})", expected=WANTED, page="the-model-cannot-be-loaded"
        ) from error


def _auto_class(config: Any) -> Any:
    """The class of transformers that loads a checkpoint; for a multimodal model, the class of the whole model."""
    import transformers

    named = (config.architectures or [""])[0]
    if is_multimodal(config) and type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        return getattr(transformers, named, transformers.AutoModelForCausalLM)
    return transformers.AutoModelForCausalLM


def _check_complete(name: str, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not those of its model; transformers would fill gaps with random numbers.

    Args:
        name: What the user gave.
        model: The loaded model.
        report: The loading info that `from_pretrained` returns under ``output_loading_info``.

    Raises:
        MechsafetyError: Tensors are missing, unread or of another shape. The message gives the number of each kind, and
            one name.
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
            hint="save it again with save_pretrained, under a config.json of the same model",
        )


def public_name(name: str) -> str:
    """A model's name for results; a local path is shortened to its last part, so that results hold no folders."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


# --- GGUF files -------------------------------------------------------------------------------------------------------


def _open_gguf(name: str, path: Path, chat_template: str | None, prepare: Prepare) -> Source:
    """A GGUF file, opened through the folder into which it was converted."""
    from transformers import PreTrainedTokenizerFast

    header = read_header(path)
    if chat_template is None and TEMPLATE not in header.values:
        raise no_template(name)  # before the tokenizer is converted, which takes long

    folder = gguf_folder(header, partial(_check_unread, name, prepare))
    # not the tokenizer class that the configuration names: it may split text differently from the file's settings
    return _open_folder(name, str(folder), PreTrainedTokenizerFast)


def _check_unread(name: str, prepare: Prepare, model: Any, tokenizer: Any) -> None:
    """Refuse a GGUF file if its model (without weights) or its tokenizer already shows that it cannot be used."""
    check_class(model)
    prepare(name, tokenizer)


def _file_of(given: Any, file: str) -> tuple[str, Path]:
    """Name and path of a file in a folder, or in a repository on the hub (or in its local copy)."""
    if not str(file).lower().endswith(".gguf"):
        raise MechsafetyError(f"file={str(file)!r}", expected="the name of a .gguf file")
    if not isinstance(given, str | os.PathLike) or is_embedded(given):
        shown = repr(given) if isinstance(given, str) else f"a {type(given).__name__}"
        raise MechsafetyError(f"file={str(file)!r} of {shown}", expected="a hub id or a folder")
    folder = Path(given).expanduser()
    if folder.is_dir():
        path = folder / file
        if not path.is_file():
            raise MechsafetyError(f"no such file: {path}", expected="a GGUF file")
        return path.stem, path
    if folder.exists() or not isinstance(given, str):
        raise MechsafetyError(f"file={str(file)!r} of {os.fspath(given)!r}", expected="a hub id or a folder")
    if looks_local(given):
        raise MechsafetyError(f"no such folder: {given}", expected="a hub id or a folder")
    from huggingface_hub import hf_hub_download

    try:
        return f"{given}/{file}", Path(hf_hub_download(given, file))
    except Exception as error:  # the hub's client raises many types
        raise MechsafetyError(
            f"cannot get the file {file!r} of {given!r} ({first_line(error)})", expected="a file of a hub repository"
        ) from error


def no_template(name: str) -> MechsafetyError:
    """The error for a model without a chat template."""
    return MechsafetyError(
        f"{name} has no chat template",
        expected="a chat model",
        hint="pass chat_template='plain' (command: --chat-template plain) for 'User: ... Assistant:'",
        page="no-chat-template",
    )


# --- adapters ---------------------------------------------------------------------------------------------------------


def _open_adapted(base: str, folder: Path, chat_template: str | None, prepare: Prepare) -> Source:
    """The base model of an adapter that was given as the model."""
    from transformers import AutoTokenizer

    tokenizer = None
    if (folder / "tokenizer_config.json").is_file():  # the tokenizer that the adapter was trained with
        with _named(str(folder)):
            tokenizer = AutoTokenizer.from_pretrained(folder, **_OWN_CODE)
        chat_template, prepare = "its own", partial(_instead, prepare, tokenizer)
    try:
        source = open_source(base, None, chat_template, prepare)
    except MechsafetyError as error:
        raise _of_base(folder, error) from error

    tokenizer = source.tokenizer if tokenizer is None else tokenizer
    return replace(source, tokenizer=tokenizer, read=partial(_read_base, folder, source), adapter=folder)


def _instead(prepare: Prepare, tokenizer: Any, name: str, base: Any) -> None:
    """Check an adapter's tokenizer instead of its base model's."""
    prepare(name, tokenizer)


def _read_base(folder: Path, source: Source, dtype: torch.dtype | str, place: Placement | None = None) -> Any:
    try:
        return source.read(dtype, place)
    except MechsafetyError as error:
        raise _of_base(folder, error) from error


def _of_base(folder: Path, error: MechsafetyError) -> MechsafetyError:
    """The error of an adapter's base model, with the adapter's name added."""
    return MechsafetyError(
        f"the base model of the adapter {folder.name!r}: {error.problem}",
        expected=error.expected,
        hint=error.hint or f"pass the base model and adapter={folder.name!r}",
    )


# --- models in memory -------------------------------------------------------------------------------------------------


def _open_memory(given: Any) -> Source:
    """A model that was given in memory."""
    model, tokenizer = _pair(given)
    base = model.get_base_model() if is_peft(model) else model
    if not is_wrapped(base):
        check_class(base)
    name = _name(base)
    return Source(name, public_name(name), model, tokenizer, lambda dtype, place=None: model, in_memory=True)


def _pair(given: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a model that was given in memory."""
    if isinstance(given, LensModel):
        raise MechsafetyError(f"{given.name} is loaded already", hint="use it as it is")
    alone = not isinstance(given, tuple)
    model, tokenizer = (given, _own_tokenizer(given)) if alone else (given if len(given) == 2 else (None, None))
    if not isinstance(model, torch.nn.Module) or not hasattr(tokenizer, "apply_chat_template"):
        kinds = f"a tuple of {tuple(type(item).__name__ for item in given)}"
        raise MechsafetyError(kinds, expected="(Hugging Face model, tokenizer)")
    if not hasattr(tokenizer, "convert_ids_to_tokens"):  # the processor of a multimodal model
        raise MechsafetyError(f"a {type(tokenizer).__name__} as tokenizer", hint="pass processor.tokenizer")
    if is_wrapped(model):
        return model, tokenizer
    if any(type(module).__module__.startswith("transformer_lens") for module in model.modules()):
        raise MechsafetyError("this model is wrapped already", hint="pass a fresh model, or copy.deepcopy it first")
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) and not is_peft(model):
        inner = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
        held = inner.get(type(model).__name__)
        raise MechsafetyError(
            f"a {type(model).__name__}", expected="a Hugging Face model", hint=f"pass model.{held}" if held else ""
        )
    return model.eval(), tokenizer


def _own_tokenizer(model: Any) -> Any:
    """The tokenizer that a TransformerLens model holds."""
    if not isinstance(model, torch.nn.Module):
        hint = "write (model, tokenizer)" if isinstance(model, list) else ""
        raise MechsafetyError(f"a {type(model).__name__} was given as the model", expected=WANTED, hint=hint)
    if not is_wrapped(model) or model.tokenizer is None:
        raise MechsafetyError(f"a {type(model).__name__} without a tokenizer", hint="pass (model, tokenizer)")
    return model.tokenizer


def _name(model: Any) -> str:
    """Name of a model that was given in memory."""
    own = wrapped_name(model) if is_wrapped(model) else getattr(model.config, "_name_or_path", "")
    return own or type(model).__name__
