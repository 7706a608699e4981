"""Views of heads and neurons over text, drawn by CircuitsVis from its packaged script, without network."""

import base64
import gzip
import hashlib
import html
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from mechsafety.circuits.circuit import AttentionExample
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node
from mechsafety.results import visible
from mechsafety.viz.cards import check_pattern
from mechsafety.viz.html import document, safe_json
from mechsafety.viz.words import plain

VIEWS = {"patterns": "AttentionPatterns", "heads": "AttentionHeads"}
# CircuitsVis' bundle is a quarter as long when packed; the page unpacks it, once, without network.
UNPACK = """window.circuitsVisReady ??= new Promise((done, fail) => {
  if (!window.DecompressionStream) { fail(); return; }
  const packed = Uint8Array.from(atob("%s"), (char) => char.charCodeAt(0));
  new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text().then((text) => {
    const script = document.createElement("script");
    script.textContent = text;
    document.head.append(script);
    done();
  });
});"""
# Mounts each figure once, under its own id, even if the same figure is on the page twice. CircuitsVis names none of its
# menus, and writes white on pale colours; both are mended here.
MOUNT = """<style>
.attention-figure button { color: #000 !important; background-image: linear-gradient(#fffb, #fffb); }
</style>
<script>(() => {
  const hosts = document.querySelectorAll(".attention-figure[data-props]");
  const name = (host) => host.querySelectorAll("select:not([aria-label])").forEach((menu) => {
    const before = menu.labels[0] || menu.previousElementSibling;
    menu.setAttribute("aria-label", (before && before.textContent) || "What is shown");
  });
  const mount = () => hosts.forEach((host) => {
    if (!host.hasAttribute("data-props")) return;
    const props = JSON.parse(host.nextElementSibling.textContent);
    host.removeAttribute("data-props");
    host.id += "-" + (window.attentionFigures = (window.attentionFigures || 0) + 1);
    new MutationObserver(() => name(host)).observe(host, { childList: true, subtree: true });
    CircuitsVis.render(host.id, CircuitsVis[host.dataset.view], props);
  });
  window.circuitsVisReady.then(mount, () => hosts.forEach((host) => {
    host.textContent = "This figure needs a newer browser, of 2023 or later.";
  }));
})();</script>"""


def attention_html(examples: Sequence[AttentionExample], *, view: str = "patterns", script: bool = True) -> str:
    """A fragment of HTML with one CircuitsVis figure per example.

    Args:
        examples: Patterns ``[head query key]`` with their tokens.
        view: ``patterns`` colours the text by what each head looks at; ``heads`` shows the matrices.
        script: Whether to include CircuitsVis' script (0.5 MB). A page needs it once (see `figures_page`).

    Raises:
        MechsafetyError: A pattern's shape does not fit its heads and tokens, or another view.

    Example:
        >>> from mechsafety.circuits.circuit import AttentionExample
        >>> seen = ms.attribution.attention_patterns(model, harmful[0], "L0.H1")
        >>> example = AttentionExample(seen.prompt, seen.tokens, seen.heads, seen.patterns)
        >>> ms.viz.attention_html([example], script=False)
        '<div class=...'
    """
    if view not in VIEWS:
        raise MechsafetyError(f"view={view!r}", expected=f"one of {sorted(VIEWS)}")
    if not examples:
        return '<p class="attention-none">No attention patterns were recorded.</p>'
    figures = []
    for example in examples:
        pattern = check_pattern(example).tolist()
        props = {
            "tokens": _tokens(example.tokens),
            "attention": [[[_finite(value) for value in row] for row in rows] for rows in pattern],
            "headLabels" if view == "patterns" else "attentionHeadNames": [str(head) for head in example.heads],
        }
        figures.append(_figure(VIEWS[view], props, example.prompt))
    return _block(figures, script)


def patterns_page(
    prompt: str, tokens: Sequence[str], heads: Sequence[Node], patterns: Any, *, view: str = "patterns"
) -> str:
    """A page of its own with the attention of some heads on one prompt, as `attention_html` draws it."""
    example = AttentionExample(prompt, tuple(tokens), tuple(heads), patterns)
    title = "Attention of " + ", ".join(map(str, heads))
    return figures_page(title, attention_html([example], view=view, script=False))


def tokens_html(tokens: Sequence[str], values: Sequence[float], *, title: str = "", script: bool = True) -> str:
    """Text with each token coloured by its value; hovering shows the number.

    Raises:
        MechsafetyError: No tokens, or a number of values that differs from the number of tokens.

    Example:
        >>> ms.viz.tokens_html(["how", "to"], [0.1, 0.9], title="attention", script=False)
        '<div class=...'
    """
    if not tokens or len(tokens) != len(values):
        raise MechsafetyError(f"{len(values)} values of {len(tokens)} tokens", expected="one per token, at least one")
    props = {"tokens": _tokens(tokens), "values": [_finite(float(value)) for value in values]}
    return _block([_figure("ColoredTokens", props, title)], script)


def neurons_html(
    texts: Sequence[tuple[Sequence[str], Any]],
    *,
    layers: Sequence[int],
    neurons: Sequence[str],
    title: str = "",
    script: bool = True,
) -> str:
    """Activations of neurons over texts, with menus for layer and neuron.

    Args:
        texts: Tokens and activations ``[token layer neuron]`` of each text.
        layers: Labels of the layers, for their menu.
        neurons: Labels of the neurons, for their menu.
        title: Title over the figure.
        script: As `attention_html`.

    Raises:
        MechsafetyError: Activations of another shape.

    Example:
        >>> texts = [(["how", "to"], torch.zeros(2, 1, 2))]  # tokens, and token layer neuron
        >>> ms.viz.neurons_html(texts, layers=[3], neurons=["N3", "N13"], script=False)
        '<div class=...'
    """
    rows = []
    for tokens, activations in texts:
        values = activations.tolist() if hasattr(activations, "tolist") else activations
        shape = (len(tokens), len(layers), len(neurons))
        if len(values) != shape[0] or any(len(a) != shape[1] or any(len(b) != shape[2] for b in a) for a in values):
            raise MechsafetyError("activations of another shape", expected=f"[token layer neuron] = {shape}")
        rows.append([[[_finite(value) for value in row] for row in layer] for layer in values])
    props = {
        "tokens": [_tokens(tokens) for tokens, _ in texts],
        "activations": rows,
        "firstDimensionName": "Layer",
        "secondDimensionName": "Neuron",
        "firstDimensionLabels": [str(layer) for layer in layers],
        "secondDimensionLabels": [plain(name) for name in neurons],
    }
    return _block([_figure("TextNeuronActivations", props, title)], script)


def figures_page(title: str, *fragments: str) -> str:
    """A self-contained page of fragments made with ``script=False``; it holds CircuitsVis' script once.

    Example:
        >>> text = ms.viz.tokens_html(["how", "to"], [0.1, 0.9], script=False)
        >>> page = ms.viz.figures_page("Two figures", text, text)
        >>> page.count("<figure")
        2
    """
    return document(
        "figures.html.j2",
        made=[bundle()],
        title=plain(title),
        body="\n".join(fragments),
        script=_script(),
        mount=MOUNT,
    )


def _tokens(tokens: Sequence[str]) -> list[str]:
    # CircuitsVis parses tokens as HTML, so they are escaped here; the JSON is escaped again
    return [html.escape(visible(token), quote=True) for token in tokens]


def _figure(view: str, props: dict[str, Any], caption: str) -> str:
    data = safe_json(props)
    name = hashlib.sha256(data.encode()).hexdigest()[:12]
    title = f"<figcaption>{html.escape(plain(caption))}</figcaption>" if caption else ""
    return (
        f'<figure>{title}<div class="attention-figure" id="attention-{name}" data-view="{view}" data-props></div>'
        f'<script type="application/json">{data}</script></figure>'
    )


def _block(figures: Sequence[str], script: bool) -> str:
    body = '<div class="attention">\n' + "\n".join(figures) + "\n</div>"
    return f"{body}\n<script>{_script()}</script>\n{MOUNT}\n" if script else body


def _finite(value: float) -> float:
    return round(value, 4) if math.isfinite(value) else 0.0


@cache
def bundle() -> str:
    """CircuitsVis' own script."""
    from importlib import resources

    text = (resources.files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    return text.replace("//# sourceMappingURL=iife.js.map", "").strip()


@cache
def _script() -> str:
    """A script that unpacks CircuitsVis' own; the same version gives the same text."""
    return UNPACK % base64.b64encode(gzip.compress(bundle().encode(), 9, mtime=0)).decode()
