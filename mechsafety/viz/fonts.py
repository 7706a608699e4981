"""Fonts of pictures: what each medium calls them, which are installed, and how wide their texts are."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from mechsafety.errors import MechsafetyError, did_you_mean

SANS = "sans-serif"
WEIGHTS = {False: "normal", True: "bold"}


@dataclass(frozen=True, slots=True)
class Family:
    """A font family in each medium.

    Attributes:
        svg: The families that an SVG asks for, the best first.
        drawn: The family that matplotlib draws PDF and PNG with. It takes signs that this lacks from DejaVu Sans.
        latex: LaTeX's command; empty where LaTeX cannot have the family.
        letter: Width of a letter in running text, as a share of its size, in the widest of the media.
    """

    svg: str
    drawn: str
    latex: str
    letter: float = 0.66


GENERIC = {
    SANS: Family("Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif", "DejaVu Sans", r"\sffamily", 0.57),
    "serif": Family(
        "Times, 'Times New Roman', 'Liberation Serif', 'DejaVu Serif', serif", "DejaVu Serif", r"\rmfamily"
    ),
    "monospace": Family("Courier, 'Liberation Mono', 'DejaVu Sans Mono', monospace", "DejaVu Sans Mono", r"\ttfamily"),
}


def family(font: str) -> Family:
    """The family of a checked font."""
    return GENERIC.get(font) or Family(f"'{font}', {GENERIC[SANS].svg}", font, "")


def checked_font(font: object) -> str:
    """The font, if every picture can be measured and drawn with it.

    Raises:
        MechsafetyError: It is not installed. The message proposes the nearest installed one.
    """
    if isinstance(font, str) and font in GENERIC:
        return font
    installed = _installed()
    if font not in installed:
        raise MechsafetyError(
            f"font={font!r} is not installed",
            expected=f"one of {tuple(GENERIC)} or an installed family",
            hint=did_you_mean(font, [*GENERIC, *installed]),
        )
    return str(font)


def families(font: str) -> list[str]:
    """The families that matplotlib takes letters from, the first that has a letter."""
    return list(dict.fromkeys((family(font).drawn, GENERIC[SANS].drawn)))


def lacking(font: str, text: str) -> str:
    """The letters of a text that matplotlib has in none of its families.

    Example:
        >>> lacking("sans-serif", "a漢b")
        '漢'
    """
    known = _letters(font)
    return "".join(dict.fromkeys(char for char in text if ord(char) not in known))


def drawable(font: str, text: str) -> str:
    """The text, with each letter that matplotlib cannot draw replaced by its code point.

    Example:
        >>> drawable("sans-serif", "a漢")
        'a[U+6F22]'
    """
    known = _letters(font)
    return "".join(char if ord(char) in known else f"[U+{ord(char):04X}]" for char in text)


def shares(font: str, texts: Sequence[tuple[str, float, bool]], rooms: Sequence[float]) -> list[float]:
    """How far each text must shrink to fit its room, since a font can be wider than the layout assumes.

    Args:
        font: The font.
        texts: Each text with its size and whether it is bold.
        rooms: The width that each has.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    measure = TextToPath()
    fonts = {bold: FontProperties(family=families(font), weight=weight, size=100) for bold, weight in WEIGHTS.items()}
    found = []
    for (text, size, bold), room in zip(texts, rooms, strict=True):
        width = measure.get_text_width_height_descent(drawable(font, text), fonts[bold], False)[0]
        found.append(min(1.0, room / (width * size / 100)) if width else 1.0)
    return found


@cache
def _letters(font: str) -> Collection[int]:
    from matplotlib.font_manager import findfont, get_font

    charmaps: list[Any] = [get_font(findfont(name)).get_charmap() for name in families(font)]
    return frozenset().union(*charmaps)


def _installed() -> list[str]:
    from matplotlib.font_manager import fontManager

    return fontManager.get_font_names()
