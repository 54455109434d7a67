"""What the installer decides, and that the lock files hold all that they are for."""

import subprocess
import sys
from pathlib import Path

import install
import lock
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", lock.LOCKS)
def test_a_lock_file_holds_all_that_is_required_here(name):
    """Which is installed without a resolver. Another Python may need less than is there."""
    missing = set(lock.lines(name)) - set(install.pinned(name))
    assert not missing, "run `python tools/lock.py`"


def test_the_demo_installs_a_part_of_what_the_tests_do():
    demo, everything = (set(install.pinned(install.LOCKS[what])) for what in ("demo", "dev"))
    assert demo < everything
    names = {pin.split("==")[0] for pin in demo}
    assert {"torch", "transformer-lens"} <= names
    assert names.isdisjoint({"pytest", "ruff", "mypy", "mkdocs", "peft"})


class Calls:
    """Stands where commands are run."""

    def __init__(self, monkeypatch, *, uv, gpu_build, gpu, fails=()):
        self.made = []
        self.fails = fails
        monkeypatch.setattr(install, "run", self)
        monkeypatch.setattr(install, "wants_gpu_build", lambda pin: gpu_build)
        there = {"uv": "/bin/uv" if uv else None, "nvidia-smi": "/bin/nvidia-smi" if gpu else None}
        monkeypatch.setattr(install.shutil, "which", there.get)

    def __call__(self, command, *, check=True):
        self.made.append([str(word) for word in command])
        return Path(self.made[-1][0]).name not in self.fails


@pytest.mark.parametrize("uv", [True, False])
@pytest.mark.parametrize("gpu", [True, False])
def test_a_build_that_pip_would_take_without_nvidia_is_taken(monkeypatch, uv, gpu):
    calls = Calls(monkeypatch, uv=uv, gpu_build=False, gpu=gpu)
    install.install_torch("torch==2.13.0")
    (command,) = calls.made
    assert command[1:3] == ["-m", "pip"]
    assert command[-1] == "torch==2.13.0"


def test_a_machine_without_a_gpu_never_gets_the_build_for_one(monkeypatch):
    calls = Calls(monkeypatch, uv=False, gpu_build=True, gpu=False)
    install.install_torch("torch==2.13.0")
    fetch, take = calls.made
    assert fetch[-1] == install.UV
    assert Path(take[0]).name == "uv"
    assert take[take.index("--torch-backend") + 1] == "cpu"


def test_a_machine_with_a_gpu_gets_it_with_its_libraries(monkeypatch):
    calls = Calls(monkeypatch, uv=True, gpu_build=True, gpu=True)
    install.install_torch("torch==2.13.0")
    (command,) = calls.made
    assert "--no-deps" not in command


def test_pip_takes_over_where_uv_fails(monkeypatch):
    calls = Calls(monkeypatch, uv=True, gpu_build=False, gpu=False, fails=("uv",))
    install.install_rest(["idna==3.20"], "/bin/uv")
    assert [Path(command[0]).name for command in calls.made] == ["uv", install.PYTHON.name]
    assert all(command[-1] == "idna==3.20" for command in calls.made)


def test_a_command_that_fails_shows_what_it_said():
    with pytest.raises(SystemExit, match=r"no luck(.|\n)*This failed"):
        install.run([sys.executable, "-c", "print('no luck'); raise SystemExit(1)"])
    assert not install.run([sys.executable, "-c", "raise SystemExit(1)"], check=False)


def test_the_installer_needs_nothing_but_python():
    code = "import sys; sys.path.insert(0, 'tools'); import install"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, cwd=ROOT)
