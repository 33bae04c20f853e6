"""Photos found by sketches: an index, and the network that made it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sbir_ray.data import formats
from sbir_ray.data.decoding import PhotoError
from sbir_ray.data.photos import align_drawing, decode_grey, read_bytes
from sbir_ray.data.raster import rasterise
from sbir_ray.data.strokes import Strokes, canonical
from sbir_ray.errors import SbirError, UserError
from sbir_ray.runs import load_retrieval
from sbir_ray.stream.filters import embedded
from sbir_ray.stream.index_store import HEADER, Hit, Index

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Ends of the names of drawings that are pictures."""


class Searcher:
    """Finds the photos of an index.

    Args:
        folder: INDEX folder.
        run: RUN folder of the network that made it; by default where that was.
        device: on which sketches are embedded.

    Raises:
        UserError: not such folders, or the run's weights are not those that made the index.
        DamagedError: the index or the run is damaged.
    """

    def __init__(self, folder: Path, run: Path | None = None, device: str = "cpu") -> None:
        self.index = Index.open(folder)
        self._stamp = _stamp(folder)
        run = run or Path(self.index.header["run"])
        if not run.exists():
            raise UserError(
                f"{run}: the run that made {folder} is not there any more; name it with --run"
            )
        trained = load_retrieval(run)
        self.weights = trained.digest
        if trained.digest != self.index.header["weights"]:
            raise UserError(
                f"{folder}: was made by weights {self.index.header['weights']}, and {run} has "
                f"{trained.digest}; index the photos again, or name the other run with --run"
            )
        self.device = torch.device(device)
        self.model = trained.model.to(self.device)
        self.image_size = trained.model.config.image_size

    def find(self, raster_SS: NDArray[np.uint8], top: int) -> list[Hit]:
        """The nearest photos, the nearest first.

        Args:
            raster_SS: a sketch as :func:`raster_of` gives it.
            top: how many at most.
        """
        return self.index.search(self._embed([raster_SS])[0], top)

    def ranks(self, strokes: Strokes, photo_id: str) -> list[int] | None:
        """The rank of a photo after each stroke of a drawing, each as if it ended there; None if
        the index does not have the photo."""
        rasters = [self.raster_of(strokes[: i + 1]) for i in range(len(strokes))]
        found = [self.index.rank(query_D, photo_id) for query_D in self._embed(rasters)]
        return None if None in found else [rank for rank in found if rank is not None]

    def raster_of(self, strokes: Strokes) -> NDArray[np.uint8]:
        """(S, S) a drawing in any units, as the network sees it."""
        raster_1SS: NDArray[np.uint8] = rasterise([canonical(strokes)], self.image_size)
        return np.asarray(raster_1SS[0])

    def read(self, file: Path) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """The sketches of a file with their names, one by one: of any kind of
        :mod:`sbir_ray.data.formats`, or a drawing that is a picture.

        Raises:
            UserError: it cannot be read, or holds no sketch.
        """
        if file.suffix.lower() in PICTURES:
            try:
                grey = decode_grey(read_bytes(file))
            except PhotoError as error:
                raise UserError(f"{file}: {error}") from error
            raster_SS = align_drawing(grey, self.image_size)
            if not raster_SS.any():
                raise UserError(f"{file}: no lines in the drawing")
            yield file.stem, raster_SS
            return
        for key, strokes in formats.read_sketches(file):
            yield key, self.raster_of(strokes)

    def refresh(self) -> bool:
        """Take up an index that was made anew since; False where it was made by other weights, so
        that the old one stays in use, as it does where the folder is gone or just being changed."""
        try:
            stamp = _stamp(self.index.folder)
            if stamp == self._stamp:
                return self._fits
            fresh = Index.open(self.index.folder)
        except (SbirError, OSError):  # looked at again before the next search
            return self._fits
        self._stamp = stamp
        self._fits = fresh.header["weights"] == self.weights
        if self._fits:
            self.index = fresh
        else:
            print(
                f"{fresh.folder}: was made anew by weights {fresh.header['weights']}; the old "
                "index is searched until this is started again",
                file=sys.stderr,
            )
        return self._fits

    _fits = True

    def _embed(self, rasters: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        found = embedded(self.model.embed_sketches, np.stack(rasters), self.device)
        embedding_BD: NDArray[np.float32] = found.float().cpu().numpy()
        return embedding_BD


def _stamp(folder: Path) -> tuple[int, int]:
    """Another one when the header was replaced."""
    found = (folder / HEADER).stat()
    return found.st_ino, found.st_mtime_ns
