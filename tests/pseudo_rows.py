"""What a PSEUDO folder holds, for tests."""

import pyarrow.parquet as parquet

from sbir_ray.stream.pseudo_store import iter_rows


def rows_of(out, without=()):
    """By photo and sample."""
    return {
        (row["photo_id"], row["sample"]): {k: v for k, v in row.items() if k not in without}
        for row in iter_rows(out, kept_only=False)
    }


def drawn(out):
    """Photos that each round drew."""
    found = {}
    for folder in sorted(out.glob("round-*")):
        files = [parquet.read_table(file, columns=["photo_id"]) for file in folder.glob("part-*")]
        found[folder.name] = {name for table in files for name in table["photo_id"].to_pylist()}
    return [found[name] for name in sorted(found)]
