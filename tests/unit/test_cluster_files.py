"""The files of cluster/: valid by Ray's and Kubernetes' schemas, as large as the documented
commands need and no larger, and their pages name commands that exist."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from sbir_ray.cli import cli
from sbir_ray.doctor import check_resources
from sbir_ray.stream.fit import Group, Node, fits, request_of
from sbir_ray.submit import SubmitConfig
from sbir_ray.submit_cli import read_command
from tests import manifests

FOLDER = Path(__file__).parents[2] / "cluster"
PAGES = sorted(FOLDER.glob("*.md"))


def loaded(name):
    return yaml.safe_load((FOLDER / name).read_text())


COMMAND = re.compile(
    r"(?:sbir-ray (?:submit -- )?|slurm\.sh )((?:[a-z]+ )?[a-z]+ (?:s3|gs|--|C)[^'&]*)"
)


def commands(text):
    """The commands of this program in a text, a line each; of those submitted what runs there."""
    for line in text.splitlines():
        match = COMMAND.search(line)
        if match and "`" not in line:
            yield shlex.split(match[1])


def request(values):
    """What a command asks for."""
    workers = Group(
        "--workers",
        values["workers"],
        values["cpus_per_worker"],
        float(values["gpu"]),
        values["worker_resource"],
    )
    actors = Group(
        "--actors",
        values["actors"][0],
        values["cpus_per_actor"],
        values["gpus_per_actor"],
        values["actor_resource"],
    )
    return request_of(workers, actors)


def node(resources):
    custom = frozenset(set(resources) - {"CPU", "GPU"})
    return Node(resources["CPU"], resources.get("GPU", 0), custom)


def launched(name):
    """Nodes of a cluster launcher file, as it starts them at least."""
    config = loaded(name)
    types = config["available_node_types"]
    head = config["head_node_type"]
    return [node(types[head]["resources"])] + [
        node(kind["resources"])
        for key, kind in types.items()
        if key != head
        for _ in range(kind["min_workers"])
    ]


def in_pods(spec):
    """Nodes of a RayCluster."""
    found = []
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources = {"CPU": int(limits["cpu"]), "GPU": int(limits.get("nvidia.com/gpu", 0))}
        # Quoted twice: the value goes through a shell.
        custom = json.loads(json.loads(group["rayStartParams"].get("resources", '"{}"')))
        found += [node({**resources, **custom})] * group.get("replicas", 1)
    return found


CLUSTERS = {
    "aws": lambda: launched("aws.yaml"),
    "gcp": lambda: launched("gcp.yaml"),
    "kubernetes": lambda: in_pods(loaded("raycluster.yaml")["spec"]),
    "rayjob": lambda: in_pods(loaded("rayjob.yaml")["spec"]["rayClusterSpec"]),
    "slurm": lambda: [Node(8, 1, frozenset({"train"}))] * 2 + [Node(8, 1, frozenset({"draw"}))] * 4,
}


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_launcher_files_follow_rays_own_schema(name):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    config = loaded(name)
    jsonschema.validate(config, schema)
    workers = [kind for kind in config["available_node_types"].values() if "max_workers" in kind]
    assert sum(kind["max_workers"] for kind in workers) <= config["max_workers"]


def test_manifests_follow_the_fields_of_kuberay_and_of_pods():
    jsonschema.validate(loaded("raycluster.yaml"), manifests.RAY_CLUSTER)
    jsonschema.validate(loaded("rayjob.yaml"), manifests.RAY_JOB)
    odd = loaded("raycluster.yaml")
    odd["spec"]["workerGroupSpecs"][0]["replica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        jsonschema.validate(odd, manifests.RAY_CLUSTER)
    assert loaded("rayjob.yaml")["spec"]["rayClusterSpec"] == loaded("raycluster.yaml")["spec"]
    assert loaded("raycluster.yaml")["spec"]["rayVersion"] == ray.__version__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_commands_and_files_that_exist(page):
    found = list(commands(page.read_text()))
    assert found
    for words in found:
        # What is imported lies on the machine where the command stands, which does it.
        absolute = tuple(f"/{word}" if word == "ChairV2" else word for word in words)
        assert read_command(cli, absolute, SubmitConfig())["command"]
    text = page.read_text()
    for name in re.findall(r"\]\(([a-zA-Z.]+)\)|cluster/([a-zA-Z.]+\.(?:yaml|sh))", text):
        assert (FOLDER / (name[0] or name[1])).exists(), name


@pytest.mark.parametrize("name", list(CLUSTERS))
def test_a_cluster_is_as_large_as_its_commands_need_and_no_larger(name):
    nodes = CLUSTERS[name]()
    page = {"rayjob": "kubernetes"}.get(name, name)
    found = list(commands((FOLDER / f"{page}.md").read_text()))
    if name == "rayjob":
        found = [shlex.split(loaded("rayjob.yaml")["spec"]["entrypoint"])[1:]]
    sized = [words for words in found if "--workers" in words]
    assert sized
    for words in sized:
        asked = request(read_command(cli, tuple(words), SubmitConfig()))
        assert fits(nodes, asked)
        assert asked.gpus == sum(one.gpus for one in nodes)
        for one in {one for one in nodes if one.custom}:
            fewer = list(nodes)
            fewer.remove(one)
            assert not fits(fewer, asked)


def documented():
    """Nodes as the table of cluster/README.md has them."""
    rows = re.findall(
        r"^\| \w+ \| (\d+)[^|]*\| (\d+) CPU(?:, (\d+) GPU)? \| (?:`(\w+)`)? ?\|",
        (FOLDER / "README.md").read_text(),
        re.MULTILINE,
    )
    return [
        Node(int(cpus), int(gpus or 0), frozenset({custom} - {""}))
        for count, cpus, gpus, custom in rows
        for _ in range(int(count))
    ]


@pytest.mark.parametrize("name", sorted(set(CLUSTERS) - {"slurm"}))
def test_the_files_have_the_nodes_of_the_page_and_the_doctor_counts_them(name):
    nodes = CLUSTERS[name]()
    assert sorted(nodes, key=repr) == sorted(documented(), key=repr)
    page = {"rayjob": "kubernetes"}.get(name, name)
    (words,) = (w for w in commands((FOLDER / f"{page}.md").read_text()) if w[0] == "doctor")
    asked = request(read_command(cli, tuple(words), SubmitConfig()))
    finding = check_resources(nodes, asked)
    cpus, gpus = sum(one.cpus for one in documented()), sum(one.gpus for one in documented())
    assert finding.ok
    assert finding.text.endswith(
        f"fit into {cpus:g} CPU, {gpus:g} GPU on {len(documented())} node(s)"
    )


def test_tokens_are_asked_for_and_dashboards_are_closed():
    for name in ("aws.yaml", "gcp.yaml"):
        config = loaded(name)
        starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
        for line in starts:
            assert line == "ray stop" or line.startswith("RAY_AUTH_MODE=token ray start")
        assert any("--dashboard-host=127.0.0.1" in line for line in starts)
        assert list(config["file_mounts"].values()) == ["~/.ray/auth_token"]
    spec = loaded("raycluster.yaml")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "RAY_AUTH_MODE=token" in (FOLDER / "Containerfile").read_text()


STUB = """#!/bin/bash
name=$(basename "$0")
case $name in
  scontrol) printf 'n%s\\n' 0 1 2 3 4 5 ;;
  getent) echo "10.0.0.1 STREAM n0" ;;
  srun) while [[ $1 == -* ]]; do [[ $1 == -w ]] && { export NODE=$2; shift; }; shift; done; "$@" ;;
  ray) echo "$NODE $RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $*" >> "$LOG" ;;
  sbir-ray) echo "here $RAY_ADDRESS $*" >> "$LOG"; [[ $1 == train ]] && exit 7; exit 0 ;;
  python)
    [[ $2 == *secrets* ]] && echo -n token
    # Ray is up when all nodes have come.
    [[ $2 == *ray.init* && $(wc -l < "$LOG") -lt 6 ]] && exit 1
    exit 0 ;;
esac
"""


def test_the_slurm_script_starts_the_nodes_asks_the_doctor_and_passes_the_exit_code_on(tmp_path):
    for name in ("scontrol", "getent", "srun", "ray", "sbir-ray", "python"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LOG": str(log),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[0-5]",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_GPUS_ON_NODE": "1",
    }
    words = ["bash", str(FOLDER / "slurm.sh"), "train", "joint", "--out", "/shared/a b"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    lines = log.read_text().splitlines()
    started = sorted(line for line in lines if " start " in line)
    for number, line in enumerate(started):
        assert line.startswith(f"n{number} token 600 start --block --num-cpus=8 --num-gpus=1")
        assert f'{{"{"train" if number < 2 else "draw"}": 1}}' in line
    assert len(started) == 6
    assert "--head" in started[0]
    assert "--dashboard-host=127.0.0.1" in started[0]
    assert all("--address=10.0.0.1:20007" in line for line in started[1:])
    (doctor,) = (line for line in lines if " doctor " in line)
    asked = request(read_command(cli, tuple(shlex.split(doctor)[2:]), SubmitConfig()))
    nodes = [
        Node(int(cpus), int(gpus), frozenset({custom}))
        for line in started
        for cpus, gpus, custom in re.findall(r"=(\d+) --num-gpus=(\d+) .*{\"(\w+)\": 1}", line)
    ]
    assert sorted(nodes, key=repr) == sorted(CLUSTERS["slurm"](), key=repr)
    assert check_resources(nodes, asked).text.endswith("fit into 48 CPU, 6 GPU on 6 node(s)")
    assert lines.index(doctor) < lines.index("here 10.0.0.1:20007 train joint --out /shared/a b")
    assert not list(tmp_path.glob(".sbir-ray-token*"))
