"""Safety neurons of the demo pair, with every control; writes docs/results/safety-neurons.md, .json and figures.

    python scripts/reproduce_safety_neurons.py               # about half an hour on two cores
    python scripts/reproduce_safety_neurons.py --small --work .work/small --out OUT      # minutes: does it run?

Every step is saved in --work and skipped when it is there, so that a stopped run goes on. Public benchmarks are read
from --data (JSON lines with an "instruction" each) and are left out, by name, where they are missing. Neurons are
ranked and guards trained on the `train` split; all figures come from the `test` split, whose topics are others, or from
public data.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import mechsafety as ms
from mechsafety.cli import quiet_libraries
from mechsafety.metrics import wilson_interval
from mechsafety.models.demo import adapter_folder
from mechsafety.monitors import GuardReport, LabelledPrompts, compare_guards, label_by_replies
from mechsafety.neurons import (
    AlignmentTax,
    CausalCurve,
    NeuronAgreement,
    NeuronCards,
    NeuronScores,
    ReplyLikelihood,
    alignment_tax,
    causal_effect_curve,
    compare_neurons,
    describe_neurons,
    dynamic_patching,
    phrase_judge,
    safety_neurons,
)
from mechsafety.prompts import read_jsonl
from mechsafety.prompts.sets import data_file

TOP = 0.05
TRAIN = Path(__file__).with_name("train_demo_adapter.py")


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything."""

    ranked: int = 200
    reply: int = 64
    curve: int = 64
    judged: int = 24
    judged_reply: int = 12
    judged_shares: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
    harmless: int = 40
    random_sets: int = 20
    taxed: int = 32
    mixed: int = 60
    guard: int = 150
    benchmark: int = 100
    seeds: int = 5
    seed_limit: int = 60
    seed_prompts: int = 40


SMALL = Size(8, 8, 4, 3, 4, (0.05, 1.0), 3, 2, 3, 4, 12, 8, 2, 6, 4)


class Run:
    """The steps, their stores and the models, each loaded when it is first needed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.size = args, SMALL if args.small else Size()
        args.work.mkdir(parents=True, exist_ok=True)
        self.harmful = ms.PromptPairs.builtin("train").sample(self.size.ranked, seed=0).harmful
        self.test = ms.PromptPairs.builtin("test").sample(self.size.curve, seed=0)
        self.plain = [prompt.text for prompt in ms.builtin_prompts("plain", "validation")][: self.size.harmless]
        self.answers = read_jsonl(data_file("helpful"), ["prompt", "reply"])

    @cache  # noqa: B019 - one run a process
    def model(self, name: str, adapter: Path | None = None) -> ms.LensModel:
        return ms.load_model(name, adapter=adapter)

    @property
    def metric(self) -> ms.RefusalLogOdds:
        stored = self.step("metric", dict, self._metric)
        return ms.RefusalLogOdds.of(self.model("demo"), stored["refusal_tokens"])

    def _metric(self) -> dict[str, Any]:
        found = ms.RefusalLogOdds.detect(self.model("demo"), ms.PromptPairs.builtin("validation").sample(24, seed=0))
        return found.to_json()

    def step(self, name: str, kind: type, make: Callable[[], Any]) -> Any:
        """The stored result of a step, or a new one, stored with the seconds it took."""
        path, clock = self.args.work / name, self.args.work / "seconds.json"
        if path.exists():
            return json.loads(path.read_text()) if kind is dict else kind.load(path)
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        found = make()
        seconds = json.loads(clock.read_text()) if clock.is_file() else {}
        seconds[name] = round(time.perf_counter() - start, 1)
        if kind is dict:
            scratch = path.with_suffix(".tmp")
            scratch.write_text(json.dumps(found, indent=1))
            scratch.replace(path)
        else:
            found.save(path)
        clock.write_text(json.dumps(seconds, indent=1))
        return found

    # --- neurons and their effect ---------------------------------------------------------------------------------

    def scores(self) -> NeuronScores:
        return self.step(
            "scores",
            NeuronScores,
            lambda: safety_neurons(
                self.model("demo"), self.model("demo-base"), self.harmful, max_new_tokens=self.size.reply
            ),
        )

    def cards(self) -> NeuronCards:
        nodes = self.scores().ranked(12)
        return self.step(
            "cards", NeuronCards, lambda: describe_neurons(self.model("demo"), nodes, self.test.harmful, n_tokens=6)
        )

    def curve(self, ranking: str) -> CausalCurve:
        scores = self.scores()
        values = scores.change if ranking == "rms" else scores.change / scores.base_rms.clamp(min=1e-12)
        harmless, metric = self.plain if ranking == "rms" else None, self.metric

        def make() -> CausalCurve:
            pair = self.model("demo-base"), self.model("demo")
            options = {"n_random": self.size.random_sets, "harmless": harmless, "max_new_tokens": 16}
            return causal_effect_curve(*pair, values, self.test.harmful, metric, **options)

        return self.step(f"curve-log-odds-{ranking}", CausalCurve, make)

    def judged_curve(self) -> CausalCurve:
        scores = self.scores()

        def make() -> CausalCurve:
            prompts = self.test.sample(self.size.judged, seed=1).harmful
            return causal_effect_curve(
                self.model("demo-base"),
                self.model("demo"),
                scores,
                prompts,
                phrase_judge,
                shares=self.size.judged_shares,
                n_random=self.size.random_sets,
                max_new_tokens=self.size.judged_reply,
            )

        return self.step("curve-judge", CausalCurve, make)

    def cost(self) -> dict[str, float]:
        """Dynamic patching against plain generation of both models, interleaved, best of three."""
        top = self.scores().top(TOP)

        def make() -> dict[str, float]:
            base, demo = self.model("demo-base"), self.model("demo")
            prompts, new, best = self.test.harmful[:16], 32, {}
            jobs = {
                "base": lambda: base.generate(prompts, new),
                "aligned": lambda: demo.generate(prompts, new),
                "patched": lambda: dynamic_patching(base, demo, top, prompts, max_new_tokens=new, progress=False),
            }
            for _ in range(3):
                for name, job in jobs.items():
                    start = time.perf_counter()
                    job()
                    best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
            return {name: round(value, 2) for name, value in best.items()}

        return self.step("cost", dict, make)

    # --- two alignments, and five seeds of one --------------------------------------------------------------------

    def has_helpful(self) -> bool:
        try:
            return adapter_folder("helpful").is_dir()
        except ms.MechsafetyError:
            return False

    def mixed_scores(self, name: str) -> NeuronScores:
        """Both alignments on the same prompts, half of them harmful, so that prompts cannot make their tops differ."""
        questions = [row["prompt"] for row in self.answers if row["split"] == "train"][: self.size.mixed]
        prompts = [*self.harmful[: self.size.mixed], *questions]
        return self.step(
            f"mixed-{name}",
            NeuronScores,
            lambda: safety_neurons(self.model(name), self.model("demo-base"), prompts, max_new_tokens=32),
        )

    def tax(self) -> AlignmentTax:
        rankings, metric = (self.mixed_scores("demo"), self.mixed_scores("demo-helpful")), self.metric

        def make() -> AlignmentTax:
            rows = [row for row in self.answers if row["split"] == "test"][: self.size.taxed]
            return alignment_tax(
                self.model("demo-base"),
                self.model("demo"),
                self.model("demo-helpful"),
                rankings,
                self.test.harmful[: self.size.taxed],
                [row["prompt"] for row in rows],
                metric,
                ReplyLikelihood(tuple(row["reply"] for row in rows)),
                share=TOP,
                n_random=self.size.random_sets,
            )

        return self.step("tax", AlignmentTax, make)

    def seed_adapter(self, seed: int) -> Path:
        out = self.args.work / f"adapter-{seed}"
        if not (out / "training.json").is_file():
            print(f"training seed {seed} ...", flush=True)
            command = [sys.executable, str(TRAIN), "--seed", str(seed), "--limit", str(self.size.seed_limit)]
            command += ["--epochs", "1", "--out", str(out), "--work", str(self.args.work / f"training-{seed}")]
            subprocess.run(command, check=True)
        return out

    def seed_scores(self, seed: int) -> NeuronScores:
        def make() -> NeuronScores:
            aligned = ms.load_model("demo-base", adapter=self.seed_adapter(seed))
            prompts = self.harmful[: self.size.seed_prompts]
            return safety_neurons(aligned, self.model("demo-base"), prompts, max_new_tokens=32)

        return self.step(f"scores-seed-{seed}", NeuronScores, make)

    def seed_refusals(self, seed: int) -> dict[str, int]:
        def make() -> dict[str, int]:
            model = ms.load_model("demo-base", adapter=self.seed_adapter(seed))
            prompts = self.test.harmful[: self.size.judged]
            return {"refused": sum(map(ms.is_refusal, model.generate(prompts, 16))), "n": len(prompts)}

        return self.step(f"refusals-seed-{seed}", dict, make)

    def agreement(self, a: int, b: int) -> NeuronAgreement:
        one, two = self.seed_scores(a), self.seed_scores(b)
        return self.step(
            f"agreement-{a}-{b}",
            NeuronAgreement,
            lambda: compare_neurons(one, two, share=TOP, n_permutations=200),
        )

    # --- the guard ------------------------------------------------------------------------------------------------

    def guard(self) -> GuardReport:
        top = self.scores().top(TOP)

        def pairs(split: str, n: int, name: str) -> LabelledPrompts:
            rows = ms.PromptPairs.builtin(split).sample(n, seed=2)
            groups = [str(k) for k in range(len(rows))] * 2
            return label_by_replies(self.model("demo-base"), rows.harmful, rows.harmless, name, groups=groups)

        def make() -> GuardReport:
            base = self.model("demo-base")
            train = pairs("train", self.size.guard, "own pairs, train topics")
            tests = [pairs("test", 80 if not self.args.small else 8, "own twins, other topics")]
            scary = [prompt.text for prompt in ms.builtin_prompts("borderline", "test")]
            harmful = self.test.harmful[: len(scary)]
            tests.append(label_by_replies(base, harmful, scary[: len(harmful)], "against scary but harmless"))
            alpaca = self.args.data / "alpaca_harmless.jsonl"
            for k, name in enumerate(("jailbreakbench", "advbench", "harmbench_test")):
                path = self.args.data / f"{name}.jsonl"
                if not path.is_file() or not alpaca.is_file():
                    print(f"{name}: left out, it or Alpaca is not in the data folder")
                    continue
                n = self.size.benchmark
                bad, good = ms.load_instructions(str(path)), ms.load_instructions(str(alpaca))
                tests.append(label_by_replies(base, bad[:n], good[k * n : (k + 1) * n], f"{name}, Alpaca"))
            return compare_guards(base, top, train, tests, n_random=self.size.random_sets)

        return self.step("guard", GuardReport, make)


# --- the report ------------------------------------------------------------------------------------------------------


def table(frame: pd.DataFrame, digits: int = 3) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float | np.floating):
            return "" if np.isnan(value) else f"{value:.{digits}f}"
        return str(value)

    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "| " + " | ".join("---" for _ in frame.columns) + " |"]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(lines)


def figures(run: Run, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "mechsafety"
    folder.mkdir(parents=True, exist_ok=True)

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, curve in zip(axes, (run.curve("rms"), run.judged_curve()), strict=True):
        frame = curve.to_dataframe()
        known = frame[frame.random_mean.notna()]
        percent = frame.share * 100
        axis.fill_between(known.share * 100, known.random_low, known.random_high, color="0.8", label="random, 95 %")
        axis.errorbar(percent, frame.effect, [frame.effect - frame.ci_low, frame.ci_high - frame.effect], fmt="o-")
        axis.axhline(1, color="0.5", lw=0.8)
        axis.axhline(0, color="0.5", lw=0.8)
        axis.set(xscale="log", xlabel="top share of neurons, %", title=curve.score)
    axes[0].set_ylabel("causal effect C")
    axes[0].legend(frameon=False)
    save(figure, "causal-effect")

    figure, axis = plt.subplots(figsize=(6, 2.6))
    shares = run.scores().layer_shares(TOP).tolist()
    axis.bar(range(len(shares)), shares)
    axis.axhline(1 / len(shares), color="0.5", lw=0.8)
    axis.set(xlabel="layer", ylabel=f"share of the top {TOP:.0%}")
    save(figure, "layers")

    frame = run.guard().to_dataframe()
    wide = frame.pivot(index="test", columns="feature", values="auroc").loc[frame.test.unique()]
    figure, axis = plt.subplots(figsize=(9, 3))
    wide[["neurons", "random", "resid", "direction", "tfidf"]].plot.bar(ax=axis, rot=12, width=0.8)
    axis.set(ylabel="AUROC", xlabel="", ylim=(0.4, 1.0))
    axis.legend(ncols=5, frameon=False)
    save(figure, "guard")


def findings(run: Run) -> list[str]:
    """What the figures say, decided by the figures."""
    curve, judged, guard = run.curve("rms"), run.judged_curve(), run.guard().to_dataframe()
    out = []
    for one in (curve, judged):
        frame = one.to_dataframe()
        row = frame[frame.share == TOP].iloc[0]
        place = "inside" if 0.56 <= row.effect <= 1.34 else "outside"
        beats = "above" if row.effect > row.random_high else "not above"
        out.append(
            f"C at the top 5 % is {row.effect:.2f} ({row.ci_low:.2f} to {row.ci_high:.2f}) on {one.score}, {place} the "
            f"published range (0.56 to 1.34, median 0.80), and {beats} the band of random neurons of the same layers "
            f"({row.random_low:.2f} to {row.random_high:.2f})."
        )
        reached = one.smallest(0.9)
        if reached is None:
            out.append(f"C never reaches 0.9 on {one.score}.")
        else:
            row = frame[frame.share == reached].iloc[0]
            band = "nothing is left for random sets there"
            if not np.isnan(row.random_mean):
                band = f"random sets there: {row.random_low:.2f} to {row.random_high:.2f}, p = {row.p_value:.3f}"
                band += f" (they share {row.random_overlap:.0%} of their neurons with the top)"
            out.append(f"The smallest share measured with C of at least 0.9 on {one.score} is {reached:.1%}; {band}.")
    random = guard[guard.feature == "random"]
    null = int(random.margin_is_null.sum())
    out.append(
        f"Guard: mean accuracy over the test sets {guard[guard.feature == 'neurons'].accuracy.mean():.1%} (published "
        f"76.2 %). Its margin in AUROC over as many random neurons is null on {null} of {len(random)} test sets; in "
        "the paper the same baseline is within two points of accuracy."
    )
    return out


def report(run: Run) -> str:
    scores, curve, cost = run.scores(), run.curve("rms"), run.cost()
    ratio = run.curve("ratio").to_dataframe()[["share", "effect", "ci_low", "ci_high", "random_low", "random_high"]]
    shown = ["share", "neurons", "effect", "ci_low", "ci_high", "random_mean", "random_low", "random_high", "p_value"]
    shown.append("random_overlap")
    ability = curve.to_dataframe()[["share", "kl", "perplexity", "agreement"]]
    ends = curve.harmless
    for name, row in (("aligned model", -2), ("base model", -1)):
        values = [ends.kl[row].mean(), ends.nll[row].mean().exp(), ends.agreement[row].mean()]
        ability.loc[len(ability)] = [name, *map(float, values)]
    cards = run.cards().to_dataframe()
    for column in ("promoted", "suppressed"):
        cards[column] = [", ".join(f"`{text!r}`" for text in row) for row in cards[column]]
    cards["active"] = [", ".join(f"`{text!r}` {value:.1f}" for text, value in row[:4]) for row in cards.active]
    lines = ["# Safety neurons of the demo pair", ""]
    lines += [
        "Written by `scripts/reproduce_safety_neurons.py`; formulas are in [methods](../methods.md#safety-neurons)."
    ]
    if run.args.small:
        lines += ["", "**A small run, made to test the script: its figures mean nothing.**"]
    lines += ["", "## What agrees with the paper and what does not", ""]
    lines += [f"- {line}" for line in findings(run)]
    lines += ["", "## Neurons", "", f"{scores!r}; split-half rank correlation {scores.reliability:.3f}."]
    lines += ["", "![layers of the top 5 %](safety-neurons/layers.svg)", "", table(cards)]
    lines += ["", "## Causal effect", "", "![C against the share of neurons](safety-neurons/causal-effect.svg)", ""]
    lines += [f"{curve.score}, {len(curve.base_scores)} harmful prompts of held-out topics; ranked by rms:", ""]
    lines += [table(curve.to_dataframe()[shown]), "", "Ranked by the ratio score:", "", table(ratio)]
    judged = run.judged_curve()
    lines += ["", f"Phrase judge, {len(judged.base_scores)} prompts, greedy replies:", ""]
    lines += [table(judged.to_dataframe()[shown])]
    lines += ["", f"General ability, {ends.kl.shape[1]} harmless prompts:", "", table(ability)]
    factor = cost["patched"] / (cost["base"] + cost["aligned"])
    lines += ["", f"Dynamic patching takes {factor:.2f} times as long as both models' plain generation."]
    lines += ["", "## Alignment tax", ""]
    if run.has_helpful():
        tax = run.tax()
        lines += [f"{tax!r}", "", table(tax.to_dataframe()), "", table(tax.agreement.to_dataframe())]
    else:
        lines += ["Not run: there is no shipped helpful adapter."]
    lines += ["", "## Seeds", "", table(seeds(run)), "", table(seed_refusals(run))]
    lines += ["", "## Guard", "", "![AUROC](safety-neurons/guard.svg)", "", table(run.guard().to_dataframe())]
    seconds = json.loads((run.args.work / "seconds.json").read_text())
    lines += ["", f"Steps took {sum(seconds.values()) / 60:.0f} minutes: {seconds}.", ""]
    return "\n".join(lines)


def seeds(run: Run) -> pd.DataFrame:
    """Agreement of every two seeds."""
    rows = []
    for a, b in combinations(range(1, run.size.seeds + 1), 2):
        frame = run.agreement(a, b).to_dataframe().set_index("measure")
        row = {"seeds": f"{a}, {b}"}
        for name in frame.index:
            row |= {name: frame.observed[name], f"{name}, permuted in layers": frame.layered_mean[name]}
        rows.append(row)
    return pd.DataFrame(rows)


def seed_refusals(run: Run) -> pd.DataFrame:
    rows = []
    for seed in range(1, run.size.seeds + 1):
        found = run.seed_refusals(seed)
        low, high = wilson_interval(found["refused"], found["n"])
        rows.append({"seed": seed, "refused": found["refused"], "of": found["n"], "low": low, "high": high})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the benchmarks")
    parser.add_argument("--work", type=Path, default=Path(".work/safety_neurons"), help="where steps are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--small", action="store_true", help="a few prompts of everything, to test the script")
    args = parser.parse_args()
    quiet_libraries()
    torch.manual_seed(0)
    run = Run(args)
    text = report(run)
    args.out.mkdir(parents=True, exist_ok=True)
    figures(run, args.out / "safety-neurons")
    (args.out / "safety-neurons.md").write_text(text)
    record = {
        "provenance": run.scores().provenance.to_json(),
        "aligned": run.scores().aligned.to_json(),
        "findings": findings(run),
        "layers": run.scores().layer_shares(TOP).tolist(),
        "curves": {
            name: found.to_dataframe().to_dict("records")
            for name, found in (("rms", run.curve("rms")), ("ratio", run.curve("ratio")), ("judge", run.judged_curve()))
        },
        "guard": run.guard().to_dataframe().to_dict("records"),
        "seeds": seeds(run).to_dict("records"),
        "tax": run.tax().to_dataframe().to_dict("records") if run.has_helpful() else None,
        "cost": run.cost(),
    }
    (args.out / "safety-neurons.json").write_text(json.dumps(plain(record), indent=1) + "\n")
    print(text)


def plain(value: Any) -> Any:
    """JSON has no NaN and no numpy types."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and np.isnan(value) else value


if __name__ == "__main__":
    main()
