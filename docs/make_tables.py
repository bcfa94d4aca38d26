"""Writes the tables of the documentation that follow from the code: `python docs/make_tables.py`, or `make docs`."""

import re
from pathlib import Path

from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.records import Family

README = Path(__file__).parents[1] / "README.md"


def cause_table() -> str:
    """The causes by family, one line each, as Markdown."""
    order = list(Family)
    causes = sorted(catalogue(), key=lambda cause: (order.index(cause.family), cause.id))
    rows = [f"| {c.family.value.replace('_', ' ')} | `{c.id}` | {c.meaning} |" for c in causes]
    return "\n".join(["| family | cause | meaning |", "| --- | --- | --- |", *rows])


def with_table(text: str, name: str, table: str) -> str:
    """A text with the table between the markers of this name replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{table}{found[2]}", text, count=1, flags=re.DOTALL)


def main() -> None:
    """Write the tables in their places."""
    README.write_text(with_table(README.read_text("utf-8"), "causes", cause_table()), "utf-8")


if __name__ == "__main__":
    main()
