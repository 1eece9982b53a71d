"""The documents' code, the blocks with torch included."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["README.md", "docs/guide.md", "docs/torch.md", "docs/trained.md"])
def test_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert any("import torch" in block for block in blocks)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), scope)


@pytest.mark.slow
def test_the_example_of_trained_tables_runs(tmp_path: Path) -> None:
    """Clustered rows tell tastes apart where hashed rows of as many bytes do not, and the file has the same rows."""
    example = ROOT / "examples" / "06_train_compressed.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, example], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    right = dict(re.findall(r"^(\w+), epoch 12: ([\d.]+)%", run.stdout, re.MULTILINE))
    assert float(right["cce"]) > float(right["hash"]) + 8
    assert "its file" in run.stdout
