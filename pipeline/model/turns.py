"""Calls that work beside each other, and calls that must be alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Who waits to be alone comes before those who come later to share."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._at_work = 0  # beside each other
        self._is_taken = False  # by the one that is alone, or waits until the others are done

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_taken)
            self._at_work += 1
        try:
            yield
        finally:
            with self._changed:
                self._at_work -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_taken)
            self._is_taken = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._at_work == 0)
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()
