"""The high-level causal model of the certified network."""

import itertools

import pytest
import torch

import mechsafety as ms
from mechsafety.nodes import Node
from mechsafety.testbed.causal import refusal_model

CASES = list(itertools.product(range(3), range(2), range(2)))


def inputs(cases=CASES):
    return {
        name: torch.tensor([case[k] for case in cases]) for k, name in enumerate(("severity", "professional", "strict"))
    }


def test_output_by_plain_words():
    out = refusal_model().run(inputs())["produce"].tolist()
    for (severity, professional, strict), refused in zip(CASES, out, strict=True):
        assert refused == (severity == 2 or (severity == 1 and (strict == 1 or professional == 0)))


@pytest.mark.parametrize("name", ["detect", "context", "policy", "evaluate", "decide", "produce"])
def test_every_variable_can_change_the_output(name):
    model, given = refusal_model(), inputs()
    outs = [model.run(given, {name: torch.full((12,), value)})["produce"] for value in range(2)]
    assert not torch.equal(*outs)


def test_interventions_cut_what_is_above():
    model, ones = refusal_model(), torch.ones(12, dtype=torch.long)
    run = model.run(inputs(), {"evaluate": ones})
    assert torch.equal(run["produce"], ones)
    assert torch.equal(run["detect"], inputs()["severity"])


def test_truth_follows_from_the_variables():
    truth = refusal_model().truth()
    assert [str(node) for node in truth.nodes] == ["L0.H1", "L0.H2", "L1.H0", "L1.MLP", "L2.H3", "L3.MLP"]
    assert sorted(map(str, truth.edges)) == [
        "L0.H1 -> L1.MLP (mlp)",
        "L0.H2 -> L1.MLP (mlp)",
        "L1.H0 -> L1.MLP (mlp)",
        "L1.MLP -> L2.H3 (v)",
        "L2.H3 -> L3.MLP (mlp)",
        "L3.MLP -> logits (resid)",
        "embed -> L0.H1 (v)",
        "embed -> L0.H2 (v)",
        "embed -> L1.H0 (v)",
    ]
    assert truth.roles[Node("mlp", 1)] == "evaluation"


def test_errors():
    model = refusal_model()
    with pytest.raises(ms.MechsafetyError, match=r"^no variable is called 'think'; expected one of \['detect'"):
        model.run(inputs(), {"think": torch.ones(12, dtype=torch.long)})
    with pytest.raises(ms.MechsafetyError, match=r"^no values of the inputs \['strict'\]"):
        model.run({name: value for name, value in inputs().items() if name != "strict"})
