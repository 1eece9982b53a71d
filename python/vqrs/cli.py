"""The door of the command line: runs a command, and says what went wrong in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130
"""Exit codes; 130 is a shell's own for Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``vqrs`` with arguments, those of the process by default.

    Returns
    -------
    int
        Exit code: 0 done, 1 failed, 2 used wrongly, 130 interrupted. Of what went wrong there is one line on stderr.
    """
    try:
        import typer

        from vqrs._commands import app
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        return _fail("the command line needs typer and rich: pip install 'vqrs[cli]'", FAILED)
    try:
        # Without "standalone" errors reach us, and what the command returns is the exit code.
        code = app(args=arguments, prog_name="vqrs", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        # Wrong use, in the words of click, of which newer versions of typer have a copy of their own.
        if hasattr(error, "format_message"):
            return _fail(f"{error.format_message()} Try 'vqrs --help'.", WRONG_USE)
        if not isinstance(error, _failures()):
            raise
        return _fail(_text(error), FAILED)
    return _fail("interrupted", INTERRUPTED) if code == INTERRUPTED else code or 0


def _failures() -> tuple[type[Exception], ...]:
    """What can go wrong by no fault of this program; anything else keeps its traceback."""
    from vqrs._core import InternalError

    return ValueError, LookupError, TypeError, OSError, ImportError, MemoryError, InternalError


def _text(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str() would put it in quotes
    return str(error) or type(error).__name__


def _fail(text: str, code: int) -> int:
    print("vqrs:", " ".join(text.split()), file=sys.stderr)
    return code
