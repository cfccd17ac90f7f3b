"""Tables of a study's page, and the spread over seeds that they show."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def over_seeds(values: Collection[float]) -> dict[str, Any] | None:
    """Return mean, least and most of the seeds' values; None without any."""
    if not values:
        return None
    mean = sum(values) / len(values)
    return {"mean": mean, "least": min(values), "most": max(values), "seeds": len(values)}


def spread(found: Mapping[str, Any] | None) -> str:
    """Return what ``over_seeds`` found for a table."""
    if found is None:
        return ""
    if found["seeds"] == 1:
        return f"{found['mean']:.4g}"
    return f"{found['mean']:.4g} ({found['least']:.4g} to {found['most']:.4g})"
