"""Photos found by drawings: by the command, and over HTTP, whoever asks and whatever they send."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbir_ray import cli
from sbir_ray.data.formats import strokes_to_json, write_sketches
from sbir_ray.data.pairs import PairSet
from sbir_ray.data.photos import read_store
from sbir_ray.data.raster import rasterise
from sbir_ray.errors import UserError
from sbir_ray.evaluate import evaluate_retrieval
from sbir_ray.runs import load_retrieval
from sbir_ray.search import server
from sbir_ray.search.searcher import Searcher
from tests.serving import Serving, ask
from tests.tiny import sketch
from tests.tiny_index import make, tiny_retrieval
from tests.tiny_store import tiny_store

COUNT = 9


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The index of the shapes 0 to 8, and the run that made it."""
    folder = tmp_path_factory.mktemp("search")
    run = tiny_retrieval(folder / "run")
    make(tiny_store(folder / "store", COUNT), folder / "index", run)
    return folder / "index", run


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Three of the shapes as files of four kinds."""
    folder = tmp_path_factory.mktemp("drawings")
    items = [(f"shape{n}", sketch(n)) for n in (2, 5, 7)]
    write_sketches(folder / "one.svg", items[:1])
    write_sketches(folder / "all.ndjson", items)
    (folder / "one.json").write_text(json.dumps(strokes_to_json(items[0][1])))
    ink = rasterise([items[0][1]], 256)[0]
    Image.fromarray(255 - ink).save(folder / "one.png")
    return folder


def said(monkeypatch, capsys, *words):
    """Exit code, output and errors of a command."""
    monkeypatch.setattr(sys, "argv", ["sbir-ray", *map(str, words)])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


# --------------------------------------------------------------------------- the searcher


def test_ranks_are_those_of_an_evaluation(made, tmp_path):
    out, run = made
    pairs = PairSet.load(run.with_name("run-pairs"), "train", 64)
    searcher = Searcher(out)
    expected = evaluate_retrieval(load_retrieval(run).model, pairs, "cpu")
    # The store has the same shapes under other ids, and one more.
    shapes = {name: f"photo{int(name[5:]):02d}" for name in pairs.names}
    more = [hit.photo_id for hit in searcher.find(searcher.raster_of(sketch(0)), COUNT)]
    assert len(set(more)) == COUNT
    for query, strokes in zip(expected.per_query, pairs.sketches, strict=True):
        name = pairs.names[pairs.photo_ids.index(query["photo"])]
        hits = searcher.find(searcher.raster_of(strokes), COUNT)
        those = [hit for hit in hits if hit.photo_id in shapes.values()]
        rank = [hit.photo_id for hit in those].index(shapes[name]) + 1
        assert rank == query["rank"]
        assert searcher.ranks(strokes, shapes[name])[-1] - 1 == [h.photo_id for h in hits].index(
            shapes[name]
        )


def test_a_rank_by_stroke_is_that_of_the_drawing_so_far(made):
    searcher = Searcher(made[0])
    strokes = sketch(4)
    found = searcher.ranks(strokes, "photo04")
    for count, rank in enumerate(found, 1):
        hits = searcher.find(searcher.raster_of(strokes[:count]), COUNT)
        assert [hit.photo_id for hit in hits].index("photo04") + 1 == rank
    assert searcher.ranks(strokes, "none") is None


def test_other_weights_are_refused(made, tmp_path):
    out, run = made
    other = tiny_retrieval(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"index: was made by weights \w+, and .*other has \w+"):
        Searcher(out, other)
    moved = shutil.copytree(out, tmp_path / "index")
    header = json.loads((moved / "index.json").read_text())
    (moved / "index.json").write_text(json.dumps({**header, "run": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"gone: the run that made .* name it with --run"):
        Searcher(moved)
    assert Searcher(moved, run).index.photo_ids == Searcher(out).index.photo_ids


def test_an_index_made_anew_is_taken_up_where_the_weights_are_the_same(made, tmp_path, capsys):
    out, run = tmp_path / "index", made[1]
    make(tiny_store(tmp_path / "few", 3), out, run)
    searcher = Searcher(out)
    assert searcher.refresh()
    make(tiny_store(tmp_path / "more", 7), out, run)
    assert searcher.refresh()
    assert len(searcher.index) == 7
    header = (out / "index.json").read_text()
    (out / "index.json").write_text("{")  # as if it were read between two files
    assert searcher.refresh()
    (out / "index.json").unlink()
    assert searcher.refresh()
    (out / "index.json").write_text(header)
    make(tmp_path / "few", out, tiny_retrieval(tmp_path / "other", seed=1))
    for _ in range(2):
        assert not searcher.refresh()
    assert len(searcher.index) == 7
    assert capsys.readouterr().err.count("was made anew by weights") == 1


# --------------------------------------------------------------------------- the command


def test_all_kinds_of_drawings_find_the_same(made, drawings, monkeypatch, capsys, tmp_path):
    files = [drawings / name for name in ("one.svg", "one.json", "all.ndjson", "one.png")]
    sheet = tmp_path / "sheet.png"
    words = ("search", made[0], *files, "--top", 4, "--sheet", sheet, "--json")
    code, out, _ = said(monkeypatch, capsys, *words)
    assert code == 0
    found = json.loads(out)
    assert found["photos"] == COUNT
    rows = found["sketches"]
    assert [row["sketch"] for row in rows] == ["one", "one", "shape2", "shape5", "shape7", "one"]
    assert all(len(row["found"]) == 4 for row in rows)
    first = [[hit["photo_id"] for hit in rows[i]["found"]] for i in range(3)]
    assert first[0] == first[1] == first[2]
    strokes, picture = ({h["photo_id"]: h["similarity"] for h in rows[i]["found"]} for i in (0, 5))
    for name in set(strokes) & set(picture):
        assert picture[name] == pytest.approx(strokes[name], abs=0.1)
    with Image.open(sheet) as shown:
        assert shown.size == (5 * 150 + 6, 6 * 150 + 6)
    code, out, _ = said(monkeypatch, capsys, "search", made[0], files[0], "--top", 1)
    assert out.splitlines()[0] == f"{files[0]}: one"
    assert out.splitlines()[1].startswith("   1  ")


def test_what_is_no_drawing_is_told(made, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "a.ndjson").write_text("")
    Image.new("L", (40, 40), 255).save(tmp_path / "a.png")
    for name, line in (
        ("none.svg", "none.svg: cannot be read"),
        ("none.png", "none.png"),
        ("a.svg", "a.svg: "),
        ("a.ndjson", "a.ndjson: holds no sketch"),
        ("a.png", "a.png: no lines in the drawing"),
        ("a.txt", "a.txt: not a sketch file"),
    ):
        code, _, errors = said(monkeypatch, capsys, "search", made[0], tmp_path / name)
        assert code == 2, name
        assert errors.count("\n") == 1
        assert line in errors


# --------------------------------------------------------------------------- over HTTP


@pytest.fixture
def address(made):
    """The port of a server that runs."""
    with Serving(Searcher(made[0])) as port:
        yield port


def test_a_drawing_finds_what_the_searcher_finds(made, address):
    searcher = Searcher(made[0])
    strokes = sketch(3)
    points = [stroke.tolist() for stroke in strokes]
    status, _, found = ask(address, "POST", "/api/search", {"strokes": points, "top": 5})
    assert status == 200
    hits = searcher.find(searcher.raster_of(strokes), 5)
    assert found["found"] == [hit._asdict() for hit in hits]
    assert found["photos"] == COUNT
    # Where it is drawn and how large does not matter.
    moved = [[[x * 3 + 50, y * 3 - 9] for x, y in stroke] for stroke in points]
    same = ask(address, "POST", "/api/search", {"strokes": moved, "top": 5})[2]["found"]
    assert [hit["photo_id"] for hit in same] == [hit.photo_id for hit in hits]
    body = {"strokes": points, "photo_id": "photo03"}
    assert ask(address, "POST", "/api/ranks", body)[2] == {
        "ranks": searcher.ranks(strokes, "photo03")
    }


def test_photos_are_as_they_are_stored(made, address):
    stored = {row["photo_id"]: row["image"] for row in read_store(made[0].with_name("store"))}
    status, headers, image = ask(address, "GET", "/photos/photo04")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert image == stored["photo04"]
    about = ask(address, "GET", "/api/index")[2]
    assert (about["photos"], about["fits"]) == (COUNT, True)
    status, headers, page = ask(address, "GET", "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"Draw a thing" in page
    assert "default-src 'self'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/photos/..%2findex.json",
        "/photos/%2e%2e/%2e%2e/etc/passwd",
        "/photos//etc/passwd",
        "/photos/photo04%00.jpg",
        "/page.html",
        "/../server.py",
        "/index.json",
        "/api",
    ],
)
def test_nothing_but_the_page_and_the_photos_is_given(address, path):
    status, _, found = ask(address, "GET", path)
    assert status == 404
    assert set(found) == {"error"}


LINE = [[[0, 0], [9, 9]]]


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[" * 100_000, 400, "not valid JSON"),
        ([], 400, "not an object"),
        ({}, 400, "not a drawing"),
        ({"strokes": []}, 400, ""),
        ({"strokes": [[]]}, 400, ""),
        ({"strokes": [[[1, "a"]]]}, 400, ""),
        (b'{"strokes": [[[NaN, 1], [2, 3]]]}', 400, ""),
        (b'{"strokes": [[[1e999, 1], [2, 3]]]}', 400, ""),
        ({"strokes": LINE * 501}, 400, "more than 500 strokes"),
        ({"strokes": [[[i, i] for i in range(200_000)]]}, 413, ""),
        ({"strokes": LINE, "top": 10**9}, 400, "top is a whole number from 1 to 200"),
        ({"strokes": LINE, "top": True}, 400, "top is a whole number"),
        ({"strokes": LINE, "top": "3"}, 400, "top is a whole number"),
    ],
)
def test_a_bad_request_is_told_and_the_server_goes_on(address, body, status, line):
    found = ask(address, "POST", "/api/search", body)
    assert found[0] == status
    assert line in found[2]["error"]
    assert ask(address, "POST", "/api/search", {"strokes": LINE})[0] == 200


def test_other_requests_are_refused(address):
    body = {"strokes": LINE}
    for status, headers in (
        (403, {"Host": "evil.example"}),
        (403, {"Host": f"evil.example:{address}"}),
        (403, {"Origin": "http://evil.example"}),
        (403, {"Origin": "null"}),
        (415, {"Content_Type": "text/plain"}),
        (200, {"Host": f"localhost:{address}", "Origin": f"http://localhost:{address}"}),
    ):
        assert ask(address, "POST", "/api/search", body, **headers)[0] == status, headers
    assert ask(address, "GET", "/photos/photo04", Host="evil.example")[0] == 403
    assert ask(address, "GET", "/api/search")[0] == 405
    assert ask(address, "POST", "/api/ranks", body)[0] == 400
    assert ask(address, "POST", "/api/ranks", {**body, "photo_id": "no"})[0] == 404


def test_a_request_that_does_not_arrive_is_given_up(made, monkeypatch):
    monkeypatch.setattr(server, "SECONDS", 0.3)
    with Serving(Searcher(made[0])) as port, socket.create_connection((server.HOST, port)) as wire:
        wire.settimeout(30)
        wire.sendall(
            f"POST /api/search HTTP/1.1\r\nHost: {server.HOST}:{port}\r\n"
            'Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"strokes'.encode()
        )
        assert wire.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert ask(port, "GET", "/api/index")[0] == 200


def test_a_fault_of_the_program_is_told_and_the_server_goes_on(made, monkeypatch, capsys):
    searcher = Searcher(made[0])
    with Serving(searcher) as port, monkeypatch.context() as patch:
        patch.setattr(searcher, "find", lambda *_: 1 / 0)
        status, _, found = ask(port, "POST", "/api/search", {"strokes": LINE})
        assert (status, list(found)) == (500, ["error"])
        assert "ZeroDivisionError" in capsys.readouterr().err
        patch.undo()
        assert ask(port, "POST", "/api/search", {"strokes": LINE})[0] == 200


def test_many_at_once_are_answered_or_turned_away(made, monkeypatch):
    searcher, turn = Searcher(made[0]), threading.Event()
    find = searcher.find

    def slow(raster, top):
        turn.wait(30)
        return find(raster, top)

    monkeypatch.setattr(searcher, "find", slow)
    monkeypatch.setattr(server, "WAITING", 4)
    found = []
    with Serving(searcher) as port:
        body = {"strokes": LINE, "top": 2}
        threads = [
            threading.Thread(target=lambda: found.append(ask(port, "POST", "/api/search", body)))
            for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 30
        while len(found) < 6 and time.monotonic() < end:
            time.sleep(0.01)
        turn.set()
        for thread in threads:
            thread.join()
    assert sorted(status for status, *_ in found) == [200] * 4 + [503] * 6
    answers = {json.dumps(got["found"]) for status, _, got in found if status == 200}
    assert len(answers) == 1


def test_the_command_serves_until_it_is_asked_to_end(made):
    command = [Path(sys.executable).with_name("sbir-ray"), "serve", made[0], "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        assert line.startswith(f"{COUNT} photos; draw at http://127.0.0.1:")
        port = int(line.split(":")[2].split("/")[0])
        assert ask(port, "GET", "/api/index")[0] == 200
        taken = subprocess.run(
            [*command[:-1], str(port)], capture_output=True, text=True, timeout=120, check=False
        )
        assert taken.returncode == 2
        assert taken.stderr.startswith(f"error: --port {port}: cannot be used (")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


def test_strokes_become_what_the_network_saw_in_training(made):
    searcher = Searcher(made[0])
    strokes = sketch(6)
    np.testing.assert_array_equal(searcher.raster_of(strokes), rasterise([strokes], 64)[0])
