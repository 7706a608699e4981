"""Attention of found heads, drawn by CircuitsVis from its packaged script, without network."""

import hashlib
import html
import math
from collections.abc import Sequence
from functools import cache

from mechsafety.circuits.circuit import AttentionExample
from mechsafety.errors import MechsafetyError
from mechsafety.viz.html import safe_json
from mechsafety.viz.words import plain

VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
# Mounts each figure once, under an id of its own even where the same figure is on the page twice.
MOUNT = """<script>(() => {
  for (const host of document.querySelectorAll(".attention-figure[data-props]")) {
    const props = JSON.parse(host.nextElementSibling.textContent);
    host.removeAttribute("data-props");
    host.id += "-" + (window.attentionFigures = (window.attentionFigures || 0) + 1);
    CircuitsVis.render(host.id, CircuitsVis.AttentionPatterns, props);
  }
})();</script>"""


def attention_html(examples: Sequence[AttentionExample]) -> str:
    """A fragment of HTML with one CircuitsVis figure an example; the 1.3 MB script is in it once.

    Args:
        examples: Patterns ``[head query key]`` with their tokens.

    Raises:
        MechsafetyError: A pattern's shape does not fit its heads and tokens.
    """
    if not examples:
        return '<p class="attention-none">No attention patterns were recorded.</p>'
    figures = "\n".join(_figure(example) for example in examples)
    return f'<div class="attention">\n{figures}\n</div>\n<script>{_script()}</script>\n{MOUNT}\n'


def visible(token: str) -> str:
    r"""A token with its white space made visible; other control characters become U+FFFD.

    Example:
        >>> visible(" a\n")
        '·a⏎'
    """
    return "".join(VISIBLE.get(char) or ("\ufffd" if ord(char) < 32 or ord(char) == 127 else char) for char in token)


def _figure(example: AttentionExample) -> str:
    pattern = example.patterns.tolist()
    n_heads, n_tokens = len(example.heads), len(example.tokens)
    fits = len(pattern) == n_heads and all(
        len(rows) == n_tokens and all(len(row) == n_tokens for row in rows) for rows in pattern
    )
    if not fits or not n_heads or not n_tokens:
        raise MechsafetyError(
            f"attention patterns of shape {tuple(example.patterns.shape)}",
            expected=f"[head query key] = ({n_heads}, {n_tokens}, {n_tokens}), none of them 0",
        )
    props = {
        # CircuitsVis parses tokens as HTML, so they are escaped here and the JSON once more.
        "tokens": [html.escape(visible(token), quote=True) for token in example.tokens],
        "attention": [[[_finite(value) for value in row] for row in rows] for rows in pattern],
        "headLabels": [str(head) for head in example.heads],
    }
    data = safe_json(props)
    name = hashlib.sha256(data.encode()).hexdigest()[:12]
    return (
        f"<figure><figcaption>{html.escape(plain(example.prompt))}</figcaption>"
        f'<div class="attention-figure" id="attention-{name}" data-props></div>'
        f'<script type="application/json">{data}</script></figure>'
    )


def _finite(value: float) -> float:
    return round(value, 4) if math.isfinite(value) else 0.0


@cache
def _script() -> str:
    """CircuitsVis' own bundle, safe inside a ``script`` element and without its source-map address."""
    from importlib import resources

    text = (resources.files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    text = text.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return text.replace("//# sourceMappingURL=iife.js.map", "").strip()
