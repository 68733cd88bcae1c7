"""What a plugin touches of another engine, written down and compared with that engine's source before anything is touched.

    Expectation   one class, function or constant that must be there, with the parameters or names we rely on
    SourceTree    the sources to look at: an installed package, an unpacked folder, or a wheel

The same expectations are checked when the plugin loads and, by a test, against released wheels. Sources are parsed, never run, so
an engine whose import needs a GPU can be checked without one.
"""

import ast
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Calls", "Constant", "Expectation", "Fields", "Function", "Instance", "SourceTree", "Uses", "problems"]

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class SourceTree:
    """Python sources by their path below a root, such as "vllm/plugins/__init__.py"."""

    def __init__(self, read: Callable[[str], str], names: Callable[[], Iterable[str]]) -> None:
        """Use `of_folder` or `of_wheel`.

        Args:
            read: the text at a path; raises OSError or KeyError.
            names: all paths.
        """
        self._read, self._names = read, names
        self._parsed: dict[str, ast.Module] = {}

    @classmethod
    def of_folder(cls, package: Path) -> "SourceTree":
        """A package's folder, such as site-packages/vllm."""
        root = package.parent
        return cls(
            lambda name: (root / name).read_text(encoding="utf-8"),
            lambda: (path.relative_to(root).as_posix() for path in sorted(package.rglob("*.py"))),
        )

    @classmethod
    def of_wheel(cls, path: Path) -> "SourceTree":
        """A wheel, which is not unpacked."""
        archive = zipfile.ZipFile(path)
        return cls(
            lambda name: archive.read(name).decode("utf-8"),
            lambda: (name for name in archive.namelist() if name.endswith(".py")),
        )

    def text(self, name: str) -> str:
        """The source at a path.

        Raises:
            LookupError: there is none that can be read.
        """
        try:
            return self._read(name)
        except (OSError, KeyError, UnicodeDecodeError) as error:
            raise LookupError(f"{name} cannot be read") from error

    def module(self, name: str) -> ast.Module:
        """The parsed source at a path.

        Raises:
            LookupError: there is none, or it is no Python that this interpreter understands.
        """
        if name not in self._parsed:
            try:
                self._parsed[name] = ast.parse(self.text(name))
            except SyntaxError as error:
                raise LookupError(f"{name} cannot be parsed: {error}") from error
        return self._parsed[name]

    def names(self) -> Iterator[str]:
        """Paths of all sources."""
        return iter(self._names())

    def find(self, place: str) -> Definition:
        """The definition at "path.py:Class.method".

        Raises:
            LookupError: it is not there.
        """
        name, _, dotted = place.partition(":")
        found: Definition | None = None
        body: Sequence[ast.stmt] = self.module(name).body
        for part in dotted.split("."):
            found = next((node for node in _definitions(body) if node.name == part), None)
            if found is None:
                raise LookupError(f"{name} has no {dotted}")
            body = found.body
        if found is None:
            raise LookupError(f"{place!r} names no definition")
        return found


class Expectation:
    """One thing that must be so; `place` is "path.py:Class.method"."""

    place: str

    def problem(self, tree: SourceTree) -> str:
        """What is wrong, or ""."""
        try:
            return self._problem(tree)
        except LookupError as error:
            return str(error.args[0])

    def _problem(self, tree: SourceTree) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Function(Expectation):
    """A function whose parameters, in order and with "=" after those that have a default, are one of these lists."""

    place: str
    signatures: tuple[str, ...]

    def _problem(self, tree: SourceTree) -> str:
        node = tree.find(self.place)
        if isinstance(node, ast.ClassDef):
            return f"{self.place} is a class, not a function"
        found = _signature(node.args)
        if found in self.signatures:
            return ""
        return f"{self.place} takes ({found}); known: " + " or ".join(f"({known})" for known in self.signatures)


@dataclass(frozen=True)
class Fields(Expectation):
    """A class (a dataclass, a protocol, settings) that annotates or assigns these names in its body or bases them on methods."""

    place: str
    names: tuple[str, ...]

    def _problem(self, tree: SourceTree) -> str:
        node, there = tree.find(self.place), set[str]()
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                there.add(item.target.id)
            elif isinstance(item, ast.Assign):
                there |= {target.id for target in item.targets if isinstance(target, ast.Name)}
            elif isinstance(item, Definition):
                there.add(item.name)
        return _missing(self.place, self.names, there)


@dataclass(frozen=True)
class Instance(Expectation):
    """A class that assigns these attributes to self somewhere in its body."""

    place: str
    names: tuple[str, ...]

    def _problem(self, tree: SourceTree) -> str:
        there = {
            node.attr
            for node in ast.walk(tree.find(self.place))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_name(node.value, "self")
        }
        return _missing(self.place, self.names, there)


@dataclass(frozen=True)
class Constant(Expectation):
    """A name at the top of a module that is bound to this literal."""

    place: str
    value: object

    def _problem(self, tree: SourceTree) -> str:
        name, _, wanted = self.place.partition(":")
        for node in tree.module(name).body:
            if isinstance(node, ast.Assign) and any(_is_name(target, wanted) for target in node.targets):
                try:
                    found = ast.literal_eval(node.value)
                except ValueError:
                    return f"{self.place} is not a plain value"
                return "" if found == self.value else f"{self.place} is {found!r}; known: {self.value!r}"
        return f"{name} does not define {wanted}"


@dataclass(frozen=True)
class Uses(Expectation):
    """A definition whose source contains each of these expressions, whatever their layout."""

    place: str
    expressions: tuple[str, ...]

    def _problem(self, tree: SourceTree) -> str:
        there = {ast.unparse(node) for node in ast.walk(tree.find(self.place)) if isinstance(node, ast.expr)}
        wanted = [ast.unparse(ast.parse(text, mode="eval")) for text in self.expressions]
        return _missing(self.place, wanted, there)


@dataclass(frozen=True)
class Calls(Expectation):
    """All that a package does with an object that it keeps under one of these names is known.

    Attributes:
        place: the package's folder, for messages and as the beginning of the paths that are searched.
        holders: dotted names under which it is kept, such as "self.eplb_state".
        known: attributes that may be used.
        ignored: beginnings of paths that are not searched, since the plugin declines what needs them.
    """

    place: str
    holders: tuple[str, ...]
    known: frozenset[str]
    ignored: tuple[str, ...] = field(default=())

    def _problem(self, tree: SourceTree) -> str:
        unknown: list[str] = []
        for name in tree.names():
            if not name.startswith(self.place) or name.startswith(self.ignored):
                continue
            text = tree.text(name)
            if not any(holder.rpartition(".")[2] in text for holder in self.holders):
                continue
            for node in ast.walk(tree.module(name)):
                if not isinstance(node, ast.Attribute) or node.attr in self.known:
                    continue
                if ast.unparse(node.value) in self.holders:
                    unknown.append(f"{name}:{node.lineno} uses {ast.unparse(node)}")
        return "; ".join(unknown)


def problems(tree: SourceTree, expectations: Iterable[Expectation]) -> list[str]:
    """What does not fit, one sentence each; empty if all does."""
    return [problem for expectation in expectations if (problem := expectation.problem(tree))]


def _definitions(body: Sequence[ast.stmt]) -> Iterator[Definition]:
    """Classes and functions of a body, also those under `if` and `try`, which sources use for platforms."""
    for node in body:
        if isinstance(node, Definition):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse])


def _signature(arguments: ast.arguments) -> str:
    """(a, b, c=1, *, d) as "a, b, c=, *, d"."""
    plain = [*arguments.posonlyargs, *arguments.args]
    first_default = len(plain) - len(arguments.defaults)
    words = [f"{argument.arg}{'=' if index >= first_default else ''}" for index, argument in enumerate(plain)]
    if arguments.vararg:
        words.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        words.append("*")
    words += [
        f"{argument.arg}{'=' if default is not None else ''}"
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        words.append(f"**{arguments.kwarg.arg}")
    return ", ".join(words)


def _missing(place: str, wanted: Iterable[str], there: set[str]) -> str:
    missing = [name for name in wanted if name not in there]
    return f"{place} has no {', '.join(missing)}" if missing else ""


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
