"""A command as a job of a cluster: submitted once, followed, stopped, and taken up again.

The job's name follows from the command and its settings, so that the same command finds its job
again. What travels is the working folder without data, and this package itself; results go to
places that all nodes share.
"""

from __future__ import annotations

import asyncio
import fnmatch
import json
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sbir_ray
from sbir_ray.errors import SbirError, UserError
from sbir_ray.runlog import other_versions, versions
from sbir_ray.strict import digest

PINNED = "SBIR_RAY_VERSIONS"
"""Environment variable of a job: the versions, as JSON, that its command was submitted with."""
HEADERS = ("pairs.json", "store.json", "pseudo.json", "run.json")
"""A folder with one of these holds data or a run, and does not travel."""
GRACE = 60
"""Seconds for a job that is stopped to save what it has reached."""
_DONE = ("SUCCEEDED", "FAILED", "STOPPED")
_POLL = 1.0


@dataclass(frozen=True)
class SubmitConfig:
    """How a command becomes a job."""

    address: str = "http://127.0.0.1:8265"
    """Of the cluster's job server, which is its dashboard; reached through a tunnel."""
    working_dir: str = "."
    """Folder that travels, for settings files."""
    exclude: tuple[str, ...] = (
        *("*.png", "*.jpg", "*.jpeg", "*.webp", "*.parquet", "*.safetensors", "*.ndjson"),
        *("*.npy", "*.npz", "*.zip", "*.tar*", "*.whl", "*.html", "__pycache__", ".*"),
    )
    """Names, or patterns of them, of files and folders that do not travel. Folders with data and
    runs never do."""
    max_mebibytes: int = 20
    """Most that may travel."""
    environment: tuple[str, ...] = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION")
    """Variables that the job gets as they are here, where they are set. Credentials need not be
    among them: nodes have roles, or get them from their cluster."""
    install: bool = False
    """Whether the cluster installs this machine's versions of the packages for the job; without it,
    a job on nodes of other versions is refused."""


@dataclass(frozen=True)
class Attempt:
    """A job of a command, as the cluster has it."""

    name: str
    number: int
    status: str
    exit_code: int | None
    message: str


# --------------------------------------------------------------------------- what travels


def stage(folder: Path, target: Path, config: SubmitConfig) -> int:
    """Copy what travels of ``folder`` to ``target``; returns its bytes.

    Raises:
        UserError: no such folder, or more than ``config.max_mebibytes``: the largest are named.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name another working_dir")
    sizes: dict[str, int] = {}
    for at, folders, files in os.walk(folder):
        here = Path(at)
        folders[:] = sorted(
            name
            for name in folders
            if not _excluded(name, config)
            and not any((here / name / header).exists() for header in HEADERS)
        )
        for name in sorted(files):
            source = here / name
            if not _excluded(name, config) and source.is_file() and not source.is_symlink():
                sizes[str(source.relative_to(folder))] = source.stat().st_size
    total = sum(sizes.values())
    if total > config.max_mebibytes << 20:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
        raise UserError(
            f"{folder}: {total / 2**20:.1f} MiB would travel, more than max_mebibytes="
            f"{config.max_mebibytes}; the largest are {named}: exclude them, or name another "
            "working_dir"
        )
    for name in sizes:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
    return total


def _excluded(name: str, config: SubmitConfig) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in config.exclude)


def runtime_env(folder: Path, config: SubmitConfig) -> dict[str, Any]:
    """What Ray makes for the job: the folder that travels, this package, variables, versions."""
    own = versions()
    variables = {name: os.environ[name] for name in config.environment if name in os.environ}
    made: dict[str, Any] = {
        "working_dir": str(folder),
        "py_modules": [str(Path(sbir_ray.__file__).parent)],
        "excludes": ["__pycache__"],
        "env_vars": {
            **variables,
            PINNED: json.dumps(own, sort_keys=True),
            "PYTHONUNBUFFERED": "1",
            "RAY_JOB_STOP_WAIT_TIME_S": str(GRACE),
        },
    }
    if config.install:
        packages = {k: v for k, v in own.items() if k not in ("sbir_ray", "python", "ray")}
        made["pip"] = [f"{name}=={version}" for name, version in sorted(packages.items())]
    return made


def refuse_other_versions(environment: Mapping[str, str] = os.environ) -> None:
    """In a job: refuse to run with other versions than it was submitted with.

    Raises:
        UserError: a version differs.
    """
    text = environment.get(PINNED)
    if not text:
        return
    odd = other_versions(json.loads(text))
    if odd:
        raise UserError(
            f"submitted with {'; '.join(odd)}, on the cluster; give it the versions of the machine "
            "that submits, or submit with --set install=true"
        )


# --------------------------------------------------------------------------- the cluster's side


class Cluster:
    """The job server of a cluster.

    Raises:
        UserError: it cannot be reached, or takes no token of this machine.
    """

    def __init__(self, address: str) -> None:
        # Servers ask for a token by default; clients send one only if told to, and Ray's core has
        # read its settings when it was imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        from ray._raylet import Config  # type: ignore[attr-defined]
        from ray.job_submission import JobSubmissionClient

        Config.initialize("")
        self.address = address
        try:
            self.client = JobSubmissionClient(address)
        except Exception as error:  # of many kinds: no answer, no token, another version
            line = " ".join(str(error).split())[:200]
            raise UserError(
                f"{address}: no job server can be reached there ({line}); open the tunnel to the "
                "head node's port 8265, and see RAY_AUTH_TOKEN_PATH"
            ) from error

    def attempts(self, base: str) -> list[Attempt]:
        """The jobs of one name, the oldest first."""
        found = []
        for job in self.client.list_jobs():
            name, _, number = (job.submission_id or "").rpartition("-")
            if name == base and number.isdigit():
                found.append(
                    Attempt(
                        name=str(job.submission_id),
                        number=int(number),
                        status=str(job.status),
                        exit_code=job.driver_exit_code,
                        message=" ".join((job.message or "").split())[:200],
                    )
                )
        return sorted(found, key=lambda attempt: attempt.number)

    def start(self, name: str, entrypoint: str, env: dict[str, Any]) -> None:
        """Submit a job."""
        try:
            self.client.submit_job(
                entrypoint=entrypoint,
                submission_id=name,
                runtime_env=env,
                metadata={"made_with": f"sbir_ray {sbir_ray.__version__}"},
            )
        except (RuntimeError, ValueError, OSError) as error:
            line = " ".join(str(error).split())[:300]
            raise SbirError(f"{self.address}: did not take the job {name} ({line})") from error

    def follow(self, name: str, say: Callable[[str], None]) -> Attempt:
        """Hand on the job's log until it has ended."""
        told = 0

        async def tail() -> None:
            nonlocal told
            seen = 0
            async for text in self.client.tail_job_logs(name):
                # A connection that was lost begins anew: what was told is left out.
                fresh = text[max(0, told - seen) :]
                seen += len(text)
                told = max(told, seen)
                if fresh:
                    say(fresh)

        while True:
            try:
                asyncio.run(tail())
            except (RuntimeError, OSError):  # the connection; the job goes on meanwhile
                time.sleep(_POLL)
            attempt = self._one(name)
            if attempt.status in _DONE:
                return attempt
            time.sleep(_POLL)

    def stop(self, name: str) -> Attempt:
        """Ask a job to end, and wait for that."""
        self.client.stop_job(name)
        limit = time.monotonic() + 2 * GRACE
        while (attempt := self._one(name)).status not in _DONE:
            if time.monotonic() > limit:
                raise SbirError(f"{name}: did not end within {2 * GRACE} s; see the dashboard")
            time.sleep(_POLL)
        return attempt

    def _one(self, name: str) -> Attempt:
        base = name.rpartition("-")[0]
        return next(attempt for attempt in self.attempts(base) if attempt.name == name)


# --------------------------------------------------------------------------- the commands


def job_name(command: Mapping[str, Any]) -> str:
    """The name of a command's jobs, without the number of the attempt.

    Args:
        command: plain values of all that its results depend on.
    """
    return f"sbir-ray-{digest(command)}"


def submit(
    base: str,
    words: Sequence[str],
    config: SubmitConfig,
    say: Callable[[str], None],
    tell: Callable[[str], None],
    resume: bool = False,
) -> int:
    """Run a command as a job, or follow the one that runs it already; returns its exit code.

    Args:
        base: see :func:`job_name`; words: the command, as after ``sbir-ray``.
        say: takes the job's log; tell: takes a line about the job.
        resume: start it again after it failed or was stopped; it goes on from its run folder.

    Raises:
        UserError: it failed or was stopped before and ``resume`` is not asked for; nothing of it
            to resume; the server cannot be reached; too much would travel.
    """
    cluster = Cluster(config.address)
    attempts = cluster.attempts(base)
    last = attempts[-1] if attempts else None
    if last is None and resume:
        raise UserError(f"{base}: never ran on {config.address}; leave --resume out")
    if last is not None and last.status == "SUCCEEDED":
        tell(f"{last.name}: finished before, nothing to do")
        return 0
    if last is not None and last.status in _DONE and not resume:
        raise UserError(
            f"{last.name}: {last.status.lower()} before ({last.message}); --resume goes on from "
            "what its run folder holds"
        )
    if last is not None and last.status not in _DONE:
        tell(f"{last.name}: runs already; this is its log")
        name = last.name
    else:
        name = f"{base}-{1 if last is None else last.number + 1}"
        with tempfile.TemporaryDirectory() as folder:
            size = stage(Path(config.working_dir), Path(folder), config)
            line = shlex.join(["python", "-m", "sbir_ray.cli", *words])
            cluster.start(name, line, runtime_env(Path(folder), config))
        tell(f"{name}: submitted with {size / 2**10:.0f} KiB; Ctrl-C leaves it running")
    ended = cluster.follow(name, say)
    tell(f"{name}: {ended.status.lower()} ({ended.message})")
    if ended.status == "SUCCEEDED":
        return 0
    return ended.exit_code if ended.exit_code and ended.exit_code > 0 else 1


def stop(base: str, config: SubmitConfig, tell: Callable[[str], None]) -> None:
    """End the job of a command, which saves what it has reached.

    Raises:
        UserError: it does not run.
    """
    cluster = Cluster(config.address)
    attempts = [a for a in cluster.attempts(base) if a.status not in _DONE]
    if not attempts:
        raise UserError(f"{base}: does not run on {config.address}; nothing to stop")
    for attempt in attempts:
        tell(f"{attempt.name}: {cluster.stop(attempt.name).status.lower()}")
