"""What comes from elsewhere runs no code, and writes nowhere but where it was told to."""

import ast
import json
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import eigenlens as el
from eigenlens import pipeline
from eigenlens.files import FileFormatError
from eigenlens.paper.studies.config import StudyConfig
from eigenlens.paper.studies.grid import run_grid

PACKAGE = Path(el.__file__).parent
SIZES = {"low": 1, "high": 12, "n_train": 20, "n_validation": 10, "n_test": 10}


class Payload:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_is_refused_and_its_code_not_run(tiny_folder, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("gpt2"), folder)
    (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        pickle.dump(Payload(tmp_path / "ran"), file)
    with pytest.raises(FileFormatError, match=rf"{name} is a pickle, .*safetensors"):
        el.load_model(folder, device="cpu")
    torch.save({"x": torch.ones(1)}, folder / name)
    with pytest.raises(FileFormatError, match="is a pickle"):
        el.load_model(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_is_not_run(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    model = el.load_model(folder, device="cpu")
    assert type(model.original_model).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def calls_and_imports(path):
    """Names that a module imports or calls, and the names of the arguments that it gives."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)
            yield from (str(keyword.arg) for keyword in node.keywords)


def test_no_module_can_load_a_pickle_or_trusts_remote_code():
    refused = {"pickle", "dill", "cloudpickle", "joblib", "torch.load", "np.load", "pd.read_pickle"}
    refused |= {"allow_pickle", "weights_only", "trust_remote_code", "eval", "exec"}
    modules = list(PACKAGE.rglob("*.py"))
    found = {(str(path), name) for path in modules for name in calls_and_imports(path)}
    assert len(modules) > 100
    assert not [pair for pair in found if pair[1] in refused]
    # where transformers looks for weights, it is told to take no pickle
    loading = [p for p in modules if "ignore_mismatched_sizes" in p.read_text(encoding="utf-8")]
    loading = [path for path in loading if path.name != "gguf_files.py"]
    assert len(loading) == 3
    assert all("use_safetensors=True" in path.read_text(encoding="utf-8") for path in loading)


writes: list[Path] = []


def note(event, arguments):
    """Where this process opens files for writing, moves them to, and makes folders."""
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        mode, flags = arguments[1], arguments[2]
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+"):
            writes.append(Path(os.path.abspath(arguments[0])))
    elif event == "os.rename":
        writes.append(Path(os.path.abspath(arguments[1])))
    elif event == "os.mkdir":
        writes.append(Path(os.path.abspath(arguments[0])))


def outside(*folders):
    return [w for w in writes if not any(w.is_relative_to(f) for f in (*folders, "/dev"))]


def test_paths_in_a_configuration_write_nowhere_else(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EIGENLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    sys.addaudithook(note)
    shutil.copytree(tiny_folder("gpt2"), tmp_path / "models" / "..x")
    name = str(tmp_path / "models" / "a" / ".." / "..x")
    (tmp_path / "models" / "a").mkdir()
    config = el.EigenpruneConfig(
        model=name,
        task="int_add",
        task_args=SIZES,
        search="learned",
        search_args={"steps": 1, "every": 1},
        protect={},
        device="cpu",
    )
    writes.clear()
    pipeline.run(config, tmp_path / "run", progress=False)
    allowed = (tmp_path / "run", tmp_path / "cache")
    assert tmp_path / "run" / "after.parquet" in writes
    assert not outside(*allowed)
    with pytest.raises(ValueError, match="checkpoint: an option of the run itself"):
        el.EigenpruneConfig.make(search_args={"checkpoint": str(tmp_path / "elsewhere")})
    study = StudyConfig(
        models=[name],
        tasks={"../../task": {"task": "int_add", "arguments": SIZES}},
        methods={"../../method": {"kind": "one_shot", "arguments": {"fractions": [0.1]}}},
        probes={"../../probe": {"task": "int_mult", "arguments": SIZES}},
    )
    writes.clear()
    table = run_grid(study, tmp_path / "cells")
    assert len(table) == 2
    assert any(write.is_relative_to(tmp_path / "cells") for write in writes)
    assert not outside(tmp_path / "cells", tmp_path / "cache", tmp_path / "temporary")
