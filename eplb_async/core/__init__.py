"""The words of the project: pure functions and data of arrays, settings and errors."""

__all__: list[str] = []
