"""The interactive circuit as a notebook widget: the selection reaches Python, the ablated nodes reach a function."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mechsafety.circuits.circuit import Ablation, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node
from mechsafety.viz.cards import ablations_on
from mechsafety.viz.html import circuit_html, template
from mechsafety.viz.style import Style

if TYPE_CHECKING:
    import anywidget

OnAblate = Callable[[tuple[Node, ...]], Ablation]
HEIGHT = 700


def circuit_widget(
    circuit: RefusalCircuit, *, on_ablate: OnAblate | None = None, style: Style | None = None, **options: Any
) -> "anywidget.AnyWidget":
    """A widget for JupyterLab, VS Code and marimo; needs the extra ``widget``.

    The attribute ``selected`` is the name of the clicked node (empty for none). The attribute ``ablated`` is the list
    of the nodes whose box is ticked, by name. Both can be observed. When boxes change, ``on_ablate`` gets the nodes and
    returns its measurement. The picture then shows it. If ``on_ablate`` raises a `MechsafetyError`, its text is in
    ``message``.

    Args:
        circuit: The circuit to show.
        on_ablate: Function that runs the model without these nodes; `RefusalCircuit.widget` makes it from a model. None
            leaves the boxes out.
        style: Options of the picture.
        options: Options of `mechsafety.viz.circuit_html`.

    Raises:
        MechsafetyError: The extra ``widget`` is not installed; otherwise as `circuit_html`.

    Example:
        >>> widget = ms.viz.circuit_widget(circuit)  # shown at the end of a notebook's cell
        >>> type(widget).__name__
        'CircuitWidget'
    """
    try:
        import anywidget
        import traitlets
    except ImportError:
        raise MechsafetyError(
            "a widget without the package anywidget", hint='pip install "mechsafety[widget]"'
        ) from None
    nodes: dict[str, list[Node]] = {}
    for member in circuit.nodes:  # by the name that is drawn
        nodes.setdefault(member.evidence.together or str(member.node), []).append(member.node)
    look = style or Style()

    class CircuitWidget(anywidget.AnyWidget):
        """The page in a frame; messages between frame and kernel carry the traits."""

        _esm = template("widget.js").render()
        page = traitlets.Unicode().tag(sync=True)
        height = traitlets.Int(HEIGHT).tag(sync=True)
        ablation = traitlets.Dict().tag(sync=True)
        selected = traitlets.Unicode().tag(sync=True)
        ablated = traitlets.List(traitlets.Unicode()).tag(sync=True)
        message = traitlets.Unicode().tag(sync=True)

        @traitlets.observe("ablated")
        def _rerun(self, change: Any) -> None:
            chosen = tuple(node for name in change["new"] for node in nodes.get(name, ()))
            self.message = ""
            if not chosen or on_ablate is None:
                self.ablation = {"name": "", "text": "", "nodes": [], "effects": {}}
                return
            try:
                self.ablation = ablations_on(circuit, [on_ablate(chosen)], look)[0]
            except MechsafetyError as error:
                self.message = str(error)

    return CircuitWidget(page=circuit_html(circuit, style, ablate=on_ablate is not None, **options))
