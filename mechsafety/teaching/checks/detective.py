"""Checks for notebook 08: a planted model's circuit is found, then revealed and scored."""

import functools
import random
from collections.abc import Callable, Sequence, Set
from itertools import combinations

import torch
from jaxtyping import Bool, Float
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from mechsafety.circuits import FaithfulnessMeter
from mechsafety.models import load_model
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.patching.masks import pair_runs
from mechsafety.teaching.check import Case, Check, Mistake
from mechsafety.teaching.models import logit_difference, random_numbers
from mechsafety.testbed import Planted, planted, score

# seed, layers, heads, doubled stages of the planted models
MODELS = ((3, 4, 4, 1), (5, 3, 6, 1), (8, 6, 3, 2))


@functools.cache
def _planted(number: int) -> Planted:
    seed, layers, heads, backups = MODELS[number]
    return planted(seed, layers, heads, backups=backups)


def _nodes(number: int) -> list[Node]:
    _, layers, heads, _ = MODELS[number]
    return list(head_and_mlp_nodes(layers, heads))


@functools.cache
def _circuits() -> list[Case]:
    cases = []
    for number in range(len(MODELS)):
        truth, rng = _planted(number).truth, random.Random(number)
        outside = [node for node in _nodes(number) if node not in truth.nodes]
        found = {*rng.sample(truth.nodes, 2 + number % 2), *rng.sample(outside, 1 + number)}
        judged = score(found, truth).found_nodes
        assert judged is not None
        inputs = {"found": found, "true": set(truth.nodes)}
        cases.append(Case(inputs, torch.tensor([judged.precision, judged.recall, judged.f1])))
    return cases


def _shares(found: Set[Node], true: Set[Node]) -> tuple[float, float]:
    return len(found & true) / len(found), len(found & true) / len(true)


def _with_third(third: Callable[[float, float], float]) -> Callable[[Set[Node], Set[Node]], list[float]]:
    def wrong(found: Set[Node], true: Set[Node]) -> list[float]:
        precision, recall = _shares(found, true)
        return [precision, recall, third(precision, recall)]

    return wrong


def _swapped(found: Set[Node], true: Set[Node]) -> list[float]:
    precision, recall = _shares(found, true)
    return [recall, precision, 2 * precision * recall / (precision + recall)]


circuit_scores = Check(
    "circuit_scores",
    _circuits,
    (
        Mistake(
            "precision and recall the wrong way round",
            "Precision is a share of what was found, recall a share of what is true.",
            _swapped,
        ),
        Mistake(
            "an arithmetic mean",
            "F1 is the harmonic mean: 2 * precision * recall / (precision + recall).",
            _with_third(lambda precision, recall: (precision + recall) / 2),
        ),
        Mistake(
            "a Jaccard index",
            "F1 divides twice the hits by the two sizes' sum, not the hits by the union.",
            _with_third(lambda precision, recall: 1 / (1 / precision + 1 / recall - 1)),
        ),
        Mistake(
            "a product",
            "F1 is the harmonic mean: 2 * precision * recall / (precision + recall).",
            _with_third(lambda precision, recall: precision * recall),
        ),
    ),
)


@functools.cache
def _rankings() -> list[Case]:
    cases = []
    for number in range(len(MODELS)):
        truth, nodes = _planted(number).truth, _nodes(number)
        values = torch.randn(len(nodes), generator=random_numbers(number))
        is_true = torch.tensor([node in truth.nodes for node in nodes])
        values = values * (1 + is_true)  # better than chance, and of both signs
        judged = score(dict(zip(nodes, values.tolist(), strict=True)), truth).nodes
        assert judged is not None
        cases.append(Case({"scores": values, "is_true": is_true}, torch.tensor(judged.average_precision)))
    return cases


def _precision_at_n(scores: Float[Tensor, " part"], is_true: Bool[Tensor, " part"]) -> Tensor:
    return is_true[scores.abs().topk(int(is_true.sum())).indices].float().mean()


average_precision = Check(
    "average_precision",
    _rankings,
    (
        Mistake(
            "a ranking by signed scores",
            "A part that works against refusal belongs to the mechanism too: rank by absolute scores.",
            lambda scores, is_true: float(average_precision_score(is_true, scores)),
        ),
        Mistake(
            "a ranking from the smallest score up",
            "The largest absolute score ranks first.",
            lambda scores, is_true: float(average_precision_score(is_true, -scores.abs())),
        ),
        Mistake(
            "an AUROC",
            "Average the precision at the rank of every true part.",
            lambda scores, is_true: float(roc_auc_score(is_true, scores.abs())),
        ),
        Mistake(
            "the precision at one rank",
            "Average the precision over the ranks of all true parts.",
            _precision_at_n,
        ),
        Mistake(
            "a mean over all ranks",
            "Average over the ranks at which a true part stands, not over all.",
            lambda scores, is_true: (
                is_true[scores.abs().sort(descending=True).indices].cumsum(0) / torch.arange(1, len(scores) + 1)
            ).mean(),
        ),
    ),
)


Effect = Callable[[Sequence[Node]], float]


def _suspects(number: int) -> list[Node]:
    """The nodes of the circuit, and some others."""
    return [node for node in _nodes(number) if node in _planted(number).truth.nodes or node.layer == 0]


@functools.cache
def effect_of(number: int) -> Effect:
    """Share of the gap that a planted model loses when some nodes are patched together."""
    made = _planted(number)
    model = load_model((made.model, made.tokenizer))
    meter = FaithfulnessMeter(model, pair_runs(model, made.pairs.sample(2, seed=number)), logit_difference(model))
    sets = [[node] for node in _suspects(number)] + [list(two) for two in combinations(_suspects(number), 2)]
    # all that an answer needs, in one batch
    known = {frozenset(nodes): 1 - left for nodes, left in zip(sets, meter.without(sets), strict=True)}

    def effect(nodes: Sequence[Node]) -> float:
        if frozenset(nodes) not in known:
            known[frozenset(nodes)] = 1 - meter.without([list(nodes)])[0]
        return known[frozenset(nodes)]

    return effect


def _excess(
    effect: Effect, nodes: Sequence[Node], alone: Callable[[float, float], float] = lambda a, b: a + b
) -> Float[Tensor, "node node"]:
    """What patching each two nodes together does beyond ``alone`` of the two single effects; 0 on the diagonal."""
    found = torch.zeros(len(nodes), len(nodes))
    for i, first in enumerate(nodes):
        for j, second in enumerate(nodes[:i]):
            found[i, j] = found[j, i] = effect([first, second]) - alone(effect([first]), effect([second]))
    return found


@functools.cache
def _backups() -> list[Case]:
    cases = []
    for number in range(len(MODELS)):
        effect, nodes = effect_of(number), _suspects(number)
        cases.append(Case({"effect": effect, "nodes": nodes}, _excess(effect, nodes)))
    return cases


joint_excess = Check(
    "joint_excess",
    _backups,
    (
        Mistake(
            "the joint effect alone",
            "Subtract both single effects: two nodes that each do a lot are no backups of one another.",
            lambda effect, nodes: _excess(effect, nodes, lambda a, b: 0.0),
        ),
        Mistake(
            "one single effect subtracted",
            "Subtract the single effects of both nodes.",
            lambda effect, nodes: _excess(effect, nodes, max),
        ),
        Mistake(
            "the opposite sign",
            "Backups do more together than apart: joint effect minus the single effects.",
            lambda effect, nodes: -_excess(effect, nodes),
        ),
        Mistake(
            "a half-filled matrix",
            "The order of two nodes does not matter: fill both triangles.",
            lambda effect, nodes: _excess(effect, nodes).triu(),
        ),
    ),
)
