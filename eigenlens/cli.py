"""The command line: ``eigenlens run``, ``report``, ``experiment``, ``figures`` and more."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from eigenlens import cli_bench, cli_edits
from eigenlens.cli_output import (
    AsJson,
    before_and_after,
    clear_errors,
    console,
    errors,
    say,
    say_json,
)
from eigenlens.cli_ray import Ray, WithRay, working_on
from eigenlens.cli_values import expanded, pairs, split

if TYPE_CHECKING:
    from eigenlens.paper.studies import ExperimentResult

app = typer.Typer(
    help="Find, freeze and explain the singular directions of transformer weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    *(cli_edits.apply, cli_edits.evaluate, cli_edits.export),
    *(cli_edits.push, cli_edits.pull, cli_edits.harness_tasks, cli_bench.bench),
):
    app.command()(command)


@app.command(cls=WithRay)
def run(
    model: Annotated[
        str | None, typer.Option(help="Short name, folder, GGUF file or Hub name.")
    ] = None,
    merge_adapter: Annotated[
        bool | None, typer.Option("--merge-adapter", help="Merge the peft adapter found there.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="See `eigenlens tasks`.")] = None,
    task_arg: Annotated[list[str] | None, typer.Option(help="key=value, repeatable.")] = None,
    matrices: Annotated[
        str | None, typer.Option(help="Comma-separated, e.g. W_K,W_in (default: all).")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Comma-separated (default: all).")] = None,
    skip_unsupported: Annotated[
        bool | None,
        typer.Option("--skip-unsupported", help="Decompose what is dense of a model that is not."),
    ] = None,
    basis: Annotated[
        str | None, typer.Option(help="svd, qk_ov (joint maps QK, OV), random, neurons or pca.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="paper; options override it.")] = None,
    search: Annotated[
        str | None, typer.Option(help="one_shot, iterative, guarded or learned.")
    ] = None,
    search_arg: Annotated[
        list[str] | None, typer.Option(help="key=value of the search, repeatable.")
    ] = None,
    fraction: Annotated[
        str | None,
        typer.Option(help="Freeze this share in one shot; of several, the best on validation."),
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(
            help="Task that the edit must leave as it is, repeatable; own_text: what the model "
            "writes itself (default); none."
        ),
    ] = None,
    protect_bound: Annotated[
        float | None,
        typer.Option(help="Nats per answer token that the edit may diverge on these."),
    ] = None,
    refine: Annotated[
        int | None, typer.Option(help="Most doubtful components to measure exactly.")
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="margin, mean, max, fisher, atp_star, … (docs/concepts.md has all)."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="mean, shared, zero, resample or pair.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per pass.")] = None,
    positions: Annotated[
        int | None, typer.Option(help="Last prompt positions with a mean of their own.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float64.")] = None,
    device: cli_edits.Device = None,
    seed: Annotated[int | None, typer.Option(help="Of the split and of resampling.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file; options override it.", callback=expanded)
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="Run folder; a run that was interrupted goes on.", callback=expanded),
    ] = Path("runs/run"),
    ray: Ray = None,
    as_json: AsJson = False,
) -> None:
    """Score, search, freeze, and measure a task before and after."""
    with clear_errors():
        from eigenlens import pipeline

        given: dict[str, Any] = {
            "model": model,
            "merge_adapter": merge_adapter,
            "task": task,
            "task_args": pairs(task_arg, "--task-arg") if task_arg else None,
            "matrices": split(matrices),
            "layers": split(layers, int),
            "skip_unsupported": skip_unsupported,
            "basis": basis,
            "search": search,
            "search_args": pairs(search_arg, "--search-arg") if search_arg else None,
            "protect": {name: {} for name in protect if name != "none"} if protect else None,
            "protect_bound": protect_bound,
            "refine": refine,
            "criterion": criterion,
            "reference": reference,
            "batch_size": batch_size,
            "n_positions": positions,
            "dtype": dtype,
            "device": device,
            "seed": seed,
        }
        if config is not None and preset is not None:
            raise ValueError("--config and --preset both say where to start: give one of them.")
        options = {name: value for name, value in given.items() if value is not None}
        if fraction is not None:
            if search not in (None, "one_shot"):
                raise ValueError(f"--fraction is for one_shot, not for --search {search}.")
            shares = {"fractions": list(split(fraction, float) or ()), "or_nothing": False}
            options["search"] = "one_shot"
            options["search_args"] = {**shares, **pairs(search_arg or [], "--search-arg")}
        base: dict[str, Any] = {}
        if config is not None:
            base = pipeline.EigenpruneConfig.from_yaml(config).model_dump(mode="json")
        elif preset is not None:
            base = pipeline.EigenpruneConfig.preset(preset).model_dump(mode="json")
        if options.get("search") in (None, base.get("search")):  # options of the same search add up
            args = {**base.get("search_args", {}), **options.get("search_args", {})}
            options["search_args"] = args
        else:
            options.setdefault("search_args", {})
        settings = pipeline.EigenpruneConfig.make(**(base | options))
        with working_on(ray) as cluster:
            result = pipeline.run(settings, out, shards=cluster or 1)
        _draw(result, out)
        if as_json:
            say_json(result.metrics())
            return
        console.print(_before_and_after(result))
        for line in result.left_out:
            say(line)
        say(f"Run folder: {out}")


def _draw(result: Any, out: Path) -> None:
    """What was scored and frozen, and the search, as pages beside the data."""
    from eigenlens import plots
    from eigenlens.plots.export import write_html

    for name, figure in (
        ("spectrum", plots.spectrum(result.scores, result.frozen)),
        ("trace", plots.search_trace(result.search)),
    ):
        write_html(figure, out / f"{name}.html", name)


def _before_and_after(result: Any) -> Table:
    title = (
        f"{result.config.task} on {result.config.model}: "
        f"{len(result.frozen):,} of {result.frozen.n_candidates:,} components {result.frozen.edit} "
        f"({result.frozen.fraction:.2%})"
    )
    table = before_and_after(title, result.comparison, result.before, result.after)
    for spared in result.search.protected.to_dict("records"):
        harm = f"{spared['loss_before']:.3f} → {spared['loss_after']:.3f}"
        table.add_row(f"{spared['data']}, per token", "", "", harm)
    return table


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the short names of models."""
    from eigenlens.models import KNOWN_MODELS

    if as_json:
        say_json(
            [
                {"name": name, "what": m.description, "hub": m.hub, "package": m.requirement}
                for name, m in KNOWN_MODELS.items()
            ]
        )
        return
    table = Table("name", "what it is", "Hub", "package")
    for name, known in KNOWN_MODELS.items():
        table.add_row(name, known.description, known.hub or "", known.requirement or "")
    console.print(table)
    console.print("Also: any Hub name, a folder that transformers wrote, or a GGUF file.")


@app.command()
def architectures(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of TransformerLens (default: all decoders).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of a page.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File to write (default: print it).", callback=expanded)
    ] = None,
) -> None:
    """Try what can be decomposed of every architecture, on tiny random models."""
    with clear_errors():
        from eigenlens.architectures import rows, to_json, to_markdown
        from eigenlens.files import write_text

        found = []
        for row in rows(names or ()):
            found.append(row)
            errors.print(f"{row.architecture}: {row.status}")
        text = to_json(found) if as_json else to_markdown(found)
        if out is None:
            print(text, end="")
        else:
            write_text(out, text)
            say(f"Written to {out}")


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """List the tasks."""
    from eigenlens.tasks import TASKS

    what = {n: inspect.cleandoc(build.__doc__ or "").splitlines()[0] for n, build in TASKS.items()}
    if as_json:
        say_json([{"name": name, "what": text} for name, text in what.items()])
        return
    table = Table("name", "what it is")
    for row in what.items():
        table.add_row(*row)
    console.print(table)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete everything.")] = False,
) -> None:
    """List what is kept on disk: decompositions and dequantised models."""
    with clear_errors():
        from eigenlens import cache as disk
        from eigenlens.files import cache_dir

        entries = disk.entries()
        table = Table("kind", "entries", "MB")
        for kind in dict.fromkeys(entry.kind for entry in entries):
            sizes = [entry.size for entry in entries if entry.kind == kind]
            table.add_row(kind, f"{len(sizes):,}", f"{sum(sizes) / 1e6:,.1f}")
        console.print(table)
        say(f"{cache_dir()}; decompositions may take {disk.LIMIT_GB:g} GB, the oldest go first.")
        if clear:
            say(f"Freed {disk.clear() / 1e6:,.1f} MB.")


@app.command(cls=WithRay)
def experiment(
    name: Annotated[str, typer.Argument(help="See figures/README.md; `all` for all of them.")],
    model: Annotated[
        list[str] | None, typer.Option(help="Model of the study, repeatable (default: all).")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file in place of the study's own, where it has one.", callback=expanded
        ),
    ] = None,
    parts: Annotated[
        Path,
        typer.Option(
            help="Folder of finished parts: an interrupted study goes on.", callback=expanded
        ),
    ] = Path("runs/experiments"),
    out: Annotated[
        Path, typer.Option(help="Folder for table, page and figure.", callback=expanded)
    ] = Path("figures"),
    ray: Ray = None,
) -> None:
    """Run a study, or all of them: writes a table, a page and a figure of each."""
    with clear_errors():
        from eigenlens.paper.studies import EXPERIMENTS
        from eigenlens.paper.studies.figures import write_index

        if name not in {"all", *EXPERIMENTS}:
            raise ValueError(
                f"Unknown experiment {name!r}; choose from {', '.join(EXPERIMENTS)}, or all."
            )
        if name == "all":
            if model or config or ray:
                raise ValueError("all are run as they are: drop --model, --config and --ray.")
            hours = sum(study.MINUTES for study in EXPERIMENTS.values()) / 60
            say(f"About {hours:.0f} hours on 2 cores; Ctrl-C is safe, run again to go on.")
        for one in EXPERIMENTS if name == "all" else [name]:
            result = _measured(one, model, config, parts, ray)
            result.save(out)
            write_index(out)
            say(result.summary.to_markdown(index=False))
            say(f"Written to {out}/{one}.*")


def _measured(
    name: str, model: list[str] | None, config: Path | None, parts: Path, ray: str | None
) -> "ExperimentResult":
    """What a study found, its parts made on a cluster where one is given."""
    from eigenlens.paper.studies import EXPERIMENTS

    study = EXPERIMENTS[name].run
    options: dict[str, Any] = {}
    parameters = inspect.signature(study).parameters
    if "parts" in parameters:
        options["parts"] = parts / name
    if model:
        if "models" not in parameters:
            raise ValueError(f"The experiment {name!r} has a model of its own: drop --model.")
        options["models"] = tuple(model)
    if config is not None:
        if "config" not in parameters:
            raise ValueError(f"The experiment {name!r} has no configuration file.")
        options["config"] = config
    with working_on(ray) as cluster:
        if cluster is not None:
            from eigenlens.paper.studies.elsewhere import make_parts

            make_parts(name, parts / name, options.get("models"), config, cluster)
    return study(**options)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder of `eigenlens run`.", callback=expanded)],
    out: Annotated[
        Path | None, typer.Option(help="Default: report.html in the folder.", callback=expanded)
    ] = None,
    circuit: Annotated[
        bool,
        typer.Option(help="Load the model again for the circuit and the activations."),
    ] = True,
    text: Annotated[
        str | None,
        typer.Option(
            help="Task in whose train split to look for what components answer to, as wikitext. "
            "Default: the model's own text if the run protected it, else the run's task."
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page that explains a finished run."""
    with clear_errors():
        from eigenlens.report import write_report
        from eigenlens.tasks import load_task

        passages = None if text is None else load_task(text).train
        say(f"Report: {write_report(run, out, text=passages, inside=circuit)}")


@app.command()
def figures(
    names: Annotated[
        list[str] | None, typer.Argument(help="Studies (default: all whose tables are there).")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="svg, pdf, png, html (default: all).")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of tables, pages and figures.", callback=expanded)
    ] = Path("figures"),
) -> None:
    """Draw the figures of the studies again from their stored tables."""
    with clear_errors():
        from eigenlens.paper.studies.figures import redraw
        from eigenlens.plots.export import FORMATS

        for result in redraw(out, names or (), formats or FORMATS):
            say(f"Drawn: {out}/{result.name}.*")


if __name__ == "__main__":
    app()
