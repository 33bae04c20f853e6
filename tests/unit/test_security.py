"""Nothing that is read can run a program or fill the memory, and no secret is written."""

import ast
import json
from pathlib import Path

import pytest

import sbir_ray
from sbir_ray.cli import cli
from sbir_ray.config import RetrievalTraining
from sbir_ray.errors import UserError
from sbir_ray.strict import load, to_toml
from tests.tiny import retrieval_config, tiny_pairs

PACKAGE = Path(sbir_ray.__file__).parent
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__"}


def faults(source):
    """Lines of a module that could run what they read."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            called = ast.unparse(node.func)
            if (
                called in CALLS
                or (called == "torch.load" and given.get("weights_only") != "True")
                or called in ("yaml.load", "yaml.unsafe_load", "os.system", "torch.jit.load")
                or given.get("allow_pickle", "False") != "False"
                or given.get("shell", "False") != "False"
            ):
                yield node.lineno, called
        yield from ((node.lineno, n) for n in names if set(n.split(".")) & MODULES)
        yield from ((node.lineno, n) for n in names if n.startswith("xml.") and "defused" not in n)


def test_no_module_runs_what_it_reads():
    found = {
        f"{file.relative_to(PACKAGE)}:{line} {what}"
        for file in PACKAGE.rglob("*.py")
        for line, what in faults(file.read_text())
    }
    # The builder that the defused parser fills, its elements, and their way out.
    assert {entry.partition(" ")[2] for entry in found} <= {
        "xml.etree.ElementTree",
        "xml.etree.ElementTree.Element",
        "xml.etree.ElementTree.TreeBuilder",
        "xml.etree.ElementTree.tostring",
    }


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from ray import cloudpickle",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "eval(x)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_test_above_sees_what_it_looks_for(line):
    assert list(faults(line))


@pytest.mark.parametrize("text", ["[" * 100_000, "{a=" * 100_000, "[[" * 50_000 + "]]"])
def test_deep_settings_are_refused(tmp_path, text):
    file = tmp_path / "deep.toml"
    file.write_text(f"seed = {text}")
    with pytest.raises(UserError, match=r"deep\.toml: not a TOML file"):
        load(RetrievalTraining, file)
    with pytest.raises(UserError, match="seed: "):
        load(RetrievalTraining, None, [f"seed={text}"])


def test_no_secret_of_the_environment_is_written_or_told(tmp_path, monkeypatch, capsys):
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "hush-aws-0123456789",
        "AWS_SESSION_TOKEN": "hush-session-0123456789",
        "RAY_AUTH_TOKEN": "hush-ray-0123456789abcdef",
        "GOOGLE_APPLICATION_CREDENTIALS": "/hush/google.json",
        "HF_TOKEN": "hush-hub-0123456789",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    tiny_pairs(tmp_path / "pairs")
    (tmp_path / "a.toml").write_text(to_toml(retrieval_config()))
    place = ["--pairs", str(tmp_path / "pairs"), "--config", str(tmp_path / "a.toml")]
    out = tmp_path / "run"
    cli.main(
        ["train", "retrieval", *place, "--out", str(out), "--workers", "0", "--json"],
        standalone_mode=False,
    )
    told = capsys.readouterr()
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) > 5
    for value in secrets.values():
        assert value not in told.out + told.err
        assert not [file for file in files if value.encode() in file.read_bytes()]
