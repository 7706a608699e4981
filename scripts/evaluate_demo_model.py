"""Measure how often the demo model and its base refuse, on data not trained on; write docs/results/demo-model.json.

    python scripts/evaluate_demo_model.py            # or: make evaluate

Greedy replies of 32 tokens, judged by `mechsafety.replies.is_refusal`. Public benchmarks are read from --data (JSON
lines with an "instruction" each), else from the Hugging Face hub under a row name that says so (its HarmBench and
Alpaca are other prompts), and are skipped, by name, where neither can be read. Replies are kept in --work, never
committed, so that a stopped run goes on. Rates with Wilson 95 % intervals go into the JSON, from which
docs/demo-model.md is drawn.
"""

import argparse
import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from pages.demo_model import OWN, SCARY
from pages.page import RESULTS
from pages.render import publish
from tqdm.auto import tqdm

import mechsafety as ms
from mechsafety.intervals import wilson_interval
from mechsafety.models.demo import adapter_folder
from mechsafety.prompts.pairs import HUB

REPLY_TOKENS = 32
HUB_SAMPLE = 1000
BENCHMARKS = {
    "AdvBench": ("advbench", "harmful"),
    "JailbreakBench": ("jailbreakbench", "harmful"),
    "HarmBench (test)": ("harmbench_test", "harmful"),
    "Alpaca sample": ("alpaca_harmless", "harmless"),
}

# hub id, configuration and split, where there is no file
HUB_IDS = {
    "AdvBench": HUB["advbench"][0],
    "JailbreakBench": HUB["jailbreakbench"][0],
    "HarmBench (test)": HUB["harmbench"][0],
    "Alpaca sample": ("tatsu-lab/alpaca", None, "train"),
}


@dataclass(frozen=True)
class PromptSet:
    name: str
    kind: str
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Rate:
    set: str
    kind: str
    n: int
    refused: int
    low: float
    high: float


def from_hub(name: str) -> tuple[str, ...]:
    """A benchmark's prompts from the hub; of many, a sample that is the same every time."""
    hub_id, config, split = HUB_IDS[name]
    prompts = ms.prompts.load_instructions(hub_id, config=config, split=split)
    return tuple(random.Random(0).sample(prompts, min(HUB_SAMPLE, len(prompts))))


def prompt_sets(data: Path) -> list[PromptSet]:
    """The project's own held-out prompts, and the public benchmarks that are there."""
    sets = []
    for name, (file, kind) in BENCHMARKS.items():
        path = data / f"{file}.jsonl"
        if path.is_file():
            sets.append(PromptSet(name, kind, tuple(ms.prompts.load_instructions(str(path)))))
            continue
        try:
            prompts = from_hub(name)
        except ms.MechsafetyError as error:
            print(f"{name}: skipped, no {path}, and {error}")
        else:
            hub_id, config, split = HUB_IDS[name]
            source = " ".join(filter(None, (hub_id, config, split)))
            sets.append(PromptSet(f"{name.partition(' (')[0]}, {source}", kind, prompts))
    test = ms.PromptPairs.builtin("test", edition=1)
    sets.append(PromptSet(f"{OWN}: harmful", "harmful", tuple(test.harmful)))
    sets.append(PromptSet(f"{OWN}: harmless counterfactuals", "harmless", tuple(test.harmless)))
    scary = tuple(prompt.text for prompt in ms.prompts.builtin_prompts("borderline", "test"))
    sets.append(PromptSet(SCARY, "harmless", scary))
    return sets


def replies(model: ms.LensModel, prompts: PromptSet, store: Path) -> list[str]:
    """Greedy replies, appended to ``store`` in batches so that a stopped run goes on."""
    done = [json.loads(line) for line in store.read_text().splitlines()] if store.is_file() else []
    with store.open("a") as out:
        for start in tqdm(range(len(done), len(prompts.prompts), 64), desc=f"{model.name}: {prompts.name}"):
            for text in model.generate(prompts.prompts[start : start + 64], REPLY_TOKENS, batch_size=32):
                done.append(text)
                out.write(json.dumps(text, allow_nan=False) + "\n")
            out.flush()
    return done


def measure(name: str, adapter: Path | None, sets: list[PromptSet], work: Path) -> list[Rate]:
    model = ms.load_model(name, adapter=adapter)
    key = f"{name}-{model.weights_sha256[:12]}"
    rates = []
    for prompts in sets:
        digest = hashlib.sha256("\n".join(prompts.prompts).encode()).hexdigest()[:12]
        found = replies(model, prompts, work / f"{key}-{digest}.jsonl")
        refused = sum(map(ms.replies.is_refusal, found))
        rates.append(Rate(prompts.name, prompts.kind, len(found), refused, *wilson_interval(refused, len(found))))
        print(f"{name}, {prompts.name}: {refused} of {len(found)} refused")
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the benchmarks")
    parser.add_argument("--adapter", type=Path, help="adapter to measure; the shipped one by default")
    parser.add_argument("--work", type=Path, default=Path(".work/evaluate"), help="where replies are kept")
    parser.add_argument(
        "--out", type=Path, default=RESULTS.parent, help="folder of the page; the record goes into results"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    sets = prompt_sets(args.data)
    folder = args.adapter or adapter_folder("refusal")
    aligned = measure("demo-base", folder, sets, args.work)
    base = measure("demo-base", None, sets, args.work)
    if len(sets) < len(BENCHMARKS) + 3:
        print(
            "the record and its page are left as they are: a benchmark is missing; name a folder that has it by --data"
        )
        return
    record = {"reply_tokens": REPLY_TOKENS, "base": [asdict(r) for r in base], "demo": [asdict(r) for r in aligned]}
    publish("demo-model", record, args.out / "results")


if __name__ == "__main__":
    main()
