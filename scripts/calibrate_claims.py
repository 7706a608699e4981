"""How often the tests behind a circuit's claims err, on a model whose circuit is known; write docs/results/claims.json.

    python scripts/calibrate_claims.py            # about five minutes on one core
    python scripts/calibrate_claims.py --quick    # a twentieth of the simulations; the page is printed, nothing written

The model is a planted one. Its pairs are the population: a simulation draws pairs from them with replacement, so that
every figure's true value is known. Two kinds of claims are tested in two ways:

- Sufficiency, necessity, minimality and independence have a p. What is tested is drawn so that the null is true: a
  random circuit in place of the circuit, a part from outside in place of a part, scores of other pairs.
- The other claims have an interval and a limit. The limit is set to the true value, where neither verdict is right.

For each there is one alternative, for the power. The package's own functions do everything but the drawing.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pages.render import simulation
from tqdm.auto import tqdm

import mechsafety as ms
from mechsafety import testbed
from mechsafety.circuits import FaithfulnessMeter, Goal
from mechsafety.circuits.search import ranked
from mechsafety.circuits.verification.claims import ALPHA, decide, decide_correlation
from mechsafety.circuits.verification.side_effects import next_token_kl
from mechsafety.circuits.verification.stability import attribute_pairs, bootstrap_stability
from mechsafety.circuits.verification.statistics import independence_test, rank_p
from mechsafety.circuits.verification.verify import (
    completeness,
    faithfulness_of,
    gap_interval,
    minimality_p,
    random_circuits,
)
from mechsafety.intervals import mean_interval
from mechsafety.nodes import Node, Part, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.patching.masks import Constants, Patch, patched_logits
from mechsafety.testbed.vocabulary import REFUSAL

MODEL = {"seed": 9, "layers": 6, "heads": 8, "decoys": 6, "neurons": 2, "varied": True, "noise": 0.03}
SIZES = (8, 16, 32)
# size-matched random circuits per simulation, parts added at random, and resamples
N_RANDOM, N_ADDED, N_RESAMPLES = 99, 39, 100
# noise in the other weights with which the smallest prefix depends on the prompts
NOISY = 0.1
# how far the limit lies from the true value for the power, in the figure's unit
APART = 0.1


@dataclass(frozen=True, slots=True)
class Drawn(FaithfulnessMeter):
    """A meter on pairs that were drawn from those of another, whose measurements it looks up."""

    rows: tuple[int, ...] = ()
    known: dict[tuple[str, frozenset[Part]], np.ndarray] = field(default_factory=dict)

    def kept(self, circuits: Sequence[Sequence[Part]], near: Sequence[Part] | None = None) -> np.ndarray:
        return self._looked_up("kept", circuits, FaithfulnessMeter.kept)

    def removed(self, circuits: Sequence[Sequence[Part]]) -> np.ndarray:
        return self._looked_up("removed", circuits, FaithfulnessMeter.removed)

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        harmful, harmless = FaithfulnessMeter.ends(self)
        return harmful[list(self.rows)], harmless[list(self.rows)]

    def _looked_up(self, name: str, circuits: Sequence[Sequence[Part]], measure: Callable[..., Any]) -> np.ndarray:
        keys = [(name, frozenset(circuit)) for circuit in circuits]
        new = {key: list(circuit) for key, circuit in zip(keys, circuits, strict=True) if key not in self.known}
        if new:
            self.known.update(zip(new, measure(self, list(new.values())), strict=True))
        return np.stack([self.known[key] for key in keys])[:, list(self.rows)]


@dataclass(frozen=True)
class Setting:
    """The model, its true circuit, and a circuit that lacks a part, on the whole population."""

    whole: Drawn
    true: tuple[Node, ...]
    partial: tuple[Node, ...]
    pool: tuple[tuple[Part, ...], ...]

    def drawn(self, n: int, rng: np.random.Generator) -> Drawn:
        """A meter on ``n`` pairs of the population."""
        return dataclasses.replace(self.whole, rows=tuple(rng.integers(len(self.whole.rows), size=n).tolist()))


def setting(pool: int, **changes: Any) -> Setting:
    """Build the model and measure what all simulations share."""
    made = testbed.planted(**{**MODEL, **changes})
    model = ms.load_model((made.model, made.tokenizer))
    metric = ms.RefusalLogOdds.of(model, [REFUSAL[0]])
    runs = pair_runs(model, made.pairs)
    whole = Drawn(model, runs, metric, rows=tuple(range(len(made.pairs))))
    true = made.truth.nodes
    parts = [tuple(node for node in true if node != gone) for gone in true]
    # the circuit without one part whose faithfulness is nearest to a half: it is faithful to a degree
    partial = min(parts, key=lambda circuit: abs(whole.faithfulness([circuit])[0] - 0.5))
    return Setting(whole, true, partial, tuple(map(tuple, random_circuits(whole, true, pool, 0))))


# each yields a row per number of pairs: how often the test errs, and how often it finds the alternative


def against_random(given: Setting, n: int, times: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Sufficiency and necessity of a circuit that is itself random; the alternative is the partial circuit."""
    for claim in ("sufficiency", "necessity"):
        p_null, p_other = [], []
        for _ in range(times):
            meter = given.drawn(n, rng)
            chosen = [given.pool[k] for k in rng.choice(len(given.pool), N_RANDOM + 1, replace=False)]
            measure = meter.faithfulness if claim == "sufficiency" else lost(meter)
            values = np.array(measure([*chosen, given.partial]))
            p_null.append(rank_p(values[0], values[1:-1]))
            p_other.append(rank_p(values[-1], values[1:-1]))
        yield row(claim, "the circuit is a random one", n, times, p_null, p_other, "the true circuit but one part")


def lost(meter: Drawn) -> Callable[[Sequence[Sequence[Part]]], list[float]]:
    return lambda circuits: [1 - value for value in meter.without(circuits)]


def minimal(given: Setting, n: int, times: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Minimality of a part that is drawn like those added at random; the alternative is a true part."""
    outside = [part for part in given.whole.parts if part not in given.true]
    p_null, p_other = [], []
    for _ in range(times):
        meter = given.drawn(n, rng)
        added = [outside[k] for k in rng.choice(len(outside), N_ADDED + 1, replace=False)]
        base, *larger = meter.faithfulness([given.true, *([*given.true, part] for part in added)])
        effects = np.array(larger) - base
        gone = given.true[rng.integers(len(given.true))]
        other = base - meter.faithfulness([[part for part in given.true if part != gone]])[0]
        for part, effect, into in ((added[0], effects[0], p_null), (gone, other, p_other)):
            into.append((minimality_p({part: effect}, effects[1:], Goal()) or {})[str(part)])
    yield row("minimality", "a part is like those added", n, times, p_null, p_other, "a part of the true circuit")


def independent(given: Setting, n: int, times: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """HSIC of scores of other pairs; the alternative is a true correlation of 0.5."""
    scores = given.whole.ends()[0]
    removed = given.whole.removed([given.partial])[0]
    unit = [(values - values.mean()) / values.std() for values in (scores, removed)]
    p_null, p_other, inside = [], [], []
    for k in range(times):
        one, other = (rng.integers(len(scores), size=n) for _ in range(2))
        p_null.append(independence_test(unit[0][one], unit[1][other], k, 200).p_value)
        mixed = 0.5 * unit[0][one] + 0.75**0.5 * unit[1][other]
        found = independence_test(unit[0][one], mixed, k, 200)
        p_other.append(found.p_value)
        assert found.correlation is not None and found.ci is not None
        inside.append(decide_correlation(found.correlation, found.ci, n).passed)
    yield row("independence, HSIC", "scores of other pairs", n, times, p_null, p_other, "a correlation of 0.5")
    yield verdicts("independence, correlation", n, inside, [], "a true correlation of 0.5", "")


def faithful(given: Setting, n: int, times: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Fresh pairs, with the limit at the true faithfulness, and below it."""
    truth = given.whole.faithfulness([given.partial])[0]
    found, power = [], []
    for k in range(times):
        value, interval = faithfulness_of(given.drawn(n, rng), given.partial, k % 20)
        found.append(decide(value, interval, n, low=truth).passed)
        power.append(decide(value, interval, n, low=truth - APART).passed)
    yield verdicts("fresh pairs", n, found, power, "the limit is the true value", f"the limit is {APART:g} lower")


def complete(given: Setting, n: int, times: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Completeness of the partial circuit, with the limit at the true largest difference, and above it."""
    tries = list(given.partial)
    truth, _ = completeness(given.whole, given.partial, tries, steps=3, width=6)
    found, power = [], []
    for k in range(times):
        meter = given.drawn(n, rng)
        value, gone = completeness(meter, given.partial, tries, steps=3, width=6)
        interval = gap_interval(meter, given.partial, gone, k % 20)
        found.append(decide(value, interval, n, high=truth).passed)
        power.append(decide(value, interval, n, high=truth + APART).passed)
    yield verdicts("completeness", n, found, power, "the limit is the true value", f"the limit is {APART:g} higher")


def harmless(given: Setting, n: int, times: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """KL on harmless prompts with the true circuit at its mean, with the limit at the true mean, and above it."""
    model, base = given.whole.model, given.whole.runs.harmless
    edited = patched_logits(model, base, Constants.mean(base).of(base), Patch.of(model, [list(given.true)]))[0]
    values = next_token_kl(base.logits, edited).double().numpy()
    truth = float(values.mean())
    found, power = [], []
    for k in range(times):
        some = values[rng.integers(len(values), size=n)]
        interval = mean_interval(some, k % 20)
        found.append(decide(float(some.mean()), interval, n, high=truth).passed)
        power.append(decide(float(some.mean()), interval, n, high=2 * truth).passed)
    yield verdicts(
        "harmless prompts, complement", n, found, power, "the limit is the true value", "it is twice as high"
    )


def stable(given: Setting, n: int, times: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Mean overlap over 100 resamples of a noisier model, with the limit at the mean over many, and below it."""
    noisy = setting(1, noise=NOISY).whole
    by_pair, nodes = attribute_pairs(noisy), head_and_mlp_nodes(noisy.model.n_layers, noisy.model.n_heads)

    def ranking_of(weights: Sequence[int] | None) -> list[Node]:
        return ranked(nodes, by_pair.mean(weights), Goal())

    many = bootstrap_stability(noisy, ranking_of, Goal(), n=max(200, times // 2), seed=n)
    assert many is not None
    overlaps, truth = np.array(many.jaccards), many.mean
    found, power = [], []
    for k in range(times):
        some = overlaps[rng.integers(len(overlaps), size=N_RESAMPLES)]
        interval = mean_interval(some, k % 20)
        found.append(decide(float(some.mean()), interval, N_RESAMPLES, low=truth).passed)
        power.append(decide(float(some.mean()), interval, N_RESAMPLES, low=truth - 2 * APART).passed)
    yield verdicts("stability", N_RESAMPLES, found, power, "the limit is the true value", f"it is {2 * APART:g} lower")


def row(
    claim: str, null: str, n: int, times: int, p_null: Sequence[float], p_other: Sequence[float], other: str
) -> dict[str, Any]:
    """How often a p is below 5 %."""
    errs, finds = (float((np.array(values) < ALPHA).mean()) for values in (p_null, p_other))
    about = {"claim": claim, "kind": "p", "null": null, "n": n, "times": times}
    return {**about, "errs": errs, "power": finds, "other": other}


def verdicts(
    claim: str, n: int, found: Sequence[bool | None], power: Sequence[bool | None], null: str, other: str
) -> dict[str, Any]:
    """How often a claim is decided at its limit, either way, and how often it holds away from the limit."""
    holds, fails = (float(np.mean([one is side for one in found])) for side in (True, False))
    finds = float(np.mean([one is True for one in power])) if power else None
    return {
        **{"claim": claim, "kind": "interval", "null": null, "n": n, "times": len(found)},
        **{"errs": holds + fails, "holds": holds, "fails": fails, "power": finds, "other": other},
    }


SIMULATED = (against_random, minimal, independent, faithful, complete, harmless, stable)


def simulate(times: int, seed: int) -> dict[str, Any]:
    """All rows."""
    given = setting(max(400, 2 * times))
    rows: list[Mapping[str, Any]] = []
    for simulated in tqdm(SIMULATED):
        for n in SIZES if simulated is not stable else SIZES[:1]:
            # a generator of its own each, so that a row can be simulated again by itself
            rng = np.random.default_rng([seed, n, *map(ord, simulated.__name__)])
            for one in simulated(given, n, times, rng):
                rows.append({key: round(v, 4) if isinstance(v, float) else v for key, v in one.items()})
    about = {"model": MODEL, "parts": len(given.whole.parts), "true": len(given.true), "pairs": len(given.whole.rows)}
    return {"times": times, "seed": seed, **about, **on_all_pairs(given), "rows": rows}


def on_all_pairs(given: Setting) -> dict[str, Any]:
    """True values of the population: of the partial circuit, and of random circuits."""
    own, *others = lost(given.whole)([given.partial, *given.pool])
    return {
        "faithfulness": round(given.whole.faithfulness([given.partial])[0], 4),
        "lost": round(own, 4),
        "random_lost": round(float(np.median(others)), 4),
        "random_as_much": round(float(np.mean(np.array(others) >= own)), 4),
    }


if __name__ == "__main__":
    simulation("claims", __doc__, simulate, few=25, many=500)
