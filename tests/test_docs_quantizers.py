"""The tables of quantizers in README and docs are what the code says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import vqrs

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs" / "generate.py"


def renewed(text: str) -> str:
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.renewed(text)


@pytest.mark.parametrize("name", ["README.md", "docs/quantizers.md"])
def test_every_kind_is_in_the_table(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for kind in vqrs.kinds():
        assert f"| `{kind['name']}` | {kind['about']} | `{kind['form']}` |" in text


def test_tables_are_current():
    answer = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_a_stale_table_is_noticed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    stale = text.replace("| `ProductQuantizer` | `product` |", "| `ProductQuantizer` | `another` |")
    assert stale != text
    assert renewed(stale) == text
