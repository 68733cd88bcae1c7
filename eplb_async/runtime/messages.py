"""What is said on the control socket: one JSON object per line each way. The only place that knows the wire.

    {"version": 1, "id": 7, "method": "rebalance", "group": "deepseek-v3", "dry_run": false}
    {"version": 1, "id": 7, "ok": true, "result": {...}}
    {"version": 1, "id": 7, "ok": false, "error": {"kind": "ControlError", "message": "..."}}

`group` may be left out where one group runs. Unknown fields, methods and versions are refused. The shapes of results are
the structs below; times are seconds, PAR see core/score.py.
"""

from typing import Any

import msgspec

from eplb_async.core.errors import ControlError
from eplb_async.observability.history import Decision

__all__ = [
    "MAX_ANSWER",
    "MAX_LINE",
    "VERSION",
    "AnswerError",
    "AnswerLine",
    "Call",
    "CostStatus",
    "DaemonStatus",
    "GroupStatus",
    "History",
    "Pause",
    "PhaseStatus",
    "PlanProgress",
    "RankStatus",
    "Rebalance",
    "Reload",
    "Resume",
    "ShadowStatus",
    "Status",
    "Stop",
    "decode_call",
    "encode_line",
    "refusal",
]

VERSION = 1
MAX_LINE = 64 << 10
"""Bytes of a request; longer ones are refused and the connection is closed."""
MAX_ANSWER = 64 << 20
"""Bytes of an answer that a client accepts: 4096 decisions of 94 layers are some 12 MB."""


class _Base(msgspec.Struct, frozen=True, kw_only=True, tag_field="method", forbid_unknown_fields=True):
    version: int
    id: int = 0


class Status(_Base, frozen=True, tag="status"):
    """Answered with DaemonStatus."""


class Rebalance(_Base, frozen=True, tag="rebalance"):
    """Decide now; answered with the Decision once its plan has ended, or as soon as it is clear that there is none."""

    group: str = ""
    dry_run: bool = False


class Pause(_Base, frozen=True, tag="pause"):
    """Stop decisions of the daemon's own; an operator's rebalance still works. Answered with the groups' names."""

    group: str = ""


class Resume(_Base, frozen=True, tag="resume"):
    """Undo `pause`."""

    group: str = ""


class History(_Base, frozen=True, tag="history"):
    """Answered with {group: [Decision]}, oldest first."""

    group: str = ""
    most: int = 32


class Reload(_Base, frozen=True, tag="reload"):
    """Read the settings again, as SIGHUP does. Answered with null; an error leaves the old ones."""


class Stop(_Base, frozen=True, tag="stop"):
    """Stop the daemon in order, as SIGTERM does. Answered with null."""


Call = Status | Rebalance | Pause | Resume | History | Reload | Stop


class AnswerError(msgspec.Struct, frozen=True):
    """`kind` is a class of core/errors.py."""

    kind: str
    message: str


class AnswerLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer."""

    version: int
    id: int
    ok: bool
    result: Any = None
    error: AnswerError | None = None


class RankStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One rank: `state` of its member line in lower case, or "gone"; counters as (generation, position). `budget_bytes`: that a step of it may begin to
    pull now; `pauses`, `slowdowns`: of its pulls since it attached."""

    rank: int
    pid: int
    state: str
    step: int
    staged: tuple[int, int]
    committed: tuple[int, int]
    records: int
    lost: int
    missed: int
    damaged: int
    unfolded: int
    budget_bytes: int = 0
    pauses: int = 0
    slowdowns: int = 0


class PlanProgress(msgspec.Struct, frozen=True, kw_only=True):
    """The active plan: entries in all, staged and committed by all ranks, seconds since it was published."""

    generation: int
    num_entries: int
    staged: int
    committed: int
    age_s: float
    reason: str


class ShadowStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Of a group whose plans are not applied: means of PAR over complete windows, as served and had they been applied; what that had moved."""

    windows: int
    par_live: float | None
    par_shadow: float | None
    plans: int
    moves: int
    bytes_moved: int


class CostStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a step costs, fitted from the windows with step times: see core/cost.py. `known`: whether plans are weighed by it; the mean step in
    milliseconds, and of it the fixed part, what goes with all tokens, those of the busiest rank with their standard error, pulled bytes and commits."""

    windows: int
    known: bool
    step_ms: float
    fixed_ms: float
    even_ms: float
    tokens_ms: float
    tokens_error_ms: float | None
    pulls_ms: float
    commits_ms: float


class PhaseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The load of one phase, whether placement serves it or not.

    Fields:
        phase: prefill, decode or mixed.
        weight: what one of its tokens counts in the windows that placement serves.
        steps, tokens: of all ranks of this node together, since the daemon found the group.
        windows: those of the newest that have such steps.
        par_live: mean PAR of these under the live placement, over layers with load; None without any.
    """

    phase: str
    weight: float
    steps: int
    tokens: int
    windows: int
    par_live: float | None


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One group. `state`: "joining", "serving", "paused" or "ended"; `problems` are sentences for people; `serves`: see DaemonSettings.serve;
    `phases`: steps of each phase, counted by each rank of this node; `phase_loads`: those with traffic; `cost`: None before the first fit."""

    group: str
    incarnation: int
    state: str
    problems: tuple[str, ...]
    ranks: tuple[RankStatus, ...]
    par_live: float | None = None
    windows: int = 0
    window_steps: int = 0
    serves: str = "all"
    phases: dict[str, int] = {}
    phase_loads: tuple[PhaseStatus, ...] = ()
    lost_records: int = 0
    generation: int = 0
    plan: PlanProgress | None = None
    planning: bool = False
    shadow: ShadowStatus | None = None
    cost: CostStatus | None = None
    decisions: tuple[Decision, ...] = ()


class DaemonStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon: CPU seconds and share of a core since it started, resident bytes, event loop lag, pool, settings."""

    pid: int
    release: str
    uptime_s: float
    cpu_s: float
    cpu_share: float
    memory_bytes: int
    loop_lag_s: float
    loop_lag_worst_s: float
    policy: str
    pool: dict[str, Any]
    groups: tuple[GroupStatus, ...]


_decoder = msgspec.json.Decoder(Call)


class _Head(msgspec.Struct):
    version: int
    id: int = 0


_head = msgspec.json.Decoder(_Head)


def decode_call(line: bytes) -> tuple[Call | None, AnswerLine | None]:
    """A request and None, or None and the answer that refuses it."""
    number = 0
    try:
        head = _head.decode(line)
        number = head.id
        if head.version != VERSION:
            return None, refusal(
                number, ControlError(f"version {head.version} is not spoken here; use version {VERSION}")
            )
        return _decoder.decode(line), None
    # UnicodeDecodeError: msgspec's for bytes in a string that are no UTF-8
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        needed = "one JSON object per line with version, id and method"
        return None, refusal(number, ControlError(f"not a request: {error}; needed {needed}"))


def refusal(number: int, error: Exception) -> AnswerLine:
    """The answer that carries an error."""
    return AnswerLine(version=VERSION, id=number, ok=False, error=AnswerError(type(error).__name__, str(error)))


def encode_line(message: Call | AnswerLine) -> bytes:
    """One line."""
    return msgspec.json.encode(message) + b"\n"
