"""Runs of the command in this process."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from mechsafety.cli import main


@dataclass(frozen=True)
class Ran:
    """How a run ended: its exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str


def runner(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """A function that runs the command with its arguments."""

    def call(*argv: object) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(part) for part in argv])
        out, err = capfd.readouterr()
        return Ran(caught.value.code, out, err)

    return call
