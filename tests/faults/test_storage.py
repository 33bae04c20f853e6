"""Checkpoints on disks and stores that fail: complete or absent, and the one before is used."""

import hashlib
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from sbir_ray import checkpoint
from sbir_ray.errors import DamagedError, SbirError, UserError
from sbir_ray.places import place
from tests.faults.disks import bad_disk, faulty  # noqa: F401  # a fixture

FILES = 4


def save(run, step, **more):
    model = {"w": torch.full((300,), float(step))}
    state = {"world": 1}
    return checkpoint.save(run, step, model, {"0.exp_avg": torch.ones(2)}, state, 5, **more)


@pytest.mark.parametrize("fault", ["full", "torn"])
@pytest.mark.parametrize("at", range(FILES))
def test_a_write_that_fails_leaves_what_was_there(tmp_path, fault, at):
    save(tmp_path, 1)
    with bad_disk(fault, at), pytest.raises(SbirError, match=r"step-00000002: cannot be written"):
        save(tmp_path, 2)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    said = []
    assert checkpoint.load(tmp_path, said.append).step == 1
    assert said == []
    save(tmp_path, 2)
    assert checkpoint.load(tmp_path).step == 2


@pytest.mark.parametrize("at", range(FILES))
def test_a_disk_that_loses_half_a_file_in_silence_is_found_out(tmp_path, at):
    save(tmp_path, 1)
    with bad_disk("lying", at) as names:
        save(tmp_path, 2)
    assert len(names) == FILES
    said = []
    assert checkpoint.load(tmp_path, said.append).step == 1
    assert "using the checkpoint before it" in said[0]


def test_a_file_system_without_room_ends_in_one_line(tmp_path):
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(SbirError, match="cannot be written"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert checkpoint.load(tmp_path).step == 1


def killed_while_saving(run, name, when):
    """Save step 2 in a child that SIGKILLs itself ``when`` it calls ``name``."""
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return
    owner = Path if name == "rename" else checkpoint
    real = getattr(owner, name)

    def dies(*args, **more):
        if when == "after":
            real(*args, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dies)
    save(run, 2)


@pytest.mark.parametrize(
    ("name", "when", "newest"),
    [
        ("write_bytes", "before", 1),
        ("write_bytes", "after", 1),
        ("rename", "before", 1),
        ("rename", "after", 2),
        ("sync", "before", 2),
        ("_prune", "before", 2),
    ],
)
def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path, name, when, newest):
    save(tmp_path, 1)
    killed_while_saving(tmp_path, name, when)
    said = []
    assert checkpoint.load(tmp_path, said.append).step == newest
    assert said == []
    save(tmp_path, 3)
    left = sorted(f.name for f in (tmp_path / "checkpoints").iterdir())
    assert left == [f"step-{step:08d}" for step in range(1, 4) if step <= newest or step == 3]


def test_an_object_store_that_is_full_keeps_the_one_before(faulty):  # noqa: F811
    run = place("memory://bucket/run")
    for step in (1, 2):
        save(run, step)
    for room in range(FILES):
        faulty.plan["room"] = room
        with pytest.raises(SbirError, match="cannot be written"):
            save(run, 3)
        assert checkpoint.load(run).step == 2
    faulty.plan.clear()
    save(run, 3)
    assert checkpoint.load(run).step == 3


def test_an_object_store_that_lists_what_was_there_before_is_not_trusted_with_half(faulty):  # noqa: F811
    run = place("memory://bucket/run")
    save(run, 1)
    folder = save(run, 2)
    known = [*faulty.store, *(str(path.parent) for path in map(Path, faulty.store))]
    lost = f"/{folder.path.strip('/')}/state.json"
    assert lost in known
    faulty.plan["stale"] = [name for name in known if name != lost]
    said = []
    assert checkpoint.load(run, said.append).step == 1
    assert "files do not agree with the manifest" in said[0]


def test_a_slow_object_store_is_waited_for(faulty):  # noqa: F811
    run = place("memory://bucket/run")
    faulty.plan["seconds"] = 0.05
    save(run, 1)
    assert checkpoint.load(run).step == 1


def test_a_manifest_cannot_make_the_program_read_without_end(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["bytes"] = 10
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedError, match="larger than the 10 bytes"):
        checkpoint.verify(folder)
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DamagedError, match="no readable manifest"):
        checkpoint.verify(folder)
    os.truncate(folder / "manifest.json", checkpoint.MAX_JSON + 1)
    with pytest.raises(DamagedError, match="larger than"):
        checkpoint.verify(folder)


def test_weights_that_lie_about_themselves_are_refused(tmp_path):
    for header in (
        b'{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"v":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"[" * 100_000,
    ):
        folder = save(tmp_path, 1)
        bomb = len(header).to_bytes(8, "little") + header + b"\0" * 4
        forge(folder, bomb)
        with pytest.raises(DamagedError, match=r"model\.safetensors: cannot be read"):
            checkpoint.verify(folder)
    folder = save(tmp_path, 1)
    forge(folder, (1 << 62).to_bytes(8, "little"))
    with pytest.raises(DamagedError, match="cannot be read"):
        checkpoint.load(tmp_path)


def forge(folder, data):
    """The model's file, with a manifest that agrees."""
    (folder / "model.safetensors").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_newer_schema_stops_and_does_not_fall_back(tmp_path):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(UserError, match="newer"):
        checkpoint.load(tmp_path)
