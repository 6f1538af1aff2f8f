"""Streaming text of generated ids: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from twingpt.core.tokenizer import Tokenizer


class TextStream:
    """Streaming decode of ids that come one by one, up to the first of the `stop` strings.

    What may yet become one is held back. The ids `before` them, of a prompt, have no text here. Ids beyond the
    tokenizer's, which pad a model's vocabulary, have none either.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False  # by a stop string
        self.held = ""
        self.ids: deque[int] = deque()
        self.pieces = tokenizer.stream(self._pop_ids(), before)

    def _pop_ids(self) -> Iterator[int]:
        while self.ids:
            yield self.ids.popleft()

    def push(self, token: int) -> str:
        """The text that is certain with one id more."""
        if token >= self.tokenizer.vocab_size:
            return ""
        self.ids.append(token)
        return self._release(next(self.pieces))

    def finish(self) -> str:
        """The rest of the text, after the last id: what is of no whole character is U+FFFD."""
        text = "" if self.stopped else self._release("".join(self.pieces)) + self.held
        self.held = ""
        return text

    def _release(self, piece: str) -> str:
        """What is held and `piece`, but for a stop string and its beginning."""
        text = self.held + piece
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        n_held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
