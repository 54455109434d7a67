"""The commands for finished edits: ``apply``, ``evaluate``, ``export``, ``push`` and ``pull``.

And ``harness-tasks``, to measure them elsewhere.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from eigenlens.cli_output import AsJson, before_and_after, clear_errors, console, say, say_json
from eigenlens.cli_values import expanded, pairs

if TYPE_CHECKING:
    from eigenlens.evaluation import Evaluation
    from eigenlens.frozen_set import FrozenSet

Edit = Annotated[
    Path,
    typer.Argument(help="frozen.safetensors of a run, or a run folder.", callback=expanded),
]
Model = Annotated[
    str | None,
    typer.Option(help="Short name, folder, GGUF file or Hub name (default: the edit's own)."),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float64 (default: what the edit was made in)."),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, mps (default: CUDA if there is one, else CPU).")
]
AllowDtype = Annotated[
    bool, typer.Option("--allow-dtype", help="Use the edit on the same weights in another dtype.")
]
TaskArgs = Annotated[list[str] | None, typer.Option(help="key=value, repeatable.")]
Shared = Annotated[
    bool, typer.Option("--shared", help="One mean for all positions in place of one for each.")
]


class Form(StrEnum):
    """What an edit is written as."""

    bake = "bake"
    lora = "lora"
    peft = "peft"


def apply(
    edit: Edit,
    model: Model = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable (default: the lines of the standard input)."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.", min=1)] = 20,
    dtype: Dtype = None,
    device: Device = None,
    allow_dtype: AllowDtype = False,
    as_json: AsJson = False,
) -> None:
    """Write on from prompts before and after an edit, side by side."""
    with clear_errors():
        from eigenlens.export.attach import attach
        from eigenlens.export.loading import load_plain, written_on

        prompts = prompt or [line for line in sys.stdin.read().splitlines() if line.strip()]
        if not prompts:
            raise ValueError("Give --prompt, or prompts as lines of the standard input.")
        frozen = _frozen(edit)
        plain, tokenizer = load_plain(*_source(frozen, model, dtype), device)
        before = [written_on(plain, tokenizer, text, new_tokens) for text in prompts]
        with attach(plain, frozen, tokenizer=tokenizer, allow_dtype=allow_dtype):
            after = [written_on(plain, tokenizer, text, new_tokens) for text in prompts]
        rows = list(zip(prompts, before, after, strict=True))
        if as_json:
            names = ("prompt", "before", "after")
            texts = [dict(zip(names, row, strict=True)) for row in rows]
            say_json(texts)
            return
        table = Table("prompt", "before", "after", show_lines=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def evaluate(
    edit: Edit,
    task: Annotated[str, typer.Option(help="See `eigenlens tasks`.")],
    task_arg: TaskArgs = None,
    model: Model = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    batch_size: Annotated[int, typer.Option(help="Examples per pass.", min=1)] = 50,
    shared: Shared = False,
    dtype: Dtype = None,
    device: Device = None,
    allow_dtype: AllowDtype = False,
    as_json: AsJson = False,
) -> None:
    """Measure a task before and after an edit."""
    with clear_errors():
        from eigenlens.evaluation import compare

        frozen = _frozen(edit, shared=shared)
        arguments = pairs(task_arg or [], "--task-arg")
        before, after = _measured(
            frozen,
            *_source(frozen, model, dtype),
            device,
            task,
            arguments,
            split=split,
            batch_size=batch_size,
            allow_dtype=allow_dtype,
        )
        test = compare(before, after)
        if as_json:
            numbers = {"before": before.summary(), "after": after.summary()}
            say_json({**numbers, "comparison": test.summary()})
            return
        title = f"{task}: {len(frozen):,} components {frozen.edit}"
        console.print(before_and_after(title, test, before, after, split=split, choices=True))


def export(
    edit: Edit,
    to: Annotated[
        Form, typer.Option(help="Edited weights, a LoRA adapter, or eigenlens's own for peft.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", callback=expanded)],
    model: Model = None,
    shared: Shared = False,
    task: Annotated[
        str | None, typer.Option(help="Task to measure for the model card of --to bake.")
    ] = None,
    task_arg: TaskArgs = None,
    dtype: Dtype = None,
    device: Device = None,
    allow_dtype: AllowDtype = False,
) -> None:
    """Write an edit as a model or an adapter that loads without a TransformerBridge."""
    with clear_errors():
        from eigenlens.export.bake import bake, baked_model
        from eigenlens.export.loading import load_plain
        from eigenlens.export.lora import to_lora
        from eigenlens.export.refusals import check_export

        if task is not None and to is not Form.bake:
            raise ValueError(f"--task is for the model card of --to bake, not for --to {to}.")
        frozen = _frozen(edit, shared=shared)
        check_export(frozen, to, out)
        name, kind = _source(frozen, model, dtype)
        plain, tokenizer = load_plain(name, kind, device)
        frozen.check_tokenizer(tokenizer)
        if to is Form.lora:
            to_lora(plain, frozen, out, allow_dtype=allow_dtype)
        elif to is Form.peft:
            from eigenlens.peft import to_peft

            to_peft(plain, frozen, out, allow_dtype=allow_dtype)
        else:
            before = after = None
            if task is not None:
                arguments = pairs(task_arg or [], "--task-arg")
                baked_model(plain, frozen, allow_dtype=allow_dtype)  # refused before it is measured
                before, after = _measured(
                    frozen, name, kind, device, task, arguments, allow_dtype=allow_dtype
                )
            bake(
                plain,
                frozen,
                out,
                tokenizer=tokenizer,
                before=before,
                after=after,
                allow_dtype=allow_dtype,
            )
        say(f"Written to {out}")


Repo = Annotated[str, typer.Argument(help="NAME, or OWNER/NAME, of a repository on the Hub.")]


def push(
    edit: Edit,
    repo: Repo,
    private: Annotated[bool, typer.Option("--private", help="If it is made anew.")] = False,
) -> None:
    """Put an edit on the Hugging Face Hub, with a card; of a run folder, with what it measured."""
    with clear_errors():
        from eigenlens.export import hub

        say(f"Pushed to {hub.push(_file(edit), repo, private=private)}")


def pull(
    repo: Repo,
    out: Annotated[
        Path, typer.Option(help="Folder to write frozen.safetensors to.", callback=expanded)
    ] = Path(),
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Fetch an edit from the Hugging Face Hub."""
    with clear_errors():
        from eigenlens.export import hub

        say(f"Edit: {hub.pull(repo, out, revision=revision)}")


def harness_tasks(
    out: Annotated[Path, typer.Option(help="Folder to write.", callback=expanded)],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the official files (default: $EIGENLENS_DATA).", callback=expanded
        ),
    ] = None,
) -> None:
    """Write CB, COPA, RTE and WikiText-2 as tasks of lm-evaluation-harness."""
    with clear_errors():
        from eigenlens.tasks import write_harness_tasks

        say(f"Written to {out}: {', '.join(write_harness_tasks(out, data))}")


def _file(edit: Path) -> Path:
    return edit / "frozen.safetensors" if edit.is_dir() else edit


def _frozen(edit: Path, *, shared: bool = False) -> "FrozenSet":
    from eigenlens.frozen_set import FrozenSet

    frozen = FrozenSet.load(_file(edit))
    return frozen.shared() if shared else frozen


def _source(frozen: "FrozenSet", model: str | None, dtype: str | None) -> tuple[str, str]:
    """Which model to load, and in which type."""
    made = frozen.provenance
    return model or made.model, dtype or made.dtype or "float32"


def _measured(
    frozen: "FrozenSet",
    model: str,
    dtype: str,
    device: str | None,
    task: str,
    arguments: dict[str, Any],
    *,
    split: str = "test",
    batch_size: int = 50,
    allow_dtype: bool = False,
) -> "tuple[Evaluation, Evaluation]":
    """A task before and after the edit."""
    from eigenlens.evaluation import evaluate
    from eigenlens.freezing import freeze
    from eigenlens.models import load_model
    from eigenlens.tasks import load_task

    if split not in ("train", "validation", "test"):
        raise ValueError(f"--split {split!r} is no split; use train, validation or test.")
    bridge = load_model(model, dtype=dtype, device=device)
    frozen.check_tokenizer(bridge.tokenizer)
    edit = freeze(bridge, frozen, allow_dtype=allow_dtype)
    data = getattr(load_task(task, bridge.tokenizer, **arguments), split)
    before = evaluate(bridge, data, batch_size=batch_size)
    with edit:
        return before, evaluate(bridge, data, batch_size=batch_size)
