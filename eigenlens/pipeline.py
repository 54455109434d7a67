"""The whole job: load → decompose → score → search → freeze → evaluate before and after.

With ``out`` every stage is written as it ends; a run that was interrupted goes on from there, and a
finished one is read back. The folder's ``config.yaml`` alone reproduces a :func:`run`; that of
:func:`eigenprune`, which takes model and task from memory, says so.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from eigenlens.blocks import left_out_lines
from eigenlens.config import EigenpruneConfig, search_options
from eigenlens.decomposition import decompose
from eigenlens.evaluation import Evaluation, compare, evaluate
from eigenlens.files import save_record
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.inputs import check_model
from eigenlens.locks import alone
from eigenlens.matrices import weight_matrices
from eigenlens.models import load_model
from eigenlens.provenance import Provenance, keeping_weights
from eigenlens.refinement import REFINED, REFINED_EXAMPLES, refined
from eigenlens.run_folder import EigenpruneResult
from eigenlens.scoring import Scores, score
from eigenlens.scoring.scores import estimates_mean
from eigenlens.scoring.shards import Shards
from eigenlens.search import SEARCHES, Protection, SearchResult, iterative, one_shot
from eigenlens.spectra import Spectra
from eigenlens.stages import Stages
from eigenlens.tasks import Task, load_task
from eigenlens.tasks.own_text import OWN_TEXT, OwnTextError, own_text

_STATE = "search.safetensors"  # of a search that is not done yet


def run(
    config: EigenpruneConfig,
    out: str | os.PathLike[str] | None = None,
    *,
    shards: int | Shards = 1,
    progress: bool = True,
) -> EigenpruneResult:
    """Load model and task as ``config`` says, then do as :func:`eigenprune` does.

    Raises:
        ValueError: as :func:`eigenprune`; a configuration whose model or task came from memory.
        UnwritableError: as :func:`eigenprune`, before anything is loaded.
    """
    if config.from_memory:
        raise ValueError(
            f"This run had its {' and '.join(config.from_memory)} from memory (from_memory in its "
            "configuration): hand them to eigenlens.eigenprune(model, task, config)."
        )
    folder = Path(out) if out is not None else None
    with alone(folder):
        model, task = load_as(config)
        return _stages(model, task, config, folder, shards, progress)


def load_as(config: EigenpruneConfig) -> tuple[TransformerBridge, Task]:
    """The model and the task that a configuration names."""
    arguments = {"seed": config.seed} | config.task_args
    load_task(config.task, **arguments)  # first, since it is cheap and may be wrong
    model = load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        merge_adapter=config.merge_adapter,
    )
    return model, load_task(config.task, model.tokenizer, **arguments)


def eigenprune(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    shards: int | Shards = 1,
    progress: bool = True,
) -> EigenpruneResult:
    """Score on the train split, choose on validation, measure on test before and after.

    Args:
        model: in eval mode.
        task: its splits are used as they are.
        config: options (default: :class:`EigenpruneConfig`'s). What it says of model and task is
            replaced by what these are.
        out: folder for the results. A folder with the same configuration is resumed.
        shards: as for :func:`eigenlens.score`.
        progress: show progress bars.

    Raises:
        ValueError: bad options or data; ``out`` holds a run with another configuration, or another
            process works there.
        UnwritableError: ``out`` cannot be written to.
    """
    check_model(model)
    arguments = json.loads(json.dumps(dict(task.arguments), default=str))
    what: dict[str, Any] = {
        "model": Provenance.of(model).model,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": None,
        "task": task.name,
        "task_args": arguments,
        "from_memory": ("model", "task"),
    }
    config = (config or EigenpruneConfig()).model_copy(update=what)
    folder = Path(out) if out is not None else None
    with alone(folder):
        return _stages(model, task, config, folder, shards, progress)


@keeping_weights
def _stages(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig,
    out: Path | None,
    shards: int | Shards,
    progress: bool,
) -> EigenpruneResult:
    stages = Stages(config, out, model, task, shards)
    before = stages.do(
        "before",
        "before.parquet",
        Evaluation.load,
        lambda: evaluate(model, task.test, batch_size=config.batch_size, progress=progress),
    )
    return _edit(model, task, config, stages, before, progress)


def _edit(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig,
    stages: Stages,
    before: Evaluation,
    progress: bool,
) -> EigenpruneResult:
    """Everything after the measurement of the unedited model."""
    scores = stages.do(
        "score",
        "scores.parquet",
        Scores.load,
        lambda: _score(model, task, config, stages, progress),
    )
    found = stages.do(
        "search",
        "",
        SearchResult.load,
        lambda: _search(model, task, config, scores, stages, progress),
    )
    if stages.out is not None:
        (stages.out / _STATE).unlink(missing_ok=True)
    frozen = found.frozen
    after = stages.do(
        "after",
        "after.parquet",
        Evaluation.load,
        lambda: _after(model, task, config, frozen, progress),
    )
    result = EigenpruneResult(
        config,
        before,
        after,
        compare(before, after, seed=config.seed),
        scores,
        found,
        stages.seconds,
        _left_out(model, config),
    )
    if stages.out is not None:
        save_record(stages.out / "metrics.json", "metrics", result.metrics())
    return result


def _score(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig,
    stages: Stages,
    progress: bool,
) -> Scores:
    with stages.timed("decompose"):
        spectra = spectra_of(model, task, config, progress=progress)
    scores = score(
        model,
        spectra,
        task.train,
        criterion=config.criterion,
        reference=config.reference,
        batch_size=config.batch_size,
        n_positions=config.n_positions,
        seed=config.seed,
        shards=stages.shards,
        progress=progress,
    )
    count = config.refine
    if count is None:
        of_the_mean = estimates_mean(config.criterion, config.reference)
        count = REFINED if config.search == "one_shot" and of_the_mean else 0
    if count == 0:
        return scores
    examples = task.train.select(range(min(REFINED_EXAMPLES, len(task.train))))
    with stages.timed("refine"):
        return refined(
            model, scores, examples, count=count, batch_size=config.batch_size, progress=progress
        )


def spectra_of(
    model: TransformerBridge, task: Task, config: EigenpruneConfig, *, progress: bool = True
) -> Spectra:
    """The decomposition that a configuration asks for; ``pca`` is that of the train split."""
    data = task.train if config.basis == "pca" else None
    options: dict[str, Any] = {"basis": config.basis, "seed": config.seed, "data": data}
    options["skip_unsupported"] = config.skip_unsupported
    return decompose(model, config.matrices, config.layers, **options, progress=progress)


def _left_out(model: TransformerBridge, config: EigenpruneConfig) -> tuple[str, ...]:
    if not config.skip_unsupported:
        return ()
    maps = weight_matrices(model, layers=config.layers, skip_unsupported=True)
    return left_out_lines(maps.left_out)


def _search(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig,
    scores: Scores,
    stages: Stages,
    progress: bool,
) -> SearchResult:
    if scores.spectra is None:  # read back from the run folder
        with stages.timed("decompose"):
            scores = replace(scores, spectra=spectra_of(model, task, config, progress=progress))
    options: dict[str, Any] = {"batch_size": config.batch_size, **config.search_args}
    with stages.timed("protect"):
        protect = _protection(model, config)
    state = stages.out / _STATE if stages.out is not None else None
    given: dict[str, Any] = {"checkpoint": state, "progress": progress}
    if config.search == "one_shot":
        found = one_shot(model, scores, task.validation, **options)
    elif config.search == "iterative":
        found = iterative(model, scores, task.train, task.validation, **options, **given)
    else:
        given["config"] = search_options(config.search)(seed=config.seed, **options)
        given["protect"] = protect
        return SEARCHES[config.search](model, scores, task.train, task.validation, **given)
    return replace(found, protected=protect.table(found.frozen)) if protect else found


def _protection(model: TransformerBridge, config: EigenpruneConfig) -> Protection | None:
    """What the edit should leave as it is: on the model's own text by default."""
    options: dict[str, Any] = {"bound": config.protect_bound, "batch_size": config.batch_size}
    chosen = {OWN_TEXT: {}} if config.protect is None else config.protect
    known, unseen = {}, {}
    for name, arguments in chosen.items():
        given = {"seed": config.seed} | arguments
        if name != OWN_TEXT:
            task = load_task(name, model.tokenizer, **given)
            known[name], unseen[name] = task.validation, task.test
            continue
        try:
            text = own_text(model, **given)
        except OwnTextError:
            if config.protect is not None:
                raise
            continue
        n_unseen = len(text) // 3
        unseen[name] = text.select(range(n_unseen))
        known[name] = text.select(range(n_unseen, len(text)))
    if not known:
        return None
    if set(known) == {OWN_TEXT}:
        options["weight"] = 0.0  # predictions of text are good enough
    return Protection(model, known, unseen=unseen, **options)


def _after(
    model: TransformerBridge,
    task: Task,
    config: EigenpruneConfig,
    frozen: FrozenSet,
    progress: bool,
) -> Evaluation:
    with freeze(model, frozen):
        return evaluate(model, task.test, batch_size=config.batch_size, progress=progress)
