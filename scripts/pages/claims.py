"""How often the tests behind claims err: tables of their page."""

from typing import Any

from pages.page import Page
from pages.records import Record
from pages.tables import marked, table

# what is called calibrated: a nominal 5 %, give or take; and of the two errors at a limit, each nominally 2.5 %
GOOD = (0.03, 0.07)
MOST_ONE_SIDED = 0.045


def context(record: Record) -> dict[str, Any]:
    """What the template is given."""
    rows = record["rows"]
    tests = [row for row in rows if row["kind"] == "p"]
    decided = [row for row in rows if row["kind"] == "interval"]
    above = [row for row in rows if row["errs"] > GOOD[1]]
    return {
        "times": record["times"],
        "parts": record["parts"],
        "n_true": record["true"],
        "pairs": record["pairs"],
        "faithfulness": record["faithfulness"],
        "good": GOOD,
        "inside": sum(GOOD[0] <= row["errs"] <= GOOD[1] for row in rows),
        "rows": len(rows),
        "above": [f"{row['claim']} at {row['n']} ({row['errs']:.1%})" for row in above],
        "below": [f"{row['claim']} at {row['n']} ({row['errs']:.1%})" for row in rows if row["errs"] < GOOD[0]],
        "blind": all(row["power"] < 0.1 for row in tests if row["claim"] == "necessity"),
        "lost": record["lost"],
        "random_lost": record["random_lost"],
        "random_as_much": record["random_as_much"],
        "most_one_sided": MOST_ONE_SIDED,
        "lopsided": [
            f"{row['claim']} at {row['n']} (holds {row['holds']:.1%}, fails {row['fails']:.1%})"
            for row in decided
            if max(row["holds"], row["fails"]) > MOST_ONE_SIDED
        ],
        "tests": table(
            [
                [row["claim"], str(row["n"]), row["null"], share(row["errs"]), row["other"], f"{row['power']:.0%}"]
                for row in tests
            ],
            ["claim", "pairs", "what is true", "p below 0.05", "alternative", "p below 0.05 there"],
        ),
        "decided": table(
            [
                [
                    *(row["claim"], str(row["n"]), row["null"], share(row["errs"])),
                    *(one_sided(row["holds"]), one_sided(row["fails"]), row["other"] or "not simulated"),
                    "" if row["power"] is None else f"{row['power']:.0%}",
                ]
                for row in decided
            ],
            ["claim", "n", "what is true", "decided", "holds", "fails", "alternative", "holds there"],
        ),
    }


def share(value: float) -> str:
    """A share of simulations with any error."""
    return marked(value, GOOD[0] <= value <= GOOD[1])


def one_sided(value: float) -> str:
    """A share of simulations with one of two errors."""
    return marked(value, value <= MOST_ONE_SIDED)


PAGE = Page("claims", context)
