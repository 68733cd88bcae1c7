"""The demo's text and stream: deterministic, complete, and the same for a rank whoever asks."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_async.demo.text as module
from eplb_async.core.errors import SpecError, UnknownName
from eplb_async.demo.text import DOMAINS, Stream, load_domain

ROOT = Path(module.__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/make_demo_text.py as a module."""
    path = ROOT / "scripts" / "make_demo_text.py"
    spec = importlib.util.spec_from_file_location("make_demo_text", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_domain_is_clean_text_with_a_source(domain: str) -> None:
    """About 24 KB of valid UTF-8, long lines unique, and named in SOURCES.md."""
    data = load_domain(domain).tobytes()
    text = data.decode("utf-8")
    assert 20_000 < len(data) <= 24_576
    assert not {"\r", "\ufffd", "\x00"} & set(text)
    lines = [line for line in text.splitlines() if len(line.strip()) >= 60]
    assert len(lines) - len(set(lines)) <= len(lines) // 20
    sources = (Path(module.__file__).parent / "text" / "SOURCES.md").read_text(encoding="utf-8")
    assert f"`{domain}.txt`" in sources


def test_domains_have_their_own_bytes() -> None:
    """Scripts differ clearly: total-variation distance of byte shares above 0.4 between writing systems."""
    groups = ("english", "russian", "arabic", "chinese", "japanese")
    shares = {domain: np.bincount(load_domain(domain), minlength=256) / load_domain(domain).size for domain in groups}
    for one, other in itertools.combinations(groups, 2):
        assert np.abs(shares[one] - shares[other]).sum() / 2 > 0.4


def test_an_unknown_domain_names_the_known() -> None:
    """The error lists what there is."""
    with pytest.raises(UnknownName, match="unknown domain 'klingon'; known: arabic, chinese"):
        load_domain("klingon")


def test_windows_follow_one_another() -> None:
    """The worked example: 2 ranks, batch 1: step 0 reads windows 0 and 1, step 1 windows 2 and 3."""
    stream = Stream(domains=("web", "german"), steps_per_domain=2, num_ranks=2, batch=1, length=10)
    text = load_domain("web")
    for window, (step, rank) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        tokens = stream.tokens(step, rank)
        assert (tokens.dtype, tokens.shape) == (torch.int64, (1, 10))
        assert tokens[0].tolist() == text[10 * window : 10 * window + 10].tolist()
    assert stream.tokens(2, 0)[0].tolist() == load_domain("german")[:10].tolist()
    assert [stream.domain(step) for step in range(4)] == ["web", "web", "german", "german"]


def test_a_domain_that_comes_back_goes_on() -> None:
    """Its second visit reads what follows the first, and a text that ends starts again."""
    stream = Stream(domains=("web", "german", "web"), steps_per_domain=1, num_ranks=1, batch=1, length=10)
    assert stream.tokens(2, 0)[0].tolist() == load_domain("web")[10:20].tolist()
    windows = load_domain("web").size // 10
    around = Stream(domains=("web",), steps_per_domain=windows + 1, num_ranks=1, batch=1, length=10)
    assert torch.equal(around.tokens(windows, 0), around.tokens(0, 0))


@settings(max_examples=50, deadline=None)
@given(
    domains=st.lists(st.sampled_from(DOMAINS), min_size=1, max_size=4),
    per_domain=st.integers(1, 5),
    num_ranks=st.integers(1, 4),
    batch=st.integers(1, 3),
)
def test_a_batch_is_a_function_of_step_and_rank(
    domains: list[str], per_domain: int, num_ranks: int, batch: int
) -> None:
    """Two streams give the same batches in any order, and no window twice before the text has ended."""
    stream, other = (
        Stream(domains=domains, steps_per_domain=per_domain, num_ranks=num_ranks, batch=batch, length=16)
        for _ in range(2)
    )
    assert stream.num_steps == len(domains) * per_domain
    for rank in range(num_ranks):
        backwards = [other.tokens(step, rank) for step in reversed(range(other.num_steps))]
        assert all(map(torch.equal, stream.steps(rank), reversed(backwards)))
    # long windows of prose are unique, so equal ones would mean that one was read twice
    long = Stream(domains=domains, steps_per_domain=per_domain, num_ranks=num_ranks, batch=batch, length=80)
    rows = [tuple(row) for rank in range(num_ranks) for tokens in long.steps(rank) for row in tokens.tolist()]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch of a stream is 0; it must be at least 1"),
        ({"length": 1_000_000}, "1000000 bytes per sequence over"),
        ({"num_ranks": -1}, "num_ranks of a stream is -1"),
        ({"domains": ("klingon",)}, "unknown domain 'klingon'"),
    ],
)
def test_a_bad_stream_is_refused(options: dict[str, int], message: str) -> None:
    """Sizes that make no batch, and names that are no domain."""
    with pytest.raises((SpecError, UnknownName), match=message):
        Stream(**options)  # type: ignore[arg-type]


def test_outside_the_stream_is_refused() -> None:
    """A step or rank that the stream does not have."""
    stream = Stream(domains=("web",), steps_per_domain=2, num_ranks=2)
    for step, rank in ((2, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(SpecError, match="of a stream"):
            stream.tokens(step, rank)


def test_unfinished_messages_are_not_text(script: ModuleType) -> None:
    """The catalogue parser takes finished messages with all plural forms, and leaves fuzzy, obsolete and short ones."""
    catalogue = """msgid ""
msgstr "Language: de, a header that is no message"

#: a.py
msgid "The first "
"original"
msgstr "Das erste "
"Original\\n in zwei Teilen"

#, fuzzy
msgid "uncertain original"
msgstr "unsichere Übersetzung"

#~ msgid "old original text"
#~ msgstr "alte Übersetzung hier"

msgid "one thing is here"
msgid_plural "many things"
msgstr[0] "ein Ding ist hier"
msgstr[1] "viele Dinge hier"

msgid "yes"
msgstr "ja"
"""
    assert list(script.po_messages(catalogue)) == [
        ("The first original", "Das erste Original in zwei Teilen"),
        ("one thing is here", "ein Ding ist hier"),
        ("one thing is here", "viele Dinge hier"),
    ]


def test_held_out_messages_stay_out_of_training(script: ModuleType, tmp_path: Path) -> None:
    """No original is in both halves, also when another source translates it, nor a translation that reads the same."""
    sentence = "Satz Nummer {} mit genügend vielen Buchstaben, Nummer {}".format
    letters = ["".join(pair) for pair in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2)]
    own = "".join(f'msgid "original {name}"\nmsgstr "{sentence(name, name)}"\n\n' for name in letters)
    other = "".join(f'msgid "original {name}"\nmsgstr "Eine andere Fassung von {name}"\n\n' for name in letters)
    other += "".join(f'msgid "elsewhere {name}"\nmsgstr "{sentence(name, name).upper()} 7!"\n\n' for name in letters)
    for package, text in (("django", own), ("oscar", other)):
        folder = tmp_path / package / "locale" / "de" / "LC_MESSAGES"
        folder.mkdir(parents=True)
        (folder / "django.po").write_text(text, encoding="utf-8")
    train, held_out = script.split_messages(("de", "de_DE"), tmp_path / "django", tmp_path)
    held = {line.split()[2] for line in held_out.splitlines()}
    trained = {line.split()[2] for line in train.splitlines() if line.startswith("Satz")}
    versions = {line.split()[-1] for line in train.splitlines() if line.startswith("Eine")}
    assert 300 < len(held) < len(letters)
    assert trained
    assert versions
    assert not held & (trained | versions)
    assert not {name.upper() for name in held} & {
        line.split()[2] for line in train.splitlines() if line.startswith("SATZ")
    }
