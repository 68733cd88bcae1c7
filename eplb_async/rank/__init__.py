"""The hook in the model worker: recording, agreement, staging, commit."""

__all__: list[str] = []
