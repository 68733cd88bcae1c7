"""The house rules find what they are for, and only that."""

import pytest

from scripts.house_rules import check_file

GOOD = '''"""Doc."""

__all__ = ["run"]


def run(a: int, b: int) -> int:
    return a + b
'''
LONG_BODY = "    pass\n" * 60
LONG_FILE = "x = 1\n" * 401


def rules(source: str, name: str = "eplb_async/core/thing.py") -> list[str]:
    """Line and rule of each finding, as `line rule`."""
    return [" ".join(part.strip() for part in finding.split(":")[1:3]) for finding in check_file(source, name)]


def test_good_file_has_no_findings() -> None:
    """A file that keeps all rules passes."""
    assert rules(GOOD) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (GOOD.replace("    return a + b\n", LONG_BODY), ["6 size"]),
        (GOOD.replace("a: int, b: int", "a, b, c, d, e, f, *, g"), ["6 size"]),
        (GOOD + "\n" + LONG_FILE, ["401 size"]),
        (GOOD.replace('"run"', '"run", "run"'), ["1 public"]),
        (GOOD.replace('"run"', '"run", "walk"'), ["1 public"]),
        (GOOD.replace('"run"', ""), ["6 public"]),
        (GOOD.replace("__all__", "names"), ["1 public"]),
        (GOOD + "\nwith contextlib.suppress(Exception):\n    run(1, 2)\n", ["9 swallowing"]),
    ],
)
def test_broken_rule_is_found_at_its_line(source: str, found: list[str]) -> None:
    """Each broken rule is reported once, at the line to change."""
    assert rules(source) == found


@pytest.mark.parametrize(
    "source",
    [
        GOOD.replace("def run", "# size: a state machine reads best in one piece\ndef run").replace(
            "    return a + b\n", LONG_BODY
        ),
        GOOD.replace("a: int, b: int) -> int:", "a, b, c, d, e, f, g):  # size: options of a command"),
        GOOD.replace('"""Doc."""\n', '"""Doc."""\n\n# size: one table\n') + "\n" + LONG_FILE,
    ],
)
def test_opt_out_names_its_reason_where_it_holds(source: str) -> None:
    """A comment `# size: <reason>` at the function or at the file's head lifts the limit."""
    assert rules(source) == []


def test_opt_out_of_a_function_does_not_cover_another() -> None:
    """The comment lifts one function's limit, not that of its neighbours."""
    source = GOOD.replace("def run", "# size: because\ndef run") + "\n\ndef _more():\n" + LONG_BODY
    assert rules(source) == ["11 size"]


@pytest.mark.parametrize("name", ["eplb_async/core/utils.py", "tests/test_helper_lists.py", "eplb_async/common/x.py"])
def test_empty_names_are_refused(name: str) -> None:
    """utils, common, misc, manager and helper say nothing, in any part of a module's path."""
    assert rules('"""Doc."""\n', name) == ["1 names"]


def test_self_is_not_a_parameter() -> None:
    """Six parameters beside self are fine."""
    source = GOOD + "\n\nclass _Thing:\n    def run(self, a, b, c, d, e, f):\n        return a\n"
    assert rules(source) == []
