"""The daemon of a node: one process that watches the ranks, plans, and publishes. It never makes them wait."""

__all__: list[str] = []
