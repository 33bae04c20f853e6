"""Every photo of a store drawn by a pool of actors, and written with where it came from.

A Ray Data pipeline: tasks read and align photos, actors draw them, tasks write the rows. Its blocks
are planned here, the same for any cluster: a block that has been written is not drawn again when
the same call is repeated after a kill. Only the accounts of rows come back to the driver.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from sbir_ray.config import SketchConfig
from sbir_ray.errors import SbirError, UserError
from sbir_ray.places import count_rows, place, read_table
from sbir_ray.runlog import Ledger, Progress, versions
from sbir_ray.stream.cluster import quiet_data, room_for_actors
from sbir_ray.stream.disk import disk_told
from sbir_ray.stream.filters import (
    RankerSpec,
    refuse_rank_above_all,
    refuse_without_effect,
)
from sbir_ray.stream.fit import SPARE_SKETCH, sent_to
from sbir_ray.stream.pseudo_rounds import (
    ERROR,
    Round,
    open_round,
    reference_of,
    tidy,
    writing,
)
from sbir_ray.stream.pseudo_store import HEADER, account, read_header, refilter
from sbir_ray.stream.sketch_actor import SketchActor, write_rows
from sbir_ray.stream.sketch_blocks import PhotoBlock, plan_blocks, read_photos, shards_of
from sbir_ray.stream.sketchers import Sketcher, SketcherSpec
from sbir_ray.strict import SCHEMA_VERSION, digest, to_dict

MAX_ERRORS = 0.5
"""Share of rows that may fail by an error before the run stops: then it is not the photos."""

_FIRST = 64
"""Rows within which errors are not yet a rate."""
PICTURE = ("longest", "format", "quality")
"""Settings of a photo store that decide its pictures' pixels."""


@dataclass(frozen=True)
class _Actors:
    """Who draws."""

    pool: ActorPoolStrategy
    cpus: float
    gpus: float
    on: str
    """Custom resource of their nodes."""


def sketch(
    photos: Path,
    out: Path,
    sketcher: str | SketcherSpec,
    config: SketchConfig | None = None,
    *,
    teacher: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    actors: tuple[int, int] = (1, 2),
    cpus_per_actor: float = 1.0,
    gpus_per_actor: float = 0.0,
    actor_resource: str = "",
    progress: Callable[[str], Progress] = Progress,
) -> Ledger:
    """Draw the photos of a store into a round of a PSEUDO folder. Needs a Ray that is up.

    A row depends on its photo, the sketcher's weights, the settings and its own seed, which follows
    from ``config.seed``, the photo's id and the number of the drawing; not on the actors. So a
    photo that an earlier round drew by the same sketcher with the same settings is not drawn again.

    Args:
        photos: PHOTOS folder.
        out: PSEUDO folder to write, or to add a round to; its header appears when it is whole.
        sketcher: ``contours``, ``edges`` or a generator's RUN folder; or how to make another one.
        teacher: RUN folder of the retrieval network that ranks photos for ``filters.max_rank`` and
            ``keep``, among the first photos of the store that the folder was begun with.
        shard: which of how many jobs this is, from 0: they share the photos, on storage that all
            of them see, and the last to finish lists the round.
        actors: least and most processes that draw.
        cpus_per_actor, gpus_per_actor: of each; a GPU may be shared.
        actor_resource: custom resource of the nodes that draw; any by default.
        progress: makes a progress line from a title.

    Returns:
        The account of all drawings of the round, which ``pseudo.json`` has too; of this shard's
        while others are not finished.

    Raises:
        UserError: the store, the sketcher or the teacher cannot be used, settings without effect,
            the actors do not fit into the cluster, another run writes ``out``, its disk is full.
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
    count = sum(count_rows(file) for file in shards_of(photos))
    if not count:
        raise UserError(f"{photos}: holds no photo; see its ledger")
    if config.samples > 1 and _temperature(config, sketcher) == 0:
        raise UserError(
            f"samples={config.samples}: at temperature=0 all drawings of a photo are the same; "
            "set a temperature"
        )
    refuse_without_effect(
        config.filters,
        author.name,
        generative=author.generative,
        judged=author.judged,
        ranked=teacher is not None,
    )
    refuse_rank_above_all(config.filters, count)
    ranker = RankerSpec.of_run(teacher, spec.device, spec.threads) if teacher else None
    least, most = actors
    room = room_for_actors(
        actors, cpus_per_actor, gpus_per_actor, actor_resource, spare_cpus=SPARE_SKETCH
    )
    # All at once: Ray Data would add them one by one, each after some seconds.
    pool = ActorPoolStrategy(min_size=least, max_size=most, initial_size=min(most, room))
    with disk_told(out), writing(out, shard) as writer:
        reference = reference_of(out, photos) if ranker else None
        request = _request(photos, author, ranker, reference, config)
        this = open_round(writer, request, photos)
        plan = plan_blocks(photos, config.batch_size, this.drawn)
        if not plan and not this.changes:
            tidy(out)
            return refilter(out, config.choice)
        this.begin(reference)
        writer.share()
        part, of = shard
        mine = [block for block in plan if block.number % of == part]
        ledger = Ledger("pseudo", config.samples * sum(block.rows for block in mine))
        left = _not_done(mine, this.folder, config.samples, ledger)
        with progress("sketch") as bar:
            bar.update(0, ledger.total)
            if left:
                _follow(
                    _pipeline(
                        left,
                        this,
                        spec,
                        author,
                        ranker,
                        config,
                        _Actors(pool, cpus_per_actor, gpus_per_actor, actor_resource),
                    ),
                    ledger,
                    bar,
                )
        ledger.check()
        header = {
            "schema_version": SCHEMA_VERSION,
            "kind": "pseudo",
            "sketcher": author.name,
            "generator_version": author.version,
            "generator_digest": author.digest,
            "generator_config": author.config,
            "generative": author.generative,
            "judged": author.judged,
            "teacher_digest": ranker and ranker.digest,
            "seed": config.seed,
            "settings": to_dict(config),
            "choice": to_dict(config.choice),
            "photos": str(photos),
            "versions": versions(),
        }
        with writer.ending():
            return _ended(this, plan, header, config.samples * count) or ledger


def _request(
    photos: Path,
    author: Sketcher,
    ranker: RankerSpec | None,
    reference: pa.Table | None,
    config: SketchConfig,
) -> dict[str, Any]:
    """What the drawings of a round depend on, as two digests, and what its blocks do."""
    store = (photos / "store.json").read_bytes()
    files = [(file.name, count_rows(file)) for file in shards_of(photos)]
    pictures = json.loads(store).get("settings", {})
    settings = {
        "seed": config.seed,
        "temperature": config.temperature,
        "samples": config.samples,
        "teacher": ranker and ranker.digest,
        "reference": reference and digest({"ids": reference["photo_id"].to_pylist()}),
        "pictures": {name: pictures.get(name) for name in PICTURE},
    }
    return {
        "sketcher": author.name,
        "generator_version": author.version,
        "generator_digest": author.digest,
        "settings_digest": digest(settings),
        "store": hashlib.sha256(store + repr(files).encode()).hexdigest(),
        "batch_size": config.batch_size,
    }


def _ended(
    this: Round, plan: Sequence[PhotoBlock], header: dict[str, Any], total: int
) -> Ledger | None:
    """List the round if it is whole: its account, or None where shards are still drawing."""
    if (this.out / HEADER).exists():
        found = read_header(this.out)
        if any(entry["round"] == this.number for entry in found.get("rounds", [])):
            return Ledger.from_json("pseudo", found["ledger"], str(this.out))
    written = _written(this.folder)
    samples = header["settings"]["samples"]
    for block in plan:
        rows = sum(count_rows(file) for file in written[block.number])
        if rows != samples * block.rows:
            return None
    ledger = account(this.out, {**header, "rounds": [*this.before, this.entry]})
    # The number planned, so that the sum can fail.
    ledger.total = total
    ledger.check()
    this.finish({**header, "ledger": ledger.to_json()})
    return ledger


def _run_folder(sketcher: str) -> str | None:
    """The whole name of a generator's run; None for a sketcher that is not one."""
    found = place(sketcher)
    return str(found.absolute()) if found.is_dir() else None


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
    written = _written(target)
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


def _written(target: Path) -> dict[int, list[Path]]:
    """The files of each block."""
    written: dict[int, list[Path]] = defaultdict(list)
    for file in target.glob("part-*.parquet"):
        written[int(file.name.split("-")[1])].append(file)
    return written


# --------------------------------------------------------------------------- the pipeline


def _pipeline(
    plan: Sequence[PhotoBlock],
    this: Round,
    spec: SketcherSpec,
    author: Sketcher,
    ranker: RankerSpec | None,
    config: SketchConfig,
    actors: _Actors,
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
            compute=actors.pool,
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
            fn_constructor_kwargs={
                "spec": spec,
                "config": config,
                "folder": str(this.folder),
                "ranker": ranker,
                "settings_digest": this.request["settings_digest"],
                "round_number": this.number,
            },
            **sent_to(actors.on),
            **tables,
        )
        .map_batches(
            cast(Any, write_rows),
            batch_size=None,
            fn_kwargs={"target": str(this.folder), "choice": config.choice},
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
