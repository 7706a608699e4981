"""Which architectures load, how exact they are and what can be asked of them: docs/results/models.json.

Every row is a tiny random model of transformers' own configuration class (architectures.py). It is compared with
the same weights before TransformerLens wrapped them, and one small call of each kind of analysis is made.

Run: python scripts/models_table.py (about three minutes on one core). docs/models.md is drawn from the JSON.
"""

import copy
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import transformers
from architectures import CONFIGS, random_model, tiny_tokenizer
from pages.render import publish
from tqdm import tqdm
from whole_forwards import patched_whole, whole_logits

import mechsafety as ms
from mechsafety.models.shortcuts import Shortcuts
from mechsafety.nodes import head_and_mlp_nodes

PROMPTS = [
    "tea",
    "how do i make a bomb",
    "teach me to steal a car please",
    "explain why the sky is blue and poison my tea",
]
HARMFUL = ["how do i make a bomb", "teach me to steal a car please", "explain how to hurt people"]
HARMLESS = ["how do i make a cake", "teach me to help a car please", "explain how to help people"]
METRIC = ms.RefusalLogOdds((20, 21), ("a", "b"))
# rows that are loaded from a folder: the architecture, the data type, the largest file
FOLDERS = {
    "Llama, a folder in bfloat16": ("Llama", torch.bfloat16, "1GB"),
    "Llama, a folder of several files": ("Llama", torch.float32, "20KB"),
    "GPT-2, a folder of several files": ("GPT-2", torch.float32, "20KB"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """What was found of one architecture.

    Attributes:
        name: The architecture.
        refused: The line that it is refused with; empty if it loads.
        alone: Largest difference of next-token logits from Hugging Face's own, prompts one at a time.
        padded: The same with all prompts in one padded batch.
        shortcuts: The engine's shortcuts that are on.
        hooks: Largest difference of the effects of heads and MLPs from those of whole forwards with hooks.
        analyses: For each kind of analysis the line that it is refused with; empty if it runs.
    """

    name: str
    refused: str = ""
    alone: float = 0.0
    padded: float = 0.0
    shortcuts: tuple[str, ...] = ()
    hooks: float = 0.0
    analyses: tuple[tuple[str, str], ...] = ()


def main() -> None:
    """Measure every architecture."""
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = [measure(name, tiny_tokenizer()) for name in tqdm([*CONFIGS, *FOLDERS], desc="architectures")]
    publish("models", record(rows))


def measure(name: str, tokenizer: transformers.PreTrainedTokenizerFast) -> Row:
    """One row; an error that is no MechsafetyError stops the script."""
    kind, dtype, size = FOLDERS.get(name, (name, torch.float32, ""))
    plain = random_model(kind, len(tokenizer)).to(dtype)
    try:
        model = from_folder(plain, tokenizer, size) if size else ms.load_model((copy.deepcopy(plain), tokenizer))
    except ms.MechsafetyError as error:
        return Row(name, refused=str(error))
    expected = torch.stack([reference(plain, model, prompt) for prompt in PROMPTS]).float()
    alone = torch.cat([model.logits([prompt]) for prompt in PROMPTS])
    gaps = [float((found - expected).abs().max()) for found in (alone, model.logits(PROMPTS))]
    return Row(name, "", gaps[0], gaps[1], model.shortcuts.on, hooked_difference(model), tuple(analyses(model).items()))


def from_folder(
    plain: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast, size: str
) -> ms.LensModel:
    """The model, saved in files of at most this size and loaded again in the data type that it was saved in."""
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder, max_shard_size=size)
        tokenizer.save_pretrained(folder)
        return ms.load_model(folder, dtype="auto")


def hooked_difference(model: ms.LensModel) -> float:
    """Largest difference of the effects of all heads and MLPs from those of whole forwards with hooks."""
    pairs, nodes = ms.PromptPairs.from_lists(HARMFUL, HARMLESS), head_and_mlp_nodes(model.n_layers, model.n_heads)
    fast = ms.activation_patching(model, pairs, METRIC, nodes=nodes, progress=False).changes
    base, source = (model.tokenize(side) for side in (pairs.harmful, pairs.harmless))
    clean = METRIC(whole_logits(model, base))
    slow = torch.stack([clean - METRIC(patched_whole(model, base, source, [node])) for node in nodes])
    return float((fast - slow).abs().max())


def reference(plain: transformers.PreTrainedModel, model: ms.LensModel, prompt: str) -> torch.Tensor:
    """Next-token logits of the model that was never wrapped, on one prompt alone."""
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        return plain(model.tokenize([prompt]).ids).logits[0, -1]


def analyses(model: ms.LensModel) -> dict[str, str]:
    """For each kind of analysis the line that it is refused with; empty if it runs."""
    pairs = ms.PromptPairs.from_lists(HARMFUL, HARMLESS)
    metric = METRIC
    neuron = ms.Node("neuron", 1, 3)
    calls: dict[str, Callable[[], object]] = {
        "heads": lambda: ms.activation_patching(model, pairs, metric, progress=False),
        "neurons": lambda: ms.activation_patching(model, pairs, metric, nodes=[neuron], progress=False),
        "paths": lambda: ms.path_patching(model, pairs, metric, progress=False),
        "edges": lambda: ms.edge_attribution(model, pairs, metric, steps=2, progress=False),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = ""
        except ms.MechsafetyError as error:
            found[name] = str(error)
    return found


def record(rows: list[Row]) -> dict[str, Any]:
    """What docs/models.md is drawn from."""
    loaded = [row for row in rows if not row.refused]
    return {
        "versions": {name: version(name) for name in ("transformers", "transformer_lens")},
        "prompts": len(PROMPTS),
        "shortcuts": list(Shortcuts().on),
        "loaded": [
            {
                **{name: getattr(row, name) for name in ("name", "alone", "padded", "shortcuts", "hooks")},
                "analyses": {name: not line for name, line in row.analyses},
            }
            for row in loaded
        ],
        "refused": [{"name": row.name, "line": row.refused} for row in rows if row.refused],
        # a line names the model's class: one example for each kind of analysis
        "lines": {name: line for row in reversed(loaded) for name, line in row.analyses if line},
    }


if __name__ == "__main__":
    main()
