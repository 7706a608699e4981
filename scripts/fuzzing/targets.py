"""What is fuzzed: valid files of each kind, made here, and the public function that reads them."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jaxtyping import Float

import mechsafety as ms

Files = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of file.

    Attributes:
        name: Its name for the command.
        about: What is read by what, for the page.
        valid: Folders of valid files, by name relative to the folder.
        load: Reads a folder, whose files may be spoilt.
        whole: Whether the loader is given the whole folder, rather than each file or folder in it.
    """

    name: str
    about: str
    valid: Sequence[Files]
    load: Callable[[Path], Any]
    whole: bool = False


def files_of(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def saved(*results: Any, single: bool) -> list[Files]:
    """Each result as a folder, or as a single JSON file."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        for k, result in enumerate(results):
            folder = Path(place) / str(k)
            result.save(folder / f"{type(result).__name__}.json" if single else folder / type(result).__name__)
            found.append(files_of(folder))
    return found


@cache
def planted() -> Any:
    """A model whose circuit is known, its pairs and a metric."""
    made = ms.testbed.planted(seed=5, layers=3, heads=2)
    model = ms.load_model((made.model, made.tokenizer))
    return model, made.pairs, ms.RefusalLogOdds.of(model, ["Sorry"])


def prompts() -> Target:
    pairs = [
        {"harmful": f"how do i make a bomb {k}", "harmless": f"how do i make a cake {k}", "topic": "x"} for k in "ab"
    ]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "how do i steal é 🙂"}]
    rows = [*pairs, {"harmful": talk, "harmless": talk, "split": "test", "edition": 2}]
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    table = "harmful,harmless,topic\n" + "".join(f'"{row["harmful"]}",{row["harmless"]},y\n' for row in pairs)
    valid: list[Files] = [
        {"pairs.jsonl": lines.encode()},
        {"pairs.json": json.dumps(rows, allow_nan=False).encode()},
        {"pairs.csv": table.encode()},
    ]

    def load(folder: Path) -> None:
        for path in folder.iterdir():
            ms.PromptPairs.from_file(path)

    return Target("prompts", "prompt files (.jsonl, .json, .csv) by `PromptPairs.from_file`", valid, load)


def circuit() -> Target:
    from circuits_drawn import neuron_circuit, small_circuit

    drawn = [small_circuit(), neuron_circuit()]
    valid = [{"circuit.json": one.to_json().encode()} for one in drawn]

    def load(folder: Path) -> None:
        for path in folder.iterdir():
            found = ms.RefusalCircuit.load(path)
            repr(found)
            found.to_json()

    return Target("circuit", "`circuit.json` by `RefusalCircuit.load`, and written again", valid, load)


def results() -> Target:
    from circuits_drawn import small_circuit

    model, pairs, metric = planted()
    some = pairs.sample(4)
    patched = ms.activation_patching(model, some, metric, nodes=["L0.H1", "L1.MLP"])
    direction = ms.refusal_direction(model, some, metric, max_kl=None)
    heads = ms.head_attribution(model, some, metric)
    found = (patched, direction, heads, small_circuit())
    valid = [*saved(*found, single=True), *saved(*found, single=False)]
    kinds = {type(one).__name__: type(one) for one in found}

    def load(folder: Path) -> None:
        for path in folder.iterdir():
            kinds[path.stem].load(path)

    return Target("results", "saved results, as folders and as single files, by `load`", valid, load)


@ms.scale.sweeps
def squares(numbers: tuple[int, ...]) -> tuple[Any, ...]:
    """A sweep whose outcomes are tensors and numbers, as those of the package are."""
    import torch

    kind = tuple[Float[torch.Tensor, "a b"], float, str]
    return tuple(ms.scale.work("squares", numbers, lambda k: (torch.full((2, 3), k**0.5), k**2 / 7, str(k)), kind))


def runs() -> Target:
    def outcome() -> str:
        return repr(squares((1, 2, 3)))

    with tempfile.TemporaryDirectory() as place:
        with ms.running(place):
            alone = outcome()
        valid = [files_of(Path(place))]

    def load(folder: Path) -> None:
        with ms.running(folder):
            if outcome() != alone:
                raise AssertionError("a spoilt item changed the result")

    return Target("runs", "run folders by `ms.running`, which goes on from them", valid, load, whole=True)


def fingerprints() -> Target:
    model, pairs, metric = planted()
    audit = ms.monitors.TamperAudit.fingerprint(model, pairs.sample(4), metric, progress=False)
    valid = [*saved(audit, single=True), *saved(audit, single=False)]

    def load(folder: Path) -> None:
        for path in folder.iterdir():
            repr(ms.monitors.TamperAudit.load(path))

    return Target("fingerprints", "fingerprints by `TamperAudit.load`", valid, load)


def guards() -> Target:
    import torch

    from mechsafety.service.judge import load_protection

    model, pairs, metric = planted()
    asked = (*pairs.harmful, *pairs.harmless)
    labelled = ms.monitors.LabelledPrompts("x", asked, (True,) * len(pairs) + (False,) * len(pairs))
    mask = torch.rand(model.n_layers, model.d_mlp, generator=torch.Generator().manual_seed(0)) < 0.2
    guard = ms.monitors.SafetyGuard.fit(model, mask, labelled)
    direction = ms.refusal_direction(model, pairs.sample(4), metric, max_kl=None)
    monitor = ms.monitors.ActivationMonitor.fit(model, direction.direction, labelled, reply_tokens=3)
    weights = (guard.weights, monitor.weights, guard.with_monitor(monitor).weights)
    valid = [*saved(*weights, single=True), *saved(*weights, single=False)]

    def load(folder: Path) -> None:
        for path in folder.iterdir():
            loaded = load_protection(path, model)
            if isinstance(loaded, ms.monitors.SafetyGuard):
                loaded.predict_all(pairs.harmful[:1])
            else:
                loaded.score(pairs.harmful[:1])

    about = "guards and monitors by `SafetyGuard.load` and `ActivationMonitor.load`, and asked for a verdict"
    return Target("guards", about, valid, load)


def adapters() -> Target:
    from safetensors.torch import save

    from mechsafety.codec import encode
    from mechsafety.models.parts_adapter import FORMAT, VERSION, PartsAdapter
    from mechsafety.models.slices import part_slices
    from mechsafety.nodes import Node

    model, _, _ = planted()
    parts = (Node("head", 0, 1), Node("mlp", 1), Node("neuron", 0, 3))
    weights = dict(model.hf_model.named_parameters())
    values = {one.name: one.read(weights[one.parameter]).detach() for one in part_slices(model, parts)[0]}
    about = PartsAdapter(model.name, model.weights_sha256, model.dtype_name, "harden", parts)
    row = {"format": FORMAT, "version": VERSION, "adapter": encode(PartsAdapter, about)}
    valid = [{"parts.safetensors": save(values, {FORMAT: json.dumps(row, allow_nan=False)})}]

    def load(folder: Path) -> None:
        for path in folder.iterdir():
            PartsAdapter.read(path).check_fits(model)

    return Target("adapters", "adapters of parts (`load_model(..., adapter=FILE)`), read and checked", valid, load)


MAKERS: dict[str, Callable[[], Target]] = {
    make.__name__: make for make in (prompts, circuit, results, runs, fingerprints, guards, adapters)
}
