"""Repair and harden the demo model by fine-tuning of chosen heads alone; write docs/results/finetuning.json.

    python scripts/study_finetuning.py

Two experiments. **Repair**: the neurons that carry most of the refusal are ablated, and the heads of a map
(docs/results/robustness/circuit.json) learn to do without them. **Spread**: the same heads learn to refuse while random
ones of the strongest heads are ablated; the control learns as many steps without ablation. Fragility curves before and
after show whether refusal hangs less on the heads that it hung on, and whether it only hangs on others now. What is
learned from is of train topics. Everything is measured on built-in pairs of test topics.

Each step is kept in --work and not done again, so that a stopped run goes on; training goes on from its checkpoints
in --adapters, where the adapters are written too. Of replies only their kinds are kept. The page is drawn from the
stored JSON alone.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pages.page import RESULTS
from pages.render import publish
from reproduce_refusal_direction import rows_of
from scipy.stats import spearmanr
from steps import Steps
from study_robustness import relocation_record

import mechsafety as ms
from mechsafety.circuits import draw_pairs
from mechsafety.intervals import mean_interval
from mechsafety.models.parts_adapter import PartsAdapter
from mechsafety.models.slices import part_slices, replaced
from mechsafety.nodes import Node, as_nodes
from mechsafety.replies import KINDS, judge_replies, loss_limit
from mechsafety.robustness import (
    FineTuneOptions,
    FragilityCurve,
    PartsFineTuning,
    Relocation,
    finetune_parts,
    fragility,
    relocation,
)
from mechsafety.robustness.finetuned import AFTER, BEFORE
from mechsafety.robustness.parts import mean_values

ROOT = Path(__file__).resolve().parents[1]
CIRCUIT = ROOT / "docs" / "results" / "robustness" / "circuit.json"
MODELS = ("before", "harden", "spread")


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything."""

    train: int = 32
    validation: int = 8
    test: int = 16
    ranking: int = 12
    damaged: int = 20
    ablated: int = 10
    sizes: tuple[int, ...] = (1, 2, 5, 10)
    n_random: int = 3
    curve_pairs: int = 10
    base: str = "demo-base"
    relocation_prompts: int = 12
    relocation_tokens: int = 12
    options: FineTuneOptions = FineTuneOptions(  # noqa: RUF009
        learning_rate=5e-4, batch_size=4, max_steps=24, every=8, reply_tokens=16, judged_tokens=20
    )


SMALL = Size(
    train=6,
    validation=2,
    test=3,
    ranking=4,
    sizes=(2, 10),
    n_random=1,
    curve_pairs=2,
    options=FineTuneOptions(
        learning_rate=1e-3, batch_size=2, max_steps=2, every=1, reply_tokens=6, judged_tokens=6, warm_up=0
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--circuit", type=Path, default=CIRCUIT)
    parser.add_argument("--work", type=Path, default=RESULTS / "finetuning" / "steps")
    parser.add_argument("--adapters", type=Path, default=ROOT / ".work" / "finetuning", help="adapters, checkpoints")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--small", action="store_true", help="a little of everything: does it run?")
    args = parser.parse_args()
    publish("finetuning", study(args, SMALL if args.small else Size()), args.out)


def study(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    """Every measurement."""
    circuit, model = ms.RefusalCircuit.load(args.circuit), ms.load_model(args.model)
    metric = ms.RefusalLogOdds.from_json(circuit.metric, model)
    members = sorted(circuit.nodes, key=lambda member: -member.effect)
    heads = [member.node for member in members if member.node.kind == "head"]
    made_of = {"size": dataclasses.asdict(size), "weights": model.provenance().weights_sha256}
    made_of["heads"] = [str(node) for node in heads]
    work = Work(Steps(args.work, made_of), args.adapters, model, metric, heads, size)
    train = ms.PromptPairs.builtin("train").sample(size.train)
    ranking = train.aligned(model)[: size.ranking]
    work.asked["limit"] = {"limit": work.steps.json("limit", lambda: loss_limit(model))}
    damage = work.steps.json("damage", lambda: work.top_neurons(ranking))
    repair = work.tuned("repair", controls=True, damage=damage)
    harden = work.tuned("harden")
    spread = work.tuned("spread", ablated=heads[: size.ablated])
    pairs = work.curve_pairs(spread)
    used = work.steps.json("used", lambda: work.used_by(circuit))
    ranks = {name: work.steps.json(f"ranks {name}", lambda name=name: work.ranks(name, ranking)) for name in MODELS}
    ablated = work.steps.json("harden, heads ablated", lambda: work.ablated("harden"))
    relocated = {name: work.relocated(name) for name in MODELS}
    orders = {f"{name}, first heads of the map": (name, [str(node) for node in heads]) for name in MODELS}
    orders |= {f"{name}, its own first heads": (name, list(ranks[name])) for name in ("before", "spread")}
    curves = {label: work.curve(label, name, order[: size.ablated], pairs) for label, (name, order) in orders.items()}
    own = [f"{name}, its own first heads" for name in ("before", "spread")]
    old = [f"{name}, first heads of the map" for name in MODELS]
    return {
        "model": model.name,
        "heads": len(heads),
        "train": len(train),
        "test": size.test,
        "used": used,
        "random_rankings": size.n_random,
        "pairs": len(pairs),
        "damage": damage,
        "ablated": [str(node) for node in heads[: size.ablated]],
        "options": dataclasses.asdict(size.options) | {"control_rates": list(size.options.control_rates)},
        "repair": repair,
        "harden": harden,
        "spread": spread,
        "curves": {
            label: {"order": [str(node) for node in curve.parts], "rows": rows_of(curve.to_dataframe())}
            for label, curve in curves.items()
        },
        "flatter": {
            "spread": flatter(curves[old[0]], curves[old[2]]),
            "harden": flatter(curves[old[0]], curves[old[1]]),
            "spread over harden": flatter(curves[old[1]], curves[old[2]]),
            "own": flatter(curves[own[0]], curves[own[1]]),
        },
        "harden_ablated": ablated,
        "relocation": {name: relocation_record(found) for name, found in relocated.items()},
        "later": {name: later(relocated["before"], relocated[name]) for name in ("harden", "spread")},
        "moved": {name: moved(ranks["before"], ranks[name], size.ablated) for name in ("harden", "spread")},
        "versions": dict(model.provenance().versions),
    }


@dataclasses.dataclass(frozen=True)
class Work:
    """The model, what is known of it, and the steps."""

    steps: Steps
    adapters: Path
    model: ms.LensModel
    metric: ms.RefusalLogOdds
    heads: Sequence[Node]
    size: Size
    asked: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def top_neurons(self, pairs: ms.PromptPairs) -> list[str]:
        """The neurons with the largest estimated effects on the refusal."""
        found = ms.node_attribution(self.model, pairs, self.metric, steps=4, neurons=True, progress=False).neurons
        order = found.flatten().argsort(descending=True, stable=True).tolist()
        return [str(Node("neuron", *divmod(k, self.model.d_mlp))) for k in order[: self.size.damaged]]

    def tuned(self, objective: str, **more: Any) -> dict[str, Any]:
        """Fine-tuning of the heads, as plain data; the adapter is written beside."""
        self.asked[objective] = more
        return self.steps.json(objective, lambda: self.tune(objective))

    def adapter(self, objective: str) -> Path:
        """The file of an adapter."""
        return self.adapters / f"{objective}.safetensors"

    def tune(self, objective: str) -> dict[str, Any]:
        """One fine-tuning."""
        size = self.size
        found: PartsFineTuning = finetune_parts(
            self.model,
            self.heads,
            ms.PromptPairs.builtin("train").sample(size.train),
            objective,  # type: ignore[arg-type]
            size.options,
            validation=ms.PromptPairs.builtin("validation").sample(size.validation),
            test=self.test,
            checkpoint=self.adapters / objective,
            progress=False,
            **self.asked["limit"],
            **self.asked[objective],
        )
        found.save_adapter(self.adapter(objective))
        before, after = found.outcome(BEFORE), found.outcome(AFTER)
        return {
            "parts": len(found.parts),
            "trained": found.trained,
            "share": found.share,
            "shared": len(found.shared),
            "best_step": found.best_step,
            "steps": len(found.losses),
            "looked": list(found.looked),
            "validation": found.validation.tolist(),
            "losses": found.losses.tolist(),
            "rows": rows_of(found.to_dataframe()),
            "controls": [dataclasses.asdict(one) for one in found.controls],
            "refused": {one.name: one.harmful.refused.tolist() for one in (before, after)},
            "falsely": {one.name: one.harmless.refused.tolist() for one in (before, after)},
        }

    @property
    def test(self) -> ms.PromptPairs:
        """Pairs of other topics."""
        return ms.PromptPairs.builtin("test").aligned(self.model).sample(self.size.test)

    def curve_pairs(self, row: dict[str, Any]) -> ms.PromptPairs:
        """Test pairs whose harmful prompt alone is refused before training."""
        refused, falsely = row["refused"][BEFORE], row["falsely"][BEFORE]
        test = self.test
        keep = [pair for pair, bad, good in zip(test, refused, falsely, strict=True) if bad and not good]
        return dataclasses.replace(test, pairs=tuple(keep or test.pairs)[: self.size.curve_pairs])

    def used_by(self, circuit: ms.RefusalCircuit) -> int:
        """How many of the test pairs the map held out, to set its size and to check it."""
        options = circuit.provenance.options
        drawn = draw_pairs(self.model, limit=options["limit"], seed=circuit.provenance.seed or 0, progress=False)
        return len(set(self.test.pairs) & set(drawn.there.pairs))

    def changed(self, name: str) -> Any:
        """Context in which the model is the one before, or one that was fine-tuned."""
        if name == "before":
            return nullcontext()
        if not self.adapter(name).is_file():  # adapters are not kept where the steps are
            self.tune(name)
        adapter = PartsAdapter.read(self.adapter(name))
        adapter.check_fits(self.model)
        return replaced(self.model, part_slices(self.model, adapter.parts)[0], adapter.values)

    def ranks(self, name: str, pairs: ms.PromptPairs) -> dict[str, float]:
        """Estimated effect of every head on the refusal of train topics, the largest first."""
        with self.changed(name):
            found = ms.node_attribution(self.model, pairs, self.metric, steps=4, progress=False).heads
        effects = {
            str(Node("head", layer, head)): float(found[layer, head])
            for layer in range(self.model.n_layers)
            for head in range(self.model.n_heads)
        }
        return dict(sorted(effects.items(), key=lambda item: -item[1]))

    def ablated(self, name: str) -> list[list[Any]]:
        """Shares of the kinds of reply of a model without the map's first heads, to each side of the test pairs."""
        first, limit = self.heads[: self.size.ablated], self.asked["limit"]["limit"]
        train = ms.PromptPairs.builtin("train").sample(self.size.train)
        means = mean_values(self.model, first, train.harmless)
        found = []
        with self.changed(name), ms.ablate(self.model, first, values=means):
            for side in (self.test.harmful, self.test.harmless):
                found.append(self.model.generate(side, self.size.options.judged_tokens, progress=False))
        sides = zip((self.test.harmful, self.test.harmless), found, strict=True)
        kinds = [judge_replies(self.model, side, texts, limit=limit) for side, texts in sides]
        return [[*(one.share(kind) for kind in KINDS), *one.interval("refuses")] for one in kinds]

    def relocated(self, name: str) -> Relocation:
        """From which layer on a model's state makes the model before alignment refuse."""

        def measure() -> Relocation:
            with self.changed(name):
                return relocation(
                    self.model,
                    ms.load_model(self.size.base),
                    self.test.harmful[: self.size.relocation_prompts],
                    self.metric,
                    max_new_tokens=self.size.relocation_tokens,
                    progress=False,
                )

        found: Relocation = self.steps.result(f"relocation {name}", Relocation, measure)
        return found

    def curve(self, label: str, name: str, order: Sequence[str], pairs: ms.PromptPairs) -> FragilityCurve:
        """A fragility curve of a model, of heads in an order."""

        def measure() -> FragilityCurve:
            with self.changed(name):
                return fragility(
                    self.model,
                    as_nodes(order),
                    pairs,
                    self.metric,
                    sizes=self.size.sizes,
                    n_random=self.size.n_random,
                    progress=False,
                )

        found: FragilityCurve = self.steps.result(f"curve {label}", FragilityCurve, measure)
        return found


def flatter(before: FragilityCurve, after: FragilityCurve) -> list[dict[str, Any]]:
    """How much less is lost after than before, per number of ablated heads, and what is left, with intervals.

    The intervals hold together with 95 %: each has 1 - 0.05 / n, for n numbers of heads (Bonferroni). Both curves are
    of the same prompts. Lost is the metric's fall as a share of the curve's own mean gap. Left is the metric under the
    ablation.
    """
    rows = []
    for k, size in enumerate(before.sizes):
        lost = [(one.before - one.after[-1, k]).double().numpy() / one.gap for one in (before, after)]
        left = [one.after[-1, k].double().numpy() for one in (before, after)]
        row: dict[str, Any] = {"parts": size}
        for name, (first, second) in (("lost", lost), ("left", left)):
            low, high = mean_interval(second - first, confidence=1 - 0.05 / len(before.sizes))
            row[name] = {"before": float(first.mean()), "after": float(second.mean())}
            row[name] |= {"change": float((second - first).mean()), "ci_low": low, "ci_high": high}
        rows.append(row)
    return rows


def later(before: Relocation, after: Relocation) -> list[Any]:
    """By how many layers the first one that recovers half is later, with a paired bootstrap interval."""
    layers, ends = before.moved(after)
    return [layers, *ends]


def moved(before: dict[str, float], after: dict[str, float], first: int) -> dict[str, Any]:
    """How far the ranking of heads by effect changed."""
    names = sorted(before)
    rank = spearmanr([before[name] for name in names], [after[name] for name in names])
    tops = [list(effects)[:first] for effects in (before, after)]
    return {
        "spearman": float(rank.statistic),
        "common": len(set(tops[0]) & set(tops[1])),
        "first": first,
        "before": [[name, before[name], after[name]] for name in tops[0]],
        "new": [[name, before[name], after[name]] for name in tops[1] if name not in tops[0]],
        "sum_before": sum(before[name] for name in tops[0]),
        "sum_after": sum(after[name] for name in tops[1]),
    }


if __name__ == "__main__":
    main()
