"""Write docs/methods.md from the registry: `make docs`."""

from __future__ import annotations

import inspect
from pathlib import Path

from secateurs.cli import kind_of, plain_default, summary
from secateurs.registry import VOCABULARY, WHEN, list_methods, options_of

PAGE = Path(__file__).with_name("methods.md")

HEAD = """# Methods

Written by `make docs` from the registry; do not edit. Run a method with
`secateurs prune MODEL --data DATA --method NAME --budget BUDGET`, or in Python with
`secateurs.prune(model, "NAME", budget, task)`; one that chooses samples (a Selector) with
`secateurs select EMBEDDINGS --method NAME --keep FRACTION --out FILE.parquet`, or
`secateurs.select(source, "NAME", keep)`.

| name | what it does | paper | unit | when | kind | budgets |
| --- | --- | --- | --- | --- | --- | --- |
"""


def row(name: str, cls: type) -> str:
    paper = f"{cls.paper.title}, {cls.paper.venue} {cls.paper.year}" if cls.paper else "baseline"
    when = ", ".join(WHEN[w] for w in cls.tags.values("when"))
    units = ", ".join(cls.tags.values("unit"))
    budgets = ", ".join("N:M" if b == "n:m" else b for b in cls.budgets)
    link = f"[`{name}`](#{name})"
    return f"| {link} | {summary(cls)} | {paper} | {units} | {when} | {kind_of(cls)} | {budgets} |"


def section(name: str, cls: type) -> str:
    lines = [f"## {name}", "", inspect.cleandoc(cls.__doc__ or ""), ""]
    if cls.aliases:
        lines += ["Also called " + ", ".join(f"`{alias}`" for alias in cls.aliases) + ".", ""]
    if cls.paper:
        lines += [
            f"Paper: {cls.paper.title}, {cls.paper.venue} {cls.paper.year}, {cls.paper.id}.",
            "",
        ]
    tags = ", ".join(f"{axis} {'+'.join(cls.tags.values(axis))}" for axis in VOCABULARY)
    lines += [f"Tags: {tags}. Needs: {', '.join(cls.needs)}.", ""]
    if options := options_of(cls):
        lines += ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
        for o in options:
            meaning = o.help + (f" [{o.unit}]" if o.unit else "")
            kind = o.type.replace("|", "\\|")
            lines.append(f"| `{o.name}` | {kind} | {plain_default(o.default)} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    found = list_methods()
    table = "\n".join(row(name, cls) for name, cls in found.items())
    sections = "\n".join(section(name, cls) for name, cls in found.items())
    return f"{HEAD}{table}\n\n{sections}"


if __name__ == "__main__":
    PAGE.write_text(page())
