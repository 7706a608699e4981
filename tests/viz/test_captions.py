"""Captions as text, LaTeX and Markdown: the picture's own words and numbers, escaped."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.viz import Style, circuit_caption, layout_caption, layout_circuit, role_diagram
from mechsafety.viz.captions import markdown

MAP = RefusalCircuit.load(Path(__file__).parents[2] / "docs" / "gallery" / "demo.json")
STYLES = [Style(), Style(width_mm=85), Style(top=9, role_names={"evaluation": "Bewertung 100 %"}, caption=False)]


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", text)


@pytest.mark.parametrize("style", STYLES, ids=["screen", "column", "view"])
@pytest.mark.parametrize("draw", [layout_circuit, role_diagram])
def test_every_format_has_the_pictures_numbers(draw, style: Style) -> None:
    layout = draw(MAP, style)
    words = {name: layout_caption(layout, format=name) for name in ("text", "latex", "markdown")}
    under = " ".join(label.text for label in layout.labels).replace("\xa0", " ")
    assert words["text"] == layout.description and f"{len(MAP)} of {MAP.n_candidates}" in words["text"]
    assert len(numbers(words["text"])) > 12
    assert all(numbers(text) == numbers(words["text"]) for text in words.values())
    if style.caption:
        assert words["text"].replace("\xa0", " ") in under, "it is the caption that stands under the picture"
    if draw is layout_circuit:
        assert circuit_caption(MAP, style, format="latex") == words["latex"]


def test_latex_is_escaped() -> None:
    text = circuit_caption(MAP, STYLES[2], format="latex")
    assert r"Bewertung 100 \%" in text and r"95 \% interval" in text and r"harmful\ensuremath{-}harmless" in text
    assert "\xa0" not in text and text.isascii() and "edges~drawn" in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("[a](b) *c* `d` ~e~ $f$", r"\[a\](b) \*c\* \`d\` \~e\~ \$f\$"),
        ("1. first", r"1\. first"),
        ("- x", r"\- x"),
        ("<img> &amp; a|b # c\\d", r"&lt;img&gt; &amp;amp; a\|b \# c\\d"),
        ("0.5 of 2", r"0\.5 of 2"),
    ],
)
def test_markdown_is_escaped(given: str, expected: str) -> None:
    assert markdown(given) == expected


def test_a_hostile_name_stays_text(small: RefusalCircuit) -> None:
    named = replace(small, provenance=replace(small.provenance, model="<img src=x> [a](b) 5 % $x$"))
    text = circuit_caption(named, format="markdown")
    assert text.startswith(r"&lt;img src=x&gt; \[a\](b) 5 % \$x\$: 12 of 300") and "<" not in text
    assert circuit_caption(named, format="latex").startswith(
        r"\ensuremath{<}img src=x\ensuremath{>} [a](b) 5 \% \$x\$: 12"
    )


def test_a_wrong_format_is_named() -> None:
    with pytest.raises(MechsafetyError, match=r"^format='latx'; expected one of \('text', .*did you mean 'latex'\?$"):
        circuit_caption(MAP, format="latx")
