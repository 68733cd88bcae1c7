"""The house rules that no stock linter knows, on the syntax tree of each file.

    size         a file has at most 400 lines, a function at most 60 lines and 6 parameters (self and cls not counted)
    names        no module or package is called utils, common, misc, manager or helper, alone or as a part of its name
    public       every module of the package has `__all__`: without repeats (ruff sorts it), all of it bound in the
                 module, and with every class and function in it whose name has no underscore in front
    swallowing   no contextlib.suppress(Exception): ruff finds the except clauses, but not this one

A file or function that is better long says so where it is, and why: a comment `# size: <reason>` before the file's first
statement (a docstring aside), or on a function's `def` line or between its decorators and the line above them.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_file", "check_folder", "public_names"]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6
FORBIDDEN_WORDS = {"util", "utils", "common", "misc", "manager", "managers", "helper", "helpers"}
OPT_OUT = re.compile(r"#\s*size:\s*\S")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def check_folder(root: Path, folder: str) -> list[str]:
    """Findings, as `file:line: rule: text`, for all Python files under root/folder; files are named relative to root."""
    findings: list[str] = []
    for path in sorted((root / folder).rglob("*.py")):
        findings += check_file(path.read_text(encoding="utf-8"), path.relative_to(root).as_posix())
    return findings


def check_file(source: str, name: str) -> list[str]:
    """Findings for one file. `name` is its path relative to the tree's root; it decides which rules hold."""
    tree = ast.parse(source, filename=name)
    lines = source.splitlines()
    found = [*_size(tree, lines), *_names(name), *_swallowing(tree)]
    if name.startswith("eplb_async/"):
        found += _public(tree, name)
    return [f"{name}:{line}: {text}" for line, text in sorted(found)]


def public_names(tree: ast.Module) -> list[str] | None:
    """What `__all__` lists, or None if the module has none (or one that is not a literal)."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id == "__all__" and isinstance(value, ast.List | ast.Tuple):
            return [str(item.value) for item in value.elts if isinstance(item, ast.Constant)]
    return None


def _size(tree: ast.Module, lines: list[str]) -> Iterator[tuple[int, str]]:
    has_docstring = ast.get_docstring(tree, clean=False) is not None
    code = tree.body[1:] if has_docstring else tree.body
    head = lines[: code[0].lineno - 1] if code else lines
    if len(lines) > MAX_FILE_LINES and not any(line.startswith("#") and OPT_OUT.search(line) for line in head):
        yield MAX_FILE_LINES + 1, f"size: the file has {len(lines)} lines; at most {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if not isinstance(node, Function) or _opted_out(node, lines):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            yield node.lineno, f"size: {node.name} has {length} lines; at most {MAX_FUNCTION_LINES}"
        count = _num_parameters(node)
        if count > MAX_PARAMETERS:
            yield (
                node.lineno,
                f"size: {node.name} has {count} parameters; at most {MAX_PARAMETERS} (use a frozen dataclass)",
            )


def _opted_out(node: Function, lines: list[str]) -> bool:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return any(OPT_OUT.search(line) for line in lines[max(first - 2, 0) : node.body[0].lineno - 1])


def _num_parameters(node: Function) -> int:
    named = [*node.args.posonlyargs, *node.args.args]
    if named and named[0].arg in ("self", "cls"):
        named = named[1:]
    return len(named) + len(node.args.kwonlyargs)


def _names(name: str) -> Iterator[tuple[int, str]]:
    for part in name.removesuffix(".py").split("/"):
        words = FORBIDDEN_WORDS.intersection(part.lower().split("_"))
        if words:
            yield 1, f"names: {part!r} says nothing about what is in it; name what it does, not {min(words)!r}"


def _swallowing(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] != "suppress":
            continue
        broad = [ast.unparse(item) for item in node.args if ast.unparse(item) in ("Exception", "BaseException")]
        if broad:
            yield node.lineno, f"swallowing: suppress({broad[0]}) hides every error; name those that are expected"


def _public(tree: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    code = [node for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    listed = public_names(tree)
    if listed is None:
        if code and not name.endswith("/__main__.py"):
            yield 1, "public: no literal __all__"
        return
    if len(listed) != len(set(listed)):
        yield 1, "public: __all__ repeats a name"
    bound = set(_bound_names(tree))
    lazy = "__getattr__" in bound
    for missing in sorted(set(listed) - bound):
        if not lazy:
            yield 1, f"public: __all__ lists {missing!r}, which the module does not define"
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_") and node.name not in listed:
            yield node.lineno, f"public: {node.name} is not in __all__; list it, or give its name an underscore"


def _bound_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
