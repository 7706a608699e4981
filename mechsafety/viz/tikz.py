"""The circuit as TikZ, for papers."""

import re
import unicodedata

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.viz.layout import layout_circuit
from mechsafety.viz.marks import Command, Label, Shape
from mechsafety.viz.words import plain

SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "-": r"{-}",
    "\u2212": r"\ensuremath{-}",
    "\u2013": r"--",
    "…": r"\dots{}",
    "→": r"\ensuremath{\rightarrow}",
}
ANCHORS = {"start": "base west", "middle": "base", "end": "base east"}
# Small TeX installations lack the standalone class; a page of the picture's size does the same.
HEAD = r"""\IfFileExists{standalone.cls}{\documentclass[border=2pt]{standalone}}{%
  \documentclass{article}
  \usepackage[paperwidth=WIDTHpt, paperheight=HEIGHTpt, margin=2pt]{geometry}
  \pagestyle{empty}\parindent=0pt\topskip=0pt\maxdepth=0pt}
\usepackage[T1]{fontenc}
\usepackage{textcomp}
\usepackage{lmodern}
\usepackage{tikz}
\renewcommand{\familydefault}{\sfdefault}
"""


def circuit_tikz(circuit: RefusalCircuit) -> str:
    """A LaTeX document that compiles by itself (``pdflatex``); its ``tikzpicture`` can be copied into a paper.

    Raises:
        MechsafetyError: The circuit lists a node twice.
    """
    layout = layout_circuit(circuit)
    shapes = [*layout.backdrop, *(mark.shape for mark in layout.edges)]
    labels = list(layout.labels)
    parts = [_path(shape) for shape in shapes]
    for mark in layout.nodes:
        parts += [f"% {mark.node}", _path(mark.shape)]
        parts += [_text(mark.label)] if mark.label else []
    parts += [_text(label) for label in labels]
    named = [*shapes, *(mark.shape for mark in layout.nodes)]
    colours = {colour for shape in named for colour in (shape.fill, shape.stroke) if colour}
    colours |= {label.colour for label in [*labels, *(mark.label for mark in layout.nodes if mark.label)]}
    width, height = 0.75 * layout.width, 0.75 * layout.height
    lines = [
        f"% Refusal circuit of {tex(plain(circuit.provenance.model))}",
        HEAD.rstrip().replace("WIDTH", f"{width + 5:.1f}").replace("HEIGHT", f"{height + 8:.1f}"),
        *(rf"\definecolor{{{_colour(colour)}}}{{HTML}}{{{colour[1:].upper()}}}" for colour in sorted(colours)),
        r"\begin{document}",
        r"\begin{tikzpicture}[x=0.75pt, y=-0.75pt, inner sep=0pt]",
        rf"\path[use as bounding box] (0,0) rectangle ({layout.width:g},{layout.height:g});",
        *parts,
        r"\end{tikzpicture}",
        r"\end{document}",
    ]
    return "\n".join(lines) + "\n"


def tex(text: str) -> str:
    r"""Text escaped for LaTeX; what pdflatex's T1 fonts lack becomes its plain letter, or a question mark.

    Example:
        >>> print(tex("50 % of a_b"))
        50 \% of a\_b
    """
    return "".join(SPECIAL.get(char) or (char if " " <= char <= "~" else _plain_letter(char)) for char in text)


def _plain_letter(char: str) -> str:
    letters = re.sub(r"[^\x20-\x7e]", "", unicodedata.normalize("NFKD", char))
    return "".join(SPECIAL.get(letter, letter) for letter in letters) or "?"


def _colour(colour: str) -> str:
    return "c" + colour[1:].lower()


def _path(shape: Shape) -> str:
    options = [f"fill={_colour(shape.fill)}"] if shape.fill else []
    if shape.stroke:
        options += [f"draw={_colour(shape.stroke)}", f"line width={0.75 * shape.width:.3g}pt"]
    if shape.dashed:
        options.append("dash pattern=on 3.75pt off 2.25pt")
    if shape.opacity < 1:
        options.append(f"opacity={shape.opacity:.3g}")
    return rf"\path[{', '.join(options)}] {_commands(shape.commands)};"


def _commands(commands: tuple[Command, ...]) -> str:
    parts = []
    for letter, values in commands:
        points = [f"({round(values[i], 2):g},{round(values[i + 1], 2):g})" for i in range(0, len(values), 2)]
        if letter == "M":
            parts.append(points[0])
        elif letter == "L":
            parts.append(f"-- {points[0]}")
        elif letter == "C":
            parts.append(f".. controls {points[0]} and {points[1]} .. {points[2]}")
        else:
            parts.append("-- cycle")
    return " ".join(parts)


def _text(label: Label) -> str:
    size = 0.75 * label.size
    font = rf"\fontsize{{{size:.3g}}}{{{size:.3g}}}\selectfont" + (r"\bfseries" if label.bold else "")
    options = f"anchor={ANCHORS[label.anchor]}, text={_colour(label.colour)}, font={font}"
    return rf"\node[{options}] at ({round(label.x, 2):g},{round(label.y, 2):g}) {{{tex(label.text)}}};"
