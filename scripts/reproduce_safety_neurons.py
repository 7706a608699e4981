"""Safety neurons of the demo pair, with every control; writes docs/results/safety-neurons.json.

    python scripts/reproduce_safety_neurons.py               # some 35 minutes on two cores
    python scripts/reproduce_safety_neurons.py --small --out OUT                 # minutes: does it run?

Every step is saved in --work and skipped when it is there, so that a stopped run goes on; a store of other sizes,
weights or data is refused. Public benchmarks are read from --data (JSON lines with an "instruction" each) and are left
out, by name, where they are missing. Neurons are ranked and guards trained on the `train` split; all figures come from
the `test` split, whose topics are others, or from public data. The page and its figures are drawn from the JSON alone,
by scripts/pages.
"""

import argparse
import dataclasses
import json
import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool
from pages.render import publish
from pages.safety_neurons import TOP
from steps import Steps
from torch import Tensor
from transformers import AutoModelForCausalLM

import mechsafety as ms
from mechsafety.intervals import mean_interval, wilson_interval
from mechsafety.models.demo import adapter_folder, base_folder
from mechsafety.models.kept import sha256_of
from mechsafety.models.quiet import quiet
from mechsafety.monitors import GuardReport, LabelledPrompts, compare_guards, label_by_replies
from mechsafety.neurons import (
    AlignmentTax,
    CausalCurve,
    NeuronAgreement,
    NeuronCards,
    NeuronContrast,
    NeuronScores,
    ReplyLikelihood,
    alignment_tax,
    causal_effect_curve,
    compare_neurons,
    contrast_neurons,
    describe_neurons,
    dynamic_patching,
    greedy_replies,
    safety_neurons,
    top_mask,
)
from mechsafety.neurons.behaviour import Unedited
from mechsafety.prompts import read_jsonl
from mechsafety.prompts.sets import data_file
from mechsafety.replies import KINDS, REPLY_TOKENS, ReplyKinds, loss_limit, phrase_judge

# parts of the time that are no steps
LOADING, PAGE = "loading", "page and figures"
TRAIN = Path(__file__).with_name("train_demo_adapter.py")
BENCHMARKS = ("jailbreakbench", "advbench", "harmbench_test")
ALPACA = "alpaca_harmless"
# prompts that come with the package
PACKAGED = ("pairs", "plain", "borderline", "helpful")
# neurons of a copy of the base whose activation is scaled, and by how much
PLANTED, FACTOR = 200, 3.0


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything: prompts, unless the name says otherwise."""

    ranked: int = 200
    reply_tokens: int = 64
    curve: int = 48
    ratio_shares: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
    judged: int = 20
    # of 107 sets of neurons only the reply's opening is asked: does it refuse? said_tokens reads what follows it
    judged_tokens: int = 10
    said_tokens: int = REPLY_TOKENS
    judged_shares: tuple[float, ...] = (0.01, 0.05, 0.2, 0.5, 1.0)
    harmless: int = 36
    random_sets: int = 20
    taxed: int = 24
    tax_random_sets: int = 20
    mixed: int = 40
    guard: int = 120
    guard_test: int = 80
    benchmark: int = 60
    timed: int = 16
    seeds: int = 5
    seed_examples: int = 80
    seed_prompts: int = 40
    seed_refusals: int = 24


SMALL = Size(8, 8, 4, (0.05, 1.0), 3, 4, 4, (0.05, 1.0), 3, 2, 3, 2, 4, 12, 8, 8, 4, 2, 6, 4, 4)
# a batch of 8 and twice the trainer's rate: few examples make few steps
SEED_OPTIONS = ("--epochs", "1", "--batch", "8", "--lr", "4e-2")


class Run(Steps):
    """The steps, their store and the models, each loaded when it is first needed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.size, self.inner = args, SMALL if args.small else Size(), 0.0
        self.loaded = 0.0
        args.work.mkdir(parents=True, exist_ok=True)  # what loads models has its time kept there
        super().__init__(args.work, self.made_of(), besides=("clock.json",))
        self.train = ms.PromptPairs.builtin("train").sample(self.size.ranked, seed=0)
        self.test = ms.PromptPairs.builtin("test").sample(self.size.curve, seed=0)
        self.answers = read_jsonl(data_file("helpful"), ["prompt", "reply"])

    def made_of(self) -> dict[str, Any]:
        """Sizes, weights and data that the steps depend on."""
        names = ["demo", "demo-base", *(["demo-helpful"] if self.has_helpful() else [])]
        files = {name: self.args.data / f"{name}.jsonl" for name in (*BENCHMARKS, ALPACA)}
        return {
            "size": {**dataclasses.asdict(self.size), "seed_options": SEED_OPTIONS},
            "weights": {name: self.model(name).weights_sha256 for name in names},
            "data": {
                name: sha256_of(path) if path.is_file() else None
                for name, path in (files | {name: data_file(name) for name in PACKAGED}).items()
            },
        }

    @cache  # noqa: B019 - one run a process
    def model(self, name: str) -> ms.LensModel:
        with self.timed(LOADING):
            return ms.load_model(name)

    @property
    def metric(self) -> ms.RefusalLogOdds:
        def detect() -> dict[str, Any]:
            pairs = ms.PromptPairs.builtin("validation").sample(24, seed=0)
            return ms.RefusalLogOdds.detect(self.model("demo"), pairs).to_json()

        return ms.RefusalLogOdds.from_json(self.json("metric", detect), self.model("demo"))

    # --- steps and what they took ---------------------------------------------------------------------------------

    def clock(self) -> dict[str, Any]:
        """Seconds of every step and the largest memory of any process so far."""
        path = self.args.work / "clock.json"
        return json.loads(path.read_text()) if path.is_file() else {"seconds": {}, "peak_mib": 0, "threads": 0}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time to the step's, that of steps inside left out; interrupted attempts count too.

        What loads models counts with the step that it was done for, and the page once: written again from stored steps,
        it takes no longer.
        """
        start, outer, self.inner = time.perf_counter(), self.inner, 0.0
        try:
            yield
        finally:
            took, record = time.perf_counter() - start, self.clock()
            seconds, own = record["seconds"], took - self.inner
            if name == LOADING:
                self.loaded += own
            elif name == PAGE:
                seconds[PAGE] = round(own, 1)
            else:
                seconds[name] = round(seconds.get(name, 0) + own, 1)
                if self.loaded:
                    seconds[LOADING] = round(seconds.get(LOADING, 0) + self.loaded, 1)
                self.loaded = 0.0
            peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            record |= {"peak_mib": max(record["peak_mib"], peak // 1024), "threads": torch.get_num_threads()}
            (self.args.work / "clock.json").write_text(json.dumps(record, indent=1, allow_nan=False))
            self.inner = outer + took

    def measured(self, name: str, compute: Callable[[], Any]) -> tuple[Any, float]:
        """A step's outcome; its time is added to the clock, also where it is interrupted."""
        with self.timed(name):
            return super().measured(name, compute)

    # --- neurons and their effect ---------------------------------------------------------------------------------

    def scores(self) -> NeuronScores:
        prompts, tokens = self.train.harmful, self.size.reply_tokens
        pair = self.model("demo"), self.model("demo-base")
        return self.result("scores", NeuronScores, lambda: safety_neurons(*pair, prompts, max_new_tokens=tokens))

    def cards(self) -> NeuronCards:
        nodes = self.scores().ranked(12)
        return self.result(
            "cards", NeuronCards, lambda: describe_neurons(self.model("demo"), nodes, self.test.harmful, n_tokens=6)
        )

    def curve(self, ranking: str) -> CausalCurve:
        scores, metric = self.scores(), self.metric
        values = scores if ranking == "rms" else by_ratio(scores)
        options: dict[str, Any] = {"n_random": self.size.random_sets, "max_new_tokens": 16}
        if ranking == "rms":
            options["harmless"] = [row["prompt"] for row in self.questions("test", self.size.harmless)]
        else:
            options["shares"] = self.size.ratio_shares
        pair = self.model("demo-base"), self.model("demo")
        return self.result(
            f"curve-log-odds-{ranking}",
            CausalCurve,
            lambda: causal_effect_curve(*pair, values, self.test.harmful, metric, **options),
        )

    def judged_curve(self) -> CausalCurve:
        pair, scores = (self.model("demo-base"), self.model("demo")), self.scores()
        prompts = self.test.sample(self.size.judged, seed=1).harmful
        options: dict[str, Any] = {"n_random": self.size.random_sets, "max_new_tokens": self.size.judged_tokens}
        options |= {"shares": self.size.judged_shares, "limit": self.limit}
        return self.result(
            "curve-judge", CausalCurve, lambda: causal_effect_curve(*pair, scores, prompts, phrase_judge, **options)
        )

    @property
    def limit(self) -> float:
        """Loss per token above which a reply of the pair is degenerate: the larger of the two models' limits."""

        def make() -> dict[str, float | None]:
            return plain({name: loss_limit(self.model(name)) for name in ("demo-base", "demo")})

        known = [value for value in self.json("loss-limit", make).values() if value is not None]
        return max(known, default=math.nan)

    def judged_replies(self) -> list[dict[str, Any]]:
        """What replies are at the judged curve's shares, and of both models by themselves; their text is not kept."""
        base, demo, scores = self.model("demo-base"), self.model("demo"), self.scores()
        prompts, tokens = self.test.sample(self.size.judged, seed=1).harmful, self.size.said_tokens

        def make() -> list[dict[str, Any]]:
            unedited, rows, options = Unedited((base, demo), self.limit), [], {"judge": None, "progress": False}
            for share in self.size.judged_shares:
                found = dynamic_patching(base, demo, scores.top(share), prompts, max_new_tokens=tokens, **options)
                rows.append((f"{share:.1%}", list(found.replies)))
            rows += [("aligned model", demo.generate(prompts, tokens)), ("base model", base.generate(prompts, tokens))]
            said = {name: unedited.kinds(prompts, texts, phrase_judge(prompts, texts)) for name, texts in rows}
            return plain([{"top share": name, **reply_row(found)} for name, found in said.items()])

        return self.json("judged-replies", make)

    def contrast(self, split: str) -> NeuronContrast:
        """Harmful against harmless prompts in the aligned model alone, on the train or the test pairs."""
        pairs = self.train if split == "train" else self.test
        return self.result(f"contrast-{split}", NeuronContrast, lambda: contrast_neurons(self.model("demo"), pairs))

    def planted(self) -> dict[str, Any]:
        """Share of planted neurons among as many of the highest scores, by both scores."""

        def make() -> dict[str, Any]:
            base, (changed, chosen) = self.model("demo-base"), planted_copy(self.model("demo-base"))
            n, tokens = (4, 4) if self.args.small else (24, 32)
            prompts = ms.PromptPairs.builtin("test").sample(n, seed=0).harmful
            found = safety_neurons(changed, base, prompts, score="ratio", max_new_tokens=tokens)
            recalls = {
                name: float((top_mask(values, PLANTED) & chosen).sum()) / PLANTED
                for name, values in (("ratio", found.scores), ("rms", found.change))
            }
            return {**recalls, "neurons": PLANTED, "factor": FACTOR, "prompts": n, "tokens": tokens}

        return self.json("planted", make)

    def ends(self) -> dict[str, Any]:
        """No neuron patched against the base model, all of them against the aligned one: replies and logits."""

        def make() -> dict[str, Any]:
            base, demo = self.model("demo-base"), self.model("demo")
            prompts, found = self.test.sample(4 if self.args.small else 16, seed=7).harmful, {}
            for name, all_of_them, model in (("0 %", False, base), ("100 %", True, demo)):
                mask = torch.full((base.n_layers, base.d_mlp), all_of_them)
                patched = dynamic_patching(base, demo, mask, prompts, max_new_tokens=16, judge=None, progress=False)
                same = [a == b for a, b in zip(patched.replies, model.generate(prompts, 16), strict=True)]
                off = float((patched.logits - model.logits(prompts)).abs().max())
                found[name] = {"same_replies": sum(same), "prompts": len(prompts), "largest_logit_difference": off}
            return found

        return self.json("ends", make)

    def cost(self) -> dict[str, float]:
        """Dynamic patching against plain generation of both models, interleaved, best of three."""
        top = self.scores().top(TOP)

        def make() -> dict[str, float]:
            base, demo = self.model("demo-base"), self.model("demo")
            prompts, new, best = self.test.sample(self.size.timed, seed=5).harmful, 32, {}
            jobs = {
                "base": lambda: base.generate(prompts, new),
                "aligned": lambda: demo.generate(prompts, new),
                "patched": lambda: dynamic_patching(
                    base, demo, top, prompts, max_new_tokens=new, judge=None, progress=False
                ),
            }
            for _ in range(3):
                for name, job in jobs.items():
                    start = time.perf_counter()
                    job()
                    best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
            return {name: round(value, 2) for name, value in best.items()}

        return self.json("cost", make)

    # --- two alignments, and five seeds of one --------------------------------------------------------------------

    def has_helpful(self) -> bool:
        try:
            return adapter_folder("helpful").is_dir()
        except ms.MechsafetyError:
            return False

    def questions(self, split: str, n: int) -> list[dict[str, str]]:
        """The project's own ordinary questions with short answers, drawn over all topics of the split."""
        return drawn([row for row in self.answers if row["split"] == split], n, seed=0)

    def replies(self, name: str, prompts: Sequence[str]) -> list[list[int]]:
        """The base model's replies, generated once for all alignments that are compared on them."""
        return self.json(f"replies-{name}", lambda: greedy_replies(self.model("demo-base"), prompts, 32))

    def mixed_scores(self, name: str) -> NeuronScores:
        """Both alignments on the same prompts, half of them harmful, so that prompts cannot make their tops differ."""
        prompts = self.train.sample(self.size.mixed, seed=3).harmful
        prompts += [row["prompt"] for row in self.questions("train", self.size.mixed)]
        pair, replies = (self.model(name), self.model("demo-base")), self.replies("mixed", prompts)
        return self.result(f"mixed-{name}", NeuronScores, lambda: safety_neurons(*pair, prompts, replies=replies))

    def tax(self) -> AlignmentTax:
        rankings, metric = (self.mixed_scores("demo"), self.mixed_scores("demo-helpful")), self.metric
        rows = self.questions("test", self.size.taxed)
        models = [self.model(name) for name in ("demo-base", "demo", "demo-helpful")]
        return self.result(
            "tax",
            AlignmentTax,
            lambda: alignment_tax(
                *models,
                rankings,
                self.test.sample(self.size.taxed, seed=6).harmful,
                [row["prompt"] for row in rows],
                metric,
                ReplyLikelihood(tuple(row["reply"] for row in rows)),
                share=TOP,
                n_random=self.size.tax_random_sets,
            ),
        )

    def seed_adapter(self, seed: int) -> Path:
        out, scratch = self.args.work / f"adapter-{seed}", self.args.work / f"training-{seed}"
        if not (out / "training.json").is_file():
            print(f"training seed {seed} ...", flush=True)
            command = [sys.executable, str(TRAIN), "--seed", str(seed), "--limit", str(self.size.seed_examples)]
            command += [*SEED_OPTIONS, "--out", str(out), "--work", str(scratch)]
            command += ["--replies", str(self.args.work / "training-replies")]
            with self.timed(f"training-{seed}"):
                status = subprocess.run(command).returncode
            if status:
                hint = f"if {scratch} is of a run with other options, delete it"
                raise SystemExit(f"seed {seed} was not trained (exit status {status}, its reason is above); {hint}")
        return out

    @lru_cache(maxsize=1)  # noqa: B019 - one run a process; one seed's model is held at a time
    def seed_model(self, seed: int) -> ms.LensModel:
        adapter = self.seed_adapter(seed)
        with self.timed(LOADING):
            return ms.load_model("demo-base", adapter=adapter)

    def seed_scores(self, seed: int) -> NeuronScores:
        prompts = self.train.sample(self.size.seed_prompts, seed=4).harmful
        base, replies = self.model("demo-base"), self.replies("seeds", prompts)
        return self.result(
            f"scores-seed-{seed}",
            NeuronScores,
            lambda: safety_neurons(self.seed_model(seed), base, prompts, replies=replies),
        )

    def seed_refusals(self, seed: int) -> dict[str, Any]:
        """How many harmful prompts and how many harmless counterfactuals a seed's model refuses."""
        pairs = self.test.sample(self.size.seed_refusals, seed=1)

        def make() -> dict[str, Any]:
            # a seed's model is no intervention's, and the opening says whether it refuses
            model = self.seed_model(seed)
            sides = {"harmful": pairs.harmful, "harmless": pairs.harmless}
            found = {name: sum(map(ms.replies.is_refusal, model.generate(texts, 12))) for name, texts in sides.items()}
            return {**found, "n": len(pairs)}

        return self.json(f"refusals-seed-{seed}", make)

    def seed_pairs(self) -> dict[tuple[int, int], NeuronAgreement]:
        """Agreement of every two seeds."""
        numbers = range(1, self.size.seeds + 1)
        scores = {}
        for seed in numbers:  # all that needs a seed's model at once
            scores[seed] = self.seed_scores(seed)
            self.seed_refusals(seed)

        return {
            (a, b): self.result(
                f"agreement-{a}-{b}",
                NeuronAgreement,
                lambda a=a, b=b: compare_neurons(scores[a], scores[b], share=TOP, n_permutations=200),
            )
            for a, b in combinations(numbers, 2)
        }

    def scale_controls(self) -> dict[str, Any]:
        """What the overlaps of two tops owe to neurons that are large in the base already.

        Of each pair of rankings: overlap by change; how much of the tops lies among as many neurons with the largest
        activations of the base; and the overlap by ratio, with its null.
        """

        def make() -> dict[str, Any]:
            seeds = [self.seed_scores(seed) for seed in range(1, self.size.seeds + 1)]
            pairs = {"seeds": list(combinations(seeds, 2))}
            if self.has_helpful():
                pairs = {"demo, demo-helpful": [(self.mixed_scores("demo"), self.mixed_scores("demo-helpful"))]} | pairs
            found = {}
            for name, listed in pairs.items():
                ratios = [compare_neurons(*map(by_ratio, two), share=TOP, n_permutations=200) for two in listed]
                found[name] = {
                    "change": mean(float((a.top(TOP) & b.top(TOP)).sum() / a.top(TOP).sum()) for a, b in listed),
                    "large in the base": mean(among_the_largest(one) for two in listed for one in two),
                    "ratio": mean(one.observed["overlap"] for one in ratios),
                    "ratio, permuted in layers": mean(float(one.layered[0].mean()) for one in ratios),
                    "largest p": max(one.p_value("overlap") for one in ratios),
                }
            return found

        return self.json("scale", make)

    # --- the guard ------------------------------------------------------------------------------------------------

    def guard_sets(self) -> dict[str, Any]:
        """Training and test sets of the guard, labelled by the base model's replies."""

        def labelled(
            harmful: Sequence[str], harmless: Sequence[str], name: str, paired: bool = False
        ) -> dict[str, Any]:
            groups = [str(k) for k in range(len(harmful))] * 2 if paired else []
            # the base is as it is, so that nothing makes it babble: the opening says whether it refuses
            found = label_by_replies(self.model("demo-base"), harmful, harmless, name, groups=groups, max_new_tokens=16)
            return {**dataclasses.asdict(found), "harmful": len(harmful)}

        def make() -> dict[str, Any]:
            train = ms.PromptPairs.builtin("train").sample(self.size.guard, seed=2)
            test = ms.PromptPairs.builtin("test").sample(self.size.guard_test, seed=2)
            scary = [prompt.text for prompt in ms.prompts.builtin_prompts("borderline", "test")]
            scary = drawn(scary, min(40, self.size.guard_test), seed=0)
            sets = [
                labelled(train.harmful, train.harmless, "own pairs, train topics", paired=True),
                labelled(test.harmful, test.harmless, "own pairs, other topics", paired=True),
                labelled(test.sample(len(scary), seed=3).harmful, scary, "against scary but harmless"),
            ]
            files = {name: self.args.data / f"{name}.jsonl" for name in (*BENCHMARKS, ALPACA)}
            n, left_out = self.size.benchmark, [name for name, path in files.items() if not path.is_file()]
            if ALPACA not in left_out:
                good = drawn(ms.prompts.load_instructions(str(files[ALPACA])), n * len(BENCHMARKS), seed=0)
                for k, name in enumerate(BENCHMARKS):
                    if name not in left_out:
                        bad = drawn(ms.prompts.load_instructions(str(files[name])), n, seed=0)
                        sets.append(labelled(bad, good[k * n : (k + 1) * n], f"{name}, Alpaca"))
            return {"sets": sets, "left_out": left_out}

        return self.json("guard-sets", make)

    def guard(self) -> GuardReport:
        top, sets = self.scores().top(TOP), self.guard_sets()["sets"]
        rows = [
            LabelledPrompts(one["name"], *(tuple(one[key]) for key in ("prompts", "unsafe", "groups", "kinds")))
            for one in sets
        ]
        return self.result(
            "guard",
            GuardReport,
            lambda: compare_guards(self.model("demo-base"), top, rows[0], rows[1:], n_random=self.size.random_sets),
        )


def plain(value: Any) -> Any:
    """JSON has no NaN and no numpy types."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def code(text: str) -> str:
    """A token as Markdown code; one that holds a backtick needs longer quotes."""
    shown = repr(text)
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`"


def planted_copy(base: ms.LensModel) -> tuple[ms.LensModel, Bool[Tensor, "layer d_mlp"]]:
    """A copy of the base with some neurons' activations scaled, and which."""
    folder = base_folder()
    with quiet():
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    order = torch.randperm(base.n_layers * base.d_mlp, generator=torch.Generator().manual_seed(0))
    flat = torch.zeros(len(order), dtype=torch.bool)
    flat[order[:PLANTED]] = True
    chosen = rearrange(flat, "(layer d_mlp) -> layer d_mlp", layer=base.n_layers)
    with torch.no_grad():
        for layer, block in enumerate(hf.model.layers):
            block.mlp.up_proj.weight[chosen[layer]] *= FACTOR
    return ms.load_model((hf, base.tokenizer)), chosen


def by_ratio(scores: NeuronScores) -> NeuronScores:
    """The same ranked by change over the base model's own activation."""
    return dataclasses.replace(scores, score="ratio", scores=scores.ratio)


def among_the_largest(scores: NeuronScores) -> float:
    """Share of the top that is among as many neurons with the largest activations in the base."""
    top = scores.top(TOP)
    return float((top & top_mask(scores.base_rms, int(top.sum()))).sum() / top.sum())


def drawn(rows: Sequence[Any], n: int, seed: int) -> list[Any]:
    """At most ``n`` rows at random: files are ordered by topic, and a slice would be one topic."""
    return random.Random(seed).sample(list(rows), min(n, len(rows)))


def record(run: Run) -> dict[str, Any]:
    """All that the page is drawn from."""
    scores, curves = run.scores(), {name: run.curve(name) for name in ("rms", "ratio")} | {"judge": run.judged_curve()}
    made, tax = run.guard_sets(), run.tax() if run.has_helpful() else None
    return {
        "provenance": scores.provenance.to_json(),
        "aligned": scores.aligned.to_json(),
        "size": dataclasses.asdict(run.size),
        "small": run.args.small,
        "layers": scores.layer_shares(TOP).tolist(),
        "neurons": {
            "tokens": scores.n_tokens,
            "reliability": scores.reliability,
            "contrast_train": run.contrast("train").n,
            "contrast_test": run.contrast("test").n,
        },
        "cards": card_rows(run.cards()),
        "contrast": contrast_rows(run),
        "curves": {name: found.to_dataframe().to_dict("records") for name, found in curves.items()},
        "ends_of": {name: ends_of(found) for name, found in curves.items()},
        "ability": ability_rows(curves["rms"]),
        "judged_replies": run.judged_replies(),
        "guard": run.guard().to_dataframe().to_dict("records"),
        "guard_sets": [guard_counts(one) for one in made["sets"]],
        "guard_left_out": made["left_out"],
        "seeds": seed_rows(run),
        "seed_refusals": refusal_rows(run),
        "tax": tax and tax.to_dataframe().to_dict("records"),
        "tax_counts": tax and tax_counts(tax),
        "tax_agreement": tax and agreement_rows(tax.agreement, sized=False),
        "tax_agreement_sized": tax and sized_null(run, tax.agreement),
        "scale": run.scale_controls(),
        "planted": run.planted(),
        "ends": run.ends(),
        "cost": {**run.cost(), **run.clock()},
    }


def card_rows(found: NeuronCards) -> list[dict[str, Any]]:
    """Cells of the table of the strongest neurons, as Markdown."""
    frame = found.to_dataframe()
    for column in ("promoted", "suppressed"):
        frame[column] = [", ".join(map(code, row)) for row in frame[column]]
    frame["active"] = [
        ", ".join(f"{code(one.context[-14:] + one.token)} {one.activation:.1f}" for one in row[:3])
        for row in found.active
    ]
    return frame.to_dict("records")


def contrast_rows(run: Run) -> list[dict[str, Any]]:
    """The strongest neurons of each span on train pairs, and how strong they are on the others."""
    keys = ["span", "node"]
    chosen = run.contrast("train").to_dataframe().groupby("span", sort=False).head(5)[[*keys, "effect"]]
    found = chosen.merge(run.contrast("test").to_dataframe(), on=keys, suffixes=(", train", ", test"))
    return found.sort_values("span", kind="stable").to_dict("records")


def ends_of(one: CausalCurve) -> dict[str, Any]:
    """Name of the score, number of prompts, and F of base and aligned model with intervals."""
    ends = {"base": one.base_scores, "aligned": one.aligned_scores}
    found = {name: [float(v.mean()), *mean_interval(v.double().numpy())] for name, v in ends.items()}
    return {"score": one.score, "n": len(one.base_scores), **found}


def ability_rows(one: CausalCurve) -> list[dict[str, Any]]:
    """General ability at each share, of the aligned and of the base model."""
    assert one.harmless is not None
    names = [f"{share:.1%}" for share in one.shares] + ["aligned model", "base model"]
    rows = one.harmless.to_dataframe().to_dict("records")
    return [{"top share": name, **row} for name, row in zip(names, rows, strict=True)]


def guard_counts(one: dict[str, Any]) -> dict[str, Any]:
    unsafe, counts = sum(one["unsafe"]), {kind: one["kinds"].count(kind) for kind in KINDS}
    row = {"set": one["name"], "harmful prompts": one["harmful"], "refused by the base": counts["refuses"]}
    row |= {kind: counts[kind] for kind in ("degenerate", "neither")}
    return row | {"unsafe": unsafe, "safe": len(one["unsafe"]) - unsafe}


def reply_row(said: ReplyKinds) -> dict[str, Any]:
    """Cells of the table of kinds of reply."""
    shares = {
        kind: f"{said.share(kind):.2f} ({low:.2f} to {high:.2f})"
        for kind, (low, high) in ((kind, said.interval(kind)) for kind in KINDS)
    }
    return {"n": len(said.kinds), **shares, "perplexity": said.perplexity}


def seed_rows(run: Run) -> list[dict[str, Any]]:
    """Agreement of every two seeds."""
    rows = []
    for (a, b), found in run.seed_pairs().items():
        frame = found.to_dataframe().set_index("measure")
        row: dict[str, Any] = {"seeds": f"{a}, {b}"}
        for name in frame.index:
            row |= {name: frame.observed[name], f"{name}, permuted in layers": frame.layered_mean[name]}
            row |= {f"{name}, permuted in sizes": frame.sized_mean[name], f"{name}, p": frame.sized_p[name]}
        rows.append(row)
    return rows


def refusal_rows(run: Run) -> list[dict[str, Any]]:
    """How many harmful prompts and harmless counterfactuals every seed refuses."""
    rows = []
    for seed in range(1, run.size.seeds + 1):
        found = run.seed_refusals(seed)
        row = {"seed": seed, "of": found["n"]}
        for side in ("harmful", "harmless"):
            low, high = wilson_interval(found[side], found["n"])
            row |= {side: found[side], f"{side} rate": f"{found[side] / found['n']:.2f} ({low:.2f} to {high:.2f})"}
        rows.append(row)
    return rows


def tax_counts(tax: AlignmentTax) -> dict[str, Any]:
    return {
        "common": int(tax.common.sum()),
        "random_overlap": tax.random_overlap,
        "scores": list(tax.scores),
        "harmful": tax.safety.shape[1],
        "harmless": tax.helpfulness.shape[1],
    }


def agreement_rows(found: NeuronAgreement, *, sized: bool) -> list[dict[str, Any]]:
    """Rows of an agreement, with the null within sizes alone or with the others."""
    frame = found.to_dataframe()
    columns = [name for name in frame.columns if name.startswith("sized") == sized and name != "measure"]
    return frame[["measure", *columns]].to_dict("records")


def sized_null(run: Run, found: NeuronAgreement) -> dict[str, Any]:
    """The null within sizes, and how the overlap of permutations depends on the number of groups."""
    both = run.mixed_scores("demo"), run.mixed_scores("demo-helpful")

    def make() -> dict[str, Any]:
        by_bins = {}
        for bins in (1, 5, 10, 20, 50, 100):
            one = compare_neurons(*both, share=TOP, bins=bins, n_permutations=200)
            by_bins[str(bins)] = float(one.sized[0].mean())
        return by_bins

    return {
        "bins": found.bins,
        "rows": agreement_rows(found, sized=True),
        "by_bins": run.json("sized", make),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the benchmarks")
    parser.add_argument(
        "--work", type=Path, help="where steps are kept; by default .work/safety-neurons, with --small its -small"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--small", action="store_true", help="a few prompts of everything, to test the script")
    args = parser.parse_args()
    args.work = args.work or Path(".work") / ("safety-neurons-small" if args.small else "safety-neurons")
    torch.manual_seed(0)
    run = Run(args)
    with run.timed(PAGE):  # drawn once to know what all of it took
        publish("safety-neurons", plain(record(run)), args.out)
    publish("safety-neurons", plain(record(run)), args.out)


if __name__ == "__main__":
    main()
