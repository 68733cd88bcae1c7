"""What a rank process has logged, kept to be asked for."""

import logging

__all__ = ["Heard"]


class Heard(logging.Handler):
    """Keeps lines of level and message."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See Handler."""
        self.lines.append(f"{record.levelname} {record.getMessage()}")
