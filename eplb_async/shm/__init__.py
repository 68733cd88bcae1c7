"""Bytes shared between the processes of a node: segments, rings, board, words, live placement."""

__all__: list[str] = []
