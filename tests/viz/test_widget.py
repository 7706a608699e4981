"""The widget's Python side; tests/browser has the other."""

import sys

import pytest

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.viz import Ablation, circuit_widget


def test_boxes_rerun_the_model_and_errors_become_a_message(small: RefusalCircuit) -> None:
    pytest.importorskip("anywidget")
    one, two = (member.node for member in small.nodes[:2])
    asked = []

    def on_ablate(nodes):
        asked.append(nodes)
        if len(nodes) > 1:
            raise MechsafetyError("too many parts", expected="one")
        return Ablation("without", nodes, (3.0, 1.0), {two: 0.1})

    widget = small.widget(on_ablate=on_ablate)
    assert '"ablate":true' in widget.page and widget.selected == ""
    widget.ablated = [str(one), "no such node"]
    assert asked == [(one,)]
    assert widget.ablation["nodes"] == [str(one)] and widget.ablation["effects"] == {str(two): 0.1}
    widget.ablated = [str(one), str(two)]
    assert widget.message == "too many parts; expected one"
    widget.ablated = []
    assert widget.message == "" and widget.ablation["nodes"] == [] and len(asked) == 2


def test_without_a_function_there_are_no_boxes(small: RefusalCircuit) -> None:
    pytest.importorskip("anywidget")
    assert '"ablate":false' in circuit_widget(small).page


def test_the_missing_extra_is_named(small: RefusalCircuit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(MechsafetyError, match=r'without the package anywidget; pip install "mechsafety\[widget\]"'):
        circuit_widget(small)
