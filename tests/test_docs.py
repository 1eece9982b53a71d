"""What the documentation shows is true: its code runs, its names exist, its links lead somewhere.

Examples in docstrings are run by pytest itself (``--doctest-modules`` in pyproject.toml).
"""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vqrs

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = sorted({*ROOT.glob("*.md"), *GUIDES})


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def needs_torch(text: str) -> bool:
    """Such examples are run by the tests in tests/torch, where torch is there."""
    return re.search(r"\btorch\b", text) is not None


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf8"), re.MULTILINE | re.DOTALL)


def public_modules() -> list[str]:
    """Modules that a user imports, torch's aside."""
    names = [module.name for module in pkgutil.iter_modules(vqrs.__path__)]
    return ["vqrs"] + [f"vqrs.{name}" for name in names if not name.startswith("_") and name != "torch"]


def public_objects(module) -> list[tuple[str, object]]:
    """Classes, functions, and methods and properties of the classes that a module offers as its own."""
    found = []
    for name in getattr(module, "__all__", []):
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            found.append((f"{module.__name__}.{name}", thing))
        if inspect.isclass(thing):
            members = [(key, value) for key, value in vars(thing).items() if not key.startswith("_")]
            found += [
                (f"{module.__name__}.{name}.{key}", value)
                for key, value in members
                if inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod))
            ]
    return found


@pytest.mark.parametrize("name", public_modules())
def test_everything_public_is_documented(name):
    silent = [path for path, thing in public_objects(importlib.import_module(name)) if not inspect.getdoc(thing)]
    assert silent == []


@pytest.mark.parametrize("name", public_modules())
def test_public_functions_and_classes_have_examples(name):
    """All but exceptions and compiled functions, whose docstrings doctest does not run."""
    lacking = []
    for path, thing in public_objects(importlib.import_module(name)):
        is_member = path.count(".") > name.count(".") + 1
        is_error = inspect.isclass(thing) and issubclass(thing, BaseException)
        if not (is_member or is_error or inspect.isbuiltin(thing) or ">>>" in (inspect.getdoc(thing) or "")):
            lacking.append(path)
    assert lacking == []


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in GUIDES if python_blocks(path)], ids=page_name)
def test_guides_run(path, tmp_path, monkeypatch):
    """The Python blocks of a page, one after the other, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "guide"}
    for block in python_blocks(path):
        if not needs_torch(block):
            exec(compile(block, str(path), "exec"), namespace)


def test_readme_shows_the_main_job():
    text = "\n".join(python_blocks(README))
    assert all(word in text for word in ("vqrs.compress(", ".save(", "vqrs.open("))


@pytest.mark.parametrize("path", GUIDES, ids=page_name)
def test_names_in_guides_exist(path):
    """Every `vqrs.name` in text or code is one; deeper names are looked up as far as modules and classes go."""
    text = path.read_text(encoding="utf8")
    missing = [name for name in set(re.findall(r"(?<!ops\.)\bvqrs((?:\.[A-Za-z_]\w*)+)", text)) if not exists(name)]
    assert missing == []


def exists(dotted: str) -> bool:
    """Whether a name below ``vqrs`` leads somewhere; file names (``.safetensors``) and torch's names pass."""
    first, *rest = dotted.strip(".").split(".")
    if first in ("torch", "safetensors", "blocks", "footer", "names", "git"):
        return True
    if not hasattr(vqrs, first) and first not in {module.name for module in pkgutil.iter_modules(vqrs.__path__)}:
        return False
    thing = getattr(vqrs, first, None) or importlib.import_module(f"vqrs.{first}")
    inner = {module.name for module in pkgutil.iter_modules(getattr(thing, "__path__", []))}
    return not rest or hasattr(thing, rest[0]) or rest[0] in inner


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        other = path.parent / file if file else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other.read_text(encoding="utf8")), target


EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if not needs_torch(path.read_text(encoding="utf8")))


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path, tmp_path):
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
