"""``eigenlens bench``: what scoring takes, and the whole chain on models of real sizes."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from eigenlens.cli_output import clear_errors, console, say
from eigenlens.cli_values import expanded, pairs


def bench(
    model: Annotated[
        str, typer.Option(help="Short name, folder, GGUF file or Hub name.")
    ] = "smollm2-135m",
    task_arg: Annotated[
        list[str] | None, typer.Option(help="key=value of int_add, repeatable.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples per pass (default 50; 10 in a chain).", min=1)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats.", min=1)] = 5,
    make: Annotated[
        str | None,
        typer.Option(
            help="Write a model with random weights to --out: gpt2-xl, phi-2, llama-7b, llama-70b, "
            "the folder of a model, or a JSON file such as its config.json."
        ),
    ] = None,
    chain: Annotated[
        str | None,
        typer.Option(
            help="Folder or short name of a model: decompose, score, freeze, a step of learned and "
            "evaluate, each timed with its peak memory."
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help="What a chain will take, from shapes alone: of all that --make and --chain name."
        ),
    ] = None,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="The powers that the chain's time and memory grow with, into --out."
        ),
    ] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="The chain on a Llama-like model of 7 B on a GPU.")
    ] = False,
    examples: Annotated[int, typer.Option(help="Of a chain: examples scored.", min=1)] = 50,
    tokens: Annotated[
        int | None, typer.Option(help="Of a chain: tokens of a prompt, at least.", min=1)
    ] = None,
    devices: Annotated[
        int, typer.Option(help="Of a plan: devices that share the layers.", min=1)
    ] = 1,
    dtype: Annotated[
        str, typer.Option(help="Of weights that are made, planned or run: float32 or bfloat16.")
    ] = "float32",
    device: Annotated[str | None, typer.Option(help="Of a chain.")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write; folder of --make, --chain, --fit and --gpu.",
            callback=expanded,
        ),
    ] = None,
) -> None:
    """Time a scoring pass against a training step, or make and time models of real sizes."""
    with clear_errors():
        if sum((make is not None, chain is not None, plan is not None, fit, gpu)) > 1:
            raise ValueError(
                "--make, --chain, --plan, --fit and --gpu are commands: give one of them."
            )
        if out is None and (make is not None or chain is not None or fit or gpu):
            raise ValueError(
                "--make, --chain, --fit and --gpu write into a folder: name it with --out."
            )
        size: dict[str, Any] = {"examples": examples, "tokens": tokens}
        size["batch_size"] = batch_size or 10
        if plan is not None:
            _plan(plan, dtype, devices, size, out)
        elif out is not None and make is not None:
            _make(make, out, dtype, seed)
        elif out is not None and chain is not None:
            _chain(chain, out, dtype, device, size)
        elif out is not None and fit:
            _fit(out, size["batch_size"], seed)
        elif out is not None and gpu:
            _gpu(out, seed)
        else:
            _ratios(model, task_arg, batch_size or 50, repeats, out)


def _make(name: str, out: Path, dtype: str, seed: int) -> None:
    from eigenlens.bench.configurations import configuration
    from eigenlens.bench.making import make_model
    from eigenlens.models.checks import checked_dtype

    resolved = checked_dtype(dtype)
    assert resolved is not None
    made = make_model(configuration(name), out, dtype=resolved, seed=seed)
    say(f"{'Written to' if made else 'Found whole in'} {out}")


def _fit(out: Path, batch_size: int, seed: int) -> None:
    from eigenlens.bench.growth import SIZES, growth

    powers = growth(out, batch_size=batch_size, seed=seed)
    table = Table("stage", "of", *SIZES)
    for (stage, of), rows in powers.groupby(["stage", "of"], sort=False):
        cells = (f"{r.power:.2f} ({r.low:.2f} … {r.high:.2f})" for r in rows.itertuples())
        table.add_row(str(stage), str(of), *cells)
    console.print(table)
    say(f"Powers of a measure, with 95 % intervals. Written to {out / 'growth.json'}")


def _gpu(out: Path, seed: int) -> None:
    """The chain of 7 B in bfloat16: 100 examples of 64 tokens."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "--gpu needs an NVIDIA GPU with 60 GB of memory and 25 GB of disk, and there is none "
            "here; `eigenlens bench --plan llama-7b --dtype bfloat16 --examples 100 --tokens 64` "
            "computes what it takes."
        )
    _make("llama-7b", out / "model", "bfloat16", seed)
    size = {"examples": 100, "tokens": 64, "batch_size": 10}
    _chain(str(out / "model"), out / "chain", "bfloat16", "cuda", size)


def _chain(name: str, out: Path, dtype: str, device: str | None, size: dict[str, Any]) -> None:
    from eigenlens.bench.chain import chain
    from eigenlens.bench.configurations import model_folder
    from eigenlens.bench.stages import ChainConfig

    folder = model_folder(name)
    if folder is None:
        raise ValueError(f"{name} is no model here: `eigenlens bench --make gpt2-xl --out FOLDER`.")
    found = chain(ChainConfig(model=str(folder), dtype=dtype, device=device, **size), out)
    table = Table("stage", "seconds", "loading", "peak (MB)", "above the loaded model (MB)")
    for stage in found["stages"]:
        table.add_row(*_cells(stage))
    console.print(table)
    say(f"Written to {out / 'chain.json'}")


def _plan(name: str, dtype: str, devices: int, size: dict[str, Any], out: Path | None) -> None:
    from transformers import AutoTokenizer

    from eigenlens.bench.configurations import configuration, model_folder
    from eigenlens.bench.plan import plan
    from eigenlens.files import write_json
    from eigenlens.models.checks import checked_dtype

    resolved = checked_dtype(dtype)
    assert resolved is not None
    folder = model_folder(name)
    words = None if folder is None else AutoTokenizer.from_pretrained(folder)
    found = plan(configuration(name), dtype=resolved, tokenizer=words, **size)
    parts = ("weights", "bases", "sums", "work")
    on_each = f"each of {devices} devices" if devices > 1 else "one device"
    names = ("stage", *parts, on_each, "process", "passes")
    table = Table(*names, title="MB of 10⁶ bytes; passes are forward / backward")
    for stage in found.stages:
        sizes = (_mb(getattr(stage, part)) for part in parts)
        passes = f"{stage.forward_passes} / {stage.backward_passes}"
        one, all_of_it = found.on_each(stage, devices), found.peak(stage.stage)
        table.add_row(stage.stage, *sizes, _mb(one), _mb(all_of_it), passes)
    console.print(table)
    say(
        f"{found.components:,} components, {found.tokens:,} tokens a batch. Python and libraries "
        f"are {_mb(found.process)} MB of a process, as measured here; all else is computed."
    )
    if out is not None:
        write_json(out, found.summary(devices))


def _cells(stage: dict[str, Any]) -> tuple[str, ...]:
    seconds = (f"{stage[name]:.1f}" for name in ("seconds", "seconds_loading"))
    peak = max(stage["peak"], stage["peak_loading"])
    return stage["stage"], *seconds, _mb(peak), _mb(stage["peak"] - stage["loaded"])


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f}"


def _ratios(
    model: str, task_arg: list[str] | None, batch_size: int, repeats: int, out: Path | None
) -> None:
    from eigenlens.bench.ratios import benchmark
    from eigenlens.files import write_json
    from eigenlens.models import load_model
    from eigenlens.tasks import load_task

    loaded = load_model(model)
    arguments = {"low": 10, "high": 30, "n_train": 300, "n_validation": 50, "n_test": 50}
    arguments |= pairs(task_arg or [], "--task-arg")
    task = load_task("int_add", loaded.tokenizer, **arguments)
    found = benchmark(loaded, task, batch_size=batch_size, repeats=repeats)
    table = Table("", "median seconds", "of a training step")
    for name, seconds in found["seconds"].items():
        share = seconds / found["seconds"]["training"]
        table.add_row(name, f"{seconds:.2f}", f"{share:.2f}")
    console.print(table)
    console.print(
        f"score / training step: {found['score_to_training_step']:.2f}; "
        f"peak memory {found['peak_memory_mb']:.0f} MB "
        f"(training {found['training_peak_memory_mb']:.0f} MB)"
    )
    if out is not None:
        write_json(out, found)
