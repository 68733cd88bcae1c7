"""What can be seen of the daemon and the ranks: decisions and what came of them."""

__all__: list[str] = []
