"""Runs every static check of this tree and prints one verdict: `scripts/check [NAME ...]`.

Each check prints what is wrong with file:line. All run, whatever comes of the first; the exit status is 1 if any failed.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scripts import house_rules

__all__ = ["CHECKS", "main"]

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("eplb_async", "tests", "benchmarks", "scripts", "examples")
FOLDERS = [name for name in NAMES if any((ROOT / name).rglob("*.py"))]


def tool(*command: str) -> Callable[[], bool]:
    """A check that runs a console script of this interpreter's environment (or `-m` of it), true when it exits 0."""

    def run() -> bool:
        program = Path(sys.executable).with_name(command[0])
        return (
            subprocess.run([str(program), *command[1:]], cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
            == 0
        )

    return run


def house() -> bool:
    """The rules of house_rules.py on every Python file of the tree."""
    findings = [finding for folder in FOLDERS for finding in house_rules.check_folder(ROOT, folder)]
    print("\n".join(findings) if findings else "house rules: no findings")
    return not findings


CHECKS: dict[str, Callable[[], bool]] = {
    "lint": tool("ruff", "check", "--quiet", "--output-format", "concise"),
    "format": tool("ruff", "format", "--check", "--quiet", "--output-format", "concise"),
    "types": tool("mypy", "--no-error-summary", *FOLDERS),
    "imports": tool("lint-imports", "--no-logo", "--no-cache"),
    "house": house,
}


def main(names: list[str]) -> int:
    """Run the named checks, or all; returns the exit status."""
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        print(f"unknown check {unknown[0]!r}; known: {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or CHECKS:
        print(f"== {name} ==", flush=True)
        start = time.monotonic()
        passed = CHECKS[name]()
        print(f"   {'passed' if passed else 'FAILED'} in {time.monotonic() - start:.1f} s", flush=True)
        failed += [] if passed else [name]
    print(f"scripts/check: FAILED: {', '.join(failed)}" if failed else "scripts/check: all passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
