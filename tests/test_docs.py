"""What the documentation shows is true: examples run, names exist. Docstrings are run by pytest's --doctest-modules."""

import doctest
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
GUIDES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def needs_torch(text: str) -> bool:
    """Such examples are run by the tests in tests/torch, where torch is there."""
    return re.search(r"\bimport torch\b|\bvqrs\.torch\b", text) is not None


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
def test_examples_in_docstrings_run(name):
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=options).failed == 0


@pytest.mark.parametrize("name", public_modules())
def test_public_functions_and_classes_have_examples(name):
    module = importlib.import_module(name)
    own = [(path, thing) for path, thing in public_objects(module) if path.count(".") == name.count(".") + 1]
    errors = [thing for _, thing in own if inspect.isclass(thing) and issubclass(thing, BaseException)]
    lacking = [path for path, thing in own if thing not in errors and ">>>" not in (inspect.getdoc(thing) or "")]
    assert lacking == []


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
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


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_in_guides_exist(path):
    """Every `vqrs.name` in text or code is one; deeper names are looked up as far as modules and classes go."""
    text = path.read_text(encoding="utf8")
    missing = [name for name in set(re.findall(r"\bvqrs((?:\.[A-Za-z_]\w*)+)", text)) if not exists(name)]
    assert missing == []


def exists(dotted: str) -> bool:
    """Whether a name below ``vqrs`` leads somewhere; file names (``.safetensors``) and torch's names pass."""
    first, *rest = dotted.strip(".").split(".")
    if first in ("torch", "safetensors", "blocks", "footer", "names", "git"):
        return True
    if not hasattr(vqrs, first) and first not in {module.name for module in pkgutil.iter_modules(vqrs.__path__)}:
        return False
    thing = getattr(vqrs, first, None) or importlib.import_module(f"vqrs.{first}")
    return not rest or hasattr(thing, rest[0])


def test_links_within_the_repository_lead_somewhere():
    for path in [*GUIDES, *ROOT.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf8")):
            if "://" not in target and not target.startswith("mailto:"):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if not needs_torch(path.read_text(encoding="utf8")))


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path, tmp_path):
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
