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
        Path | None,
        typer.Option(
            help="Folder of a model: decompose, score, freeze, a step of learned and evaluate, "
            "each timed with its peak memory.",
            callback=expanded,
        ),
    ] = None,
    examples: Annotated[int, typer.Option(help="Of a chain: examples scored.", min=1)] = 50,
    tokens: Annotated[
        int | None, typer.Option(help="Of a chain: tokens of a prompt, at least.", min=1)
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of --make and --chain: float32 or bfloat16.")
    ] = "float32",
    device: Annotated[str | None, typer.Option(help="Of a chain.")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file to write; folder of --make and --chain.", callback=expanded),
    ] = None,
) -> None:
    """Time a scoring pass against a training step, or make and time models of real sizes."""
    with clear_errors():
        if make is not None and chain is not None:
            raise ValueError("--make and --chain are two commands: give one of them.")
        if (make is not None or chain is not None) and out is None:
            raise ValueError("--make and --chain write into a folder: name it with --out.")
        if make is not None and out is not None:
            _make(make, out, dtype, seed)
        elif chain is not None and out is not None:
            _chain(chain, out, dtype, device, examples, tokens, batch_size or 10)
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


def _chain(
    folder: Path,
    out: Path,
    dtype: str,
    device: str | None,
    examples: int,
    tokens: int | None,
    batch_size: int,
) -> None:
    from eigenlens.bench.chain import chain
    from eigenlens.bench.stages import ChainConfig

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no model: `eigenlens bench --make gpt2-xl --out {folder}`."
        )
    config = ChainConfig(
        model=str(folder.resolve()),
        dtype=dtype,
        device=device,
        examples=examples,
        tokens=tokens,
        batch_size=batch_size,
    )
    found = chain(config, out)
    table = Table("stage", "seconds", "loading", "peak (MB)", "above the loaded model (MB)")
    for stage in found["stages"]:
        table.add_row(*_cells(stage))
    console.print(table)
    say(f"Written to {out / 'chain.json'}")


def _cells(stage: dict[str, Any]) -> tuple[str, ...]:
    seconds = (f"{stage[name]:.1f}" for name in ("seconds", "seconds_loading"))
    peak = max(stage["peak"], stage["peak_loading"])
    return stage["stage"], *seconds, _mb(peak), _mb(stage["peak"] - stage["loaded"])


def _mb(n_bytes: float) -> str:
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
