"""Checks for notebook 07: mapping and verifying a circuit."""

import functools
from collections.abc import Callable, Sequence, Set

import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits import FaithfulnessMeter
from mechsafety.circuits.faithfulness import in_order
from mechsafety.circuits.verification.statistics import rank_p
from mechsafety.circuits.verification.verify import completeness_gaps, drawn, marginal_intervals, random_circuits
from mechsafety.nodes import Node, Part
from mechsafety.teaching.check import Case, Check, Mistake
from mechsafety.teaching.models import logit_difference, random_numbers, shared_model, shared_runs

Score = Callable[[Set[Node]], float]


@functools.cache
def _meter(size: int) -> FaithfulnessMeter:
    model = shared_model(size)
    return FaithfulnessMeter(model, shared_runs(size), logit_difference(model))


def _circuit(size: int, n: int) -> list[Node]:
    """A random circuit of the shared model."""
    return [part for part in drawn(_meter(size).parts, n, seed=size) if isinstance(part, Node)]


def _score(size: int) -> Score:
    """Faithfulness as a function of the parts that are kept."""

    @functools.cache
    def of(kept: frozenset[Node]) -> float:
        return _meter(size).faithfulness([in_order(tuple(kept))])[0]

    return lambda kept: of(frozenset(kept))


@functools.cache
def _kept() -> list[Case]:
    cases = []
    for size, n in enumerate((4, 3, 6)):
        meter = _meter(size)
        circuits: list[list[Part]] = random_circuits(meter, _circuit(size, n), n, seed=size)
        kept, ends = meter.kept(circuits), meter.ends()
        full, empty = (torch.from_numpy(values).float() for values in ends)
        inputs = {"kept": torch.from_numpy(kept).float(), "full": full, "empty": empty}
        cases.append(Case(inputs, torch.tensor(meter.shares(kept))))
    return cases


faithfulness = Check(
    "faithfulness",
    _kept,
    (
        Mistake(
            "a mean of ratios",
            "Average above and below the line first: a pair with hardly any gap would dominate the mean of ratios.",
            lambda kept, full, empty: ((kept - empty) / (full - empty)).mean(1),
        ),
        Mistake(
            "a ratio without the empty circuit",
            "Subtract the mean metric of the empty circuit above and below the line.",
            lambda kept, full, empty: kept.mean(1) / full.mean(),
        ),
        Mistake(
            "the share that is lost",
            "Faithfulness is what the circuit restores: 0 for the empty circuit, 1 for the whole model.",
            lambda kept, full, empty: (full - kept).mean(1) / (full - empty).mean(),
        ),
        Mistake(
            "a share that is turned over",
            "Divide by the gap of the whole model, not by what the circuit restores.",
            lambda kept, full, empty: (full - empty).mean() / (kept - empty).mean(1),
        ),
    ),
)


@functools.cache
def _subsets() -> list[Case]:
    cases = []
    for size, (n, subsets) in enumerate(((4, 3), (7, 5), (5, 4))):
        meter, circuit = _meter(size), _circuit(size, n)
        chosen = [frozenset(drawn(circuit, 1 + k % (n - 1), seed=k)) for k in range(subsets)]
        gaps = completeness_gaps(meter, circuit, [in_order(tuple(one)) for one in chosen])
        inputs = {
            "faithfulness_of": _score(size),
            "model": frozenset(meter.parts),
            "circuit": frozenset(circuit),
            "subsets": chosen,
        }
        cases.append(Case(inputs, torch.tensor(max(gap for gap, _ in gaps))))
    return cases


def _gaps(
    faithfulness_of: Score, model: Set[Node], circuit: Set[Node], subsets: Sequence[Set[Node]]
) -> Float[Tensor, " subset"]:
    return torch.tensor([faithfulness_of(circuit - gone) - faithfulness_of(model - gone) for gone in subsets])


completeness_gap = Check(
    "completeness_gap",
    _subsets,
    (
        Mistake(
            "a signed maximum",
            "Take the absolute difference for each subset, then the largest.",
            lambda *inputs: _gaps(*inputs).max(),
        ),
        Mistake(
            "a mean over the subsets",
            "Completeness is about the worst subset: take the largest difference.",
            lambda *inputs: _gaps(*inputs).abs().mean(),
        ),
        Mistake(
            "a comparison with the whole circuit",
            "Compare the circuit without K with the model without K.",
            lambda faithfulness_of, model, circuit, subsets: max(
                abs(faithfulness_of(circuit - gone) - faithfulness_of(circuit)) for gone in subsets
            ),
        ),
        Mistake(
            "a comparison with the whole model",
            "K leaves the model too: compare with the faithfulness of the model without K.",
            lambda faithfulness_of, model, circuit, subsets: max(
                abs(faithfulness_of(circuit - gone) - faithfulness_of(model)) for gone in subsets
            ),
        ),
    ),
)


@functools.cache
def _marginals() -> list[Case]:
    cases = []
    for size, n in enumerate((3, 6, 5)):
        circuit = _circuit(size, n)
        values, _ = marginal_intervals(_meter(size), circuit, seed=0)
        inputs = {"faithfulness_of": _score(size), "circuit": circuit}
        cases.append(Case(inputs, torch.tensor([values[node] for node in circuit])))
    return cases


marginal_effects = Check(
    "marginal_effects",
    _marginals,
    (
        Mistake(
            "the effect of each part alone",
            "Take the part out of the circuit; a circuit of one part says little about what the part adds to others.",
            lambda faithfulness_of, circuit: torch.tensor([faithfulness_of({node}) for node in circuit]),
        ),
        Mistake(
            "parts that leave one after the other",
            "Each part leaves the whole circuit: put the part back before the next one leaves.",
            lambda faithfulness_of, circuit: torch.tensor(
                [faithfulness_of({*circuit[k:]}) - faithfulness_of({*circuit[k + 1 :]}) for k in range(len(circuit))]
            ),
        ),
        Mistake(
            "the opposite sign",
            "A part that helps has a positive effect: F(C) minus F(C without the part).",
            lambda faithfulness_of, circuit: torch.tensor(
                [faithfulness_of({*circuit} - {node}) - faithfulness_of({*circuit}) for node in circuit]
            ),
        ),
        Mistake(
            "what is left without the part",
            "Subtract it from the faithfulness of the circuit.",
            lambda faithfulness_of, circuit: torch.tensor([faithfulness_of({*circuit} - {node}) for node in circuit]),
        ),
    ),
)


@functools.cache
def _controls() -> list[Case]:
    cases = []
    for seed, (n, observed) in enumerate(((19, 0.8), (99, 1.2), (40, 0.5), (7, 3.0))):
        # rounded, so that some controls tie with what was observed
        controls = torch.randn(n, generator=random_numbers(seed)).mul(10).round() / 10
        controls[0] = observed if observed < 3 else 0.0
        expected = rank_p(float(torch.tensor(observed)), controls.numpy())
        cases.append(Case({"observed": torch.tensor(observed), "controls": controls}, torch.tensor(expected)))
    return cases


control_p = Check(
    "control_p",
    _controls,
    (
        Mistake(
            "a p that can be 0",
            "The circuit itself counts as one more draw: add 1 above and below the line.",
            lambda observed, controls: (controls >= observed).float().mean(),
        ),
        Mistake(
            "ties that do not count",
            "A control that is as good as the circuit counts against it: use >=.",
            lambda observed, controls: (1 + (controls > observed).sum()) / (1 + len(controls)),
        ),
        Mistake(
            "the wrong tail",
            "Count the controls that are at least as good as the circuit.",
            lambda observed, controls: (1 + (controls <= observed).sum()) / (1 + len(controls)),
        ),
        Mistake(
            "a test of both tails",
            "The claim is that the circuit is better than chance: count one tail.",
            lambda observed, controls: (1 + (controls.abs() >= observed).sum()) / (1 + len(controls)),
        ),
    ),
)
