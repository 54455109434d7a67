"""Where in a text a component's coordinate is largest and smallest, with the tokens marked."""

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.nodes import Nodes, make_nodes
from eigenlens.files import FileFormatError, load_record, save_record
from eigenlens.inputs import tokenizer_of
from eigenlens.matrices import Site
from eigenlens.metrics import check_eval_mode
from eigenlens.passes import Activation, FiniteCheck, record
from eigenlens.provenance import Provenance, data_hash
from eigenlens.spectra import COMPONENT, Directions, Spectra
from eigenlens.tasks.batches import Batch, make_batches

_COLUMNS = ["end", "example", "position", "coordinate", "tokens", "coordinates", "at"]
_ENDS = {"largest": 1, "smallest": -1}
_COLOURS = {True: "213, 94, 0", False: "0, 114, 178"}  # above and below zero


@dataclass(frozen=True)
class Examples:
    """Passages on which a coordinate is largest and smallest.

    Attributes:
        node: name of the component or degenerate block.
        passages: one row per passage, the most extreme first: ``end`` (``largest`` or
            ``smallest``), ``example`` (its row in the data), ``position`` of the extreme token
            (from the end of the prompt), its ``coordinate``, the ``tokens`` around it as texts with
            their ``coordinates``, and the place ``at`` which it stands among them.
        provenance: model, data and versions.
    """

    node: str
    passages: pd.DataFrame
    provenance: Provenance

    def show(self) -> None:
        """Print the passages, the extreme token in double brackets."""
        print(self)

    def __str__(self) -> str:
        lines = [self.node]
        for end, rows in self.passages.groupby("end", sort=False):
            lines.append(f"{end} coordinates")
            for _, row in rows.iterrows():
                parts = list(row["tokens"])
                parts[row["at"]] = f"[[{parts[row['at']]}]]"
                lines.append(f"  {row['coordinate']:+.3g}  {''.join(parts)!r}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        strongest = max((np.abs(c).max() for c in self.passages["coordinates"]), default=1.0)
        parts = [f"<p>{html.escape(self.node)}</p>"]
        for end, rows in self.passages.groupby("end", sort=False):
            parts.append(f"<b>{end} coordinates</b>")
            for _, row in rows.iterrows():
                marked = "".join(
                    _marked(token, value, value / (strongest or 1.0), place == row["at"])
                    for place, (token, value) in enumerate(
                        zip(row["tokens"], row["coordinates"], strict=True)
                    )
                )
                note = f"example {row['example']}, {row['coordinate']:+.3g}"
                parts.append(f"<div><small>{note}</small> {marked}</div>")
        return "".join(parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file."""
        rest = {"node": self.node, "provenance": self.provenance.model_dump()}
        save_record(path, "examples", {**rest, "passages": self.passages.to_dict(orient="list")})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Examples":
        """Read back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated or foreign.
        """
        found = load_record(path, "examples")
        try:
            passages = pd.DataFrame(found["passages"], columns=_COLUMNS)
            return cls(found["node"], passages, Provenance(**found["provenance"]))
        except KeyError as error:
            raise FileFormatError(f"{path} lacks {error}.") from error


def _marked(token: str, value: float, share: float, is_extreme: bool) -> str:
    """A token on the colour of its coordinate; the extreme one in bold, with a border."""
    style = f"background: rgba({_COLOURS[value >= 0]}, {min(abs(share), 1.0):.2f})"
    if is_extreme:
        style += "; font-weight: bold; outline: 1px solid"
    shown = html.escape(token).replace("\n", "⏎")
    return f'<span style="white-space: pre-wrap; {style}" title="{value:+.4g}">{shown}</span>'


def examples(
    model: TransformerBridge,
    spectra: Spectra,
    component: Mapping[str, Any] | pd.Series | Sequence[Any],
    data: Dataset,
    *,
    top: int = 5,
    around: int = 12,
    batch_size: int = 50,
    progress: bool = True,
) -> Examples:
    """Passages on which a component's coordinate is largest and smallest.

    Args:
        model: in eval mode.
        spectra: its decomposition, or that of another object with the same weights.
        component: ``layer, matrix, head, index``: a tuple, or a row of a table of components. Of a
            degenerate block, whose directions are arbitrary, the length of its coordinates.
        data: passages as prompts and answers, such as :func:`eigenlens.tasks.text_examples` makes;
            both are read, all but the last token of the answer.
        top: passages of either end; from each example at most one.
        around: tokens to show on either side of the extreme one.
        batch_size: examples per pass.
        progress: show a progress bar.

    Raises:
        ValueError: no such component; ``top`` below 1 or ``around`` below 0; a model in training
            mode or with other weights; data that are empty or do not fit.
    """
    nodes = make_nodes(spectra.on(model), pd.DataFrame([_place(component)]))
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    (found,) = examples_of(model, nodes, data, top=top, around=around, **options).values()
    return found


def examples_of(
    model: TransformerBridge,
    nodes: Nodes,
    data: Dataset,
    *,
    top: int = 5,
    around: int = 12,
    batch_size: int = 50,
    progress: bool = True,
) -> dict[str, Examples]:
    """:func:`examples` of many components or blocks by name, from one pass over ``data``.

    Raises:
        ValueError: as :func:`examples`.
    """
    if top < 1 or around < 0:
        raise ValueError(f"top={top}, around={around}: at least 1 and 0 are needed.")
    check_eval_mode(model)
    found: dict[str, list[dict[str, Any]]] = {node.name: [] for node in nodes}
    batches = make_batches(data, model, batch_size)
    for batch in tqdm(batches, desc="examples", unit="batch", disable=not progress):
        for name, coordinates in _coordinates(model, nodes, batch).items():
            found[name] += _extremes(model, batch, coordinates, top, around)
    provenance = Provenance.of(model, task_hash=data_hash(data))
    return {name: Examples(name, _best(rows, top), provenance) for name, rows in found.items()}


def _best(rows: list[dict[str, Any]], top: int) -> pd.DataFrame:
    """The most extreme passages of either end."""
    table = pd.DataFrame(rows, columns=_COLUMNS)
    ends = [
        table[table["end"] == end]
        .sort_values("coordinate", ascending=end == "smallest", kind="stable")
        .head(top)
        for end in _ENDS
    ]
    return pd.concat(ends, ignore_index=True)


def _place(component: Mapping[str, Any] | pd.Series | Sequence[Any]) -> dict[str, Any]:
    if isinstance(component, Mapping | pd.Series):
        if any(name not in component for name in COMPONENT):
            raise ValueError(f"A component has {', '.join(COMPONENT)}, not {list(component)!r}.")
        return {name: component[name] for name in COMPONENT}
    if len(component) != len(COMPONENT):
        raise ValueError(f"A component has {', '.join(COMPONENT)}, not {component!r}.")
    return dict(zip(COMPONENT, component, strict=True))


def _coordinates(
    model: TransformerBridge, nodes: Nodes, batch: Batch
) -> dict[str, Float[Tensor, "batch pos"]]:
    """Coordinates of every node by its name; of a block, their length."""
    own: dict[str, list[tuple[str, Directions]]] = {}
    for node in nodes:
        members = node.spectrum.subset(np.full_like(node.index, node.head), node.index)
        own.setdefault(node.site.name, []).append((node.name, members))
    seen: dict[str, Tensor] = {}
    finite = FiniteCheck()

    def keep(site: Site, h: Activation) -> None:
        for name, members in own[site.name]:
            assert members.read is not None
            c = members.coordinates(h.to(members.read.dtype))[:, :, 0]
            seen[name] = (c[..., 0] if c.shape[-1] == 1 else c.norm(dim=-1)).cpu().double()

    sites = {members.site.name: members.site for parts in own.values() for _, members in parts}
    record(model, list(sites.values()), batch, keep, finite)
    finite.check()
    return {node.name: seen[node.name] for node in nodes}


def _extremes(
    model: TransformerBridge,
    batch: Batch,
    coordinates: Float[Tensor, "batch pos"],
    top: int,
    around: int,
) -> list[dict[str, Any]]:
    """The most extreme coordinates, one of an example, with what stands around them."""
    there = batch.attention_mask.cpu()
    tokenizer = tokenizer_of(model)
    rows = []
    for end, sign in _ENDS.items():
        values_there = (sign * coordinates).masked_fill(~there, -torch.inf)
        places = values_there.argmax(1)
        most = values_there.gather(1, places[:, None])[:, 0]
        for line in most.argsort(descending=True, stable=True)[:top].tolist():
            place = int(places[line])
            first = max(place - around, int(there[line].int().argmax()))
            last = min(place + around, int(torch.nonzero(there[line]).max()))
            tokens = batch.tokens[line, first : last + 1].tolist()
            values = coordinates[line, first : last + 1].tolist()
            rows.append(
                {
                    "end": end,
                    "example": batch.indices[line],
                    "position": batch.positions[place],
                    "coordinate": values[place - first],
                    "tokens": [str(tokenizer.decode([token])) for token in tokens],
                    "coordinates": values,
                    "at": place - first,
                }
            )
    return rows
