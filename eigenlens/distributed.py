"""Work on several processes and machines, through Ray (extra ``ray``).

A :class:`Cluster` is this machine's processors, or machines that are joined already. What is to be
done is cut into tasks; each has a key, which progress, logs and errors name. A task whose process
or machine is lost is done again, by another one; a task that fails by itself (an exception) is not.
What a task returns comes back to the process that asked, and only that one writes files.

Tasks are sent as pickles, among processes of one cluster only: whoever may reach its ports can run
code there. One that is started here takes a secret that is drawn for it. Ray's usage statistics
are off.
"""

import os
import re
import secrets
import shutil
import site
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.errors import MissingPackageError, reason
from eigenlens.models.packed import PackedModel
from eigenlens.scoring.shards import Part
from eigenlens.spectra import Spectra

T = TypeVar("T")

RETRIES = 5  # of a task whose process or machine was lost
_PARTS_PER_WORKER = 4  # what one loses with a process, and the steps of a progress bar
_LOCAL = ("127.0.0.1", "localhost")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class LostTaskError(ValueError):
    """A task's process or machine was lost again and again."""


class FailedTaskError(ValueError):
    """A task raised an exception; names the task."""


@dataclass(frozen=True)
class Task:
    """Something to do elsewhere.

    Attributes:
        key: names it in progress, logs and errors.
        function: of a module; gets ``arguments``.
        arguments: what can be pickled. What lies in the store (:meth:`Cluster.share`) is fetched.
    """

    key: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Shared:
    """Something in the store of objects, once on each machine, and once in each process."""

    number: str
    reference: Any  # in an object, since Ray fetches bare ones before a task starts

    def value(self) -> Any:
        if self.number not in _unpacked:
            _unpacked.clear()  # one model at a time
            value = _ray().get(self.reference)
            _unpacked[self.number] = value.unpack() if isinstance(value, _Scored) else value
        return _unpacked[self.number]


_unpacked: dict[str, Any] = {}


@dataclass(frozen=True)
class _Scored:
    """A model and its components."""

    model: PackedModel
    spectra: Spectra

    def unpack(self) -> tuple[TransformerBridge, Spectra]:
        return self.model.unpack(), self.spectra


class Cluster:
    """Processes on this machine or on others; a context manager, and ``shards`` of a score.

    ``with Cluster() as shards: el.score(model, spectra, data, shards=shards)``
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int | None = None,
        threads: int = 1,
        memory_mb: int | None = None,
        retries: int = RETRIES,
    ) -> None:
        """Say where; nothing is started yet.

        Args:
            address: ``host:port`` of a cluster that this machine has joined (``ray start``);
                ``"auto"`` finds it. By default one is started here, and ended afterwards.
            workers: processes of one that is started here (default: one for each processor).
            threads: of each process.
            memory_mb: of the store of objects of one that is started here; what does not fit
                goes to disk (default: Ray's, 30 % of the memory).
            retries: how often a task is done again when its process or machine is lost.

        Raises:
            MissingPackageError: Ray is not installed.
            ValueError: ``workers`` or ``threads`` below 1, or ``retries`` below 0; ``workers`` or
                ``memory_mb`` of a cluster that exists.
        """
        for name, value, least in (
            ("workers", workers, 1),
            ("threads", threads, 1),
            ("retries", retries, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: at least {least} is needed.")
        if address is not None and (workers, memory_mb) != (None, None):
            raise ValueError("workers and memory_mb are those of the cluster that exists.")
        self._address = address
        self._workers = workers
        self._threads = threads
        self._memory_mb = memory_mb
        self._retries = retries
        self._folder: Path | None = None
        self._sent: tuple[str, Spectra, _Shared] | None = None
        self._ray = _ray()

    def __enter__(self) -> "Cluster":
        """Start or join it.

        Raises:
            ValueError: no cluster answers at the address, or none starts here.
        """
        if self._ray.is_initialized():
            raise ValueError("This process works on a Ray cluster already: leave that first.")
        if self._address is None:
            try:
                self._start()
            except Exception as error:  # Ray raises this very class when it has waited 30 s
                self.__exit__(None, None, None)
                raise ValueError(
                    f"Ray does not start here ({reason(error)}): make room on this machine, whose "
                    "processors or memory may be busy, and try again."
                ) from error
            return self
        try:
            _check_answers(self._address)
            self._init(address=self._address)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"No Ray cluster answers at {self._address!r} ({reason(error)}): start one with "
                "`ray start --head`, and run this on a machine that has joined it."
            ) from error
        return self

    def _start(self) -> None:
        # In place of one in a file at home. Ray reads it once in a process.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray would give way to all else that runs here: but these processes are the job itself.
        os.environ.setdefault("RAY_worker_niceness", "0")
        self._folder = Path(tempfile.mkdtemp(prefix="eigenlens-ray-"))
        with _own_package():
            self._init(
                address="local",
                num_cpus=(self._workers or os.cpu_count() or 1) * self._threads,
                num_gpus=0,
                object_store_memory=None if self._memory_mb is None else self._memory_mb * 2**20,
                include_dashboard=False,
                _temp_dir=str(self._folder),
            )

    def _init(self, **options: Any) -> None:
        with warnings.catch_warnings():
            # Ray announces changes of its own defaults, and leaves sockets to the interpreter.
            warnings.simplefilter("ignore")
            self._ray.init(**options, logging_level="error", log_to_driver=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._sent = None
        self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def workers(self) -> int:
        """Processes that work at once, as things stand."""
        processors = self._ray.cluster_resources().get("CPU", 1)
        return max(1, int(processors) // self._threads)

    @property
    def count(self) -> int:
        """Into how many parts examples are cut, at most."""
        return self.workers * _PARTS_PER_WORKER

    def share(self, value: Any) -> _Shared:
        """Put something into the store of objects, for arguments of several tasks."""
        reference = self._ray.put(value)
        return _Shared(reference.hex(), reference)

    def results(
        self,
        tasks: Sequence[Task],
        *,
        name: str,
        unit: str,
        progress: bool,
        keep_going: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """The number of each task and what it returned, as they are done.

        ``keep_going`` tells a failure as it comes, and raises it when all others are done.

        Raises:
            FailedTaskError: a task raised an exception, which is the error's cause.
            LostTaskError: a task's process or machine was lost more than ``retries`` times.
        """
        run = self._ray.remote(num_cpus=self._threads, max_retries=self._retries)(_run)
        open_ = {
            run.options(name=task.key).remote(task, self._threads): number
            for number, task in enumerate(tasks)
        }
        failed: list[ValueError] = []
        try:
            with tqdm(total=len(tasks), desc=name, unit=unit, disable=not progress) as bar:
                while open_:
                    (done,), _ = self._ray.wait(list(open_), num_returns=1)
                    number = open_.pop(done)
                    bar.set_postfix_str(tasks[number].key)
                    bar.update()
                    try:
                        value = self._value(tasks[number], done)
                    except (FailedTaskError, LostTaskError) as error:
                        if not keep_going:
                            raise
                        failed.append(error)
                        bar.write(str(error).splitlines()[0], file=sys.stderr)
                        continue
                    yield number, value
            if failed:
                raise failed[0]
        finally:
            for reference in open_:
                self._ray.cancel(reference, force=True)

    def _value(self, task: Task, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            there = _COLOURS.sub("", str(error))  # the traceback
            raise FailedTaskError(
                f"{task.key} failed: {type(error.cause).__name__}: {error.cause}\n\n{there}"
            ) from error.cause
        except self._ray.exceptions.RayError as error:
            raise LostTaskError(
                f"{task.key} was given up after {self._retries + 1} tries: its process or machine "
                f"was lost each time, killed or out of memory ({reason(error)})."
            ) from error

    def run(
        self,
        model: TransformerBridge,
        spectra: Spectra,
        parts: Sequence[Part[T]],
        *,
        progress: bool,
    ) -> Iterator[T]:
        """What each part found, in their order.

        Raises:
            Exception: whatever a part raised, as in this process.
            LostTaskError: see :meth:`results`.
        """
        scored = self._scored(model, spectra)
        tasks = [
            Task(f"{part.name} {i + 1}/{len(parts)}", _on_model, (scored, part))
            for i, part in enumerate(parts)
        ]
        early: dict[int, T] = {}  # done before one that comes before it
        due = 0
        try:
            for number, found in self.results(
                tasks, name=parts[0].name, unit="part", progress=progress
            ):
                early[number] = found
                while due in early:
                    yield early.pop(due)
                    due += 1
        except FailedTaskError as error:
            raise error.__cause__ or error from None

    def _scored(self, model: TransformerBridge, spectra: Spectra) -> _Shared:
        packed = PackedModel.of(model)
        if self._sent is None or self._sent[:2] != (packed.fingerprint, spectra):
            shared = self.share(_Scored(packed, spectra))
            self._sent = packed.fingerprint, spectra, shared
        return self._sent[2]


@contextmanager
def _own_package() -> Iterator[None]:
    """Let processes that are started here import this copy of the package, wherever it lies."""
    own, before = str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")
    if own in site.getsitepackages():
        yield
        return
    os.environ["PYTHONPATH"] = os.pathsep.join([own, *([before] if before else [])])
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _check_answers(address: str) -> None:
    """Raise where nothing listens: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        raise ValueError("this is neither host:port nor auto")
    socket.create_connection((host, int(port)), timeout=10).close()


def _run(task: Task, threads: int) -> Any:
    """What a worker does."""
    torch.set_num_threads(threads)
    return task.function(*task.arguments)


def _on_model(scored: _Shared, part: Part[T]) -> T:
    model, spectra = scored.value()
    return part.run(model, spectra, progress=False)


def _ray() -> Any:
    """Ray, without its statistics, and with no proxy between processes of one machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, *_LOCAL]))
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "Work on several processes needs Ray: pip install 'eigenlens[ray]'."
        ) from error
    return ray
