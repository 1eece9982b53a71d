"""Ctrl-C while numpy is at work, whose functions answer no signal before they return."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

LARGE = 1 << 24
"""Bytes from which work on an array can last."""


def interruptible(work: Callable[..., T], *arguments: object) -> T:
    """``work(*arguments)`` on a thread of its own, so that Ctrl-C is answered at once; its result is then dropped.

    For functions that give back the interpreter's lock and change nothing that others see.

    Examples
    --------
    >>> from vqrs._interrupt import interruptible
    >>> interruptible(sum, [1, 2])
    3
    """
    # Signals are answered in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        return work(*arguments)
    result: Future[T] = Future()
    parts = (result, contextvars.copy_context(), work, arguments)
    try:
        threading.Thread(target=_run, args=parts, name="vqrs-numpy", daemon=True).start()
    except RuntimeError:  # the system starts no thread
        return work(*arguments)
    try:
        return result.result()
    finally:
        del result, parts  # an error's traceback would else keep the arguments


def _run(
    result: Future[T], context: contextvars.Context, work: Callable[..., T], arguments: tuple[object, ...]
) -> None:
    try:
        result.set_result(context.run(work, *arguments))
    except BaseException as error:
        result.set_exception(error)
    finally:
        del result, arguments
