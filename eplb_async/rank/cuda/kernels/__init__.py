"""Triton kernels and nothing else: their arguments carry no types."""

__all__: list[str] = []
