"""The report: one HTML page that explains a run, without any request to a network."""

import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from datasets import Dataset
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs
from transformer_lens.model_bridge import TransformerBridge

from eigenlens import plots
from eigenlens.bases import SINGULAR
from eigenlens.circuits.nodes import node_name
from eigenlens.evaluation import Evaluation
from eigenlens.files import write_text
from eigenlens.plots.examples import OUTCOMES
from eigenlens.report.cards import cards
from eigenlens.report.drawing import fragment
from eigenlens.report.inside import Inside, look_inside
from eigenlens.report.tables import Table, make_table
from eigenlens.run_folder import EigenpruneResult, load_run
from eigenlens.spectra import COMPONENT
from eigenlens.tasks import Task

_SCRIPTS = ("sort.js", "pin.js")
# What components are, by basis.
_COMPONENTS = {
    "svd": "singular components",
    "qk_ov": "singular components of the joint maps (QK: W_Q W_Kᵀ, OV: W_V W_O)",
    "random": "components of a random orthonormal basis",
    "neurons": "neurons",
    "pca": "principal components of the activations",
}
MOST_ROWS = 200  # of a table: a page for a phone, not a data base


def write_report(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    model: TransformerBridge | None = None,
    task: Task | None = None,
    text: Dataset | None = None,
    inside: bool = True,
    progress: bool = True,
) -> Path:
    """Write the page of a finished run.

    Args:
        run: folder of :func:`eigenlens.pipeline.run`.
        out: the file to write (default: ``report.html`` in the folder).
        model: that of the run; needed where it had it from memory, and else loaded again.
        task: likewise.
        text: passages in which to look for what components answer to, as prompts and answers
            (default: the model's own text, drawn anew, if the run protected own text, else the
            training examples), and to measure the harm of the edit on, scaled back or whole.
        inside: draw activations and the circuit of pruned paths, which takes the model. Where that
            is not possible, the page says why and has everything else.
        progress: show progress bars.

    Returns:
        The file.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        FileFormatError: a file of it is truncated or foreign.
    """
    result, metrics = load_run(run)
    found, reason = _inside(result, model, task, text, inside, progress)
    path = Path(out) if out is not None else Path(run) / "report.html"
    write_text(path, _render(result, metrics, found, reason))
    return path


def _inside(
    result: EigenpruneResult,
    model: TransformerBridge | None,
    task: Task | None,
    text: Dataset | None,
    wanted: bool,
    progress: bool,
) -> tuple[Inside | None, str]:
    """What the model shows, or why it does not."""
    if not wanted:
        return None, "the report was written with --no-circuit."
    try:
        return look_inside(result, model, task, text=text, progress=progress), ""
    except (ValueError, OSError) as error:
        return None, f"the model of this run could not be used: {error}"


def _render(
    result: EigenpruneResult, metrics: dict[str, Any], found: Inside | None, reason: str
) -> str:
    folder = files("eigenlens.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda share: f"{share:.1%}",
        "range": lambda ends: f"{ends[0]:.1%} … {ends[1]:.1%}",
        "signed": lambda value: f"{value:+.3f}".replace("-", "−"),
        "points": lambda value: f"{100 * value:+.1f}".replace("-", "−"),
    }
    changed, n_changed = _changed(result.before, result.after)
    return environment.get_template("page.html.j2").render(
        result=result,
        components=_COMPONENTS[result.scores.basis],
        metrics=metrics,
        inside=found,
        left_out=reason,
        plotly_js=get_plotlyjs(),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script="".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS),
        cards=cards(found) if found is not None else {},
        figures=_figures(result, found),
        frozen=_frozen(result, found),
        changed=changed,
        n_changed=n_changed,
        spared=_spared(result.search.protected),
        rewound=_rewound(found),
        against=_against(found),
        answers=_answers(found, result.scores.basis),
        groups=_groups(found),
        cost=_cost(result.seconds),
        made_with=_made_with(metrics),
        most_rows=MOST_ROWS,
    )


def _figures(result: EigenpruneResult, found: Inside | None) -> dict[str, str]:
    """HTML of every figure that there is something to draw for, by name."""
    scores, frozen = result.scores, result.frozen
    drawn = {
        "spectrum": plots.spectrum(scores, frozen),
        "trace": plots.search_trace(result.search),
        "losses": plots.example_losses(result.before, result.after),
    }
    if len(frozen):
        drawn["map"] = plots.pruned_map(frozen, scores)
    if found is not None:
        drawn["activations"] = plots.activation_change(found.activations)
        if found.frontier is not None:
            drawn["frontier"] = plots.frontier(found.frontier)
        if found.paths is not None:
            drawn["circuit"] = plots.circuit(found.paths)
    return {name: fragment(figure, f"figure-{name}") for name, figure in drawn.items()}


def _frozen(result: EigenpruneResult, found: Inside | None) -> Table:
    """The frozen components with the lowest scores."""
    table = result.frozen.to_pandas().merge(result.scores.to_pandas(), on=COMPONENT)
    table = table.rename(columns={"delta_loss": "ΔL (nats)", "sigma": "σ"})
    named = {} if found is None else _node_of(found.nodes)
    singular = result.scores.basis in SINGULAR
    sigma = "σ the singular value" if singular else "σ the length of the matrix along it"
    places = table[COMPONENT].itertuples(index=False, name=None)
    table["component"] = [named.get(place, node_name(*place)) for place in places]
    return make_table(
        table.sort_values("ΔL (nats)").head(MOST_ROWS),
        "Frozen components, lowest score first: ΔL is the predicted change of the loss per "
        f"example, {sigma}, strength how much of its effect is frozen",
        {
            "component": "",
            "layer": "d",
            "matrix": "",
            "head": "d",
            "index": "d",
            "strength": ".3g",
            "ΔL (nats)": ".4g",
            "σ": ".4g",
        },
        pins=_names(found),
    )


def _names(found: Inside | None) -> set[str]:
    """Of the nodes that have a card."""
    return set() if found is None or found.nodes.empty else set(found.nodes["node"])


def _node_of(nodes: pd.DataFrame) -> dict[tuple[Any, ...], str]:
    """The node that each component is of: degenerate blocks hold several."""
    return {
        (row["layer"], row["matrix"], row["head"], row["index"] + member): row["node"]
        for row in nodes.to_dict("records")
        for member in range(row["size"])
    }


def _changed(before: Evaluation, after: Evaluation) -> tuple[Table, int]:
    """Examples whose answer is another one than before, those that were lost or gained first."""
    was, now = before.examples, after.examples
    both = pd.DataFrame(
        {
            "prompt": now["prompt"],
            "right answer": now["answer"],
            "before": was["predicted"],
            "after": now["predicted"],
            "outcome": [
                OUTCOMES[bool(a), bool(b)][0]
                for a, b in zip(was["correct"], now["correct"], strict=True)
            ],
            "loss before": was["loss"],
            "loss after": now["loss"],
        }
    )
    changed = both[(was["predicted"] != now["predicted"]) | (was["correct"] != now["correct"])]
    order = changed["outcome"].map({"lost": 0, "gained": 1}).fillna(2)
    changed = changed.iloc[np.argsort(order, kind="stable")]
    table = make_table(
        changed.head(MOST_ROWS),
        "Test examples whose answer changed; losses in nats per answer",
        {
            "prompt": str,
            "right answer": str,
            "before": str,
            "after": str,
            "outcome": str,
            "loss before": ".3f",
            "loss after": ".3f",
        },
    )
    return table, len(changed)


def _spared(protected: pd.DataFrame) -> Table | None:
    if protected.empty:
        return None
    return make_table(
        protected.rename(columns=lambda name: name.replace("_", " ")),
        "What the search was told to leave as it is: divergence from the unedited model, its bound "
        "and losses in nats per answer token",
        {
            "data": "",
            "examples": "d",
            "divergence": ".4f",
            "bound": ".3g",
            "loss before": ".3f",
            "loss after": ".3f",
            "accuracy before": ".1%",
            "accuracy after": ".1%",
        },
    )


def _rewound(found: Inside | None) -> Table | None:
    """The edit at the strengths that no other beats, down to none."""
    if found is None or found.frontier is None:
        return None
    table = found.frontier.show()[
        ["strength", "components", "test_accuracy", "test_harm", "chosen"]
    ]
    return make_table(
        table.assign(chosen=table["chosen"].map({True: "chosen", False: ""})).rename(
            columns={"test_accuracy": "test accuracy", "test_harm": "harm"}
        ),
        "The edit scaled back, at the strengths that are best for some harm on validation data: "
        "harm is the rise of the loss on the half of the text that did not choose, in nats per "
        f"token; chosen is the most accurate on validation within {found.frontier.bound:g}",
        {
            "strength": ".1f",
            "components": "d",
            "test accuracy": ".1%",
            "harm": ".4f",
            "chosen": "",
        },
    )


def _against(found: Inside | None) -> Table | None:
    """Which frozen components wrote against the right answer, and from where they read."""
    if found is None or found.paths is None:
        return None
    table = found.paths.against_answer().rename(columns={"delta_loss": "ΔL"})
    if table.empty:
        return None
    return make_table(
        table.rename(columns=lambda name: name.replace("_", " ")),
        "Frozen components that wrote against the right answer: what each adds to its "
        "log-probability (nats) and logit at the last position of the prompt, the maps and nodes "
        "that it reads from with the effect of each on the loss (nats), and the tokens that it "
        "reads, promotes and suppresses; of what moves attention, the pairs query→key whose score "
        "it raises and lowers",
        {
            "node": "",
            "answer logprob": ".4f",
            "answer logit": ".4f",
            "ΔL": ".4g",
            "read from": str,
            "sources": str,
            "reads": str,
            "promotes": str,
            "suppresses": str,
        },
        pins=_names(found),
    )


def _groups(found: Inside | None) -> Table | None:
    """What each group of frozen components does as a whole, and its members one by one."""
    if found is None or found.groups is None:
        return None
    table = found.groups.table.rename(columns=lambda name: name.replace("_", " "))
    formats: dict[str, str | Callable[[object], str]] = {
        "group": "d",
        "components": "d",
        "where": str,
        "first order": "+.3g",
        "single": "+.3g",
        "joint": "+.3g",
        "stderr": ".1g",
        "reads": str,
        "writes": str,
    }
    if table["single"].isna().all():
        del formats["single"]
    return make_table(
        table,
        "Frozen components that act on the same examples, the group that lowers the loss most "
        f"first, on {found.groups.n_examples} training examples: joint is the change of the loss "
        "when a group is frozen as a whole, first order and single the sums over its members "
        "taken one at a time, estimated and exact (nats per answer)",
        formats,
    )


def _answers(found: Inside | None, basis: str) -> Table | None:
    """The passages at both ends of every described component's coordinate."""
    if found is None or not found.examples:
        return None
    rows = []
    for node, own in found.examples.items():
        ends = dict(iter(own.passages.groupby("end")))
        rows.append([node, *(_marked(ends[end]) for end in ("largest", "smallest"))])
    return make_table(
        pd.DataFrame(rows, columns=["component", "largest", "smallest"], dtype=object),
        "Passages on which a component's coordinate is largest and smallest, with the coordinate "
        f"at the marked token; {found.text}"
        + ("" if basis == "neurons" else ". A coordinate's sign is arbitrary"),
        {"component": "", "largest": "", "smallest": ""},
        pins=_names(found),
    )


def _marked(passages: pd.DataFrame) -> Markup:
    """Passages line by line, each with its coordinate and the extreme token marked."""
    lines = []
    for row in passages.to_dict("records"):
        tokens = [escape(token.replace("\n", "⏎")) for token in row["tokens"]]
        tokens[row["at"]] = Markup("<mark>{}</mark>").format(tokens[row["at"]])
        value = f"{row['coordinate']:+.3g}".replace("-", "−")
        lines.append(Markup("<b>{}</b> {}").format(value, Markup("").join(tokens)))
    return Markup("\n").join(lines)


def _cost(seconds: dict[str, float]) -> Table:
    rows = pd.DataFrame({"stage": list(seconds), "seconds": list(seconds.values())})
    total = sum(seconds.values())
    rows["share"] = rows["seconds"] / total if total else 0.0
    return make_table(
        rows,
        f"Seconds of each stage, {total:.1f} in all; a stage that an earlier start of the run had "
        "finished counts as reading it back",
        {"stage": "", "seconds": ".2f", "share": ".1%"},
    )


def _made_with(metrics: dict[str, Any]) -> Table:
    rows = [
        *metrics["versions"].items(),
        ("seed", str(metrics["seed"])),
        *((f"fingerprint: {name}", value) for name, value in metrics["fingerprints"].items()),
    ]
    return make_table(
        pd.DataFrame(rows, columns=["what", "value"]),
        "Versions, seed and fingerprints",
        {"what": "", "value": ""},
    )
