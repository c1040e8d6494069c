"""Splitformer: speech recognition with an exit every few encoder layers.

    recognizer = splitformer.load("averaged.pt", exit=4)
    for segment in recognizer.transcribe("meeting.wav"):
        print(segment.start, segment.end, segment.text, segment.exit)

See docs/python_api.md. Names are imported when they are first used, so that importing a part of the package does not
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitformer.errors import UserError
    from splitformer.speech.audio import AudioError
    from splitformer.speech.recognizer import Recognizer, load
    from splitformer.speech.transcripts import Segment, Transcript, Word

__version__ = "0.2.0"

_MODULES = {
    "AudioError": "splitformer.speech.audio",
    "Recognizer": "splitformer.speech.recognizer",
    "Segment": "splitformer.speech.transcripts",
    "Transcript": "splitformer.speech.transcripts",
    "UserError": "splitformer.errors",
    "Word": "splitformer.speech.transcripts",
    "load": "splitformer.speech.recognizer",
}
__all__ = ["AudioError", "Recognizer", "Segment", "Transcript", "UserError", "Word", "load"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'splitformer' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
