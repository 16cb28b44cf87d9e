"""Decoded image stores: every image of a set as raw u8 in one memory-mapped file, decoded once.

Shapes: H, W pixels, 3 channels R, G, B.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

U8 = npt.NDArray[np.uint8]


class ImageStore:
    """Images of one set by file name, each a read-only view [H,W,3]."""

    def __init__(self, pixels: npt.NDArray[np.uint8], index: dict[str, list[int]]):
        self._pixels, self._index = pixels, index

    @property
    def names(self) -> list[str]:
        return list(self._index)

    def __getitem__(self, name: str) -> U8:
        offset, height, width = self._index[name]
        return self._pixels[offset : offset + height * width * 3].reshape(height, width, 3)


def encoded_images(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, encoded bytes) of a folder's or tar's images, in name order within a folder."""
    if source.is_dir():
        for path in sorted(source.iterdir()):
            yield path.name, path.read_bytes()
        return
    with tarfile.open(source) as tar:
        for member in tar:
            handle = tar.extractfile(member)
            if handle is not None:
                yield member.name, handle.read()


def open_store(source: Path, cache_dir: Path, name: str) -> ImageStore:
    """The store of `source`, decoded into `cache_dir` on first use."""
    pixels_path, index_path = cache_dir / f"{name}.u8", cache_dir / f"{name}.json"
    if not index_path.is_file():
        _decode(source, pixels_path, index_path)
    return ImageStore(np.memmap(pixels_path, np.uint8, mode="r"), json.loads(index_path.read_text()))


def _decode(source: Path, pixels_path: Path, index_path: Path) -> None:
    pixels_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pixels_path.with_suffix(f".{os.getpid()}.tmp")
    index: dict[str, list[int]] = {}
    offset = 0
    with temporary.open("wb") as out:
        for name, data in encoded_images(source):
            pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            index[name] = [offset, *pixels.shape[:2]]
            offset += out.write(pixels.tobytes())
    temporary.replace(pixels_path)
    # The index is written last: its presence says that the pixels are whole.
    index_path.write_text(json.dumps(index))
