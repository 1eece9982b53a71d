"""Which module may know which: reads the sources and fails where one looks up."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE, BORDER, PACKAGE = ROOT / "rust/core", ROOT / "rust/py", ROOT / "python/vqrs"

RUST_LAYERS = {
    **dict.fromkeys(["error", "matrix", "bits", "rng", "pool", "tensor"], 0),
    "kernels": 1,
    "algo": 2,
    "decoder": 3,
    "quantizer": 4,
    "table": 4,
    **dict.fromkeys(["search", "stream"], 5),
}
"""A module uses modules of lower layers, and in layer 0 those beside it: quantizer and table do not know each other."""

UNSAFE_HOMES = [
    "rust/core/src/kernels/",
    "rust/core/src/table/map.rs",
    "rust/py/src/array.rs",
    "rust/py/src/address.rs",
]

PYTHON_LAYERS = {
    **dict.fromkeys(["_core", "reference", "metrics", "_validation", "_bytes", "_progress", "_interrupt"], 0),
    **dict.fromkeys(["table", "_encode", "_ladders", "_search", "_compress", "_readers"], 1),
    **dict.fromkeys(["_base", "cluster", "quantizers", "mixed", "_tune"], 2),
    **dict.fromkeys(["__init__", "__main__", "_commands", "cli", "demo", "bench", "torch"], 3),
}
"""A module uses modules of its own layer and lower ones."""


def without_comments(source: str) -> str:
    """Rust without comments and string contents, line numbers kept."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', re.DOTALL)
    return pattern.sub(lambda found: "\n" * found.group().count("\n"), source)


def rust_files(folder: Path) -> list[Path]:
    return sorted((folder / "src").rglob("*.rs"))


def group_end(source: str, start: int) -> int:
    """Position behind the brace that closes the one at ``start``."""
    depth = 0
    for position in range(start, len(source)):
        depth += {"{": 1, "}": -1}.get(source[position], 0)
        if depth == 0:
            return position + 1
    raise AssertionError("unbalanced braces")


def heads(group: str) -> list[str]:
    """First names of the paths in a ``{a::b, c::{d, e}}`` group."""
    flat = group.strip()[1:-1]
    while "{" in flat:
        start = flat.index("{")
        flat = flat[:start] + flat[group_end(flat, start) :]
    return [path.strip().split("::")[0] for path in flat.split(",") if path.strip()]


def names_at_root(source: str) -> list[str]:
    """Names that a file takes from the crate's root, by ``crate::`` or by climbing with ``super::``."""
    names = []
    for found in re.finditer(r"\b(?:crate|super)::(?=[\w{])", source):
        rest = source[found.end() :]
        if rest.startswith("{"):
            names += heads(rest[: group_end(rest, 0)])
        else:
            names.append(re.match(r"\w+", rest).group())
    return names


def exports() -> dict[str, str]:
    """Names that lib.rs re-exports, and the module that each comes from."""
    found = {}
    for module, rest in re.findall(
        r"pub use (?:crate::)?(\w+)::([^;]+);", without_comments((CORE / "src/lib.rs").read_text())
    ):
        found |= dict.fromkeys(re.findall(r"\w+", rest), module)
    return found


def test_rust_modules_do_not_look_up():
    home = exports()
    seen = 0
    for file in rust_files(CORE):
        path = file.relative_to(CORE / "src")
        module = path.parts[0].removesuffix(".rs")
        if module == "lib":
            continue
        assert module in RUST_LAYERS, f"{path}: give the module {module} a layer in {Path(__file__).name}"
        for name in names_at_root(without_comments(file.read_text())):
            used = home.get(name, name)
            if used == module or used not in RUST_LAYERS:
                continue
            seen += 1
            low_enough = RUST_LAYERS[used] < RUST_LAYERS[module] or RUST_LAYERS[used] == RUST_LAYERS[module] == 0
            assert low_enough, f"{path} uses {used}, which is not below {module}"
    assert seen > 20, "the patterns no longer find the use lines"


def test_the_patterns_find_what_they_should():
    source = without_comments(
        'use crate::{error::{Error, Result}, matrix::Matrix}; // crate::no\nlet x = super::table::f("crate::no");'
    )
    assert names_at_root(source) == ["error", "matrix", "table"]


@pytest.mark.parametrize("name", ["pyo3", "numpy"])
def test_core_knows_no_python(name):
    assert not re.search(rf"^{name}\b", (CORE / "Cargo.toml").read_text(), re.MULTILINE)
    users = [str(f) for f in rust_files(CORE) if re.search(rf"\b{name}\b", without_comments(f.read_text()))]
    assert users == []


def test_unsafe_code_stays_home_and_explains_itself():
    homeless, unexplained = [], []
    for file in rust_files(CORE) + rust_files(BORDER):
        path = file.relative_to(ROOT).as_posix()
        lines = file.read_text().splitlines()
        for number, line in enumerate(without_comments(file.read_text()).splitlines()):
            if not re.search(r"\bunsafe\b", line):
                continue
            if not path.startswith(tuple(UNSAFE_HOMES)):
                homeless.append(f"{path}:{number + 1}")
            if re.search(r"\bunsafe (\{|impl\b)", line) and not explained(lines, number):
                unexplained.append(f"{path}:{number + 1}")
    assert homeless == []
    assert unexplained == []


def explained(lines: list[str], number: int) -> bool:
    """Whether a SAFETY comment stands before the statement that line ``number`` belongs to."""
    above = number
    while above > 0 and (
        lines[above - 1].lstrip().startswith(("//", "#[")) or not lines[above - 1].rstrip().endswith((";", "{", "}"))
    ):
        above -= 1
    return any("SAFETY" in line for line in lines[above : number + 1])


def package_module(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, at the top or inside a function."""
    inside = file.relative_to(PACKAGE.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(inside[: len(inside) - node.level]) if node.level else []
            start = ".".join(base + ([node.module] if node.module else []))
            full = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in full if name.split(".")[0] == "vqrs"]
        found |= {path[1] if path[1:] and path[1] in PYTHON_LAYERS else "__init__" for path in parts}
    return found


def test_python_modules_do_not_look_up():
    seen = 0
    for file in sorted(PACKAGE.rglob("*.py")):
        module = package_module(file)
        assert module in PYTHON_LAYERS, f"{file.name}: give the module {module} a layer in {Path(__file__).name}"
        for used in imports(file):
            seen += 1
            assert PYTHON_LAYERS[used] <= PYTHON_LAYERS[module], f"{file.name} uses {used}, which is above {module}"
    assert seen > 5, "the patterns no longer find the imports"


def test_reference_stands_alone():
    """The judge shares no code with what it judges."""
    assert imports(PACKAGE / "reference.py") == set()


HEAVY = ["sklearn", "torch", "rich", "typer", "matplotlib", "pandas", "scipy", "dask", "safetensors"]


@pytest.mark.parametrize(
    "action",
    [
        "",
        "vqrs.kinds(); vqrs.hardware()",
        "table = vqrs.compress(np.eye(8, dtype=np.float32), method='scalar'); table.save(path); vqrs.open(path)[0]",
        "vqrs.estimate(100, 8, method='scalar')",
    ],
)
def test_import_loads_numpy_alone(action, tmp_path):
    program = (
        f"import sys, numpy as np, vqrs; path = {str(tmp_path / 't.safetensors')!r}; {action}\nprint(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert [name for name in HEAVY if name in loaded] == []
