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
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.nodes import Node, make_nodes
from eigenlens.files import FileFormatError, load_record, save_record
from eigenlens.inputs import tokenizer_of
from eigenlens.matrices import Site
from eigenlens.metrics import check_eval_mode
from eigenlens.passes import Activation, FiniteCheck, record
from eigenlens.provenance import Provenance, data_hash
from eigenlens.spectra import COMPONENT, Spectra
from eigenlens.tasks.batches import Batch, make_batches

_COLUMNS = ["end", "example", "position", "coordinate", "tokens", "coordinates", "at"]
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
    if top < 1 or around < 0:
        raise ValueError(f"top={top}, around={around}: at least 1 and 0 are needed.")
    check_eval_mode(model)
    spectra = spectra.on(model)
    (node,) = make_nodes(spectra, pd.DataFrame([_place(component)]))
    found: list[dict[str, Any]] = []
    batches = make_batches(data, model, batch_size)
    for batch in tqdm(batches, desc="examples", unit="batch", disable=not progress):
        found += _extremes(model, batch, _coordinates(model, node, batch), around)
    table = pd.DataFrame(found, columns=_COLUMNS)
    ends = [
        table[table["end"] == end]
        .sort_values("coordinate", ascending=end == "smallest", kind="stable")
        .head(top)
        for end in ("largest", "smallest")
    ]
    provenance = Provenance.of(model, task_hash=data_hash(data))
    return Examples(node.name, pd.concat(ends, ignore_index=True), provenance)


def _place(component: Mapping[str, Any] | pd.Series | Sequence[Any]) -> dict[str, Any]:
    if isinstance(component, Mapping | pd.Series):
        if any(name not in component for name in COMPONENT):
            raise ValueError(f"A component has {', '.join(COMPONENT)}, not {list(component)!r}.")
        return {name: component[name] for name in COMPONENT}
    if len(component) != len(COMPONENT):
        raise ValueError(f"A component has {', '.join(COMPONENT)}, not {component!r}.")
    return dict(zip(COMPONENT, component, strict=True))


def _coordinates(model: TransformerBridge, node: Node, batch: Batch) -> Float[Tensor, "batch pos"]:
    own = node.spectrum.subset(np.full_like(node.index, node.head), node.index)
    assert own.read is not None
    read = own.read[0]
    seen: list[Tensor] = []
    finite = FiniteCheck()

    def keep(site: Site, h: Activation) -> None:
        c = einsum(h[:, :, 0].to(read.dtype), read, "b p width, width k -> b p k")
        seen.append(c[..., 0] if len(node.index) == 1 else c.norm(dim=-1))

    record(model, [own.site], batch, keep, finite)
    finite.check()
    return seen[0].cpu().double()


def _extremes(
    model: TransformerBridge, batch: Batch, coordinates: Float[Tensor, "batch pos"], around: int
) -> list[dict[str, Any]]:
    """The largest and the smallest coordinate of every example, with what stands around it."""
    there = batch.attention_mask.cpu()
    ends = {
        "largest": coordinates.masked_fill(~there, -torch.inf).argmax(1),
        "smallest": coordinates.masked_fill(~there, torch.inf).argmin(1),
    }
    tokenizer = tokenizer_of(model)
    rows = []
    for end, places in ends.items():
        for line, place in enumerate(places.tolist()):
            first = max(place - around, int(there[line].int().argmax()))
            last = max(place, int(torch.nonzero(there[line]).max()))
            columns = range(first, min(place + around, last) + 1)
            tokens = batch.tokens[line, first : columns.stop].tolist()
            values = coordinates[line, first : columns.stop].tolist()
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
