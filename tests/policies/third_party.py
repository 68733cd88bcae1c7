"""A third party's policy, installed as far as importlib.metadata can tell: a module and a dist-info in a folder."""

from pathlib import Path

__all__ = ["install"]


def install(folder: Path, module: str, source: str, entry_points: str) -> None:
    """Write what `pip install` would: `module`.py with `source`, and a dist-info with the text of its entry_points.txt.

    Put `folder` on sys.path to make it known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")
