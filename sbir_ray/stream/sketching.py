"""Every photo of a store drawn by a pool of actors, and written with where it came from.

A Ray Data pipeline: tasks read and align photos, actors draw them, tasks write the rows. Its blocks
are planned here, the same for any cluster: a block that has been written is not drawn again when
the same call is repeated after a kill. Only the accounts of rows come back to the driver.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from sbir_ray.config import SketchConfig
from sbir_ray.data.photos import align, decode_stored, read_store
from sbir_ray.data.strokes import count_points, flatten
from sbir_ray.errors import SbirError, UserError
from sbir_ray.runlog import Ledger, Progress, building, versions, write_json_atomic
from sbir_ray.stream.attempts import KILLED, LIMIT, Attempts
from sbir_ray.stream.cluster import ensure_fits, quiet_data
from sbir_ray.stream.filters import (
    RankerSpec,
    filter_reason,
    reference_photos,
    refuse_without_effect,
)
from sbir_ray.stream.pseudo_store import HEADER, PSEUDO_SCHEMA
from sbir_ray.stream.sketchers import Drawn, Sketcher, SketcherSpec
from sbir_ray.strict import SCHEMA_VERSION, to_dict

MAX_ERRORS = 0.5
"""Share of rows that may fail by an error before the run stops: then it is not the photos."""

_ERROR = "error-"
_ROUND = "round-0000"
_ATTEMPTS, _REFERENCE = "attempts", "reference.npy"
"""Inside the folder while it is being made: the actors' journals, the teacher's photos."""
_BLOCK_ROWS = 64
_BLOCKS = 8
_DRAWN_SCHEMA = PSEUDO_SCHEMA.append(pa.field("block", pa.int64())).append(
    pa.field("detail", pa.string())
)


def sketch(
    photos: Path,
    out: Path,
    sketcher: str | SketcherSpec,
    config: SketchConfig | None = None,
    *,
    teacher: Path | None = None,
    actors: tuple[int, int] = (1, 2),
    cpus_per_actor: float = 1.0,
    gpus_per_actor: float = 0.0,
    progress: Callable[[str], Progress] = Progress,
) -> Ledger:
    """Draw the photos of a store into a PSEUDO folder. Needs a Ray that is up.

    A row depends on its photo, the sketcher's weights, the settings and its own seed, which follows
    from ``config.seed``, the photo's id and the number of the drawing; not on the actors.

    Args:
        photos: PHOTOS folder.
        out: PSEUDO folder to write; appears when it is whole.
        sketcher: ``contours``, ``edges`` or a generator's RUN folder; or how to make another one.
        teacher: RUN folder of the retrieval network that ranks photos for ``filters.max_rank``,
            among the first :data:`REFERENCES` photos of the store.
        actors: least and most processes that draw.
        cpus_per_actor, gpus_per_actor: of each; a GPU may be shared.
        progress: makes a progress line from a title.

    Returns:
        The account of all rows, which ``pseudo.json`` has too.

    Raises:
        UserError: the store, the sketcher or the teacher cannot be used, settings without effect,
            the actors do not fit into the cluster.
        SbirError: more than :data:`MAX_ERRORS` of the rows fail by an error.
    """
    config = config or SketchConfig()
    quiet_data()
    spec = (
        sketcher
        if isinstance(sketcher, SketcherSpec)
        else SketcherSpec(
            # Actors run in other folders.
            source=os.path.abspath(sketcher) if os.path.isdir(sketcher) else sketcher,
            temperature=_temperature(config, sketcher),
            device="cuda" if gpus_per_actor else "cpu",
            threads=max(1, int(cpus_per_actor)),
        )
    )
    # The driver need not have a GPU.
    author = dataclasses.replace(spec, device="cpu").make()
    plan = plan_blocks(photos, config.batch_size)
    count = sum(entry.rows for entry in plan)
    if config.samples > 1 and _temperature(config, sketcher) == 0:
        raise UserError(
            f"samples={config.samples}: at temperature=0 all drawings of a photo are the same; "
            "set a temperature"
        )
    refuse_without_effect(config.filters, author, teacher, count)
    ranker = RankerSpec.of_run(teacher, spec.device, spec.threads) if teacher else None
    least, most = actors
    if not 1 <= least <= most:
        raise UserError(f"--actors {least}:{most}: the least is 1, and not more than the most")
    room = ensure_fits(cpus_per_actor, gpus_per_actor, least, what="--actors", spare_cpus=1.0)
    request = {
        "settings": to_dict(config),
        "sketcher": [author.name, author.version, author.digest],
        "teacher": ranker and ranker.digest,
        "photos": [[entry.file.name, entry.start, entry.stop] for entry in plan],
        "store": hashlib.sha256((photos / "store.json").read_bytes()).hexdigest(),
    }
    ledger = Ledger("pseudo", config.samples * count)
    with building(out, request) as folder:
        (folder / _ROUND).mkdir(exist_ok=True)
        left = _not_done(plan, folder / _ROUND, config.samples, ledger)
        with progress("sketch") as bar:
            bar.update(0, ledger.total)
            if left:
                if ranker:
                    np.save(folder / _REFERENCE, reference_photos(photos, ranker.image_size))
                # All at once: Ray Data would add them one by one, each after some seconds.
                pool = ActorPoolStrategy(
                    min_size=least, max_size=most, initial_size=min(most, room)
                )
                dataset = _pipeline(
                    left,
                    folder,
                    spec,
                    author,
                    ranker,
                    config,
                    pool,
                    cpus_per_actor,
                    gpus_per_actor,
                )
                _follow(dataset, ledger, bar)
        ledger.check()
        header = {
            "schema_version": SCHEMA_VERSION,
            "kind": "pseudo",
            "sketcher": author.name,
            "generator_version": author.version,
            "generator_digest": author.digest,
            "generator_config": author.config,
            "teacher_digest": ranker and ranker.digest,
            "seed": config.seed,
            "settings": to_dict(config),
            "photos": str(photos),
            "ledger": ledger.to_json(),
            "versions": versions(),
        }
        shutil.rmtree(folder / _ATTEMPTS, ignore_errors=True)
        (folder / _REFERENCE).unlink(missing_ok=True)
        write_json_atomic(folder / HEADER, header)
    return ledger


def row_seed(seed: int, photo_id: str, sample: int) -> int:
    """Seed of one drawing, 63 bits, from the run's seed, the photo and the drawing's number."""
    text = f"{seed}/{photo_id}/{sample}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1


def _temperature(config: SketchConfig, sketcher: str | SketcherSpec) -> float:
    """The setting; its default is a generator's, and means nothing to what draws without chance."""
    default = SketchConfig().temperature
    chanceless = isinstance(sketcher, str) and not os.path.isdir(sketcher)
    return 0.0 if chanceless and config.temperature == default else config.temperature


# --------------------------------------------------------------------------- blocks


@dataclass(frozen=True, slots=True)
class PhotoBlock:
    """Photos that are read and drawn together: rows ``start`` to ``stop`` of a shard."""

    number: int
    file: Path
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of photos."""
        return self.stop - self.start


def plan_blocks(photos: Path, batch_size: int) -> list[PhotoBlock]:
    """The blocks of a photo store: whole batches, few enough rows for actors to share the work,
    enough that Ray Data costs little beside it.

    Raises:
        UserError: not a photo store of a known version, or an empty one.
    """
    if next(read_store(photos), None) is None:
        raise UserError(f"{photos}: holds no photo; see its ledger")
    shards = sorted((photos / "shards").glob("part-*.parquet"))
    counts = [pq.read_metadata(shard).num_rows for shard in shards]
    rows = min(_BLOCK_ROWS, sum(counts) // _BLOCKS)
    rows = max(1, -(-rows // batch_size)) * batch_size
    blocks: list[PhotoBlock] = []
    for shard, count in zip(shards, counts, strict=True):
        for start in range(0, count, rows):
            blocks.append(PhotoBlock(len(blocks), shard, start, min(start + rows, count)))
    return blocks


def _not_done(
    plan: Sequence[PhotoBlock], target: Path, samples: int, ledger: Ledger
) -> list[PhotoBlock]:
    """The blocks still to draw. Adds the others to the ledger, and removes what is half written or
    failed by an error, which may be gone."""
    written: dict[int, list[Path]] = defaultdict(list)
    for file in target.glob("part-*.parquet"):
        written[int(file.name.split("-")[1])].append(file)
    left = []
    for block in plan:
        fates = [
            row
            for file in written[block.number]
            for row in pq.read_table(file, columns=["status", "reason"]).to_pylist()
        ]
        erred = any(row["reason"].startswith(_ERROR) for row in fates)
        if len(fates) == block.rows * samples and not erred:
            for row in fates:
                ledger.add(row["status"], row["reason"])
        else:
            for file in written[block.number]:
                file.unlink()
            left.append(block)
    return left


# --------------------------------------------------------------------------- the pipeline


def _pipeline(
    plan: Sequence[PhotoBlock],
    folder: Path,
    spec: SketcherSpec,
    author: Sketcher,
    ranker: RankerSpec | None,
    config: SketchConfig,
    pool: ActorPoolStrategy,
    cpus: float,
    gpus: float,
) -> ray.data.Dataset:
    entries = [
        pa.table(
            {
                "block": [block.number],
                "file": [str(block.file.absolute())],
                "start": [block.start],
                "stop": [block.stop],
            }
        )
        for block in plan
    ]
    sizes = {author.image_size, ranker.image_size if ranker else author.image_size}
    tables: dict[str, Any] = {"batch_format": "pyarrow"}
    return (
        ray.data.from_arrow(entries)
        .map_batches(
            cast(Any, read_photos),
            batch_size=1,
            fn_kwargs={"image_sizes": sorted(sizes)},
            # One byte: another demand than the actors' keeps Ray Data from joining the readers
            # with them; the actors would then read between drawings.
            memory=1,
            **tables,
        )
        .map_batches(
            cast(Any, SketchActor),
            batch_size=config.batch_size,
            compute=pool,
            num_cpus=cpus,
            num_gpus=gpus,
            fn_constructor_kwargs={
                "spec": spec,
                "config": config,
                "folder": str(folder),
                "ranker": ranker,
            },
            **tables,
        )
        .map_batches(
            cast(Any, write_rows),
            batch_size=None,
            fn_kwargs={"target": str(folder / _ROUND)},
            **tables,
        )
    )


def _follow(dataset: ray.data.Dataset, ledger: Ledger, bar: Progress) -> None:
    """Run the pipeline to its end and account for its rows."""
    errors: Counter[str] = Counter()
    rows: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    for table in rows:
        for row in table.to_pylist():
            ledger.add(row["status"], row["reason"])
            if row["reason"].startswith(_ERROR):
                errors[row["detail"]] += 1
        bar.update(ledger.accounted, note=f"{ledger.count('kept')} kept")
        if errors.total() > MAX_ERRORS * max(ledger.accounted, min(_BLOCK_ROWS, ledger.total)):
            text, _ = errors.most_common(1)[0]
            raise SbirError(
                f"{errors.total()} of {ledger.accounted} drawings failed, most often by {text}"
            )


def read_photos(plan: pa.Table, image_sizes: Sequence[int]) -> pa.Table:
    """Task: the photos of one block, for each size S ``aligned_S`` as bytes (S, S, 3), or ``fault``
    and none."""
    (entry,) = plan.to_pylist()
    rows = _read_slice(entry["file"], entry["start"], entry["stop"])
    aligned: dict[int, list[bytes | None]] = {size: [] for size in image_sizes}
    faults: list[str] = []
    for image in rows["image"].to_pylist():
        found: dict[int, bytes] = {}
        try:
            rgb = decode_stored(image)
            found = {size: align(rgb, size).tobytes() for size in image_sizes}
            faults.append("")
        except Exception as error:  # one damaged picture costs its own row alone, and is told
            faults.append(_one_line(error))
        for size, column in aligned.items():
            column.append(found.get(size))
    block = np.full(len(faults), entry["block"], np.int64)
    for size, column in aligned.items():
        rows = rows.append_column(f"aligned_{size}", pa.array(column, pa.binary()))
    rows = rows.append_column("fault", pa.array(faults, pa.string()))
    return rows.append_column("block", pa.array(block))


class SketchActor:
    """Actor: draws batches of photos; a photo that cannot be drawn is a failed row."""

    def __init__(
        self,
        spec: SketcherSpec,
        config: SketchConfig,
        folder: str,
        ranker: RankerSpec | None = None,
    ) -> None:
        self.sketcher = spec.make()
        self.config = config
        self.ranker = ranker.make(np.load(Path(folder) / _REFERENCE)) if ranker else None
        self.journals = Path(folder) / _ATTEMPTS
        self.block = -1
        self.attempts: Attempts | None = None

    def __call__(self, photos: pa.Table) -> pa.Table:
        """Rows of :data:`PSEUDO_SCHEMA` for rows of :func:`read_photos`."""
        rows: list[dict[str, Any]] = []
        for block in dict.fromkeys(photos["block"].to_pylist()):
            mine = photos.filter(pc.equal(photos["block"], block)).to_pylist()
            attempts = self._journal(block)
            for sample in range(self.config.samples):
                rows += self._draw(mine, sample, attempts)
        return pa.Table.from_pylist(rows, schema=_DRAWN_SCHEMA)

    def _journal(self, block: int) -> Attempts:
        if self.attempts is None or self.block != block:
            if self.attempts is not None:
                self.attempts.close()
            self.attempts = Attempts(self.journals / f"{block:06d}")
            self.block = block
        return self.attempts

    def _draw(
        self, photos: list[dict[str, Any]], sample: int, attempts: Attempts
    ) -> Iterator[dict[str, Any]]:
        """All at once; one by one where that raised, or where a process ended at it before."""
        seeds = [row_seed(self.config.seed, photo["photo_id"], sample) for photo in photos]
        whole = [i for i, photo in enumerate(photos) if not photo["fault"]]
        drawn: dict[int, Drawn | tuple[str, str]] = {}
        key = f"{sample}/{photos[0]['photo_id']}/{len(photos)}"
        if whole and not attempts.deaths(key):
            try:
                with attempts.working_on(key):
                    found = self._ranked([photos[i] for i in whole], [seeds[i] for i in whole])
                    drawn = dict(zip(whole, found, strict=True))
            except Exception:  # whose fault it is shows when they are drawn one by one
                drawn = {}
        for i, photo in enumerate(photos):
            if i not in drawn:
                drawn[i] = self._draw_alone(photo, seeds[i], sample, attempts)
            yield self._row(photo, seeds[i], drawn[i])

    def _draw_alone(
        self, photo: dict[str, Any], seed: int, sample: int, attempts: Attempts
    ) -> Drawn | tuple[str, str]:
        """The drawing, or reason and text of why there is none."""
        if photo["fault"]:
            return "damaged-photo", photo["fault"]
        key = f"{sample}/{photo['photo_id']}"
        if attempts.deaths(key) >= LIMIT:
            return KILLED, f"{attempts.deaths(key)} processes ended while they drew it"
        try:
            with attempts.working_on(key):
                return self._ranked([photo], [seed])[0]
        except Exception as error:  # any fault costs its own row alone, and is told
            return f"{_ERROR}{type(error).__name__}", _one_line(error)

    def _ranked(self, photos: list[dict[str, Any]], seeds: list[int]) -> list[Drawn]:
        """A drawing of each photo, with the photo's rank where there is a teacher."""
        drawn = self.sketcher.draw(_pixels(photos, self.sketcher.image_size), seeds)
        if self.ranker is None:
            return drawn
        photo_B3SS = _pixels(photos, self.ranker.image_size).transpose(0, 3, 1, 2)
        ranks = self.ranker.rank(photo_B3SS, [one.strokes for one in drawn])
        return [dataclasses.replace(one, rank=rank) for one, rank in zip(drawn, ranks, strict=True)]

    def _row(
        self, photo: dict[str, Any], seed: int, drawn: Drawn | tuple[str, str]
    ) -> dict[str, Any]:
        status, reason, detail = "kept", "", ""
        if isinstance(drawn, tuple):
            (reason, detail), drawn = drawn, Drawn([])
            status = "failed"
        elif not drawn.strokes:
            status, reason = "failed", "nothing-to-draw"
        elif reason := filter_reason(drawn, self.config.filters):
            status = "filtered"
        return {
            "photo_id": photo["photo_id"],
            "image": photo["image"],
            "strokes": flatten(drawn.strokes),
            "certainty": drawn.certainty if drawn.strokes else 0.0,
            "log_prob": drawn.log_prob,
            "rank": drawn.rank if drawn.strokes else 0,
            "points": count_points(drawn.strokes),
            "generator_version": self.sketcher.version,
            "generator_digest": self.sketcher.digest,
            "seed": seed,
            "round": 0,
            "kept": status == "kept",
            "status": status,
            "reason": reason,
            "block": photo["block"],
            "detail": detail,
        }


def _pixels(photos: list[dict[str, Any]], size: int) -> NDArray[np.uint8]:
    """(B, S, S, 3) the photos as they were aligned at one size."""
    pixels = np.stack([np.frombuffer(photo[f"aligned_{size}"], np.uint8) for photo in photos])
    return pixels.reshape(-1, size, size, 3)


def write_rows(rows: pa.Table, target: str) -> pa.Table:
    """Task: rows to files named after their block and content; returns their accounts."""
    for block in dict.fromkeys(rows["block"].to_pylist()):
        mine = rows.filter(pc.equal(rows["block"], block))
        names = "".join(mine["photo_id"].to_pylist()) + repr(mine["seed"].to_pylist())
        content = hashlib.sha256(names.encode()).hexdigest()[:12]
        file = Path(target) / f"part-{block:06d}-{content}.parquet"
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        pq.write_table(mine.select(PSEUDO_SCHEMA.names), temporary, compression="zstd")
        temporary.replace(file)
    return rows.select(["status", "reason", "detail"])


def _read_slice(file: str, start: int, stop: int) -> pa.Table:
    """``photo_id`` and ``image`` of rows ``start`` to ``stop``, from the row groups they are in."""
    with pq.ParquetFile(file) as parquet:
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        edges = np.cumsum([0, *sizes])
        groups = [i for i in range(len(sizes)) if edges[i] < stop and edges[i + 1] > start]
        table = parquet.read_row_groups(groups, columns=["photo_id", "image"])
        return table.slice(start - int(edges[groups[0]]), stop - start)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
