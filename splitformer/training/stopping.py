"""Being asked to stop: by a cluster that needs the machine (SIGTERM), or by Ctrl-C (SIGINT)."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Stopped(Exception):
    """The run was asked to stop, has saved its state and can go on with --resume."""


class StopRequest:
    """Notes SIGTERM and the first SIGINT while it is entered; a second Ctrl-C interrupts at once, as ever."""

    def __init__(self) -> None:
        self.name = ""
        """of the signal that came, if one did"""
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return bool(self.name)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
