"""The content-security policy of a page: its own scripts run, by their hashes, and nothing else."""

import base64
import hashlib
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

# where a template names its scripts; escaped text never holds it
SCRIPTS = "<own scripts>"


def allowed(page: str, made: Sequence[str] = ()) -> str:
    r"""A page with the hashes of its scripts in its policy, in the place of `SCRIPTS`.

    A frame with a page of its own (``srcdoc``) is under the policy of the page around it as well, so that the frame's
    scripts are allowed in both.

    Args:
        page: The page.
        made: Texts of the scripts that the page's own scripts make.

    Example:
        >>> allowed('<meta content="script-src <own scripts>"><script>go()</script>')[:40]
        '<meta content="script-src \'sha256-5KYv+P'
    """
    return page.replace(SCRIPTS, " ".join(dict.fromkeys(map(digest, [*scripts_of(page), *made]))) or "'none'", 1)


def digest(text: str) -> str:
    """The hash of a script or style, as a policy names it.

    Example:
        >>> digest("go()")
        "'sha256-5KYv+PUboo5h+0+YAtGRPbwv5d/QxzHslP4YGnUaxRw='"
    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def scripts_of(page: str) -> list[str]:
    """The scripts of a page and of the pages in its frames; data (``type="application/json"``) is none."""
    reader = _Scripts()
    reader.feed(page)
    reader.close()
    return reader.found


class _Scripts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if given.get("srcdoc"):
            self.found += scripts_of(given["srcdoc"])
        self._inside = tag == "script" and given.get("type") != "application/json"
        if self._inside:
            self.found.append("")

    def handle_data(self, data: str) -> None:
        if self._inside:
            # browsers read every line break as \n
            self.found[-1] += data.replace("\r\n", "\n").replace("\r", "\n")

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._inside = False
