"""The caption of a picture as text, LaTeX or Markdown, with the numbers that stand under the picture."""

import re
from collections.abc import Callable

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.errors import MechsafetyError, did_you_mean
from mechsafety.viz.layout import layout_circuit
from mechsafety.viz.marks import Layout
from mechsafety.viz.style import Style
from mechsafety.viz.tikz import tex

# a number with a dot, a dash and the like begin a list or a heading where a line begins with them
_STARTS_A_BLOCK = re.compile(r"^(\d+(?=[.)])|(?=[-+=]))")


def circuit_caption(circuit: RefusalCircuit, style: Style | None = None, *, format: str = "text") -> str:
    r"""The caption of a circuit's picture, whether or not the picture itself has one.

    Args:
        circuit: The circuit.
        style: Options of the picture; the caption counts what it draws and uses its names.
        format: ``text``, ``latex`` (for ``\caption{...}``) or ``markdown``.

    Raises:
        MechsafetyError: Another format; otherwise as `layout_circuit`.

    Example:
        >>> print(ms.viz.circuit_caption(circuit))
        planted-rmsnorm-4x4-5: 5 of 20 candidate nodes; ...
    """
    return layout_caption(layout_circuit(circuit, style), format=format)


def layout_caption(layout: Layout, *, format: str = "text") -> str:
    """The caption of any layout, such as a role diagram or a comparison.

    Raises:
        MechsafetyError: Another format.

    Example:
        >>> print(ms.viz.layout_caption(ms.viz.role_diagram(circuit)))
        planted-rmsnorm-4x4-5: 5 of 20 candidate nodes; ...
    """
    writers: dict[str, Callable[[str], str]] = {"text": str, "latex": tex, "markdown": markdown}
    if format not in writers:
        raise MechsafetyError(
            f"format={format!r}", expected=f"one of {tuple(writers)}", hint=did_you_mean(format, writers)
        )
    return writers[format](layout.description)


def markdown(text: str) -> str:
    r"""Text that every Markdown shows as it stands.

    Example:
        >>> print(markdown("a_b [0.1, 0.2] <c> & 5 $"))
        a\_b \[0.1, 0.2\] &lt;c&gt; &amp; 5 \$
    """
    escaped = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", text)
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        escaped = escaped.replace(sign, entity)
    return _STARTS_A_BLOCK.sub(r"\1\\", escaped)
