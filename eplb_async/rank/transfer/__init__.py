"""Ways of moving weights between ranks."""

__all__: list[str] = []
