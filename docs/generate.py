"""Writes the tables of quantizers and methods in the documents from the code: ``python docs/generate.py [--check]``.

The text between ``<!-- NAME begin -->`` and ``<!-- NAME end -->`` is replaced. ``--check`` writes nothing and fails if
a document is out of date. Tables of what needs torch are left as they are where it is missing.
"""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import vqrs
from vqrs import quantizers

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("quantizers", "benchmark", "reliability"))]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kinds_table() -> str:
    """One line a kind: its class, its name in files and on the command line, what it does, how it is read."""
    classes = {getattr(quantizers, name)._kind: name for name in quantizers.__all__}
    rows = [
        [f"`{classes[kind['name']]}`", f"`{kind['name']}`", kind["about"], f"`{kind['form']}`"] for kind in vqrs.kinds()
    ]
    return markdown(["estimator", "kind", "what it does", "form"], rows)


def parameters_table() -> str:
    """One line a kind: its parameters and their defaults."""
    rows = [
        [f"`{kind['name']}`", ", ".join(f"`{name}={default!r}`" for name, default in kind["parameters"].items())]
        for kind in vqrs.kinds()
    ]
    return markdown(["kind", "parameters and their defaults"], rows)


def methods_table() -> str:
    """One line a method of trained embeddings: what it does, its stages, what it keeps, whether it becomes a table."""
    import vqrs.torch

    rows = [
        [
            f"`{name}`",
            method.about,
            ", ".join(method.stages),
            "yes" if method.per_id_state else "no",
            "yes" if method.has_table else "no",
        ]
        for name, method in vqrs.torch.methods().items()
    ]
    return markdown(["method", "what it does", "stages", "per id", "table file"], rows)


def models_table() -> str:
    """One line a click model."""
    from vqrs.bench.models import models

    return markdown(["model", "what it does"], [[f"`{name}`", model.about] for name, model in models().items()])


def faults_table() -> str:
    """One line a fault: how often it was injected by ``make faults``, and how often what was promised held."""
    records = json.loads((ROOT / "benches" / "faults" / "results.json").read_text(encoding="utf-8"))
    rows = []
    for key in sorted(records, key=lambda key: (int(re.findall(r"\d+", key)[0]), key)):
        record = records[key]
        if "missing" in record:
            held, note = "not injected", record["missing"]
        else:
            held, note = f"{record['held']:,} of {record['tried']:,}", record.get("note", "")
        rows.append([key, record["fault"], record["holds"], held, note, record["date"]])
    return markdown(["", "fault", "must hold", "held", "measured", "date"], rows)


TABLES = {"kinds": kinds_table, "parameters": parameters_table, "faults": faults_table}
if find_spec("torch") is not None:
    TABLES |= {"methods": methods_table, "models": models_table}


def renewed(text: str) -> str:
    """The document with its tables written anew."""
    for name, table in TABLES.items():
        between = re.compile(rf"(<!-- {name} begin -->\n).*?(<!-- {name} end -->)", re.DOTALL)
        text = between.sub(lambda found, make=table: f"{found[1]}{make()}\n{found[2]}", text)
    return text


def main() -> None:
    """Writes or checks every document."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        new = renewed(text)
        if new != text and "--check" in sys.argv[1:]:
            sys.exit(f"{path.relative_to(ROOT)} is out of date: run python docs/generate.py")
        if new != text:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
