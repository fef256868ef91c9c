"""A benchmark's document for people."""

from __future__ import annotations

from typing import Any


def as_text(document: dict[str, Any]) -> str:
    """Return the results of a benchmark's document as a table, with where they were measured."""
    where = document["environment"]
    machine = where["gpu"] or where["cpu"]
    load = " ".join(f"{value:.1f}" for value in where["load_average"])
    lines = [
        f"{document['benchmark']}: {machine}, {where['torch_threads']} threads, torch {where['versions']['torch']}, "
        f"commit {where['commit']}, load {load}, {where['date']}",
        f"{'':<44}{'ours':>10}{'reference':>12}{'ratio':>8}  unit",
    ]
    for result in document["results"]:
        lines.append(
            f"{result['name']:<44}{result['value']:>10.4g}{result['reference']:>12.4g}{result['ratio']:>8.3f}"
            f"  {result['unit']}"
        )
        lines.append(f"    ours {_range(result['spread'])}; reference {_range(result['reference_spread'])}")
        if len(result["pair_ratios"]) > 1:
            ratios = result["pair_ratios"]
            lines.append(f"    ratio by pair {min(ratios):.3f} to {max(ratios):.3f}, median {result['ratio']:.3f}")
        lines.append(f"    reference: {result['reference_is']}")
    lines.append("ratio: how many times better ours is (above 1: ours is better), the median over the pairs of trials.")
    return "\n".join(lines)


def _range(spread: dict[str, float]) -> str:
    return f"{spread['min']:.4g} to {spread['max']:.4g} (middle half {spread['q1']:.4g} to {spread['q3']:.4g})"
