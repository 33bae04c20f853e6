"""A folder of long work that one process at a time writes, for one request."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sbir_ray.errors import UserError
from sbir_ray.places import is_local
from sbir_ray.runlog import write_json_atomic
from sbir_ray.strict import SCHEMA_VERSION, check_schema

_REQUEST = "request.json"


@contextmanager
def claimed(
    out: Path, what: str, identity: Mapping[str, Any], files: Mapping[str, str]
) -> Iterator[None]:
    """``out`` for this process alone, made when it is not there.

    Args:
        what: is done there ("study").
        identity: plain values that decide what is written; kept in ``request.json``.
        files: written beside it at the first time, text by name.

    Raises:
        UserError: another process has it, it holds something else or another request's work, or it
            is in an object store.
    """
    if not is_local(out):
        raise UserError(
            f"{out}: a {what} is written by locks and renames, which object stores lack; choose an "
            "--out in a file system that all nodes share"
        )
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another {what} is writing it; wait for it") from error
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
        elif any(e.name != "lock" and not e.name.startswith(".") for e in out.iterdir()):
            raise UserError(f"{out}: is not empty and holds no {what}; choose another --out")
        else:
            head = {"schema_version": SCHEMA_VERSION, "kind": f"{what}-request"}
            write_json_atomic(file, {**head, "identity": plain})
        for name, text in files.items():
            if not (out / name).exists():
                (out / name).write_text(text)
        yield


def _differing(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*new, *(name for name in old if name not in new)]:
            yield from _differing(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif old != new:
        yield path.removeprefix("config.")
