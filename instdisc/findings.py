"""What `instdisc doctor` found, and how it is shown."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ok: training can go on with it; advice: what to do, empty where nothing is."""

    name: str
    value: str
    ok: bool = True
    advice: str = ""


def as_document(found: list[Finding]) -> dict[str, Any]:
    """Return the findings as a JSON-able document, `{"findings": [...]}`."""
    return {"findings": [asdict(finding) for finding in found]}


def as_table(found: list[Finding], *, width: int = 100) -> str:
    """Return the findings as text: a mark, a name and a value to a line, advice under it."""
    name_width = max((len(finding.name) for finding in found), default=0)
    indent = " " * (name_width + 7)
    lines = []
    for finding in found:
        head = f"{'ok' if finding.ok else '!!':<4} {finding.name:<{name_width}}  "
        lines.append(textwrap.fill(finding.value, width, initial_indent=head, subsequent_indent=indent))
        if finding.advice:
            lines.append(textwrap.fill(finding.advice, width, initial_indent=indent, subsequent_indent=indent))
    num_bad = sum(not finding.ok for finding in found)
    lines.append("")
    lines.append(f"{num_bad} of {len(found)} need attention (!!)." if num_bad else "Nothing needs attention.")
    return "\n".join(lines)
