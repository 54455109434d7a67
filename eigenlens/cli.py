"""The command line: ``eigenlens run``, ``models``, ``tasks``, ``experiment``, ``bench``."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Find, freeze and explain the singular directions of transformer weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn what a user can mend into one sentence and exit code 2."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {error}", highlight=False)
        raise typer.Exit(2) from error


def _pairs(values: list[str]) -> dict[str, Any]:
    """``key=value`` pairs, values read as YAML."""
    pairs = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--task-arg {text!r} is not of the form key=value.")
        pairs[key] = yaml.safe_load(value)
    return pairs


def _split(text: str | None, kind: type = str) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"{text!r} is not a comma-separated list of numbers.") from error


@app.command()
def run(
    model: Annotated[
        str | None, typer.Option(help="Short name, folder, GGUF file or Hub name.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="See `eigenlens tasks`.")] = None,
    task_arg: Annotated[list[str] | None, typer.Option(help="key=value, repeatable.")] = None,
    matrices: Annotated[
        str | None, typer.Option(help="Comma-separated, e.g. W_K,W_in (default: all).")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Comma-separated (default: all).")] = None,
    fraction: Annotated[
        str | None, typer.Option(help="Share to freeze; of several, the best on validation.")
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="mean, max, ucb, fisher or margin.")] = None,
    reference: Annotated[str | None, typer.Option(help="mean, zero or resample.")] = None,
    within: Annotated[
        str | None, typer.Option(help="Budget over all, or per matrix or layer.")
    ] = None,
    negative_only: Annotated[
        bool | None, typer.Option(help="Freeze only scores below zero.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per pass.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float64.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps (default: what there is).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split and of resampling.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file; options override it.")] = None,
    out: Annotated[
        Path, typer.Option(help="Run folder; a run that was interrupted goes on.")
    ] = Path("runs/run"),
) -> None:
    """Score, freeze, and measure a task before and after."""
    with _clear_errors():
        from eigenlens import pipeline

        given = {
            "model": model,
            "task": task,
            "task_args": _pairs(task_arg) if task_arg else None,
            "matrices": _split(matrices),
            "layers": _split(layers, int),
            "fraction": _split(fraction, float),
            "criterion": criterion,
            "reference": reference,
            "within": within,
            "negative_only": negative_only,
            "batch_size": batch_size,
            "dtype": dtype,
            "device": device,
            "seed": seed,
        }
        options = {name: value for name, value in given.items() if value is not None}
        if config is not None:
            settings = pipeline.EigenpruneConfig.from_yaml(config, **options)
        else:
            settings = pipeline.EigenpruneConfig.make(**options)
        result = pipeline.run(settings, out)
        console.print(_before_and_after(result))
        console.print(f"Run folder: {out}")


def _before_and_after(result: Any) -> Table:
    test = result.comparison
    table = Table(
        title=f"{result.config.task} on {result.config.model}: "
        f"{len(result.frozen):,} of {result.frozen.n_candidates:,} components frozen "
        f"({result.frozen.fraction:.2%})",
        caption=f"{test.n} test examples, {test.gained} gained, {test.lost} lost, "
        f"McNemar p = {test.p_value:.2g}",
    )
    for name in ("", "accuracy", "95 % interval", "loss (nats)"):
        table.add_column(name, justify="right" if name else "left")
    for name, e in (("before", result.before), ("after", result.after)):
        low, high = e.interval
        table.add_row(name, f"{e.accuracy:.1%}", f"{low:.1%} … {high:.1%}", f"{e.loss:.3f}")
    return table


@app.command()
def models() -> None:
    """List the short names of models."""
    from eigenlens.models import KNOWN_MODELS

    table = Table("name", "what it is", "Hub", "package")
    for name, known in KNOWN_MODELS.items():
        table.add_row(name, known.description, known.hub or "", known.requirement or "")
    console.print(table)
    console.print("Also: any Hub name, a folder that transformers wrote, or a GGUF file.")


@app.command()
def tasks() -> None:
    """List the tasks."""
    from eigenlens.tasks import TASKS

    table = Table("name", "what it is")
    for name, build in TASKS.items():
        table.add_row(name, inspect.cleandoc(build.__doc__ or "").splitlines()[0])
    console.print(table)


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="ambiguous or planted.")],
    model: Annotated[
        list[str] | None, typer.Option(help="Models of `planted`, repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for table, page and figure.")] = Path("figures"),
) -> None:
    """Run a study: writes a table, a page and a figure."""
    with _clear_errors():
        from eigenlens.experiments import EXPERIMENTS

        if name not in EXPERIMENTS:
            raise ValueError(f"Unknown experiment {name!r}; choose from {', '.join(EXPERIMENTS)}.")
        result = EXPERIMENTS[name](**({"models": tuple(model)} if model else {}))
        result.save(out)
        console.print(result.summary.to_markdown(index=False))
        console.print(f"Written to {out}/{name}.*")


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="Short name, folder, GGUF file or Hub name.")
    ] = "smollm2-135m",
    task_arg: Annotated[
        list[str] | None, typer.Option(help="key=value of int_add, repeatable.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples per pass.")] = 50,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats.", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time a scoring pass against an ordinary training step."""
    with _clear_errors():
        from eigenlens.bench import benchmark
        from eigenlens.files import write_json
        from eigenlens.models import load_model
        from eigenlens.tasks import load_task

        loaded = load_model(model)
        arguments = {"low": 10, "high": 30, "n_train": 300, "n_validation": 50, "n_test": 50}
        task = load_task("int_add", loaded.tokenizer, **arguments | _pairs(task_arg or []))
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


if __name__ == "__main__":
    app()
