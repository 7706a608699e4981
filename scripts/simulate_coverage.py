"""How often the package's intervals hold the true value, and how often its tests reject what is true.

    python scripts/simulate_coverage.py            # docs/results/coverage.json and coverage.md, about five minutes
    python scripts/simulate_coverage.py --quick    # a tenth of the samples, printed and not written
    python scripts/simulate_coverage.py --page     # the page again, from the JSON alone

Every sample comes from a population whose true value is known. Intervals are at 95 %, tests at 5 %.
"""

import argparse
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tqdm.auto import tqdm

from mechsafety.circuits.verification.statistics import equivalence_test, independence_test, prompt_areas, rank_p
from mechsafety.intervals import MANY, ratio_intervals, wilson_interval
from mechsafety.metrics import adjust_p, sign_flip_p

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SIZES = (7, 12, 20, 40)
GOOD = (0.93, 0.97)
RATES = (0.5, 0.7, 0.8, 0.9, 0.95)
# shares of all parts at which the simulated curves are measured, and their mean faithfulness there
K = np.array([0.0, 0.05, 0.1, 0.2, 0.5, 1.0])
CURVES = {
    "rises to 1": np.array([0.0, 0.1, 0.3, 0.6, 0.9, 1.0]),
    "at 1 early": np.array([0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
}

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
# each with mean 0 and standard deviation 1 but for the heavy tails, whose scale is that of Student's t
NOISE: dict[str, Draw] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: (rng.lognormal(0, 0.5, size) - math.exp(0.125)) / 0.6039,
    "very skewed": lambda rng, size: (rng.lognormal(0, 1, size) - math.exp(0.5)) / 2.1612,
    "heavy tails": lambda rng, size: rng.standard_t(3, size),
    "bounded": lambda rng, size: (rng.beta(2, 5, size) - 2 / 7) / 0.1597,
    "half zeros": lambda rng, size: (np.where(rng.random(size) < 0.5, 0, rng.beta(2, 5, size)) - 1 / 7) / 0.1819,
}
WORDS = {
    "normal": "normal",
    "skewed": "lognormal, sigma 0.5 (skewness 1.8)",
    "very skewed": "lognormal, sigma 1 (skewness 6.2)",
    "heavy tails": "Student's t with 3 degrees of freedom",
    "bounded": "beta(2, 5), between 0 and 1",
    "half zeros": "0 for half of the prompts, beta(2, 5) for the others",
}


def held(ends: np.ndarray, truth: float) -> dict[str, float]:
    """Share of the intervals [sample 2] that hold the truth; and of those that have no end on a side."""
    inside = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    return {"held": float(inside.mean()), "unbounded": float(np.isinf(ends).any(1).mean())}


def _rows(method: Callable[..., list[tuple[float, float]]], parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Intervals of all rows, twenty seeds in turn."""
    ends = np.zeros((len(parts), 2))
    for k in range(20):
        ends[k::20] = method(parts[k::20], wholes[k::20], seed=k)
    return ends


def means(samples: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Means of every kind of value."""
    for name, draw in NOISE.items():
        for n in SIZES:
            values = 1 + draw(rng, (samples, n))
            ends = _rows(ratio_intervals, values, np.ones_like(values))
            yield {"of": "mean", "data": name, "n": n, **held(ends, 1.0)}


def ratios(samples: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Shares of a gap that is far from 0 on every prompt, and ratios to one that is not."""
    for kind, spread, scale in (("share of the gap", 0.3, 0.3), ("ratio", 0.6, 0.5)):
        for name, draw in NOISE.items():
            for n in SIZES:
                whole = 1 + spread * rng.normal(size=(samples, n))
                part = 0.4 * whole + scale * draw(rng, (samples, n))
                ends = _rows(ratio_intervals, part, whole)
                yield {"of": kind, "data": name, "n": n, **held(ends, 0.4)}


def rates(*_: Any) -> Iterator[dict[str, Any]]:
    """Wilson's interval, exactly: summed over all outcomes of the binomial distribution."""
    for rate in RATES:
        for n in SIZES:
            hits = np.arange(n + 1)
            ends = np.array([wilson_interval(int(k), n) for k in hits])
            inside = (ends[:, 0] <= rate) & (rate <= ends[:, 1])
            found = float(stats.binom.pmf(hits, n, rate)[inside].sum())
            yield {"of": "rate", "data": f"{rate:g}", "n": n, "held": found, "unbounded": 0.0}
    grid = (np.arange(1000) + 0.5) / 1000
    for n in SIZES:
        ends = np.array([wilson_interval(k, n) for k in range(n + 1)])
        inside = (ends[:, :1] <= grid) & (grid <= ends[:, 1:])
        pmf = stats.binom.pmf(np.arange(n + 1)[:, None], n, grid)
        yield {"of": "rate", "data": "all", "n": n, "held": float((pmf * inside).sum(0).mean()), "unbounded": 0.0}


def areas(samples: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """CMD and CPR of curves that rise to 1 and of curves that are at 1 early, where CMD cannot be below 0."""
    for curve, mean in CURVES.items():
        truth = np.trapezoid(np.abs(1 - mean), K), np.trapezoid(mean, K)
        for name in ("normal", "very skewed", "heavy tails"):
            for n in SIZES:
                gaps = 1 + 0.3 * rng.normal(size=(samples, n))
                own = 0.2 * NOISE[name](rng, (1, samples, n)) + 0.1 * rng.normal(size=(len(K), samples, n))
                own[[0, -1]] = 0.0  # nothing kept and everything kept are known
                scores = mean[:, None, None] * gaps + own
                parts = [prompt_areas(K, scores[:, k], gaps[k], np.zeros(n)) for k in range(samples)]
                for place, area in enumerate(("CMD", "CPR")):
                    ends = _rows(ratio_intervals, np.array([part[place] for part in parts]), gaps)
                    yield {"of": f"{area}, {curve}", "data": name, "n": n, **held(ends, truth[place])}


def others(samples: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """What other intervals of a mean hold on the same kinds of values."""
    fewer = max(50, samples // 2)
    for name in ("normal", "very skewed", "heavy tails", "half zeros"):
        for n in SIZES:
            values = 1 + NOISE[name](rng, (fewer, n))
            for method in ("percentile", "BCa"):
                with warnings.catch_warnings(action="ignore"):  # of samples of one value repeated
                    found = stats.bootstrap(
                        (values,), np.mean, axis=1, n_resamples=1000, method=method, rng=rng, batch=100
                    ).confidence_interval
                ends = np.stack([found.low, found.high], 1)
                ends = np.where(np.isnan(ends), values.mean(1, keepdims=True), ends)
                yield {"method": method, "data": name, "n": n, **held(ends, 1.0)}
            error = stats.sem(values, axis=1)
            half = stats.t.ppf(0.975, n - 1) * error
            ends = np.stack([values.mean(1) - half, values.mean(1) + half], 1)
            yield {"method": "Student's t", "data": name, "n": n, **held(ends, 1.0)}
            # of resamples of one value repeated, nothing
            drawn = values[:, rng.integers(n, size=(1000, n))]
            with np.errstate(invalid="ignore", divide="ignore"):
                t = (drawn.mean(-1) - values.mean(1, keepdims=True)) / (drawn.std(-1, ddof=1) / math.sqrt(n))
            low, high = np.nanquantile(np.where(np.isfinite(t), t, np.nan), [0.025, 0.975], axis=1)
            ends = np.stack([values.mean(1) - high * error, values.mean(1) - low * error], 1)
            yield {"method": "studentised", "data": name, "n": n, **held(ends, 1.0)}


def tests(samples: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """How often each test rejects what is true, at 5 %."""
    for name in ("normal", "very skewed", "heavy tails"):
        for n in SIZES:
            values = NOISE[name](rng, (samples, n))
            p = np.concatenate([sign_flip_p(values[k::10], seed=k) for k in range(10)])
            yield {"test": "sign flips", "data": name, "n": n, "rejected": float((p < 0.05).mean())}
    for name in ("normal", "very skewed", "heavy tails"):
        for n in SIZES:
            # the mean difference is the margin itself: equivalence is false, as closely as it can be
            rows = 0.2 + 0.1 * NOISE[name](rng, (max(50, samples // 2), n))
            p = np.array([equivalence_test(row, 0.2).p_value for row in rows])
            yield {"test": "equivalence", "data": name, "n": n, "rejected": float((p < 0.05).mean())}
    for n in (20, 100, 200):
        p = np.array([rank_p(row[0], row[1:]) for row in rng.normal(size=(samples, n + 1))])
        yield {"test": "random circuits", "data": f"{n} circuits", "n": n, "rejected": float((p < 0.05).mean())}
    for n in SIZES:
        some = max(50, samples // 10)
        pairs = [(rng.normal(size=n), rng.normal(size=n)) for _ in range(some)]
        p = np.array([independence_test(x, y, k, 200).p_value for k, (x, y) in enumerate(pairs)])
        yield {"test": "independence", "data": "normal", "n": n, "rejected": float((p < 0.05).mean())}
    for share in (0.0, 0.1):
        for n in (12, 14, 20, 40):
            yield {"test": f"sweep, {share:.0%} real", "data": "normal", "n": n, **sweep(samples, n, share, rng)}


def sweep(samples: int, n: int, share: float, rng: np.random.Generator) -> dict[str, float]:
    """Sweeps over 300 parts, correlated within each prompt; of those real the effect is two standard deviations.

    ``rejected``: the mean share of what is rejected that is not real, what Benjamini and Hochberg bound at 5 %.
    """
    false, found = [], []
    real = np.arange(300) < 300 * share
    for k in range(max(5, samples // 40)):
        values = 0.6 * rng.normal(size=(1, n)) + 0.8 * rng.normal(size=(300, n)) + 2.0 * real[:, None]
        chosen = adjust_p(sign_flip_p(values, seed=k)) < 0.05
        false.append((chosen & ~real).sum() / max(1, chosen.sum()))
        found.append(chosen[real].mean() if share else 0.0)
    return {"rejected": float(np.mean(false)), "found": float(np.mean(found))}


PARTS = {"coverage": (means, ratios, rates, areas), "others": (others,), "tests": (tests,)}


def simulate(samples: int, seed: int) -> dict[str, Any]:
    """All tables."""
    store: dict[str, Any] = {"samples": samples, "seed": seed, "many": MANY}
    for name, parts in PARTS.items():
        store[name] = []
        for part in parts:
            # a generator of its own each, so that a part can be run again by itself
            rng = np.random.default_rng([seed, *map(ord, part.__name__)])
            for row in tqdm(part(samples, rng), desc=part.__name__):
                store[name].append({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
    return store


def page(store: Mapping[str, Any]) -> str:
    """The page, from the tables alone."""
    rows = store["coverage"]
    outside = [row for row in rows if row["data"] != "all" and not GOOD[0] <= row["held"] <= GOOD[1]]
    lines = [
        "# How often intervals hold the true value, and tests reject what is true",
        "",
        f"`python scripts/simulate_coverage.py`, seed {store['seed']}. An interval should hold the true value in 95 %",
        f"of the samples. Each cell is the share of {store['samples']:,} samples in which it does, known to about ±",
        f"{2 * math.sqrt(0.05 * 0.95 / store['samples']):.1%}. Cells outside {GOOD[0]:.0%} to {GOOD[1]:.0%} are bold.",
        "The formulas are in [methods](../methods.md#behaviour-and-metrics).",
        "",
        "Values over prompts are " + "; ".join(f"*{name}*: {text}" for name, text in WORDS.items()) + ".",
    ]
    for title, kinds, text in SECTIONS:
        lines += ["", f"## {title}", "", text, ""]
        for kind in kinds:
            some = [row for row in rows if row["of"] == kind]
            lines += [f"**{kind[0].upper()}{kind[1:]}**", "", *_table(some, "data", "held", GOOD), ""]
            open_ended = [row for row in some if row["unbounded"] > 0.005]
            if open_ended:
                shown = ", ".join(f"{row['data']}, n = {row['n']}: {row['unbounded']:.1%}" for row in open_ended)
                lines += [f"Share of samples in which the interval has no end ({shown}).", ""]
    lines += ["## Where none covers", "", *_outside(outside, rows)]
    lines += ["", "## Other intervals of a mean", ""]
    lines += [f"On the same kinds of values, {max(50, store['samples'] // 2)} samples a cell."]
    lines += [f"The package uses *percentile* from {store['many']} prompts on.", ""]
    for method in dict.fromkeys(row["method"] for row in store["others"]):
        some = [row for row in store["others"] if row["method"] == method]
        lines += [f"**{method}**", "", *_table(some, "data", "held", GOOD), ""]
    lines += ["## Tests", "", *TESTS, _fewer(store["samples"]), ""]
    for test in dict.fromkeys(row["test"] for row in store["tests"]):
        some = [row for row in store["tests"] if row["test"] == test]
        lines += [f"**{test[0].upper()}{test[1:]}**", ""]
        if test == "random circuits":
            lines += [", ".join(f"{row['data']}: {row['rejected']:.1%}" for row in some) + ".", ""]
            continue
        lines += [*_table(some, "data", "rejected", (0.0, 0.06)), ""]
        if "found" in some[0] and some[0]["found"]:
            found = ", ".join(f"{row['found']:.0%} at {row['n']}" for row in some)
            lines += [f"Share of the real effects that is found: {found} prompts.", ""]
    return "\n".join(lines).rstrip() + "\n"


SECTIONS = (
    ("Means", ("mean",), "Scores, KL, effects in units of the metric."),
    (
        "Ratios of two means",
        ("share of the gap", "ratio"),
        "*Share of the gap*: an effect or a faithfulness. The gap has a standard deviation of 0.3 of its mean. "
        "*Ratio*: as C of two models that hardly differ on some prompts. The whole has one of 0.6 of its mean. "
        "In both, the part is 0.4 of the whole plus values of the kind named.",
    ),
    (
        "Rates",
        ("rate",),
        "Exact, not simulated. A rate of few prompts takes few values, so no interval covers 95 % at each true rate; "
        "*all* is the mean over true rates from 0 to 1.",
    ),
    (
        "Areas of a faithfulness curve",
        tuple(f"{area}, {curve}" for curve in CURVES for area in ("CPR", "CMD")),
        "CPR is the area under the curve, CMD the area between it and 1, which cannot be below 0.",
    ),
)
TESTS = (
    "Share of samples in which a true null hypothesis is rejected at p < 0.05. Cells above 6 % are bold.",
    "*Sign flips*: the mean is 0. The test assumes random signs, which skewed values of mean 0 do not have.",
    "*Equivalence*: the true difference is the margin. *Random circuits*: the circuit is one of them.",
    "*Independence*: two unrelated scores. *Sweep*: 300 parts, p values adjusted by Benjamini and Hochberg. Its",
    "figure is the mean share of the rejected parts that is not real, which the adjustment should keep below 5 %.",
)


def _fewer(n: int) -> str:
    """How many samples the slow tests have; see `tests`."""
    return (
        f"Equivalence has {max(50, n // 2)} samples a cell, independence {max(50, n // 10)}, sweeps {max(5, n // 40)}."
    )


def _table(rows: list[Mapping[str, Any]], by: str, figure: str, good: tuple[float, float]) -> list[str]:
    sizes = sorted({row["n"] for row in rows})
    lines = [f"| {by} | " + " | ".join(f"n = {n}" for n in sizes) + " |", "| --- |" + " --- |" * len(sizes)]
    for name in dict.fromkeys(row[by] for row in rows):
        cells = []
        for n in sizes:
            value = next(row[figure] for row in rows if (row[by], row["n"]) == (name, n))
            text = f"{value:.1%}"
            cells.append(text if good[0] <= value <= good[1] or name == "all" else f"**{text}**")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _outside(outside: list[Mapping[str, Any]], rows: list[Mapping[str, Any]]) -> list[str]:
    """The cells outside the limits, by what they are of."""
    lines = [f"{len(outside)} of {len(rows)} cells lie outside {GOOD[0]:.0%} to {GOOD[1]:.0%}:", ""]
    for kind in dict.fromkeys(row["of"] for row in outside):
        some = [row for row in outside if row["of"] == kind]
        for word, part in (
            ("below", [row for row in some if row["held"] < GOOD[0]]),
            ("above", [row for row in some if row["held"] > GOOD[1]]),
        ):
            if part:
                cells = ", ".join(f"{row['data']} at {row['n']} ({row['held']:.1%})" for row in part)
                lines.append(f"- {kind}, {word}: {cells}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 samples a cell; print the page, write nothing")
    parser.add_argument("--page", action="store_true", help="write the page from the JSON again")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    target = args.out / "coverage.json"
    if args.quick:
        print(page(simulate(100, args.seed)))
        return
    if not args.page:
        target.write_text(json.dumps(simulate(args.samples, args.seed), indent=1, allow_nan=False) + "\n")
    (args.out / "coverage.md").write_text(page(json.loads(target.read_text())))


if __name__ == "__main__":
    main()
