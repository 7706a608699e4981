"""Which architectures load, how exact they are and what can be asked of them: writes docs/models.md.

Every row is a tiny random model of transformers' own configuration class (tests/architectures.py). It is compared with
the same weights before TransformerLens wrapped them, and one small call of each kind of analysis is made.

Run: python scripts/models_table.py (about three minutes on one core)
"""

import copy
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import mechsafety as ms
from mechsafety.models.shortcuts import Shortcuts

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

from alignment import load, section  # noqa: E402
from architectures import CONFIGS, random_model, tiny_tokenizer  # noqa: E402
from reference import patched_whole, whole_logits  # noqa: E402

from mechsafety.nodes import head_and_mlp_nodes  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
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

PAGE_TEXT = """# Models

`scripts/models_table.py` wrote this page. It tried {total} architectures: tiny random models of transformers' own
classes, in float32 where the name says nothing else ({versions}). {loaded} load, {refused} are refused with one line.
A real checkpoint goes through the same checks when it is loaded.

## Architectures that load

- *alone*: the largest difference of next-token logits from Hugging Face's own model with the same weights (eager
  attention), over {prompts} prompts of different lengths, each run by itself. In bfloat16 two neighbouring numbers
  between 4 and 8 are 3e-02 apart, so that rounding alone makes differences of that size.
- *padded*: the same, with all prompts in one padded batch.
- *shortcuts*: which shortcuts of the forward engine are on. `load_model` measures each one on the model and switches
  off what is not exact.
- *hooks*: the largest difference of the effects of all heads and MLPs (activation patching, in nats) from those of
  whole forwards with TransformerLens' own hooks, which use none of the shortcuts.
- *heads*: activation patching of heads and MLPs runs. *neurons*: activation patching of a neuron runs. *paths*: path
  patching runs. *edges*: edge attribution runs.

{table}

{lines}

## Architectures that are refused

{refusals}

{alignment}"""


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
    """Measure every architecture and write the page."""
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = [measure(name, tiny_tokenizer()) for name in tqdm([*CONFIGS, *FOLDERS], desc="architectures")]
    PAGE.write_text(page(rows), encoding="utf-8")


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


def page(rows: list[Row]) -> str:
    """docs/models.md."""
    loaded, refused = [row for row in rows if not row.refused], [row for row in rows if row.refused]
    head = ["architecture", "alone", "padded", "shortcuts", "hooks", *(name for name, _ in loaded[0].analyses)]
    every = set(Shortcuts().on)
    table = [
        [
            row.name,
            f"{row.alone:.0e}",
            f"{row.padded:.0e}",
            "all" if set(row.shortcuts) == every else ", ".join(row.shortcuts) or "none",
            f"{row.hooks:.0e}",
            *("no" if line else "yes" for _, line in row.analyses),
        ]
        for row in loaded
    ]
    # the line names the model's class: one example for each kind of analysis
    lines = {name: line for row in reversed(loaded) for name, line in row.analyses if line}
    return PAGE_TEXT.format(
        total=len(rows),
        loaded=len(loaded),
        refused=len(refused),
        prompts=len(PROMPTS),
        versions=", ".join(f"{name} {version(name)}" for name in ("transformers", "transformer_lens")),
        table=markdown(head, table),
        lines="\n\n".join(f"Where *{name}* says no, the line is such as: {line}." for name, line in lines.items()),
        alignment=section(load()),
        refusals=markdown(["architecture", "the line"], [[row.name, row.refused] for row in refused]),
    )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
