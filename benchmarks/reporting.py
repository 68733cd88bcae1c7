"""What every benchmark prints and writes: the machine and versions it ran on, tables with ratios, JSON and Markdown."""

import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from os import sched_getaffinity
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

__all__ = ["Column", "header", "markdown_tables", "show_table", "write_json", "write_whole"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("numpy", "numba", "torch", "msgspec")

Row = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table.

    Fields:
        key: of the rows' values; a row without it shows a dash.
        title: with the unit.
        digits: after the point, for numbers.
        ratio: also show the value as a multiple of the group's first row.
    """

    key: str
    title: str
    digits: int = 3
    ratio: bool = False


def header(more: Row | None = None) -> dict[str, object]:
    """CPU model, cores this process may use, versions, commit and command: what a number means nothing without.

    Args:
        more: further lines of one benchmark (versions of what it compares with, say).
    """
    return {
        "cpu": _cpu_model(),
        "cores": len(sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
        **(more or {}),
        "commit": _commit(),
        "command": _command(),
    }


def show_table(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    group: str,
    console: Console | None = None,
    more: Row | None = None,
) -> None:
    """Print the header, and one table for each group of rows, all with columns of the same width.

    Args:
        title: of the whole.
        columns: in order; the first is the row's label.
        rows: values by column key.
        group: key of the value that rows of one table share, and that stands above it; ratios are to its first row.
        console: where to; the terminal by default, always wide enough for the table.
        more: further lines of the header.
    """
    firsts = {row[group]: row for row in reversed(rows)}
    cells = [[_cell(row, firsts[row[group]], column) for column in columns] for row in rows]
    widths = [
        max(len(text) for text in (column.title, *(line[index] for line in cells)))
        for index, column in enumerate(columns)
    ]
    needed = sum(widths) + 3 * len(widths) + 1
    target = console or Console(width=max(needed, Console().width if sys.stdout.isatty() else 150))
    for name, value in header(more).items():
        target.print(f"{name:>8}  {value}", markup=False, highlight=False, soft_wrap=True)
    target.print(f"\n[bold]{title}[/bold]", soft_wrap=True)
    for label in dict.fromkeys(row[group] for row in rows):
        table = Table(title=str(label), title_justify="left", header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column.title, justify="right" if index else "left", no_wrap=True, min_width=widths[index])
        for row, line in zip(rows, cells, strict=True):
            if row[group] == label:
                table.add_row(*line)
        target.print(table)


def write_json(path: Path, benchmark: str, rows: Sequence[Row], more: Row | None = None) -> None:
    """Write `{"benchmark", "header", "rows"}`, indented; `more` goes into the header."""
    document = msgspec.json.encode({"benchmark": benchmark, "header": header(more), "rows": rows})
    write_whole(path, msgspec.json.format(document) + b"\n")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def markdown_tables(columns: Sequence[Column], rows: Sequence[Row], group: str) -> str:
    """One Markdown table for each group of rows, its name in bold above it; without ratios.

    [Column(key="what", title="what"), Column(key="ms", title="ms", digits=1)] and the row {"case": "a", "what": "x",
    "ms": 1.25} give "**a**", "", "| what | ms |", "|---|---:|", "| x | 1.2 |".
    """
    lines: list[str] = []
    for label in dict.fromkeys(row[group] for row in rows):
        lines += [f"**{label}**", "", "| " + " | ".join(column.title for column in columns) + " |"]
        lines.append("|" + "|".join("---:" if index else "---" for index in range(len(columns))) + "|")
        for row in rows:
            if row[group] == label:
                cells = [_cell(row, {}, column).replace("|", "\\|") for column in columns]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: Row, first: Row, column: Column) -> str:
    value, base = row.get(column.key), first.get(column.key)
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    text = f"{value:,.{column.digits}f}"
    if column.ratio and isinstance(base, float) and base > 0:
        text += " (1)" if row is first else f" ({value / base:.2f}x)"
    return text


def _cpu_model() -> str:
    """The name in /proc/cpuinfo; arm64 has none there."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """Its version without importing it; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """Short hash of the checked-out commit, with a plus if files differ from it; "unknown" outside a repository."""
    results = [
        subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
    ]
    if results[0].returncode:
        return "unknown"
    return results[0].stdout.strip() + ("+" if results[1].stdout.strip() else "")


def _command() -> str:
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    return " ".join(["python", str(shown), *sys.argv[1:]])
