r"""A layout as TikZ: one file that compiles by itself and can be ``\input`` into a paper."""

import unicodedata

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.viz.fonts import GENERIC, family
from mechsafety.viz.layout import layout_circuit
from mechsafety.viz.look import Look
from mechsafety.viz.marks import Command, Label, Layout, Shape
from mechsafety.viz.style import Style

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
    "<": r"\ensuremath{<}",
    ">": r"\ensuremath{>}",
    "|": r"\ensuremath{|}",
    '"': r"{\char34}",
    "'": r"{'}",
    "`": r"{`}",
    "-": r"{-}",
    "\xa0": "~",
    "\u2212": r"\ensuremath{-}",
    "\u2013": r"--",
    "\u2014": r"---",
    "\u2018": r"{`}",
    "\u2019": r"{'}",
    "\u201c": r"``",
    "\u201d": r"''",
    "\u2026": r"\dots{}",
    "\u2192": r"\ensuremath{\rightarrow}",
    "\u2190": r"\ensuremath{\leftarrow}",
    "\u00d7": r"\ensuremath{\times}",
    "\u00b1": r"\ensuremath{\pm}",
    "\u00b7": r"\ensuremath{\cdot}",
    "\u23ce": r"\ensuremath{\hookleftarrow}",
    "\u2264": r"\ensuremath{\le}",
    "\u2265": r"\ensuremath{\ge}",
    "\u00df": r"\ss{}",
    "\u00f8": r"\o{}",
    "\u00d8": r"\O{}",
    "\u00e6": r"\ae{}",
    "\u00c6": r"\AE{}",
    "\u0142": r"\l{}",
    "\u0141": r"\L{}",
    "\u0131": r"\i{}",
}
ACCENTS = {
    "\u0300": r"\`",
    "\u0301": r"\'",
    "\u0302": r"\^",
    "\u0303": r"\~",
    "\u0304": r"\=",
    "\u0306": r"\u",
    "\u0307": r"\.",
    "\u0308": r"\"",
    "\u030a": r"\r",
    "\u030b": r"\H",
    "\u030c": r"\v",
    "\u0323": r"\d",
    "\u0327": r"\c",
}
# capitals that LaTeX has a command for; the others look like Latin letters
CAPITALS = ("GAMMA", "DELTA", "THETA", "LAMDA", "XI", "PI", "SIGMA", "PHI", "PSI", "OMEGA")
ANCHORS = {"start": "base west", "middle": "base", "end": "base east"}
# Small TeX installations lack the standalone class; a page of the picture's size does the same. They lack Latin Modern
# too: fix-cm gives Computer Modern at every size. Inside a paper, \@nodocument is \relax.
HEAD = r"""\makeatletter
\ifx\@nodocument\relax\def\mechsafetyend{}\else\def\mechsafetyend{\end{document}}
\IfFileExists{standalone.cls}{\documentclass[border=2pt]{standalone}}{%
  \documentclass{article}
  \usepackage[paperwidth=WIDTHpt, paperheight=HEIGHTpt, margin=2pt]{geometry}
  \pagestyle{empty}\parindent=0pt\topskip=0pt\maxdepth=0pt}
\IfFileExists{lmodern.sty}{\usepackage[T1]{fontenc}\usepackage{lmodern}}{\usepackage{fix-cm}}
\usepackage{tikz}
\renewcommand{\familydefault}{\sfdefault}
\begin{document}\fi
\makeatother
"""


def circuit_tikz(circuit: RefusalCircuit, style: Style | None = None) -> str:
    r"""LaTeX that ``pdflatex`` compiles by itself and that a paper with ``\usepackage{tikz}`` can ``\input``.

    Raises:
        MechsafetyError: As `layout_circuit` and `layout_tikz`.

    Example:
        >>> print(ms.viz.circuit_tikz(circuit))
        % Refusal circuit of planted{-}rmsnorm{-}4x4{-}5
        ...
    """
    return layout_tikz(layout_circuit(circuit, style))


def layout_tikz(layout: Layout) -> str:
    """The same for any layout, at the size of the picture.

    Raises:
        MechsafetyError: LaTeX has not the layout's font, or has no letter of a text of the user's own.

    Example:
        >>> print(ms.viz.layout_tikz(ms.viz.role_diagram(circuit)))
        % Roles in the refusal circuit of planted{-}rmsnorm{-}4x4{-}5
        ...
    """
    _check(layout.look)
    font = family(layout.look.font).latex
    edges = [shape for mark in layout.edges for shape in mark.shapes]
    parts = [_path(shape) for shape in (*layout.backdrop, *edges)]
    for mark in layout.nodes:
        parts += [f"% {tex(mark.key)}", *map(_path, mark.shapes), *(_text(label, font) for label in mark.labels)]
    labels = [*layout.labels, *(label for mark in layout.edges for label in mark.labels)]
    parts += [_text(label, font) for label in labels]
    shapes = [*layout.backdrop, *edges, *(shape for mark in layout.nodes for shape in mark.shapes)]
    colours = {colour.lower() for shape in shapes for colour in (shape.fill, shape.stroke) if colour}
    colours |= {label.colour.lower() for label in [*labels, *(x for mark in layout.nodes for x in mark.labels)]}
    width, height = 0.75 * layout.width, 0.75 * layout.height
    lines = [
        f"% {tex(layout.title)}",
        r"% Compile it with pdflatex, or \usepackage{tikz} and \input it. In a caption:",
        f"% {tex(layout.description)}",
        HEAD.rstrip().replace("WIDTH", f"{width + 5:.1f}").replace("HEIGHT", f"{height + 8:.1f}"),
        r"\begingroup",
        *(rf"\definecolor{{{_colour(colour)}}}{{HTML}}{{{colour[1:].upper()}}}" for colour in sorted(colours)),
        r"\begin{tikzpicture}[x=0.75bp, y=-0.75bp, inner sep=0pt]",
        rf"\path[use as bounding box] (0,0) rectangle ({layout.width:.5g},{layout.height:.5g});",
        *parts,
        r"\end{tikzpicture}\endgroup",
        r"\mechsafetyend",
    ]
    return "\n".join(lines) + "\n"


def tex(text: str) -> str:
    r"""Text for any LaTeX: accents and Greek become commands, characters without a command their code points.

    Example:
        >>> print(tex("50 % of a_b, é, 漢"))
        50 \% of a\_b, \'{e}, [U+6F22]
    """
    return "".join(SPECIAL.get(char) or (char if " " <= char <= "~" else _letter(char)) for char in text)


def _letter(char: str) -> str:
    alphabet, _, letter = unicodedata.name(char, "").partition(" LETTER ")
    if letter.isalpha() and (alphabet == "GREEK SMALL" or (alphabet == "GREEK CAPITAL" and letter in CAPITALS)):
        command = letter.replace("LAMDA", "LAMBDA").lower()
        return rf"\ensuremath{{\{command.capitalize() if alphabet == 'GREEK CAPITAL' else command}}}"
    parts = unicodedata.normalize("NFKD", char)
    if all(" " <= part <= "~" for part in parts):
        return tex(parts)
    if len(parts) == 2 and parts[0].isascii() and parts[0].isalpha() and parts[1] in ACCENTS:
        return f"{ACCENTS[parts[1]]}{{{parts[0]}}}"
    return f"[U+{ord(char):04X}]"


def _colour(colour: str) -> str:
    return "c" + colour[1:].lower()


def _path(shape: Shape) -> str:
    options = [f"fill={_colour(shape.fill)}"] if shape.fill else []
    if shape.stroke:
        options += [f"draw={_colour(shape.stroke)}", f"line width={0.75 * shape.width:.4g}bp"]
    if shape.dashes:
        pattern = " ".join(f"{'off' if k % 2 else 'on'} {0.75 * part:.3g}bp" for k, part in enumerate(shape.dashes))
        options.append(f"dash pattern={pattern}")
    if shape.opacity < 1:
        options.append(f"opacity={shape.opacity:.3g}")
    return rf"\path[{', '.join(options)}] {_commands(shape.commands)};"


def _commands(commands: tuple[Command, ...]) -> str:
    parts = []
    for letter, values in commands:
        points = [f"({round(values[i], 1):g},{round(values[i + 1], 1):g})" for i in range(0, len(values), 2)]
        if letter == "M":
            parts.append(points[0])
        elif letter == "L":
            parts.append(f"-- {points[0]}")
        elif letter == "C":
            parts.append(f".. controls {points[0]} and {points[1]} .. {points[2]}")
        else:
            parts.append("-- cycle")
    return " ".join(parts)


def _check(look: Look) -> None:
    if not family(look.font).latex:
        raise MechsafetyError(
            f"font={look.font!r} in LaTeX",
            expected=f"one of {tuple(GENERIC)}",
            hint="LaTeX takes these from its document",
        )
    for text in look.texts:
        missing = "".join(char for char in text if "[U+" in tex(char))
        if missing:
            raise MechsafetyError(
                f"the text {text!r} in LaTeX: its standard fonts lack {missing!r}",
                expected="Latin or Greek letters",
                hint="PDF or SVG draws the others",
            )


def _text(label: Label, family: str) -> str:
    size = 0.75 * label.size
    font = rf"\fontsize{{{size:.3g}bp}}{{{size:.3g}bp}}\selectfont" + (r"\bfseries" if label.bold else "")
    options = f"anchor={ANCHORS[label.anchor]}, text={_colour(label.colour)}, font={family}{font}"
    return rf"\node[{options}] at ({round(label.x, 1):g},{round(label.y, 1):g}) {{{tex(label.text)}}};"
