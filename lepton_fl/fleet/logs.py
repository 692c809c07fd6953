"""The log of a server and of an agent: one JSON object a line. Names, digests, counts and durations only.

Give the fields with logging's own `extra`: `log.info("round", extra={"run": run, "round": 3})`.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from lepton_fl.errors import ConfigError

_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
_MAX = 2_000
"""Characters of one field: some of the words are other people's."""


class JsonLines(logging.Formatter):
    """A record as one line: when, how grave, what, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage()[:_MAX],
        }
        line |= {name: _short(value) for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            line |= _without_words(*record.exc_info)
        return json.dumps(line, default=str)


def _short(value: object) -> object:
    return value[:_MAX] if isinstance(value, str) else value


def _without_words(
    kind: type[BaseException] | None, error: BaseException | None, found: TracebackType | None
) -> dict[str, object]:
    """What an unforeseen error is and where it arose. Not its text, which may quote a record."""
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(found)]
    cause = None if error is None else error.__cause__ or error.__context__
    return {
        "error": "" if kind is None else kind.__name__,
        "caused_by": "" if cause is None else type(cause).__name__,
        "at": places[-20:],
    }


def log_to(path: Path | None) -> None:
    """Send all of this process's log to a file of mode 0600, or to standard error.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
    else:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
            # Reopened when a log rotation has moved it away.
            handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: the log cannot be written: {error.strerror}") from None
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # gRPC's own words on each call that was cut off; what matters of them is logged by those who call.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
