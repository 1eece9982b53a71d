"""Makes the virtual environment that the Makefile works in: ``python3 tools/make_environment.py FOLDER``.

Needs nothing but the standard library, and runs far enough on an old Python to say that it is too old. A torch >= 2.4
that this Python can import is made visible to the new environment, so that it is not fetched again.
"""

import importlib.util
import os
import shutil
import subprocess
import sys

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 4)


def complaint():
    """What this machine lacks, and what to install: one line, or None."""
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(str(part) for part in sys.version_info[:2])
        return f"Python 3.10 or newer is needed, this is {found}: install one and run make PYTHON=python3.12 TARGET"
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        return "this Python has no venv module: install it (on Debian or Ubuntu: apt install python3-venv)"
    if not shutil.which("cargo"):
        return "cargo is missing: install Rust 1.89 or newer (see rust-lang.org/tools/install)"
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        return "a C compiler is missing: install one (on Debian or Ubuntu: apt install gcc)"
    return None


def torch_is_there():
    """Whether this Python imports a torch that is new enough."""
    code = "import torch; print(*torch.__version__.split('.')[:2])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    version = tuple(int(part) for part in answer.stdout.split() if part.isdigit())
    return answer.returncode == 0 and version >= OLDEST_TORCH


def show_outer_packages(folder):
    """Lets the environment see the packages of the environment that we run in.

    An environment made from a virtual environment's Python sees the packages of the Python underneath, not those of
    the virtual environment.
    """
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inner = subprocess.run(
        [os.path.join(folder, "bin", "python"), "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()
    outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    with open(os.path.join(inner, "outer_environment.pth"), "w", encoding="utf-8") as file:
        file.write("\n".join(outer) + "\n")


def main(folder):
    """Makes the environment, or ends with one line."""
    problem = complaint()
    if problem:
        sys.exit("vqrs: " + problem)
    import venv  # here, because a system without it gets a line that tells

    share = torch_is_there()
    print(f"making {folder}" + " (it sees the torch that is installed)" * share, flush=True)
    venv.create(folder, clear=True, system_site_packages=share, with_pip=True, symlinks=True)
    if share and sys.prefix != sys.base_prefix:
        show_outer_packages(folder)


if __name__ == "__main__":
    main(sys.argv[1])
