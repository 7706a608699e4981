"""The page in which a student finds the circuit of a planted model.

python scripts/explorable.py [--out docs/explorable.html]

The model has the fewest layers that hold the four stages, a decoy and a backup: two. The same machine gives the same
bytes. On another one the last digits of the weights may differ.
"""

import argparse
from pathlib import Path

from mechsafety.output import write_text
from mechsafety.testbed import ExportedModel, Planted, exported, planted
from mechsafety.viz import explorable_html

PAGE = Path(__file__).resolve().parents[1] / "docs" / "explorable.html"


def model() -> Planted:
    """The planted model of the page: two query heads per key-value head, one decoy, one backup."""
    return planted(seed=14, layers=2, heads=4, kv_heads=2, decoys=1, backups=1)


def shown() -> ExportedModel:
    """The same model as data."""
    return exported(model())


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE)
    print(write_text(parser.parse_args().out, explorable_html(shown())))


if __name__ == "__main__":
    main()
