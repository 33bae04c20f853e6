"""A folder of long work that one process at a time writes, for one request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sbir_ray.errors import UserError
from sbir_ray.places import reach, write_bytes
from sbir_ray.runlog import locked, write_json_atomic
from sbir_ray.strict import SCHEMA_VERSION, check_schema

_REQUEST = "request.json"


@contextmanager
def claimed(
    out: Path, what: str, identity: Mapping[str, Any], files: Mapping[str, str]
) -> Iterator[None]:
    """``out`` for this process alone, made when it is not there; an object store has no locks, and
    there nothing is refused for another process's sake.

    Args:
        what: is done there ("study").
        identity: plain values that decide what is written; kept in ``request.json``.
        files: written beside it at the first time, text by name.

    Raises:
        UserError: another process has it, it holds something else or another request's work, or
            its object store cannot be reached.
    """
    reach(out)
    with locked(out):
        plain = json.loads(json.dumps(identity))
        file = out / _REQUEST
        if file.exists():
            found = json.loads(file.read_text())
            check_schema(found.get("schema_version"), str(file))
            if found.get("kind") != f"{what}-request":
                raise UserError(f"{out}: holds no {what}; choose another --out")
            other = list(_differing(found["identity"], plain))
            if other:
                raise UserError(
                    f"{out}: holds a {what} with another {', '.join(other[:5])}; choose another "
                    "--out, or repeat its request to go on with it"
                )
        elif out.exists() and any(
            e.name != "lock" and not e.name.startswith(".") for e in out.iterdir()
        ):
            raise UserError(f"{out}: is not empty and holds no {what}; choose another --out")
        else:
            head = {"schema_version": SCHEMA_VERSION, "kind": f"{what}-request"}
            write_json_atomic(file, {**head, "identity": plain})
        for name, text in files.items():
            if not (out / name).exists():
                write_bytes(out / name, text.encode())
        yield


def _differing(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*new, *(name for name in old if name not in new)]:
            yield from _differing(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif old != new:
        yield path.removeprefix("config.")
