"""All pages, and the command that draws them."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mechsafety.errors import MechsafetyError
from mechsafety.output import json_text, write_text
from pages import (
    audit,
    claims,
    coverage,
    demo_model,
    discovery,
    finetuning,
    fuzzing,
    gallery,
    ground_truth,
    models,
    native_model,
    refusal_direction,
    robustness,
    safety_neurons,
)
from pages.page import RESULTS, Page
from pages.records import PageError

MODULES = (
    *(refusal_direction, safety_neurons, native_model, coverage, claims, discovery),
    *(robustness, finetuning, ground_truth, demo_model, models, gallery, audit, fuzzing),
)
PAGES: dict[str, Page] = {module.PAGE.name: module.PAGE for module in MODULES}


def publish(name: str, record: Any, folder: Path | None = None) -> None:
    """Store what a script measured, and draw its page, into the page's own folder unless another is named."""
    write_text(PAGES[name].stored(folder), json_text(record) + "\n")
    redraw(PAGES[name], folder)


def simulation(name: str, about: str | None, simulate: Callable[[int, int], Any], few: int, many: int) -> None:
    """The command of a script that simulates what its page shows.

    Args:
        name: The page.
        about: What the script does.
        simulate: Function of the number of samples and the seed that gives the page's record.
        few: Number of samples for a look at the page; nothing is written.
        many: Number of samples by default.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{few} samples; print the page, write nothing")
    parser.add_argument("--samples", type=int, default=many, help="samples of each number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick:
        print(PAGES[name].text(simulate(few, args.seed)))
    else:
        publish(name, simulate(args.samples, args.seed), args.out)


def redraw(page: Page, folder: Path | None = None) -> None:
    """Draw a page from its record.

    Raises:
        SystemExit: There is no record, or the page cannot be drawn from it.
    """
    if not page.stored(folder).is_file():
        raise SystemExit(f"{page.name}: {page.stored(folder)} is not there; its script writes it")
    try:
        page.draw(folder)
    except (PageError, MechsafetyError) as error:
        raise SystemExit(f"{page.name}: {error}") from None
    print(f"wrote {page.path(folder).resolve()}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the named pages; of all pages, those whose record is there."""
    parser = argparse.ArgumentParser(prog="python scripts/pages", description="Draw pages from their stored JSON.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(PAGES)}")
    names = parser.parse_args(arguments).names
    unknown = [name for name in names if name not in PAGES]
    if unknown:
        parser.error(f"no page {', '.join(unknown)}; there are {', '.join(PAGES)}")
    for name in names or PAGES:
        if names or PAGES[name].stored().is_file():
            redraw(PAGES[name])
        else:
            print(f"{name}: left out, {PAGES[name].stored()} is not there")
