"""Structured logs: one JSON object per line, without any text of a prompt or a reply."""

import datetime
import logging
import traceback
from typing import Any

from mechsafety.output import json_text

logger = logging.getLogger("mechsafety.service")


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object: time (UTC), level, event and the record's ``fields``.

    Of an exception it has the type and the places in the code. The message is left out, because it may quote a prompt.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        row: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            row |= described(record.exc_info[1])
        return json_text(row, indent=None)


def described(error: BaseException) -> dict[str, Any]:
    """Type of an exception, and where it was raised, innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event with its fields."""
    logger.log(level, event, extra={"fields": fields})


def log_to_stderr() -> None:
    """Write the service's and the server's log to stderr, as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in (logger.name, "uvicorn.error"):
        one = logging.getLogger(name)
        one.handlers, one.propagate = [handler], False
        one.setLevel(logging.INFO)
