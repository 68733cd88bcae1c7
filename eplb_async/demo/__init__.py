"""A tiny trained MoE language model, its text, and how it is served with expert parallelism."""

__all__: list[str] = []
