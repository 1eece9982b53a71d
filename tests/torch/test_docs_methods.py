"""The tables of methods and models in the documents are what the code says."""

import importlib.util
from pathlib import Path

import vqrs.torch
from vqrs.bench.models import models
from vqrs.bench.report import put_between

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")


def test_every_method_and_model_is_in_the_table():
    for name, of in {**vqrs.torch.methods(), **models()}.items():
        assert f"| `{name}` | {of.about} |" in TEXT, "run python docs/generate.py"


def generator(monkeypatch, found):
    """The script that writes the tables, where torch is found or not."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_stay_as_they_are_without_torch(monkeypatch):
    stale = TEXT.replace("| `gmf` |", "| `another` |")
    assert generator(monkeypatch, None).renewed(stale) == stale != TEXT
    assert generator(monkeypatch, True).renewed(stale) == TEXT


def test_there_is_a_place_for_results():
    results = (ROOT / "docs" / "benchmark-results.md").read_text(encoding="utf-8")
    assert put_between(results, "tables").count("tables\n<!-- results end -->") == 1
