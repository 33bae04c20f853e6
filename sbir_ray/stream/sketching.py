"""Every photo of a store drawn by a pool of actors, and written with where it came from.

A Ray Data pipeline: tasks read and align photos, actors draw them, tasks write the rows. Its blocks
are planned here, the same for any cluster: a block that has been written is not drawn again when
the same call is repeated after a kill. Only the accounts of rows come back to the driver.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray.data
from ray.data import ActorPoolStrategy

from sbir_ray.config import SketchConfig
from sbir_ray.errors import SbirError, UserError
from sbir_ray.places import place, read_table, remove_tree, write_bytes
from sbir_ray.runlog import Ledger, Progress, building, versions, write_json_atomic
from sbir_ray.stream.cluster import ensure_fits, quiet_data
from sbir_ray.stream.filters import RankerSpec, reference_photos, refuse_without_effect
from sbir_ray.stream.pseudo_store import HEADER
from sbir_ray.stream.sketch_actor import ATTEMPTS, ERROR, REFERENCE, SketchActor, write_rows
from sbir_ray.stream.sketch_blocks import PhotoBlock, plan_blocks, read_photos
from sbir_ray.stream.sketchers import Sketcher, SketcherSpec
from sbir_ray.strict import SCHEMA_VERSION, to_dict

MAX_ERRORS = 0.5
"""Share of rows that may fail by an error before the run stops: then it is not the photos."""

_ROUND = "round-0000"
_FIRST = 64
"""Rows within which errors are not yet a rate."""


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
        teacher: RUN folder of the retrieval network that ranks photos for ``filters.max_rank``
            and ``keep``, among the first :data:`REFERENCES` photos of the store.
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
            source=_run_folder(sketcher) or sketcher,
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
        "photos": [[[file.name, *rows] for file, *rows in block.runs] for block in plan],
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
                    _save(folder / REFERENCE, reference_photos(photos, ranker.image_size))
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
        remove_tree(folder / ATTEMPTS)
        (folder / REFERENCE).unlink(missing_ok=True)
        write_json_atomic(folder / HEADER, header)
    return ledger


def _run_folder(sketcher: str) -> str | None:
    """The whole name of a generator's run; None for a sketcher that is not one."""
    found = place(sketcher)
    return str(found.absolute()) if found.is_dir() else None


def _save(file: Path, array: Any) -> None:
    stream = io.BytesIO()
    np.save(stream, array)
    write_bytes(file, stream.getvalue())


def _temperature(config: SketchConfig, sketcher: str | SketcherSpec) -> float:
    """The setting; its default is a generator's, and means nothing to what draws without chance."""
    default = SketchConfig().temperature
    chanceless = isinstance(sketcher, str) and _run_folder(sketcher) is None
    return 0.0 if chanceless and config.temperature == default else config.temperature


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
            for row in read_table(file, columns=["status", "reason"]).to_pylist()
        ]
        erred = any(row["reason"].startswith(ERROR) for row in fates)
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
    sizes = {author.image_size, ranker.image_size if ranker else author.image_size}
    tables: dict[str, Any] = {"batch_format": "pyarrow"}
    return (
        ray.data.from_arrow([block.to_table() for block in plan])
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
            if row["reason"].startswith(ERROR):
                errors[row["detail"]] += 1
        bar.update(ledger.accounted, note=f"{ledger.count('kept')} kept")
        if errors.total() > MAX_ERRORS * max(ledger.accounted, min(_FIRST, ledger.total)):
            text, _ = errors.most_common(1)[0]
            raise SbirError(
                f"{errors.total()} of {ledger.accounted} drawings failed, most often by {text}"
            )
