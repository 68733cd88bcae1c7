"""The exception tree is the one that is drawn, and its errors say what happened and survive a trip between processes."""

import pickle

import pytest

from eplb_async.core import errors
from eplb_async.core.errors import EplbError

EXAMPLES: list[EplbError] = [
    errors.ConfigError("EPLB_ASYNC_HOOK_LAG", "is 0"),
    errors.UnknownName("policy", "defualt", ["static", "default"]),
    errors.SpecMismatch("main", ["lag is 2 here and 3 in the group"]),
    errors.HookClosed("main", 3, "detached"),
    errors.RankTaken("main", 3, 4242),
    errors.AttachTimeout("main", [1, 2], 4, 12.5),
    errors.PeerLost("main", 3, 17, 2.5, "process 4242 is gone"),
    errors.StepDrift("main", 0, 3, 17, 99, 64),
    errors.SegmentMissing("/eplb_async.0.main.board"),
    errors.SegmentRefused("/eplb_async.0.main.board", "version 2", "version 1"),
    errors.NoSharedMemory("/eplb_async.0.main.board", 123456, "no room in /dev/shm"),
    errors.DaemonUnavailable("/run/x"),
    errors.DaemonRunning("/run/x"),
    errors.PolicyError("default", "raised ValueError"),
    errors.SpecError("P is not divisible"),
    errors.InternalError("broken"),
]


def drawn_tree() -> dict[str, str]:
    """Parent of each class, from the drawing in the module's docstring."""
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.strip(" |`-").split(" ")[0]
        if not line.startswith("    ") or not name:
            continue
        column = line.index(name)
        while path and path[-1][0] >= column:
            path.pop()
        if path:
            parents[name] = path[-1][1]
        path.append((column, name))
    return parents


def test_tree_is_as_drawn() -> None:
    """Every class stands in the drawing below its base, and nothing else does."""
    classes = {name: getattr(errors, name) for name in errors.__all__ if name != "EplbError"}
    assert drawn_tree() == {name: kind.__bases__[0].__name__ for name, kind in classes.items()}


def test_settings_are_value_errors() -> None:
    """Whoever catches ValueError for bad arguments catches ours."""
    assert issubclass(errors.SettingError, ValueError)
    assert not issubclass(errors.PeerLost, ValueError)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error: EplbError) -> None:
    """An error that crosses a process boundary keeps its class, its message and what it carries."""
    twin = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert twin.__dict__ == error.__dict__


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (EXAMPLES[1], ["policy", "'defualt'", "default, static"]),
        (EXAMPLES[4], ["'main'", "rank 3", "4242"]),
        (EXAMPLES[5], ["[1, 2] of 4", "12.5 s", "attach_deadline_s"]),
        (EXAMPLES[6], ["rank 3", "step 17", "2.5 s", "process 4242 is gone", "Do not run"]),
        (EXAMPLES[7], ["rank 3", "17", "99", "64 steps", "dummy steps"]),
        (EXAMPLES[9], ["version 2", "version 1", "gc"]),
        (EXAMPLES[10], ["123,456", "no room", "--shm-size"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, EplbError) else "",
)
def test_messages_say_what_was_found_and_what_to_do(error: EplbError, words: list[str]) -> None:
    """The numbers and names that one needs to act are in the message."""
    for word in words:
        assert word in str(error)
