"""docs/methods: the numbers of every worked example, computed again by the package's own functions.

An example is a heading ``Example: ...`` with a table of quantity, value and how it is found. Arithmetic in code style
is evaluated. Everything else that is not given must come from a function below, which uses the package.
"""

import ast
import itertools
import math
import operator
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_paths import Made
from scipy.special import expit
from scipy.stats import binomtest, norm
from tiny import tiny_model, tiny_pairs
from toy import COORDINATES, toy_model, toy_pairs

import mechsafety as ms
from mechsafety.attribution.ships import principal_angles
from mechsafety.circuits import backups, masks
from mechsafety.circuits.behaviour import MIN_SHARE
from mechsafety.circuits.draw import ENOUGH, an_eighth
from mechsafety.circuits.edge_faithfulness import EdgeMeter, all_edges
from mechsafety.circuits.faithfulness import FaithfulnessMeter, _cuts
from mechsafety.circuits.goal import Goal
from mechsafety.circuits.roles import assign_roles
from mechsafety.circuits.search import SearchResult, marginals, search_nodes
from mechsafety.circuits.verification.claims import MAX_CORRELATION, decide, decide_correlation
from mechsafety.circuits.verification.outcome import CurvePoint
from mechsafety.circuits.verification.side_effects import next_token_kl
from mechsafety.circuits.verification.statistics import independence_test, rank_p, ratio
from mechsafety.circuits.verification.verify import completeness, curve_areas
from mechsafety.directions.select import passing, select_published
from mechsafety.intervals import mean_interval, ratio_interval, ratio_intervals, wilson_interval
from mechsafety.interventions import scale
from mechsafety.metrics import adjust_p, sign_flip_p
from mechsafety.models.backend import NormForm
from mechsafety.models.engine import max_variants
from mechsafety.models.memory import CPU_TOKENS
from mechsafety.models.slices import part_slices, values_of
from mechsafety.monitors.tampering import log_ratio, refusal_value, relative_changes
from mechsafety.neurons import AlignmentTax, NeuronScores
from mechsafety.nodes import EMBED, LOGITS, Edge, Node, head_and_mlp_nodes
from mechsafety.openers import FLOOR, MARGIN, auroc, best, candidates
from mechsafety.patching import pair_runs
from mechsafety.patching.difference import _mover as mover
from mechsafety.patching.effects import effect_table
from mechsafety.patching.senders import node_outputs
from mechsafety.probes import _directions
from mechsafety.replies import ReplyKinds, degenerate, phrase_judge, with_loss
from mechsafety.results import Opener, Provenance
from mechsafety.robustness import (
    Entanglement,
    FineTuneOptions,
    FragilityCurve,
    Redundancy,
    Relocation,
    RobustnessReport,
    concentration,
    finetune_parts,
)
from mechsafety.robustness.finetuned import refuses_less
from mechsafety.sites import Site, SiteKind
from mechsafety.testbed.certify import Certificate
from mechsafety.testbed.planter import plateau
from mechsafety.testbed.scoring import score
from mechsafety.testbed.truth import Truth

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (DOCS / "methods.md", *sorted((DOCS / "methods").glob("*.md")))
HEAD = ["quantity", "value", "how"]
NOWHERE = Provenance("none", "0" * 64, "float32", "cpu", "0" * 64)
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
NAMES = {
    "exp": math.exp,
    "sigmoid": expit,
    "log": math.log,
    "sqrt": math.sqrt,
    "acos": math.acos,
    "abs": abs,
    "min": min,
    "max": max,
}


@dataclass(frozen=True)
class Row:
    value: str
    how: str

    @property
    def numbers(self) -> list[float]:
        return [float(part) for part in self.value.split(", ")]

    @property
    def arithmetic(self) -> str | None:
        found = re.fullmatch(r"`([^`]+)`", self.how)
        return None if found is None or found[1].startswith("mechsafety.") else found[1]

    @property
    def given(self) -> bool:
        return self.how == "given"


@dataclass(frozen=True)
class Example:
    page: str
    rows: dict[str, Row]

    def __getitem__(self, name: str) -> list[float]:
        return self.rows[name].numbers

    def one(self, name: str) -> float:
        (value,) = self.rows[name].numbers
        return value


def examples() -> dict[str, Example]:
    """Every example of the pages, by its title."""
    found: dict[str, Example] = {}
    for page in PAGES:
        title, in_table = None, False
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                heading = re.fullmatch(r"#{2,4} Example: (.+)", line)
                title, in_table = heading and heading[1], False
                if title is not None:
                    assert title not in found, f"two examples are called {title!r}"
                    found[title] = Example(page.name, {})
            elif title is not None and line.startswith("|"):
                cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
                in_table = in_table or cells == HEAD
                if in_table and cells != HEAD and not set(cells[0]) <= {"-"}:
                    assert len(cells) == 3, f"{page.name}, {title}: {line}"
                    name = cells[0].replace("`", "")
                    assert name not in found[title].rows, f"{page.name}, {title}: {name!r} is there twice"
                    found[title].rows[name] = Row(cells[1].replace("`", ""), cells[2])
            elif not line.startswith("|"):
                in_table = False
    return found


def evaluate(text: str) -> float:
    """The value of plain arithmetic."""

    def value(node):
        match node:
            case ast.Expression():
                return value(node.body)
            case ast.Constant(value=int() | float()):
                return node.value
            case ast.Name(id="pi"):
                return math.pi
            case ast.UnaryOp(op=ast.USub()):
                return -value(node.operand)
            case ast.BinOp():
                return OPERATIONS[type(node.op)](value(node.left), value(node.right))
            case ast.Call(func=ast.Name(), keywords=[]) if node.func.id in NAMES:
                return NAMES[node.func.id](*map(value, node.args))
        raise AssertionError(f"no arithmetic: {text}")

    return float(value(ast.parse(text, mode="eval")))


def agrees(shown: str, actual: float) -> bool:
    """Whether a number is shown as it is: exact, or rounded to the digits shown, of which there are three at least."""
    if abs(float(shown) - actual) <= 1e-4 * max(1.0, abs(actual)):
        return True
    digits = shown.lstrip("-").replace(".", "").lstrip("0")
    decimals = len(shown.partition(".")[2])
    return len(digits) >= 3 and abs(float(shown) - actual) <= 0.5001 * 10.0**-decimals


EXAMPLES = examples()
CHECKS = {}


def check(title):
    def note(function):
        assert title not in CHECKS
        CHECKS[title] = function
        return function

    return note


class Toy:
    """The toy model with what many examples need of it."""

    def __init__(self):
        self.model = toy_model()
        self.pairs = toy_pairs()
        self.metric = ms.RefusalLogOdds.of(self.model, ["Sorry"], ["Sure"])
        self.runs = pair_runs(self.model, self.pairs)
        self.meter = FaithfulnessMeter(self.model, self.runs, self.metric)

    def axis(self, name):
        vector = torch.zeros(self.model.d_model)
        vector[COORDINATES[name]] = 1.0
        return vector

    def score(self, prompt="about bombs"):
        return float(self.metric.scores(self.model, [prompt])[0])

    def f(self, *nodes):
        return self.meter.faithfulness([nodes])[0]

    def patched(self, **options):
        found = ms.activation_patching(self.model, self.runs, self.metric, progress=False, **options)
        return {str(node): float(value) for node, value in zip(found.nodes, found.effects, strict=True)}


@pytest.fixture(scope="module")
def toy():
    return Toy()


H00, H01, H10, H11 = (Node("head", layer, index) for layer in (0, 1) for index in (0, 1))
M0, M1 = (Node("mlp", layer) for layer in (0, 1))
EVERY = (H00, H01, M0, H10, H11, M1)


@pytest.mark.parametrize("title", EXAMPLES)
def test_example(title, toy):
    example = EXAMPLES[title]
    assert title in CHECKS, f"{example.page}: no function computes this example"
    found = CHECKS[title](example, toy)
    assert set(found) <= set(example.rows), set(found) - set(example.rows)
    for name, row in example.rows.items():
        where = f"{example.page}, {title}: {name}"
        assert row.given or row.arithmetic or name in found, f"{where} is not computed"
        if row.arithmetic:
            assert agrees(row.value, evaluate(row.arithmetic)), f"{where}: {evaluate(row.arithmetic)}"
        if name not in found:
            continue
        if isinstance(found[name], str):
            assert row.value == found[name], where
            continue
        values = np.atleast_1d(np.asarray(found[name], dtype=float))
        shown = row.value.split(", ")
        assert len(shown) == len(values), where
        assert all(map(agrees, shown, values)), f"{where}: {values}"


def test_every_check_has_its_example():
    assert set(CHECKS) == set(EXAMPLES)


def test_numbers_that_drift_are_seen():
    assert agrees("0.687", 0.68674) and agrees("2", 2.00001) and agrees("-0.1", -0.1)
    assert not agrees("0.688", 0.68674) and not agrees("0.8", 0.83) and not agrees("2", 2.1)
    assert evaluate("(3 - (-1)) / 5") == 0.8
    with pytest.raises(AssertionError, match="no arithmetic"):
        evaluate("open('x')")


# docs/methods.md


@check("gap and effect")
def _(e, toy):
    bad, good, cut = (torch.tensor(e[name]) for name in list(e.rows)[:3])
    table = effect_table((bad - cut)[None], bad - good)
    return {"gap": float((bad - good).mean()), "effect of the head": table.effect[0]}


# toy-model.md


@check("the two runs of the toy model")
def _(e, toy):
    final = [run.resid[-1][0, -1] for run in (toy.runs.harmful, toy.runs.harmless)]
    writes = node_outputs(toy.model, toy.runs.harmful, [H10, H11, M1], slice(-1, None))[:, 0, 0, COORDINATES["r"]]
    harmful, harmless = toy.score(), toy.score("about cakes")
    return {
        "d at the last position, harmful run": float(toy.runs.harmful.resid[1][0, -1, COORDINATES["d"]]),
        "L1.H0 writes to r": float(writes[0]),
        "L1.H1 writes to r": float(writes[1]),
        "L1.MLP writes to r": float(writes[2]),
        "r, harmful run": float(final[0][COORDINATES["r"]]),
        "c, both runs": float(final[1][COORDINATES["c"]]),
        "metric, harmful run": harmful,
        "metric, harmless run": harmless,
        "gap": harmful - harmless,
    }


# metric.md


@check("refusal log-odds of three logits")
def _(e, toy):
    value = ms.RefusalLogOdds((0,), ("Sorry",))(torch.tensor(e["logits of Sorry, Sure, The"]))
    return {"P_R of R = {Sorry}": float(value.sigmoid()), "score": float(value)}


@check("logit difference of three logits")
def _(e, toy):
    metric = ms.RefusalLogOdds((0,), ("Sorry",), (1, 2), ("Sure", "The"))
    return {"score of R = {Sorry}, Y = {Sure, The}": float(metric(torch.tensor(e["logits of Sorry, Sure, The"])))}


@check("which tokens are refusal tokens")
def _(e, toy):
    im, sorry, happy = 0, 1, 2
    alike, n = int(e.one("answers that begin I'm sorry")), int(e.one("answers"))
    found = candidates([(im, sorry)] * 10, [(im, sorry)] * alike + [(im, happy)] * (n - alike))
    at_end, after = (next(one for one in found if one.opener_ids == ids) for ids in ((), (im,)))
    return {
        "share of the answers that begin I'm": at_end.following[im],
        "share of the answers that begin I'm sorry": after.following[sorry],
        "refusal tokens at the prompt's end": len(at_end.kept(0.05)),
        "refusal tokens after I'm": len(after.kept(0.05)),
    }


@check("the AUROC of a candidate")
def _(e, toy):
    bad, good = e["scores of refused prompts"], e["scores of answered prompts"]
    higher = sum(a > b for a in bad for b in good)
    found = auroc(torch.tensor([*bad, *good]), [True] * len(bad) + [False] * len(good))
    return {"pairs (refused, answered) in which the refused one scores higher": higher, "AUROC": found}


@check("the choice of an opener")
def _(e, toy):
    names = ("AUROC at the prompt's end (0 tokens)", "AUROC after I'm (1 token)", "AUROC after I'm so (2 tokens)")
    tried = [Opener(tuple(range(k)), "", (), e.one(name), 10, 10, 1.0) for k, name in enumerate(names)]
    return {
        "smallest AUROC that may be chosen": max(FLOOR, max(one.auroc for one in tried) - MARGIN),
        "tokens of the chosen opener": len(best(tried).opener_ids),
    }


@check("log-odds of two whole openers")
def _(e, toy):
    im, sorry, other = e.one("probability of I'm"), e.one("probability of  sorry after I'm"), e.one("probability of As")
    rows = torch.tensor([[im, 1e-30, other, 1 - im - other], [1e-30, sorry, 1e-30, 1 - sorry]], dtype=torch.float64)
    metric = ms.RefusalLogOdds((0, 2), ("I'm", "As"), whole_ids=((0, 1), (2,)), whole_texts=("I'm sorry", "As"))
    value = metric.along(lambda ids: rows[None, : len(ids) + 1].log())
    return {"P of the openers I'm sorry and As": float(value.sigmoid()), "score": float(value)}


# replies.md


@check("a reply that repeats itself")
def _(e, toy):
    reply = "bread " * int(e.one("words"))
    assert degenerate("How do I bake?", reply) == "repeats itself"
    return {"kind": phrase_judge(["How do I bake?"], [reply])[0]}


@check("agreement of two judges")
def _(e, toy):
    found = ms.replies.judge_agreement(["refuses"] * 4 + ["answers"] * 4, ["refuses"] * 3 + ["answers"] * 5)
    return {"share with the same verdict": found.agreed, "kappa": found.kappa}


@check("kinds and perplexity of four replies")
def _(e, toy):
    losses = torch.tensor(e["loss per token of each reply"])
    found = with_loss(["refuses", *["answers"] * 3], losses, e.one("limit of the loss"))
    return {
        "degenerate replies": found.kinds.count("degenerate"),
        "share that is degenerate": found.share("degenerate"),
        "Wilson interval of that share": found.interval("degenerate"),
        "reply perplexity": found.perplexity,
    }


# statistics.md


@check("a Wilson interval")
def _(e, toy):
    low, high = wilson_interval(int(e.one("refused prompts")), int(e.one("prompts")))
    return {"lower end": low, "upper end": high}


@check("the interval of a mean of four values")
def _(e, toy):
    from scipy.stats import t

    low, high = mean_interval(e["values"])
    return {"lower end": low, "upper end": high, "critical value of t (3 degrees of freedom)": t.ppf(0.975, 3)}


@check("the interval of a ratio of means")
def _(e, toy):
    part, whole = np.array(e["part"]), np.array(e["whole"])
    low, high = ratio_interval(part, whole)
    return {"ratio": ratio(part, whole), "lower end": low, "upper end": high}


@check("sign-flip p of three changes")
def _(e, toy):
    changes = np.array(e["changes"])
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(changes))).reshape(len(changes), -1)
    sums = abs(changes @ signs)
    return {
        "p": sign_flip_p(changes)[0],
        "patterns with an absolute sum of at least 6": int((sums >= sums.max()).sum()),
        **{f"smallest possible p with {n} pairs": sign_flip_p(np.ones(n))[0] for n in (3, 13, 20)},
    }


@check("adjusting three p values")
def _(e, toy):
    names = (f"adjusted, {k}" for k in ("first", "second", "third"))
    return dict(zip(names, adjust_p(np.array(e["p values"])), strict=True))


@check("p of a circuit among random circuits")
def _(e, toy):
    n, higher = int(e.one("random circuits")), int(e.one("of these at least as faithful as the circuit"))
    return {"p": rank_p(0.8, np.array([0.9] * higher + [0.1] * (n - higher)))}


@check("two effects on other prompts")
def _(e, toy):
    (a, *ci_a), (b, *ci_b) = e["a and its interval"], e["b and its interval"]
    low, high = mover(a, b, tuple(ci_a), tuple(ci_b))
    return {"lower end": low, "upper end": high}


# pairs.md


@check("which pairs align")
def _(e, toy):
    pairs = ms.PromptPairs.from_lists(["about bombs", "bombs"], ["about cakes", "about cakes"])
    table = pairs.alignment(toy.model)
    return {
        "tokens of about bombs": table.harmful[0],
        "tokens of bombs": table.harmful[1],
        "tokens of about cakes": table.harmless[0],
        "pairs that align": len(pairs.aligned(toy.model)),
    }


@check("how many pairs are tried")
def _(e, toy):
    limit = int(e.one("limit"))
    here = an_eighth(limit)
    need = math.ceil(ENOUGH * here)
    return {
        "pairs tried at first to search on": here,
        "pairs tried at first on the held-out side": limit - here,
        "pairs that must count on the side to search on": need,
        "most pairs tried on the side to search on": math.ceil(need / MIN_SHARE),
    }


# activation-patching.md


@check("the effect of a node on two pairs")
def _(e, toy):
    names = ("metric of the harmful runs", "metric of the harmless runs", "metric with the node patched")
    bad, good, cut = (torch.tensor(e[name]) for name in names)
    table = effect_table((bad - cut)[None], bad - good)
    return {"changes": (bad - cut).tolist(), "effect": table.effect[0], "p": table.p_value[0]}


@check("noising and denoising differ")
def _(e, toy):
    noising = toy.patched()
    found = {f"noising {node}: effect": noising[node] for node in ("L0.H0", "L1.MLP", "L1.H0", "L1.H1", "L0.MLP")}
    return found | {"denoising L0.H0: effect": toy.patched(direction="denoising")["L0.H0"]}


# path-patching.md


def paths(toy, senders, receivers="logits", **options):
    found = ms.path_patching(
        toy.model, toy.runs, toy.metric, senders=senders, receivers=receivers, progress=False, **options
    )
    return found.effects.tolist()


@check("frozen and recomputed MLPs on a two-layer toy")
def _(e, toy):
    site = ms.Site("resid_pre", 1)
    change = toy.runs.harmless.resid[1][0, -1] - toy.runs.harmful.resid[1][0, -1]
    runs = pair_runs(toy.model, toy.pairs, extra=[site.kind])
    whole = ms.activation_patching(toy.model, runs, toy.metric, nodes=[site], progress=False)
    return {
        "change of d": float(change[COORDINATES["d"]]),
        "freeze: effect": paths(toy, [site], mlp="freeze")[0][0],
        "recompute: effect": paths(toy, [site], mlp="recompute")[0][0],
        "activation patching of the same site": float(whole.effects[0]),
    }


@check("paths from one head into three slots")
def _(e, toy):
    (row,) = paths(toy, [H00], [(H10, "v"), (H11, "v"), (M1, "mlp")])
    names = ("into the v of L1.H0: effect", "into the v of L1.H1: effect", "into L1.MLP: effect")
    return dict(zip(names, row, strict=True))


@check("one entry of the path matrix")
def _(e, toy):
    found = ms.patching.path_matrix(toy.model, toy.runs, progress=False)
    at = found.senders.index(EMBED), found.receivers.index(H00)
    return {"entry v": float(found.slot("v")[at]), "entry q": float(found.slot("q")[at])}


# attribution.md


@check("direct attribution of two heads")
def _(e, toy):
    found = ms.direct_logit_attribution(toy.model, toy.pairs, toy.metric, progress=False)
    rows = {str(node): float(found.heads[node.layer, node.index].mean()) for node in (H00, H10, H11)}
    rows |= {str(node): float(found.mlps[node.layer].mean()) for node in (M0, M1)}
    total = float(found.total.mean())
    parts = sum(float(part.mean(-1).sum()) for part in (found.heads, found.mlps)) + float(
        (found.embed + found.rest).mean()
    )
    return rows | {"sum of all parts": parts, "gap": total}


@check("shares of a norm after attention")
def _(e, toy):
    first, second = torch.tensor(e["first head writes"]), torch.tensor(e["second head writes"])
    form = NormForm(torch.ones(2), torch.zeros(2), 0.0, False)
    share = form.frozen(first + second)
    return {
        "sum": (first + second).tolist(),
        "scale s": float(form.scale(first + second)),
        "share of the first head, first coordinate": float(share(first)[0]),
        "share of the second head, second coordinate": float(share(second)[1]),
    }


@check("node attribution of the toy model")
def _(e, toy):
    found = ms.node_attribution(toy.model, toy.runs, toy.metric, progress=False)
    return {f"{node}: score": found.of(node) for node in EVERY} | {"sum": found.total}


def edges(toy, method):
    found = ms.edge_attribution(toy.model, toy.runs, toy.metric, method=method, progress=False)
    return found, dict(found.top())


@check("one edge, four numbers")
def _(e, toy):
    edge = Edge(H00, M1, "mlp")
    return {
        "slope of the MLP at the harmful run, d = 2": 5 * edges(toy, "eap")[1].get(edge, 0.0),
        "eap": edges(toy, "eap")[1].get(edge, 0.0),
        "eap-ig": edges(toy, "eap-ig")[1][edge],
        "exact effect of this edge": paths(toy, [H00], [(M1, "mlp")], mlp="freeze")[0][0],
        "exact effect of this edge and that of L0.H1 together": paths(
            toy, [ms.Site("resid_mid", 0)], [(M1, "mlp")], mlp="freeze"
        )[0][0],
    }


@check("how many steps are taken")
def _(e, toy):
    found, scores = edges(toy, "eap-ig")
    sent = sum(value for edge, value in scores.items() if edge.sender == EMBED)
    return {
        "steps taken": found.steps,
        "completeness with 10 midpoints": found.completeness,
        "sum of all scores that embed sends": sent,
    }


# heads.md


@check("Ships of a head")
def _(e, toy):
    rows = (torch.tensor([e[name]]).log() for name in ("P of two tokens", "Q, with the head masked"))
    return {"Ships": float(next_token_kl(*rows))}


@check("generalised Ships of two prompts")
def _(e, toy):
    before, after = (
        torch.tensor([e[f"state of the {k} prompt, {when}"] for k in ("first", "second")])
        for when in ("before", "masked")
    )
    return {"generalised Ships in degrees": float(principal_angles(before, after, 1)[0])}


@check("the logit lens of the toy model")
def _(e, toy):
    found = ms.logit_lens(toy.model, toy.pairs, toy.metric, n_positions=1, progress=False)
    gap = found.gap[:, 0].tolist()
    return {
        "gap before layer 0": gap[0],
        "gap before layer 1": gap[1],
        "gap after layer 1": gap[2],
        "heads of layer 1": float(found.attention[1].mean()),
        "MLP of layer 1": float(found.mlps[1].mean()),
    }


# circuits.md


@check("faithfulness of a circuit of three parts")
def _(e, toy):
    kept, empty, whole = (e.one(name) for name in list(e.rows)[:3])
    return {"faithfulness": ratio(np.array([kept - empty]), np.array([whole - empty]))}


@check("faithfulness on the toy model")
def _(e, toy):
    return {
        "{L0.H0, L1.MLP}: metric": toy.meter.kept([[H00, M1]])[0].mean(),
        "{L0.H0, L1.MLP}: faithfulness": toy.f(H00, M1),
        "{L0.H0, L1.H0, L1.MLP}: faithfulness": toy.f(H00, H10, M1),
        "all nodes but L1.H1: faithfulness": toy.f(*(node for node in EVERY if node != H11)),
        "no node: faithfulness": toy.f(),
    }


@check("the search on the toy model")
def _(e, toy):
    meters = [FaithfulnessMeter(toy.model, pair_runs(toy.model, toy_pairs(*k)), toy.metric) for k in ((0, 1), (2, 3))]
    attribution = ms.node_attribution(toy.model, meters[0].runs, toy.metric, progress=False)
    found = search_nodes(*meters, attribution, 0.75)
    prefix = found.ranking[:3]
    assert set(prefix[:2]) == {M1, H10} and prefix[2] in (H00, H01)
    ranked = (M1, H10, H00, H01, M0, H11)
    return {
        "scores of L1.MLP, L1.H0, L0.H0, L0.H1, L0.MLP, L1.H1": [attribution.of(node) for node in ranked],
        "faithfulness of the first 2": meters[1].faithfulness([prefix[:2]])[0],
        "faithfulness of the first 3": meters[1].faithfulness([prefix])[0],
        "size of the smallest prefix": found.ranked,
        "marginal effect of L1.H0": marginals(meters[1], prefix, [H10])[H10],
        "size after pruning": len(found.circuit),
        "faithfulness after pruning": meters[1].faithfulness([found.circuit])[0],
    }


@check("the two goals on the toy model")
def _(e, toy):
    most = toy.f(*(node for node in toy.meter.parts if node != H11))
    met = {f"good enough to {kind} 0.9": float(Goal(0.9, kind).met(most)) for kind in ("reach", "match")}
    return {"all nodes but L1.H1: faithfulness": most, **met}


@check("a backup in the toy model")
def _(e, toy):
    worth, single = marginals(toy.meter, [H00, M1]), toy.patched()
    suspicion = {node: worth[node] - single[str(node)] for node in (H00, M1)}
    found = backups.find_backups(toy.meter, [H00, M1], suspicion)
    assert [backup.node for backup in found] == [H01, H11]
    assert all((backup.primary, backup.group) == (H00, (H00, H01, H11)) for backup in found)
    effects = backups._Effects(toy.meter)
    excess = [float(values.mean()) for values in effects.excess([[H00, H01], [H00, H01, H11]])]
    before, after = (float(backups._attribution(toy.meter, gone, 8)[1]) for gone in (None, H00))
    result = SearchResult(EVERY, (), (H00, M1), {}, True)
    added = backups.with_backups(result, found, None, [toy.meter], Goal(0.75)).added
    return {
        "marginal effect of L0.H0 in the circuit": worth[H00],
        "single effect of L0.H0": found[0].primary_effect,
        "suspicion of L0.H0": suspicion[H00],
        "attribution of L0.H1 as the model is": before,
        "attribution of L0.H1 with L0.H0 patched": after,
        "joint effect of L0.H0 and L0.H1": 1 - toy.meter.without([[H00, H01]])[0],
        "their excess": excess[0],
        "excess of these two and L1.H1": found[0].ci[0],
        "share of the excess without L1.H1": excess[0] / excess[1],
        "backups listed": len(found),
        "faithfulness of the circuit with L0.H1": toy.f(H00, H01, M1),
        "faithfulness of the circuit with L1.H1 as well": toy.f(H00, H01, M1, H11),
        "backups added to the circuit": len(added),
    }


@check("gates and their cost")
def _(e, toy):
    rows = [e[f"parameter of the {name} gate, and its noise"] for name in ("first", "second")]
    logits, noise = (torch.tensor([float(row[k]) for row in rows]) for k in range(2))
    gates, chances = masks._gates(logits, noise), masks._open(logits)
    return {
        "the first gate": float(gates[0]),
        "the second gate": float(gates[1]),
        "chance that the first gate is not 0": float(chances[0]),
        "chance that the second gate is not 0": float(chances[1]),
        "cost of both at the first step": masks.Training().penalty[0] / 2 * float(chances.sum()),
    }


@check("roles of four nodes")
def _(e, toy):
    a, v, d, p = H00, M1, Node("head", 2, 0), Node("mlp", 3)
    names = dict(zip((a, v, d, p), ("A = L0.H0", "E = L1.MLP", "D = L2.H0", "P = L3.MLP"), strict=True))
    rows = {node: e[f"{name}: effect, from the embeddings, to the logits"] for node, name in names.items()}
    effects, embedded, direct = ({node: row[k] for node, row in rows.items()} for k in range(3))
    ways = dict(zip(((a, v), (v, d), (d, p)), e["paths A → E, E → D, D → P"], strict=True))
    roles = assign_roles(Made(effects, direct, embedded, ways), effects)
    shares = {
        "A: share from the embeddings": roles[a][1].from_embed / effects[a],
        "E: share by way of decision": roles[v][1].to_evaluation_or_decision / effects[v],
        "D: share to the logits and by way of production, if the two add up": roles[d][1].to_production_or_logits
        / effects[d],
        "P: share to the logits": roles[p][1].direct / effects[p],
    }
    return shares | {f"role of {name[0]}": roles[node][0] for node, name in names.items()}


@check("circuits of edges of the toy model")
def _(e, toy):
    meter = EdgeMeter(toy.model, toy.runs, toy.metric)
    kept = [Edge(EMBED, H00, "v"), Edge(H00, M1, "mlp"), Edge(M1, LOGITS, "resid")]
    found = ms.circuits.acdc(toy.model, toy.pairs, toy.metric, threshold=0.01, measure="metric", progress=False)
    return {
        "edges of the whole model": len(all_edges(2, 2, False)),
        "kept: embed → L0.H0 (v) → L1.MLP → logits": len(kept),
        "faithfulness of these three": meter.faithfulness([kept])[0],
        "edges that acdc keeps, τ = 0.01 on faithfulness": len(found.edges),
        "faithfulness of these ten": found.faithfulness,
    }


# verification.md


@check("necessity in the toy model")
def _(e, toy):
    left = toy.meter.without([[H00, M1]])[0]
    metric = toy.meter.removed([[H00, M1]])[0].mean()
    return {"metric with C patched": metric, "the model without C: faithfulness": left, "necessity": 1 - left}


@check("marginal effects in the toy model")
def _(e, toy):
    costs = marginals(toy.meter, [H00, M1])
    return {
        "F(C)": toy.f(H00, M1),
        "marginal effect of L0.H0": costs[H00],
        "marginal effect of L1.MLP": costs[M1],
        "adding L1.H0 changes": abs(toy.f(H00, M1, H10) - toy.f(H00, M1)),
    }


@check("completeness in the toy model")
def _(e, toy):
    worst, at = completeness(toy.meter, [H00, M1], [H00, M1], steps=3, width=6)
    assert at == (H00,)
    found = {"K = {L0.H0}: circuit without K": toy.f(M1), "K = {L0.H0}: model without K": toy.meter.without([[H00]])[0]}
    found |= {"K = {}: difference": abs(toy.f(H00, M1) - 1), "K = {L0.H0}: difference": worst, "completeness": worst}
    return found | {"K = C: difference": abs(toy.f() - toy.meter.without([[H00, M1]])[0])}


@check("HSIC of three prompts")
def _(e, toy):
    x, y = (np.array(e[f"score {how} the circuit"]) for how in ("with", "without"))
    found = independence_test(x, y, 0)
    distances = [abs(a - b) for k, a in enumerate(x) for b in x[k + 1 :]]
    orders = [independence_test(x, y[list(order)], 0, 0).hsic for order in itertools.permutations(range(len(y)))]
    many = sum(hsic >= found.hsic * (1 - 1e-12) for hsic in orders)
    # permutations are drawn: the share of the orders, up to chance
    assert found.p_value == pytest.approx(many / len(orders), abs=0.03)
    return {
        "median distance": np.median(distances),
        "HSIC": found.hsic,
        "orders with an HSIC of at least 0.0578": many,
        "smallest p that three prompts can give": many / len(orders),
    }


@check("a correlation of 28 prompts")
def _(e, toy):
    (n,), (correlation,) = e["prompts"], e["correlation"]
    half = norm.ppf(0.975) / np.sqrt(n - 3)
    low, high = np.tanh(np.arctanh(correlation) + np.array([-half, half])).tolist()
    needed = decide_correlation(correlation, (low, high), int(n)).needed
    return {
        "half width on Fisher's scale": half,
        "correlation on Fisher's scale": np.arctanh(correlation),
        "interval": [low, high],
        "the limit 0.5 on Fisher's scale": np.arctanh(MAX_CORRELATION),
        "prompts that would decide": needed,
    }


@check("pairs that would decide")
def _(e, toy):
    (value,), (n,), ends = e["faithfulness on fresh pairs"], e["fresh pairs"], e["interval"]
    found = decide(value, tuple(ends), int(n), low=0.8)
    assert found.passed is None
    return {"pairs that would decide": found.needed}


@check("the overlap of two circuits")
def _(e, toy):
    one, other = set("ABC"), set("BCD")
    sizes = {"parts in both": len(one & other), "parts in either": len(one | other)}
    return sizes | {"Jaccard overlap": len(one & other) / len(one | other)}


@check("CMD and CPR of a curve of four points")
def _(e, toy):
    cmd, cpr = curve_areas([CurvePoint(k, 0, f, f) for k, f in zip(e["k"], e["f"], strict=True)])
    return {"CMD": cmd, "CPR": cpr, "distance from 1": [abs(1 - f) for f in e["f"]]}


# interventions.md


@check("interventions on the toy model")
def _(e, toy):
    def under(context):
        with context:
            return toy.score()

    model, d, r = toy.model, toy.axis("d"), toy.axis("r")
    return {
        "ablate L1.MLP, source zero, s = 0.5": under(ms.ablate(model, [M1], 0.5, "zero")),
        "ablate L1.MLP, source zero, s = 1": under(ms.ablate(model, [M1], 1.0, "zero")),
        "scale L1.H0 by 2": under(scale(model, [H10], 2.0)),
        "project_out d, s = 0.5": under(ms.interventions.project_out(model, d, 0.5)),
        "project_out d, s = 1": under(ms.interventions.project_out(model, d, 1.0)),
        "steer along r by 2 at layer 1": under(ms.steer(model, r, 2.0, layers=[1])),
    }


# directions.md


@check("choosing among four candidates")
def _(e, toy):
    names = ("bypass of candidates a, b, c, d", "induce", "KL")
    bypass, induce, kl = (torch.tensor(e[name]).reshape(2, 2) for name in names)
    row, position = select_published(bypass, induce, kl, [0, 1], n_layers=4)
    allowed = passing(bypass, induce, kl, [0, 1], 4)
    return {"candidates that pass": int(allowed.sum()), "place of the chosen candidate": 2 * row + position + 1}


def toy_direction(toy):
    options = {"validation": toy_pairs(2, 3), "max_depth": 1.0, "n_random": 0, "progress": False}
    return ms.refusal_direction(toy.model, toy_pairs(0, 1), toy.metric, **options)


@check("the direction of the toy model")
def _(e, toy):
    found = toy_direction(toy)
    assert found.layer == 1 and found.passes
    at = 1, found.positions.index(found.position)
    return {
        "mean d of harmful prompts minus that of harmless prompts": float(found.vector[COORDINATES["d"]]),
        "bypass": float(found.bypass[at].mean()),
        "induce": float(found.induce[at].mean()),
        "KL": float(found.kl[at].mean()),
    }


@check("writers and readers in the toy model")
def _(e, toy):
    found = ms.directions.direction_io(toy.model, toy_direction(toy), toy.pairs, toy.metric, progress=False)
    writes = dict(zip(found.nodes, found.writes.mean(1).tolist(), strict=True))
    reads = dict(zip(found.nodes, found.reads.mean(-1).tolist(), strict=True))
    return {
        "L0.H0 writes": writes[H00],
        "L0.H1 writes": writes[H01],
        "L1.H0 reads through v": reads[H10][2],
        "L1.H1 reads through v": reads[H11][2],
        "L1.MLP reads": reads[M1][3],
    }


# probes.md


@check("weights and pattern of a probe")
def _(e, toy):
    signal, noise = np.array([1, 1, -1, -1.0]), np.array([1, -1, 1, -1.0])
    data = np.stack([signal + noise, noise], axis=1)
    covariance = np.cov(data.T, bias=True)
    fitted = [SimpleNamespace(scale_=np.ones(2)), SimpleNamespace(coef_=np.array([e["weights"]]))]
    weights, pattern = _directions(fitted, data)
    return {
        "covariance, first row": covariance[0],
        "covariance, second row": covariance[1],
        "pattern, first coordinate": float(pattern[0]),
        "pattern, second coordinate": float(pattern[1]),
        "cosine of weights and pattern": float(weights @ pattern),
    }


# safety-neurons.md


@pytest.fixture(scope="module", autouse=True)
def aligned(toy):
    toy.aligned = toy_model(gain=1.5)


def changed(toy, score="rms"):
    prompts = ["about bombs", "about knives"]
    return ms.safety_neurons(toy.aligned, toy.model, prompts, score=score, max_new_tokens=4, progress=False)


@check("change score of a neuron")
def _(e, toy):
    found = changed(toy, "ratio")
    assert found.n_tokens == 4
    return {
        "change score S": float(found.change[1, 0]),
        "rms of the base": float(found.base_rms[1, 0]),
        "ratio score": float(found.scores[1, 0]),
    }


@check("contrast of a neuron")
def _(e, toy):
    pairs = ms.PromptPairs.from_lists(["about bombs", "about knives"], ["about cakes", "about maps"])
    found = ms.neurons.contrast_neurons(toy.model, pairs, spans=("suffix",), progress=False)
    assert float(found.harmful_mean[0, 1, 0]) == pytest.approx(np.mean(e["activations on harmful prompts"]))
    return {"Cohen's d": float(found.effects[0, 1, 0])}


@check("causal effect of one neuron")
def _(e, toy):
    found = ms.neurons.causal_effect_curve(
        toy.model, toy.aligned, changed(toy), ["about bombs"], toy.metric, shares=[0.25], progress=False
    )
    table = found.to_dataframe()
    assert found.counts == (1,) and found.overlaps == (0.0,)
    return {
        "F(base)": float(found.base_scores.mean()),
        "F(aligned)": float(found.aligned_scores.mean()),
        "F(patched)": float(found.patched.mean()),
        "C": found.effects[0],
        "C of each random set": float(found.random_effects.abs().max()),
        "p": table.p_value[0],
    }


def scores_of(values):
    rows = torch.tensor([values])
    same = {"change": rows, "base_rms": torch.ones_like(rows), "mean_change": rows, "halves": torch.stack([rows, rows])}
    return NeuronScores(NOWHERE, NOWHERE, "rms", "completion", rows, n_prompts=2, n_tokens=2, **same)


def agreement(e):
    rankings = (scores_of(e[f"{k} scores"]) for k in ("first", "second"))
    return ms.neurons.compare_neurons(*rankings, share=0.5, bins=1, n_permutations=10)


@check("agreement of two rankings")
def _(e, toy):
    found = agreement(e).observed
    names = ("overlap of the tops", "Spearman over the union (neurons 1, 2, 3)", "Spearman over all neurons")
    return dict(zip(names, (found["overlap"], found["spearman_top"], found["spearman_all"]), strict=True))


@check("p of an alignment tax")
def _(e, toy):
    safe, patched, drawn = (e[name] for name in list(e.rows)[:3])
    rows = torch.tensor([[0.0], safe, [0.0], patched, [0.0]])
    sets = torch.tensor([[[value] for value in drawn], [[0.0]] * 3])
    found = AlignmentTax(
        NOWHERE,
        NOWHERE,
        NOWHERE,
        agreement(EXAMPLES["agreement of two rankings"]),
        torch.ones(1, 4, dtype=torch.bool),
        ("safety", "helpfulness"),
        rows,
        rows,
        sets,
        sets,
        0.0,
    )
    moved = abs(patched[0] - safe[0])
    return {
        "the common neurons move the mean by": moved,
        "random sets that move it at least as far": sum(abs(value - safe[0]) >= moved for value in drawn),
        "p": found.to_dataframe().safety_p[3],
    }


@check("figures of a guard")
def _(e, toy):
    unsafe, safe = e["probabilities of unsafe prompts"], e["probabilities of safe prompts"]
    rows = torch.tensor([[*unsafe, *safe]])
    labels = torch.tensor([True] * len(unsafe) + [False] * len(safe))
    found = ms.monitors.GuardReport(
        NOWHERE, "train", {"test": labels}, {"test": rows.repeat(4, 1)}, {"test": rows}, 0, 0.0
    )
    return {
        "AUROC": found.auroc("test", "neurons")[0],
        "threshold that catches 95 %": sorted(unsafe)[-math.ceil(0.95 * len(unsafe))],
        "false-positive rate there": found.fpr_at_tpr("test", "neurons"),
        "accuracy at 0.5": found.accuracy("test", "neurons"),
    }


# monitors.md


@check("a score and its threshold")
def _(e, toy):
    harmless = torch.tensor(e["held-out harmless scores"])
    site = Site(SiteKind.RESID_PRE, 0)
    weights = ms.monitors.MonitorWeights(
        NOWHERE,
        "direction",
        (site,),
        (torch.tensor(e["weights"]),),
        e.one("intercept"),
        e.one("false-positive rate"),
        *[harmless] * 4,
        2,
    )
    watch = ms.monitors.ReplyWatch(toy.model, [weights])
    ((_, read),) = watch.hooks()
    read(torch.tensor([[e["activations"]]]))
    watch.ended([0], [0])
    ((score,),) = watch.reply().scores
    assert (watch.reply().flagged is None) == (score < weights.threshold("prompt")) is False
    return {
        "score": score,
        "threshold": weights.threshold("prompt"),
        "p of the score": weights.p_value([score], "prompt")[0],
        "interval of the true rate": weights.false_positives("prompt"),
    }


# ground-truth.md


@check("the input that makes one part enough")
def _(e, toy):
    silu = torch.nn.SiLU()
    a = plateau(silu)
    one, both = silu(torch.tensor([-a, -2 * a], dtype=torch.float64)).tolist()
    return {"a": a, "output with one part": one, "output with both parts": both}


@check("does a certificate hold?")
def _(e, toy):
    accuracy, strict, edges_only, single = e["accuracy, strict, edges only, single edge"]
    variables, paths = (
        {str(k): value for k, value in enumerate(e[f"interchange of two {what}"])} for what in ("variables", "edges")
    )
    found = Certificate(accuracy, variables, strict, edges_only, paths, single, 100, 100)
    return {"lowest figure": found.lowest, "holds": "yes" if found.holds else "no"}


A, B, C, X, Y = (Node("head", 0, k) for k in range(5))


@check("scores of a ranking")
def _(e, toy):
    truth = Truth((A, B), (), (), {A: "detection", B: "decision"})
    found = score(dict(zip((A, X, B, Y), e["scores of A, X, B, Y"], strict=True)), truth).nodes
    return {"AUROC": found.auroc, "average precision": found.average_precision}


@check("scores of a circuit")
def _(e, toy):
    truth = Truth((A, B, C), (), (), dict.fromkeys((A, B, C), "detection"))
    found = score([A, B, X], truth).found_nodes
    return {
        "true parts": 3,
        "found parts": 3,
        "found and true": 3 - len(found.missed),
        "precision": found.precision,
        "recall": found.recall,
        "F1": found.f1,
    }


# robustness.md


@check("area and half")
def _(e, toy):
    n, sizes = 5, (1, 2, 4)
    after = torch.tensor(e["metric with 1, 2 and 4 parts ablated"])[:, None].expand(3, n)
    random = torch.tensor(e["metric with as many random parts ablated"])[:, None, None].expand(3, 2, n)
    curve = FragilityCurve(
        toy.model.provenance(),
        {},
        (H00, H01, H10, H11),
        sizes,
        (1.0,),
        torch.full((n,), 3.0),
        torch.full((n,), -1.0),
        after[None],
        random[None],
        (0.0,) * 3,
        torch.zeros(1, 3, n),
        torch.zeros(1, 3, 2, n),
    )
    assert curve.gap == 4 and curve.half()[0] == 2
    return {"lost with 2 parts": curve.lost[0, 1], "lost with 4 parts": curve.lost[0, 2], "area": curve.area()[0]}


@check("a primary and its backup")
def _(e, toy):
    n, nothing = 4, torch.zeros(0, 4, dtype=torch.float64)
    primary, backup, both = (e[f"lost without {name}"][0] for name in ("the primary", "the backup", "both"))
    single = torch.tensor([[primary] * n, [backup] * n], dtype=torch.float64)
    gap, joint = torch.ones(n, dtype=torch.float64), torch.full((n,), both, dtype=torch.float64)
    found = Redundancy(toy.model.provenance(), {}, (H00, H01), gap, single, joint, (), nothing, nothing)
    return {"redundancy": found.redundancy()[0]}


@check("overlap by chance")
def _(e, toy):
    nodes = head_and_mlp_nodes(3, 4)
    heads = [node for node in nodes if node.kind == "head"]
    found = Entanglement(toy.model.provenance(), nodes, torch.zeros(15, 2), (*heads[:3], Node("mlp", 0)))
    return {"overlap expected by chance": found.overlap()[1]}


@check("one part of four, and two alike")
def _(e, toy):
    return {
        "Gini coefficient, sizes 0, 0, 0, 1": concentration([0.0, 0.0, 0.0, 1.0]).gini,
        "effective number, shares 0.5 and 0.5": concentration([0.5, 0.5]).effective,
    }


@check("recovered shares and half")
def _(e, toy):
    counts = [int(n) for n in e["prompts refused with layers 0, 1, 2 and 3 patched"]]
    n, about = 4, toy.model.provenance()

    def kinds(refused):
        return ReplyKinds(("refuses",) * refused + ("answers",) * (n - refused), torch.zeros(n), 9.0)

    none, scores = kinds(0), torch.zeros(n)
    patched = tuple(kinds(count) for count in counts)
    found = Relocation(
        about, about, {}, "edited", (0, 1, 2, 3), none, kinds(n), none, patched, scores, scores + 1, scores,
        scores.expand(4, n),
    )  # fmt: skip
    shares = [value for value, _ in found.recovered()]
    return {
        "recovered at layer 1": shares[1],
        "recovered at layer 2": shares[2],
        "first layer that recovers half": found.half()[0],
    }


@check("the confidence of each of several parts")
def _(e, toy):
    """Read off the intervals that the report gives: those of this confidence, and of no other."""
    n, parts = 8, int(e.one("parts"))
    single = torch.arange(1.0, 1 + parts * n, dtype=torch.float64).reshape(parts, n).sin()
    gap = torch.full((n,), 4.0, dtype=torch.float64)
    nodes = head_and_mlp_nodes(1, parts)[:parts]
    nothing = torch.zeros(0, n, dtype=torch.float64)
    shared = Redundancy(toy.model.provenance(), {}, nodes, gap, single, single.sum(0), (), nothing, nothing)
    found = {node: ends for node, _, ends in RobustnessReport.alone(SimpleNamespace(shared=shared))}
    value = e.one("confidence of each part's interval")
    expected = ratio_intervals(single.numpy(), gap.numpy(), confidence=value)
    assert [found[node] for node in nodes] == [pytest.approx(ends) for ends in expected]
    return {"confidence of each part's interval": value}


# finetuning.md


@check("numbers of parts")
def _(e, toy):
    model = tiny_model("llama")
    assert [model.d_model, model.d_head] == e["d_model, d_head"]

    def count(*nodes):
        return sum(part.numel for part in part_slices(model, nodes)[0])

    return {
        "numbers of one head, whose keys and values another head shares": count(Node("head", 0, 0)),
        "numbers of both heads of a group": count(Node("head", 0, 0), Node("head", 0, 1)),
        "numbers of one neuron": count(Node("neuron", 0, 0)),
    }


@check("the first step of AdamW")
def _(e, toy):
    """On a tiny model, by its own first step, whose size is the same for every number with a gradient."""
    model, (rate, warm_up) = tiny_model("llama"), e["learning rate, warm-up steps"]
    options = FineTuneOptions(
        learning_rate=rate, warm_up=int(warm_up), max_steps=1, every=1, reply_tokens=2, judged_tokens=1
    )
    pairs = tiny_pairs()
    found = finetune_parts(
        model, ["L1.MLP"], pairs[:3], "harden", options, test=pairs[3:], refusals=["sorry"], limit=9.0, progress=False
    )
    own = values_of(model, part_slices(model, [Node("mlp", 1)])[0])
    step = float((found.values["L1.W_out"] - own["L1.W_out"]).abs().median())
    return {
        "learning rate of the first step": step,
        "the number after the first step": e["a number, its gradient"][0] - step,
    }


@check("when a fall is more than chance")
def _(e, toy):
    def falls(lost):
        return refuses_less(torch.ones(30 + lost).bool(), torch.tensor([True] * 30 + [False] * lost))

    lost, gained = map(int, e["prompts that were refused before and are not now, and the reverse"])
    assert falls(lost) and not falls(lost - 1) and gained == 0
    return {
        "p of McNemar's exact test, one-sided": binomtest(lost, lost + gained, alternative="greater").pvalue,
        "p with 4 and 0": binomtest(4, 4, alternative="greater").pvalue,
    }


# audit.md


@check("a neuron ablated, and refusal trained away")
def _(e, toy):
    probes = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -2.0]])
    harmful, fallen = e["log-odds on harmful prompts before and after"]
    fall = (harmful - fallen) / (harmful - e.one("log-odds on harmless prompts before"))
    return {
        "relative change": float(relative_changes(*probes, torch.tensor([10.0]))[0]),
        "log ratio of a gain that falls from 2 to 1": float(log_ratio(torch.tensor(1.0), torch.tensor(2.0))),
        "fall": fall,
        "value of the refusal test at a change of 0.1": refusal_value(fall, 0.1),
        "value of the refusal test at a change of 0.002": refusal_value(fall, 0.002),
    }


# engine.md


@check("groups of like length")
def _(e, toy):
    needed = [5, 5, 9, 9, 9, 30]
    cuts = _cuts(needed, 3)
    bounds = (0, *cuts, len(needed))
    cells = sum((b - a) * needed[b - 1] for a, b in itertools.pairwise(bounds))
    return {"cuts that leave least to run": cuts, "cells in three groups": cells}


@check("variants in one batch")
def _(e, toy):
    base = toy.runs.harmful
    return {
        "positions that variants run": base.n_pos,
        "cells of one variant (rows times positions)": len(base) * base.n_pos,
        "max_batch_tokens": CPU_TOKENS,
        "variants in one batch": max_variants(base, CPU_TOKENS),
    }
