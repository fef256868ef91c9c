"""Configuration files in YAML, read so that whatever is wrong in them can be told with its key and its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]
"""The way to a value: names of keys, and positions in lists."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, and what was found and expected."""

    key: Key
    what: str


@dataclass(frozen=True)
class Document:
    """One document of a file. lines: of each key's value in the file, counted from 1; problems: of the YAML itself."""

    value: Any
    lines: dict[Key, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


class ConfigProblems(ValueError):
    """A configuration file holds something wrong: one line for each, with the key."""

    def __init__(self, path: str, lines: list[str]):
        self.path, self.lines = path, lines
        count = "one problem" if len(lines) == 1 else f"{len(lines)} problems"
        super().__init__("\n  ".join([f"{path}: {count}", *lines]))

    def __reduce__(self):
        return ConfigProblems, (self.path, self.lines)


def read_documents(path: Path) -> list[Document]:
    """Return the documents of a YAML file. Raises OSError, or ConfigProblems where it is not YAML."""
    loader: Any = None
    documents = []
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(path.read_bytes())
        while loader.check_node():
            node = loader.get_node()
            documents.append(_document(node, loader.construct_document(node)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigProblems(str(path), [f"not YAML: {' '.join(str(error).split())}"]) from error
    finally:
        if loader is not None:
            loader.dispose()
    return [document for document in documents if document.value is not None]


def raise_problems(path: Path, found: Iterable[tuple[Document, Problem]]) -> None:
    """Raise ConfigProblems with every problem, in the order of the file; nothing where there is none."""
    told = sorted({(_line(document, problem.key), _told(document, problem)) for document, problem in found})
    if told:
        raise ConfigProblems(str(path), [line for _, line in told])


def name_of(key: Key) -> str:
    """Return "a.b[0].c" for ("a", "b", 0, "c")."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in key]
    return "".join(parts).lstrip(".") or "the whole document"


def closest(name: object, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?", or the few that there are, or ""."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are {', '.join(names)}" if 0 < len(names) <= 12 else ""


def unknown_key(name: object, known: Iterable[str]) -> str:
    """Say that a key is unknown, and which known one may be meant."""
    return "; ".join(filter(None, ["unknown key", closest(name, known)]))


def _document(node: yaml.Node, value: Any) -> Document:
    lines: dict[Key, int] = {}
    problems: list[Problem] = []
    for key, line, is_repeated in _walk(node, ()):
        if is_repeated:
            problems.append(Problem(key, f"stands twice, again in line {line}: only the last counts; remove one"))
        lines.setdefault(key, line)
    return Document(value, lines, tuple(problems))


def _walk(node: yaml.Node, key: Key) -> Iterator[tuple[Key, int, bool]]:
    """Every key below a node with its line, and whether it stood there before."""
    yield key, node.start_mark.line + 1, False
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for name, child in node.value:
            below = (*key, str(name.value))
            if below in seen:
                yield below, name.start_mark.line + 1, True
            else:
                yield from ((k, name.start_mark.line + 1 if k == below else n, r) for k, n, r in _walk(child, below))
            seen.add(below)
    elif isinstance(node, yaml.SequenceNode):
        for position, child in enumerate(node.value):
            yield from _walk(child, (*key, position))


def _line(document: Document, key: Key) -> int:
    while key not in document.lines and key:
        key = key[:-1]
    return document.lines.get(key, 0)


def _told(document: Document, problem: Problem) -> str:
    return f"line {_line(document, problem.key)}: {name_of(problem.key)}: {problem.what}"
