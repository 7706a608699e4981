"""Find and judge the demo model's refusal direction (Arditi et al. 2024); write docs/results/refusal-direction.json.

    python scripts/reproduce_refusal_direction.py

Directions come from 64 AdvBench and 64 Alpaca prompts, are chosen on 32 HarmBench (validation) and 32 other Alpaca
prompts, and are judged on 100 JailbreakBench, 100 other AdvBench and 100 other Alpaca prompts: read from --data (JSON
lines with an "instruction" each). Each step is kept in --work and not done again, so that a stopped run goes on; delete
a step's file or folder there to do it again. Of replies only their kind and their loss under the unedited model are
kept, never their text. The page and its figures are drawn from the JSON alone, by scripts/pages.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pages.render import publish
from steps import Steps
from torch import Tensor

import mechsafety as ms
from mechsafety.directions import RefusalDirection, RefusalSubspace
from mechsafety.directions.scores import mean_differences
from mechsafety.interventions import Direction, StrengthSweep, orthogonalized, project_out, steer
from mechsafety.probes import N_ERASE, ProbeReport
from mechsafety.replies import KINDS, REPLY_TOKENS, ReplyKinds, loss_limit
from mechsafety.sites import Site, SiteKind

N_RANDOM = 8
ADDED = (0.0, 0.5, 1.0, 1.5, 2.0)
REMOVED = (0.0, 0.25, 0.5, 0.75, 1.0)


class Study(Steps):
    """The model, the prompts, and the folder in which finished steps are kept.

    Args:
        args: As `main` reads them.
        model: The model; loaded by its name if None.
        metric: What refusal is measured by; detected on built-in validation pairs if None.
    """

    def __init__(
        self, args: argparse.Namespace, model: ms.LensModel | None = None, metric: ms.RefusalLogOdds | None = None
    ) -> None:
        super().__init__(args.work)
        self.args, self.model = args, ms.load_model(args.model) if model is None else model
        self.layer = 0  # where the chosen direction was read, once it is known
        if metric is None:
            detected = self.json("detected", lambda: self._detect().to_json())
            metric = ms.RefusalLogOdds.from_json(detected, self.model)
        self.metric = metric

    @property
    def limit(self) -> float:
        """The loss above which a reply is degenerate, found once; NaN where the model answers too little to say."""
        found = self.json("loss-limit", lambda: number(loss_limit(self.model)))
        return math.nan if found is None else found

    def prompts(self, file: str, n: int, *, skip: int = 0, sign: int = 0) -> list[str]:
        """The next ``n`` prompts of a file after ``skip``; with a sign those that the model treats as expected."""
        every = ms.prompts.load_instructions(str(self.args.data / f"{file}.jsonl"))[skip:]
        if not sign:
            return every[:n]
        kept: list[str] = []
        for start in range(0, len(every), 16):
            chunk = every[start : start + 16]
            scores = self.metric.scores(self.model, chunk).tolist()
            kept += [prompt for prompt, score in zip(chunk, scores, strict=True) if sign * score > 0]
            if len(kept) >= n:
                break
        return kept[:n]

    def _detect(self) -> ms.RefusalLogOdds:
        return ms.RefusalLogOdds.detect(self.model, ms.PromptPairs.builtin("validation").sample(self.args.n_detect))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the benchmarks")
    parser.add_argument("--work", type=Path, default=Path(".work/refusal-direction"), help="where steps are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--n-train", type=int, default=64)
    parser.add_argument("--n-validation", type=int, default=32)
    parser.add_argument("--n-test", type=int, default=100)
    parser.add_argument("--n-sweep", type=int, default=24, help="prompts of the sweep of strengths, on either side")
    parser.add_argument("--n-pairs", type=int, default=12, help="aligned pairs for heads, writers and readers")
    parser.add_argument("--n-probe", type=int, default=120, help="pairs for probes")
    parser.add_argument("--n-detect", type=int, default=40)
    parser.add_argument("--layers", type=int, nargs="*", help="candidates' layers; all by default")
    args = parser.parse_args()
    study = Study(args)
    found = study.result("direction", RefusalDirection, lambda: find(study))
    print(found, flush=True)
    study.layer = found.layer
    publish("refusal-direction", record(study, found), args.out)


def record(study: Study, found: RefusalDirection) -> dict[str, Any]:
    """All that the page is drawn from."""
    cosmic = found.choose("cosmic")
    sweeps = {
        way: study.result(way, StrengthSweep, lambda w=way: sweep(study, found, w)) for way in ("removed", "added")
    }
    measured = rates(study, found)
    further = study.result("subspace", RefusalSubspace, lambda: subspace(study, found))
    return {
        "provenance": found.provenance.to_json(),
        "metric": found.metric,
        "sizes": {
            "train": list(found.n_train),
            "validation": [len(found.harmful), len(found.harmless)],
            "strengths": sweeps["removed"].harmful.shape[1],
            "erased": N_ERASE,
            "harmless": N_ERASE,
            "random": N_RANDOM,
            "subspace_stop_below": further.provenance.options.get("stop_below", 0.0),
            "reply_tokens": REPLY_TOKENS,
        },
        "unedited": {"bypass": float(found.harmful.mean()), "induce": float(found.harmless.mean())},
        "chosen": {"layer": found.layer, "position": found.position, "passes": found.passes},
        "cosmic": {"layer": cosmic.layer, "position": cosmic.position},
        "seconds": study.seconds("direction"),
        "candidates": rows_of(found.to_dataframe()),
        "controls": rows_of(found.controls.to_dataframe()) if found.controls else [],
        "rates": {s: {c: rate(said) for c, said in row.items()} for s, row in measured.items()},
        "replies": {s: {c: summary(said, row["as it is"]) for c, said in row.items()} for s, row in measured.items()},
        "loss_limit": number(study.limit),
        "strengths": {way: rows_of(one.to_dataframe()) for way, one in sweeps.items()},
        "subspace": rows_of(further.to_dataframe()),
        "equality": study.json("equality", lambda: equality(study, found)),
        "writers": study.json("writers", lambda: writers(study, found)),
        "heads": study.json("heads", lambda: heads(study, found)),
        "probes": study.json("probes", lambda: probes(study)),
        "others": study.json("others-replies", lambda: others(study, measured)),
    }


def rows_of(frame: Any) -> list[dict[str, Any]]:
    """A table as plain data, NaN as None."""
    return json.loads(frame.to_json(orient="records"))


def find(study: Study) -> RefusalDirection:
    train, held = prompt_sets(study)
    return ms.refusal_direction(study.model, train, study.metric, validation=held, layers=study.args.layers)


def prompt_sets(study: Study) -> tuple[ms.PromptPairs, ms.PromptPairs]:
    """Training and validation prompts that the model treats as expected; the two sides do not align."""
    sides = []
    for file, n, skip in (("advbench", study.args.n_train, 0), ("harmbench_val", study.args.n_validation, 200)):
        bad = study.prompts(file, n, sign=1)
        good = study.prompts("alpaca_harmless", n, skip=skip, sign=-1)
        n_both = min(len(bad), len(good))
        sides.append(ms.PromptPairs.from_lists(bad[:n_both], good[:n_both], f"{file}, alpaca_harmless"))
    return sides[0], sides[1]


def test_sets(study: Study) -> dict[str, list[str]]:
    n = study.args.n_test
    return {
        "JailbreakBench": study.prompts("jailbreakbench", n),
        "AdvBench (rest)": study.prompts("advbench", n, skip=250),
        "Alpaca (rest)": study.prompts("alpaca_harmless", n, skip=400),
    }


def random_like(vector: torch.Tensor, seed: int) -> torch.Tensor:
    noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))
    return noise / noise.norm() * vector.norm()


def rates(study: Study, found: RefusalDirection) -> dict[str, dict[str, ReplyKinds]]:
    """What the reply to each test prompt is, in each condition; kept condition by condition."""
    model, vector = study.model, found.vector
    conditions: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "as it is": nullcontext,
        "direction removed": lambda: found.ablate(model),
        "direction added": lambda: found.add(model),
    }
    for seed in (1, 2):
        noise = random_like(vector, seed)
        conditions[f"random {seed} removed"] = lambda noise=noise: project_out(model, noise)
        conditions[f"random {seed} added"] = lambda noise=noise: steer(model, noise, 1.0, [found.layer])
    out: dict[str, dict[str, ReplyKinds]] = {}
    for name, prompts in test_sets(study).items():
        for condition, make in conditions.items():
            if condition.endswith("added") and not name.startswith("Alpaca"):
                continue
            out.setdefault(name, {})[condition] = judged(study, f"{name} {condition}", prompts, make)
    return out


def judged(
    study: Study, name: str, prompts: Sequence[str], make: Callable[[], AbstractContextManager[Any]]
) -> ReplyKinds:
    """Kinds of the replies under an intervention, and their loss under the unedited model; a step of its own."""

    def compute() -> dict[str, Any]:
        with make():
            replies = study.model.generate(prompts, REPLY_TOKENS)
        said = ms.judge_replies(study.model, prompts, replies, limit=study.limit)
        return {"kinds": list(said.kinds), "loss": [number(value) for value in said.loss.tolist()]}

    stored = study.json(f"replies {name}".replace(" ", "-").lower(), compute)
    loss = torch.tensor([math.nan if value is None else value for value in stored["loss"]])
    return ReplyKinds(tuple(stored["kinds"]), loss, study.limit)


def rate(said: ReplyKinds) -> list[int]:
    """Refusals, and of how many replies."""
    return [said.kinds.count("refuses"), len(said.kinds)]


def summary(said: ReplyKinds, before: ReplyKinds) -> dict[str, Any]:
    """What the page says of replies: counts, perplexity, and refusals lost since before with those degenerate now."""
    counts = {kind: said.kinds.count(kind) for kind in KINDS}
    return {"kinds": counts, "perplexity": number(said.perplexity), "lost": list(said.lost_refusals(before))}


def number(value: float) -> float | None:
    """JSON has no NaN, and nothing infinite."""
    return value if math.isfinite(value) else None


def equality(study: Study, found: RefusalDirection) -> dict[str, float]:
    """Largest difference in logits between the hooks and the orthogonalised weights."""
    prompts = study.prompts("jailbreakbench", 8) + study.prompts("alpaca_harmless", 8)
    plain = study.model.logits(prompts)
    with found.ablate(study.model):
        hooked = study.model.logits(prompts)
    with orthogonalized(study.model, found.vector):
        swapped = study.model.logits(prompts)
    back = study.model.logits(prompts)
    gaps = {"hooks against weights": swapped - hooked, "hooks against the model": hooked - plain, "after": back - plain}
    return {name: float(gap.abs().max()) for name, gap in gaps.items()}


def sweep(study: Study, found: RefusalDirection, way: str) -> StrengthSweep:
    n, model = study.args.n_sweep, study.model
    sets = study.prompts("jailbreakbench", n), study.prompts("alpaca_harmless", n, skip=400)
    make, strengths = (found.ablate, REMOVED) if way == "removed" else (found.add, ADDED)
    options = {"name": f"direction {way}", "limit": study.limit}
    return ms.interventions.strength_sweep(model, lambda s: make(model, s), strengths, *sets, study.metric, **options)


def subspace(study: Study, found: RefusalDirection) -> RefusalSubspace:
    """Further directions, looked for at every third layer, also when the mean log-odds are below 0."""
    train, held = prompt_sets(study)
    layers = study.args.layers or list(range(2, int(0.8 * study.model.n_layers), 3))
    return ms.directions.refusal_subspace(study.model, found, train, study.metric, held, layers=layers, stop_below=None)


def expected_pairs(study: Study, n: int) -> ms.PromptPairs:
    """Aligned built-in pairs of held-out topics that the model treats as expected, of both sides."""
    kept = []
    for pair in ms.PromptPairs.builtin("test", edition=1):
        high, low = study.metric.scores(study.model, [pair.harmful, pair.harmless]).tolist()
        if high > 0 > low:
            kept.append(pair)
    return ms.PromptPairs(tuple(kept), "built-in test pairs").sample(n)


def writers(study: Study, found: RefusalDirection) -> dict[str, Any]:
    """Nodes of a circuit by what they write of the direction, and all nodes' top."""
    from mechsafety.circuits import RefusalCircuit

    path = study.folder / "circuit.json"
    if not path.exists():
        options = ms.MapOptions(limit=2 * study.args.n_pairs)
        ms.map_refusal_circuit(study.model, metric=study.metric, options=options).save(path)
    circuit = RefusalCircuit.load(path)
    measured = ms.directions.direction_io(study.model, found, expected_pairs(study, study.args.n_pairs), study.metric)
    frame = measured.to_dataframe()
    inside = {str(member.node): member.role for member in circuit.nodes}
    frame["in_circuit"], frame["role"] = frame.node.isin(inside), frame.node.map(inside).fillna("")
    reads = frame.filter(regex="^reads_[a-z]+$").abs().max(axis=1)
    return {
        "top": json.loads(frame.head(12).to_json(orient="records")),
        "readers": json.loads(frame.loc[reads.sort_values(ascending=False).index[:8]].to_json(orient="records")),
        "neurons": json.loads(measured.neurons_dataframe(6).to_json(orient="records")),
        "circuit_nodes": len(inside),
        "written_by_circuit": float(frame.writes[frame.in_circuit].sum()),
        "mean_abs_cosine": {
            "circuit": float(frame.cosine[frame.in_circuit].abs().mean()),
            "other nodes": float(frame.cosine[~frame.in_circuit].abs().mean()),
        },
    }


def heads(study: Study, found: RefusalDirection, pairs: ms.PromptPairs | None = None) -> dict[str, Any]:
    """Scores of all heads, on pairs that the model treats as expected."""
    pairs = expected_pairs(study, study.args.n_pairs) if pairs is None else pairs
    table = ms.head_attribution(study.model, pairs, study.metric, direction=found, n_masked=min(8, len(pairs)))
    return {
        "top": json.loads(table.to_dataframe().head(10).to_json(orient="records")),
        "agreement": json.loads(table.rank_agreement().to_json(orient="split")),
        "sahara": "published",
    }


def probes(study: Study, layers: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Probes with their controls; erased on harmful prompts of topics that no probe saw, its cost on Alpaca prompts."""
    args, model = study.args, study.model

    def measure() -> ProbeReport:
        return ms.probe_layers(
            model,
            ms.PromptPairs.builtin("train").sample(args.n_probe),
            study.metric,
            layers=layers or args.layers or list(range(0, model.n_layers + 1, 3)),
            erase_on=ms.PromptPairs.builtin("test").sample(N_ERASE).harmful,
            harmless_on=study.prompts("alpaca_harmless", N_ERASE, skip=400),
            n_random=N_RANDOM,
            progress=False,
        )

    report = study.result("probe-report", ProbeReport, measure)
    rows = rows_of(report.to_dataframe())
    return [{**row, "shuffled_draws": report.shuffled_accuracies(row["layer"], row["span"])} for row in rows]


def others(study: Study, measured: dict[str, dict[str, ReplyKinds]]) -> list[dict[str, Any]]:
    """Three methods, each fitted on either kind of contrast data, removed and added in the same places.

    Vectors of the residual stream are removed everywhere, as the chosen direction is, and, apart from that, at their
    own layer alone; heads' vectors have no place but their heads. The mean difference is read where the chosen
    direction is, so that on the first data it is that direction. Replies are compared with those of the unedited model
    to the same prompts, in ``measured``.
    """
    sets = test_sets(study)
    names = ("JailbreakBench", "Alpaca (rest)")
    (bad, good), before = (sets[name] for name in names), [measured[name]["as it is"] for name in names]
    rows: list[dict[str, Any]] = []
    chosen: Tensor | None = None
    for name, pairs in contrast_data(study).items():
        for method, direction, strength in fitted(study, pairs):
            everywhere = replace(direction, everywhere=True) if len(direction.sites) == 1 else None
            vector = None if everywhere is None else direction.vectors[0]
            chosen = vector if chosen is None else chosen
            runs = {
                "removed": everywhere and (bad, partial(everywhere.ablate, study.model)),
                "removed_at_site": (bad, partial(direction.ablate, study.model)),
                "added": (good, partial(direction.add, study.model, strength)),
            }
            row = {"data": name, "method": method, "strength": strength}
            row["cosine"] = None if vector is None else float(torch.cosine_similarity(vector, chosen, dim=0))
            for way, task in runs.items():
                said = task and judged(study, f"others {name} {method} {way}", *task)
                row[way] = said and rate(said)
                row[f"{way}_replies"] = said and summary(said, before[way == "added"])
            rows.append(row)
    return rows


def contrast_data(study: Study) -> dict[str, ms.PromptPairs]:
    """What directions are fitted on: the chosen one's prompts, and built-in pairs of near-equal texts."""
    built_in = ms.PromptPairs.builtin("train").sample(study.args.n_train)
    return {"AdvBench and Alpaca": prompt_sets(study)[0], "built-in pairs": built_in}


def fitted(study: Study, pairs: ms.PromptPairs) -> Iterator[tuple[str, Direction, float]]:
    """Method, direction, and the strength at which it is added."""
    model, layer = study.model, study.layer
    means, _ = mean_differences(model, pairs.harmful, pairs.harmless, n_positions=1)
    site = (Site(SiteKind.RESID_PRE, layer),)
    yield "mean difference", Direction(model.provenance(), "mean difference", site, means[layer].cpu()), 1.0
    yield "representation reading", ms.directions.repe_direction(model, pairs, layers=[layer], progress=False), 1.0
    n_heads = min(16, model.n_layers * model.n_heads // 2)
    yield "inference-time intervention", ms.directions.iti_direction(model, pairs, n_heads=n_heads, progress=False), 5.0


if __name__ == "__main__":
    main()
