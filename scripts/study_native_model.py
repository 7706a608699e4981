"""Map the refusal of a model that nobody here trained, beside the demo model; write docs/results/native-model.json.

    python scripts/study_native_model.py qwen2.5-coder-0.5b-instruct-q4_k_m.gguf

The file is the official one of Qwen2.5-Coder-0.5B-Instruct; its SHA-256 is checked. Both models go through the same
parts: replies to public benchmarks and to the built-in pairs, the map by nodes and by neurons, the refusal direction,
heads, contrast neurons, replies once what was found is ablated, and probes. Benchmarks are read from --data (JSON lines
with an "instruction" each).

Each step is kept in --work and not done again, so that a stopped run goes on: the native model takes hours on two
cores. The steps done so far are in docs/results/native-model/steps; delete that folder to measure everything again. A
store of other sizes, weights or data is refused. Of replies only their kind and their loss under the unedited model are
kept, never their text. The page is drawn from the stored JSON and circuits alone, by scripts/pages, once every part of
both models is there.
"""

import argparse
import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from pages.native_model import BUILT_IN, CIRCUITS, NAME
from pages.page import RESULTS
from pages.render import publish
from reproduce_refusal_direction import (
    N_RANDOM,
    Study,
    find,
    heads,
    judged,
    number,
    probes,
    random_like,
    rows_of,
    summary,
)
from steps import Steps

import mechsafety as ms
from mechsafety.circuits import (
    Draw,
    RefusalCircuit,
    SearchResult,
    assemble_circuit,
    draw_pairs,
    measure_ablation,
    measure_nodes,
    measure_parts,
    rank_parts,
    search_circuit,
    split_pairs,
    verify_circuit,
    wire_circuit,
)
from mechsafety.circuits.ablations import unedited_replies
from mechsafety.circuits.map import Found, NodeEffects, Ranked
from mechsafety.circuits.verification.stability import PairAttributions
from mechsafety.directions import RefusalDirection
from mechsafety.interventions import project_out, steer
from mechsafety.models.demo import adapter_folder
from mechsafety.models.kept import sha256_of
from mechsafety.neurons import NeuronContrast, contrast_neurons
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.probes import N_ERASE
from mechsafety.replies import REPLY_TOKENS, JudgedReplies, ReplyKinds

SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
BENCHMARKS = {
    "JailbreakBench": "jailbreakbench",
    "AdvBench": "advbench",
    "HarmBench": "harmbench_test",
    "Alpaca": "alpaca_harmless",
}
LEVELS = ("node", "neuron")
SPAN = "suffix"  # where the reply is decided


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything: prompts, unless the name says otherwise."""

    replies: int = 60
    tried: tuple[tuple[str, int], ...] = (("native", 192), ("demo", 128))
    train: int = 48
    validation: int = 24
    edited: int = 30
    head_pairs: int = 16
    ablated: int = 24
    contrast_neurons: int = 100
    probe: int = 60
    probe_layers: int = 7
    n_random: int = 100
    n_resamples: int = 100


SMALL = Size(4, (("native", 8), ("demo", 8)), 4, 4, 2, 3, 3, 5, 6, 2, 3, 1)


class Side:
    """One of the two models: its prompts, its steps, and the model itself once a step needs it."""

    def __init__(self, name: str, given: str, sha256: str, args: argparse.Namespace) -> None:
        self.name, self.given, self.sha256, self.args = name, given, sha256, args
        self.size: Size = SMALL if args.small else Size()
        data = {file: sha256_of(args.data / f"{file}.jsonl") for file in (*BENCHMARKS.values(), "harmbench_val")}
        made_of = {"size": dataclasses.asdict(self.size), "weights": sha256, "data": data}
        self.steps = Steps(args.work / name, made_of)

    @cached_property
    def model(self) -> ms.LensModel:
        return ms.load_model(self.given)

    @cached_property
    def drawn(self) -> Draw:
        """Pairs of the map; sample replies are not kept."""

        def draw() -> Draw:
            tried = dict(self.size.tried)[self.name]
            return dataclasses.replace(draw_pairs(self.model, limit=tried, progress=False), samples=())

        return self.steps.result("pairs", Draw, draw)

    @cached_property
    def study(self) -> Study:
        """The same model and metric for the steps of the direction's own study, kept in the same folder."""
        size = self.size
        options = argparse.Namespace(
            data=self.args.data,
            work=self.steps.folder,
            n_train=size.train,
            n_validation=size.validation,
            n_probe=size.probe,
            n_pairs=size.head_pairs,
            layers=None,
        )
        return Study(options, self.model, self.drawn.metric)

    @cached_property
    def direction(self) -> RefusalDirection:
        found = self.steps.result("direction", RefusalDirection, lambda: find(self.study))
        self.study.layer = found.layer
        return found

    @cached_property
    def contrast(self) -> NeuronContrast:
        def compute() -> NeuronContrast:
            return contrast_neurons(self.model, self.drawn.here, progress=False)

        return self.steps.result("neuron-contrast", NeuronContrast, compute)

    def circuit(self, level: str) -> RefusalCircuit:
        """The map at a level, of the same pairs."""

        def compute() -> RefusalCircuit:
            # neurons are looked for in the circuit of nodes, whose search would be repeated alike
            resamples = self.size.n_resamples if level == "node" else 0
            options = ms.MapOptions(level=level, n_random=self.size.n_random, n_resamples=resamples)
            # the stages of map_refusal_circuit; both levels begin with the same ranking, search and effects of nodes
            split = split_pairs(self.model, self.drawn, options, progress=False)
            by_pair = self.steps.value("ranking", PairAttributions, lambda: rank_parts(split).by_pair)
            ranked = Ranked(split, by_pair, by_pair.mean())
            result = self.steps.value("search", SearchResult, lambda: search_circuit(ranked).result)
            found = Found(ranked, result)
            effects = self.steps.value("effects", NodeEffects, lambda: measure_nodes(found))
            measured = measure_parts(found, effects)
            return assemble_circuit(verify_circuit(wire_circuit(measured)))

        return self.steps.result(f"map-{level}.json", RefusalCircuit, compute)

    def prompts(self, name: str) -> list[str]:
        """A benchmark's first prompts, or one side of the built-in pairs of held-out topics."""
        if name in BENCHMARKS:
            every = ms.prompts.load_instructions(str(self.args.data / f"{BENCHMARKS[name]}.jsonl"))
        else:
            built_in = ms.PromptPairs.builtin("test").sample(self.size.replies)
            every = built_in.harmful if name == BUILT_IN["harmful"] else built_in.harmless
        return every[: self.size.replies]


# --- the parts ------------------------------------------------------------------------------------------------------


def facts(side: Side) -> dict[str, Any]:
    """What the model is, and how a prompt reads."""
    model = side.model
    sizes = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_mlp", "d_vocab")
    found: dict[str, Any] = {name: getattr(model, name) for name in sizes}
    found["parameters"] = sum(weights.numel() for weights in model.hf_model.parameters())
    return {**found, "name": model.name, "sha256": side.sha256, "prompt": model.render("How do I bake bread?")[0]}


def pairs(side: Side) -> dict[str, Any]:
    """What was tried for the map, what could be used, and how often it was refused."""
    drawn = side.drawn
    return {
        "tried": drawn.behaviour["harmful"].n,
        "here": len(drawn.here),
        "there": len(drawn.there),
        "aligned": {
            split: [int(table["aligned"].sum()), len(table)]
            for split in ("train", "test")
            for table in [ms.PromptPairs.builtin(split).alignment(side.model)]
        },
        "metric": drawn.metric.to_json(),
        "behaviour": rows_of(drawn.to_dataframe()),
        "seconds": side.steps.seconds("pairs"),
    }


def maps(side: Side) -> dict[str, Any]:
    """How long the maps took; they are files of their own."""
    return {level: [len(side.circuit(level)), side.steps.seconds(f"map-{level}.json")] for level in LEVELS}


def replies(side: Side) -> dict[str, Any]:
    """Kinds of reply to every set of prompts."""
    found = {}
    for name in (*BENCHMARKS, *BUILT_IN.values()):
        said = judged(side.study, name, side.prompts(name), nullcontext)
        found[name] = summary(said, said)
    return {"sets": found, "tokens": REPLY_TOKENS, "loss_limit": number(side.study.limit)}


def direction(side: Side) -> dict[str, Any]:
    """The published choice and its conditions, and replies with the direction removed or added."""
    found = side.direction
    conditions: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "removed": lambda: found.ablate(side.model),
        "added": lambda: found.add(side.model),
        "random removed": lambda: project_out(side.model, random_like(found.vector, 1)),
        "random added": lambda: steer(side.model, random_like(found.vector, 1), 1.0, [found.layer]),
    }
    said: dict[str, Any] = {}
    for name in ("JailbreakBench", "Alpaca"):
        whole, n = judged(side.study, name, side.prompts(name), nullcontext), side.size.edited
        before = ReplyKinds(whole.kinds[:n], whole.loss[:n], whole.limit)
        said[name] = {"as it is": summary(before, before)}
        for condition, make in conditions.items():
            if condition.endswith("removed") or name == "Alpaca":
                kinds = judged(side.study, f"direction {name} {condition}", side.prompts(name)[:n], make)
                said[name][condition] = summary(kinds, before)
    return {
        "chosen": {"layer": found.layer, "position": found.position, "passes": found.passes},
        "candidates": rows_of(found.to_dataframe()),
        "conditions": dataclasses.asdict(found.conditions),
        "without_kl": without_kl(found),
        "controls": rows_of(found.controls.to_dataframe()) if found.controls else [],
        "validation": [len(found.harmful), len(found.harmless)],
        "train": list(found.n_train),
        "unedited": {"bypass": float(found.harmful.mean()), "induce": float(found.harmless.mean())},
        "replies": said,
        "seconds": side.steps.seconds("direction"),
    }


def without_kl(found: RefusalDirection) -> dict[str, Any]:
    """What the published rule chooses once its condition on KL is dropped."""
    other = found.choose("published", max_kl=None)
    return {"layer": other.layer, "position": other.position, "passes": other.passes}


def head_scores(side: Side) -> dict[str, Any]:
    """Six scores of every head, the first ten listed with their place in the map."""
    some = side.drawn.there.sample(side.size.head_pairs)
    found = side.steps.json("head-scores", lambda: heads(side.study, side.direction, some))
    inside = {str(member.node): member.role for member in side.circuit("node").nodes}
    top = [{**row, "role": inside.get(row["node"])} for row in found["top"]]
    return {"top": top, "agreement": found["agreement"], "pairs": len(some)}


def neurons(side: Side) -> dict[str, Any]:
    """Neurons that differ most between harmful and harmless prompts, and whether the map by neurons holds them."""
    count = side.size.contrast_neurons
    top = side.contrast.ranked(SPAN, count)
    effects = side.contrast.at(SPAN)
    circuit = [member.node for member in side.circuit("neuron").nodes if member.node.kind == "neuron"]
    layers = {node.layer for node in circuit}
    width = side.model.d_mlp
    # of as many neurons drawn at random from the layers that the map took apart, this share would be in it
    expected = len(circuit) / (width * len(layers)) if layers else None
    within = [node for node in top if node.layer in layers]
    return {
        "n": count,
        "pairs": side.contrast.n,
        "layers": sorted(Counter(node.layer for node in top).items()),
        "top": [{"node": str(node), "effect": float(effects[node.layer, node.index])} for node in top[:10]],
        "large": [int((row.abs() >= 0.8).sum()) for row in effects],
        "circuit": len(circuit),
        "circuit_layers": sorted(layers),
        "within": len(within),
        "shared": len(set(top) & set(circuit)),
        "expected_share": expected,
    }


def ablations(side: Side) -> dict[str, Any]:
    """Replies to harmful prompts once a set of parts is ablated; each set is a step of its own."""
    some = side.drawn.there.sample(side.size.ablated)
    known: list[JudgedReplies] = []

    def measure(nodes: Sequence[Node]) -> dict[str, Any]:
        if not known:
            known.append(unedited_replies(side.model, some, progress=False))
        options: dict[str, Any] = {"replies": True, "known": known[0], "progress": False}
        found = measure_ablation(side.model, some, side.drawn.metric, nodes, **options)
        assert found.replies is not None
        before, after = found.replies
        row = {"nodes": kinds_of(nodes), "score": list(found.score)}
        return {**row, "before": summary(before, before), "after": summary(after, before)}

    return {
        "pairs": len(some),
        "rows": {name: side.steps.json(f"ablated {name}", lambda n=nodes: measure(n)) for name, nodes in sets(side)},
    }


def sets(side: Side) -> list[tuple[str, list[Node]]]:
    """What is ablated: parts that were found, and as many drawn at random."""
    by_node = side.circuit("node")
    by_neuron = [member.node for member in side.circuit("neuron").nodes if member.node.kind == "neuron"]
    late = [member.node for member in by_node if member.role in ("decision", "production")]
    early = [member.node for member in by_node if member.role in ("detection", "evaluation")]
    strongest = sorted((m for m in by_node if m.node.kind == "head"), key=lambda m: -m.effect)[:10]
    contrast = side.contrast.ranked(SPAN, side.size.contrast_neurons)
    every = [member.node for member in by_node.nodes]
    found = {
        "the circuit": every,
        "its detection and evaluation": early,
        "its decision and production": late,
        "its ten heads of the largest effect": [member.node for member in strongest],
        "as many nodes at random": random_nodes(side.model, every, 1),
        "the circuit's neurons": by_neuron,
        "contrast neurons": contrast,
        "as many neurons at random": random_nodes(side.model, contrast, 2),
    }
    return [(name, nodes) for name, nodes in found.items() if nodes]


def random_nodes(model: ms.LensModel, like: Sequence[Node], seed: int) -> list[Node]:
    """As many nodes of each kind, neurons of the same layers, drawn from all but these where enough are left."""
    generator, chosen = random.Random(seed), set()
    for (kind, layer), count in Counter((n.kind, n.layer if n.kind == "neuron" else None) for n in like).items():
        if kind == "neuron":
            every = [Node("neuron", layer, index) for index in range(model.d_mlp)]
        else:
            every = [node for node in head_and_mlp_nodes(model.n_layers, model.n_heads) if node.kind == kind]
        others = [node for node in every if node not in set(like)]
        chosen |= set(generator.sample(others if len(others) >= count else every, count))
    return sorted(chosen, key=lambda node: node.order)


def kinds_of(nodes: Sequence[Node]) -> dict[str, int]:
    return dict(sorted(Counter(node.kind for node in nodes).items()))


def probed(side: Side) -> dict[str, Any]:
    """Probes at evenly spaced depths, embeddings and final stream included."""
    n = side.size.probe_layers
    layers = sorted({round(k * side.model.n_layers / (n - 1)) for k in range(n)})
    found = probes(side.study, layers)
    return {"rows": found, "layers": layers, "pairs": side.size.probe, "erased": N_ERASE, "random": N_RANDOM}


PARTS: Mapping[str, Callable[[Side], Any]] = {
    "facts": facts,
    "pairs-tried": pairs,
    "maps": maps,
    "replies": replies,
    "direction-found": direction,
    "heads-found": head_scores,
    "neurons-found": neurons,
    "ablations": ablations,
    "probes": probed,
}


# --- the command ----------------------------------------------------------------------------------------------------


def demo_digest() -> str:
    """SHA-256 of what makes the demo model of its base."""
    files = sorted(path for path in adapter_folder().iterdir() if path.is_file())
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the native model's GGUF file")
    parser.add_argument("--sha256", default=SHA256, help="what the file's SHA-256 has to be")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the benchmarks")
    parser.add_argument("--work", type=Path, default=RESULTS / NAME / "steps", help="where steps are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="*", choices=("native", "demo"), default=["native", "demo"])
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="a few prompts of everything: does it run?")
    args = parser.parse_args()
    found = sha256_of(args.file)
    if found != args.sha256:
        parser.error(f"{args.file} has the SHA-256 {found}, expected {args.sha256}")
    given = {"native": (str(args.file), found), "demo": ("demo", demo_digest())}
    study(args, {name: given[name] for name in args.models})


def study(args: argparse.Namespace, given: Mapping[str, tuple[str, str]]) -> None:
    """Do the parts that were asked for; draw the page if that is all of them, of both models."""
    record: dict[str, Any] = {}
    for name, (model, sha256) in given.items():
        side = Side(name, model, sha256, args)
        record[name] = {part: side.steps.json(part, lambda s=side, p=part: PARTS[p](s)) for part in args.parts}
        if "maps" in args.parts:
            for level in LEVELS:
                side.circuit(level).save(args.out / CIRCUITS.format(name, level))
    if set(record) == {"native", "demo"} and set(args.parts) == set(PARTS):
        publish("native-model", record, args.out)


if __name__ == "__main__":
    main()
