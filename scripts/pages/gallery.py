"""The gallery: a list of the pictures that its script has drawn."""

from pages.page import RESULTS, Page
from pages.records import Record


def context(record: Record) -> Record:
    """What the template is given."""
    return {"pictures": record["pictures"]}


PAGE = Page("gallery", context, file="README.md", source="pictures.json", folder=RESULTS.parent / "gallery")
