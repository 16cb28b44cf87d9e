"""Result lines told: in a file exactly once each, whatever kills the process.

A line is in the journal before it is told, and is marked there when it has been. The length of the file is kept with
the mark: what a killed process wrote beyond it is cut off and written again, whole. On stdout, which has no length, the
line at which a process was killed may come a second time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from edge_rsvlm.alerts.journal import Journal
from edge_rsvlm.sinks.files import writing


@dataclass
class Teller:
    """Writes lines to ``stream``, and appends them to the file ``output``. Raises UsageError when it cannot."""

    journal: Journal
    stream: TextIO
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.output is not None:
            self.output = self.output.absolute()
            with writing(self.output):
                self.output.parent.mkdir(parents=True, exist_ok=True)
                self.output.touch()
                self.journal.expect(str(self.output), self.output.stat().st_size)

    def tell(self) -> None:
        """Everything that was not told yet."""
        for n, line in self.journal.untold():
            lengths = {} if self.output is None else {str(self.output): self._append(self.output, line)}
            self.stream.write(line + "\n")
            self.stream.flush()
            self.journal.told(n, lengths)

    def _append(self, output: Path, line: str) -> int:
        """The file's length with the line."""
        text = line.encode() + b"\n"
        with writing(output), output.open("r+b" if output.exists() else "w+b") as stream:
            stream.seek(_end(stream, self.journal.output_length(str(output)), text))
            stream.truncate()
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
            return stream.tell()


def _end(stream: BinaryIO, known: int | None, text: bytes) -> int:
    """Where the line belongs: after all that is in the file, but for a beginning of this very line.

    A file that is shorter than it was has been replaced, and goes on as it is.
    """
    size = stream.seek(0, os.SEEK_END)
    if known is None or size <= known or size - known > len(text):
        return size
    stream.seek(known)
    return known if text.startswith(stream.read()) else size
