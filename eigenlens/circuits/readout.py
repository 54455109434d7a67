"""What a component reads and writes, in tokens and in other components.

Reading: the cosine of ``u_i`` with every token's embedding behind the norm (position embeddings
left out). Writing: ``v_i`` through the final norm's weight and the unembedding, in logits per unit
of the component's activation at scale one, over the mean of all tokens. ``W_Q`` and ``W_K`` write
no tokens: they give pairs (query token, key token) whose attention score they raise or lower,
rotary turns and norms of queries and keys left out.

Signs: the tokens with positive scores drive the activation up, and those ``promoted`` get higher
logits when it is positive; when it is negative everything turns round. A degenerate block has no
signs: its scores are lengths, and nothing is suppressed.
"""

import html
import os
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.composition import comes_after, inside
from eigenlens.circuits.nodes import Nodes, make_nodes, node_name, spectrum_of
from eigenlens.circuits.norms import final_gain, gain_before
from eigenlens.circuits.residual import (
    own_rows,
    query_heads,
    read_rows,
    seen_by,
    unit,
    write_rows,
)
from eigenlens.files import FileFormatError, load_record, save_record
from eigenlens.matrices import WeightMatrix, weight_matrices
from eigenlens.provenance import Provenance
from eigenlens.spectra import Spectra, Spectrum

_TABLES = ("reads", "reads_from", "writes", "pairs")


@dataclass(frozen=True)
class Readout:
    """What one component (or degenerate block) reads and writes.

    Attributes:
        node: its name.
        reads: ``token, score``: cosine with the embedding; the highest, then the lowest.
        reads_from: ``writer, score``: cosine with earlier write directions, largest first.
        writes: ``token, through, score``: logits per unit of activation; the most promoted, then
            the most suppressed; ``through`` is the query head of ``W_O`` that a ``W_V`` passes.
        pairs: ``query, key, through, score`` for ``W_Q`` and ``W_K``: attention score per unit
            embeddings, before the division by ``√d_head``.
        provenance: model and versions.
    """

    node: str
    reads: pd.DataFrame
    reads_from: pd.DataFrame
    writes: pd.DataFrame
    pairs: pd.DataFrame
    provenance: Provenance

    def _repr_html_(self) -> str:
        parts = [
            f"<b>{name.replace('_', ' ')}</b>{table.to_html(index=False)}"
            for name in _TABLES
            if len(table := getattr(self, name))
        ]
        return f"<p>{html.escape(self.node)}</p>" + "".join(parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file."""
        tables = {name: getattr(self, name).to_dict(orient="list") for name in _TABLES}
        rest = {"node": self.node, "provenance": self.provenance.model_dump()}
        save_record(path, "readout", {**rest, **tables})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Readout":
        """Read back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated or foreign.
        """
        record = load_record(path, "readout")
        try:
            tables = {name: pd.DataFrame(record[name]) for name in _TABLES}
            return cls(record["node"], **tables, provenance=Provenance(**record["provenance"]))
        except KeyError as error:
            raise FileFormatError(f"{path} lacks {error}.") from error


def readout(
    model: TransformerBridge,
    spectra: Spectra,
    layer: int,
    matrix: str,
    head: int,
    index: int,
    *,
    top: int = 10,
) -> Readout:
    """Describe what a component reads and writes.

    Args:
        model: gives embeddings, norms and the maps in between.
        spectra: its decomposition.
        layer, matrix, head, index: the component; head 0 for MLP maps. In a degenerate block, the
            whole block is described.
        top: rows of each kind.

    Raises:
        ValueError: no such component.
    """
    place = {"layer": layer, "matrix": matrix, "head": head, "index": index}
    nodes = make_nodes(spectra, pd.DataFrame([place]))
    spectrum = spectrum_of(spectra, layer, matrix)
    indices = nodes.members["index"].tolist()
    scores = _read_scores(model, spectrum, head, indices)
    written = {
        h: _token_logits(model, rows)
        for h, rows in write_rows(model, spectrum, head, indices).items()
    }
    return Readout(
        node=nodes.table["node"].iloc[0],
        reads=_ends(model, scores, top),
        reads_from=_reads_from(model, spectra, spectrum, head, indices).head(top),
        writes=_concat(
            [_ends(model, s, top).assign(through=h) for h, s in written.items()],
            ["token", "through", "score"],
        ),
        pairs=_pairs(model, spectrum, head, indices, top),
        provenance=Provenance.of(model),
    )


def token_summary(model: TransformerBridge, spectra: Spectra, nodes: Nodes) -> pd.DataFrame:
    """Top tokens of each node as text: columns ``reads, promotes, suppresses``.

    For ``W_Q`` and ``W_K``, ``promotes`` and ``suppresses`` hold pairs ``query→key``; of several
    query heads that a ``W_V`` feeds, the one that passes on most speaks.
    """
    rows = []
    for number in range(len(nodes)):
        own = nodes.members[nodes.members["number"] == number]
        spectrum, head = spectra[own["map"].iloc[0]], int(own["head"].iloc[0])
        rows.append(_one_summary(model, spectrum, head, own["index"].tolist()))
    return pd.DataFrame(rows, columns=["reads", "promotes", "suppresses"])


def _one_summary(
    model: TransformerBridge, spectrum: Spectrum, head: int, indices: list[int], top: int = 4
) -> dict[str, str]:
    reads = _ends(model, _read_scores(model, spectrum, head, indices), top)
    written = write_rows(model, spectrum, head, indices)
    if written:
        through = max(written, key=lambda h: float(written[h].norm()))
        table = _ends(model, _token_logits(model, written[through]), top)
    else:
        pairs = _pairs(model, spectrum, head, indices, top)
        table = pairs.assign(token=pairs["query"] + "→" + pairs["key"])
    return {
        "reads": _joined(reads, 1),
        "promotes": _joined(table, 1),
        "suppresses": _joined(table, -1),
    }


def _joined(table: pd.DataFrame, sign: int) -> str:
    return " ".join(table.loc[table["score"] * sign > 0, "token"])


def _concat(tables: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    if not tables:
        return pd.DataFrame(columns=columns)
    return pd.concat(tables, ignore_index=True)[columns]


def _lengths(scores: Float[Tensor, "n token"]) -> Float[Tensor, " token"]:
    """Scores of a block as lengths; of a single component as they are."""
    return scores[0] if len(scores) == 1 else scores.norm(dim=0)


def _embeddings(model: TransformerBridge, matrix: WeightMatrix) -> Float[Tensor, "token d_model"]:
    """Token embeddings at unit length behind the norm before ``matrix``."""
    rows = seen_by(model, matrix, model.W_E.detach())
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _read_scores(
    model: TransformerBridge, spectrum: Spectrum, head: int, indices: list[int]
) -> Float[Tensor, " token"]:
    rows = unit(read_rows(model, spectrum, head, indices))
    return _lengths(rows @ _embeddings(model, spectrum.matrix).to(rows).T)


def _token_logits(
    model: TransformerBridge, rows: Float[Tensor, "n d_model"]
) -> Float[Tensor, " token"]:
    logits = final_gain(model)(rows) @ model.W_U.detach().to(rows)
    return _lengths(logits - logits.mean(-1, keepdim=True))


def _ends(model: TransformerBridge, scores: Float[Tensor, " token"], top: int) -> pd.DataFrame:
    """The highest and, where there are signs, the lowest scores, with their tokens."""
    order = scores.argsort(descending=True).tolist()
    chosen = order[:top] + [token for token in order[-top:] if scores[token] < 0]
    chosen = list(dict.fromkeys(chosen))
    table = {"token": [_text(model, t) for t in chosen], "score": scores[chosen].tolist()}
    return pd.DataFrame(table)


def _text(model: TransformerBridge, token: int) -> str:
    return str(model.tokenizer.decode([token])) or f"#{token}"


def _reads_from(
    model: TransformerBridge, spectra: Spectra, spectrum: Spectrum, head: int, indices: list[int]
) -> pd.DataFrame:
    """Cosine of what a node reads with all earlier write directions."""
    u, _ = own_rows(spectrum, head, indices)
    read = unit(u)
    found: list[tuple[str, float]] = []
    for writer in spectra.values():
        for h in range(writer.matrix.n_heads):
            if inside(model, writer.matrix, h, spectrum.matrix, head):
                written = {head: writer.vh[h]}
            elif comes_after(model, writer.matrix, spectrum.matrix):
                everything = list(range(writer.matrix.rank))
                rows = write_rows(model, writer, h, everything)
                written = {q: seen_by(model, spectrum.matrix, r) for q, r in rows.items()}
            else:
                continue
            for through in written.values():
                found += _block_cosines(writer, h, through, read)
    table = pd.DataFrame(found, columns=["writer", "score"])
    return table.sort_values("score", key=abs, ascending=False, ignore_index=True)


def _block_cosines(
    writer: Spectrum, head: int, rows: Float[Tensor, "rank width"], read: Tensor
) -> list[tuple[str, float]]:
    tiny = torch.finfo(rows.dtype).tiny
    single = (rows / rows.norm(dim=-1, keepdim=True).clamp_min(tiny)) @ read.T
    blocks = writer.blocks[head]
    found = []
    for block in blocks.unique().tolist():
        own = (blocks == block).nonzero()[:, 0]
        if len(own) == 1 and len(read) == 1:
            score = float(single[own[0], 0])
        else:
            score = float(torch.linalg.matrix_norm(unit(rows[own]) @ read.T, 2))
        found.append((node_name(writer, head, own.tolist()), score))
    return found


def _pairs(
    model: TransformerBridge, spectrum: Spectrum, head: int, indices: list[int], top: int
) -> pd.DataFrame:
    """Pairs of tokens with the highest and lowest share of the attention score."""
    columns = ["query", "key", "through", "score"]
    kind = spectrum.matrix.kind
    if kind not in ("W_Q", "W_K"):
        return pd.DataFrame(columns=columns)
    return _concat(
        [
            _head_pairs(model, spectrum, head, indices, q, top).assign(through=q)
            for q in query_heads(model, spectrum.matrix, head)
        ],
        columns,
    )


def _head_pairs(
    model: TransformerBridge,
    spectrum: Spectrum,
    head: int,
    indices: list[int],
    query_head: int,
    top: int,
) -> pd.DataFrame:
    own_is_query = spectrum.matrix.kind == "W_Q"
    (other,) = weight_matrices(model, ["W_K" if own_is_query else "W_Q"], [spectrum.matrix.layer])
    partner = query_head // (model.cfg.n_heads // other.n_heads)
    u, v = own_rows(spectrum, head, indices)
    tokens = gain_before(model, spectrum.matrix)(model.W_E.detach()).to(u)
    tokens = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
    own = (tokens @ u.T) * spectrum.sigma[head, indices]
    across = tokens @ (other.weight[partner].to(u) @ v.T)
    query, key = (own, across) if own_is_query else (across, own)
    return _best_pairs(model, query, key, top)


def _best_pairs(
    model: TransformerBridge,
    query: Float[Tensor, "token n"],
    key: Float[Tensor, "token n"],
    top: int,
) -> pd.DataFrame:
    """Top entries of ``query keyᵀ``, exact for one component.

    The largest products of two lists are among the ends of each list, so only those are multiplied
    out; for a block the ends of every member.
    """
    rows, columns = _both_ends(query, top), _both_ends(key, top)
    products = query[rows] @ key[columns].T
    flat = rearrange(products, "query key -> (query key)")
    order = flat.argsort(descending=True).tolist()
    chosen = list(dict.fromkeys([i for i in order[:top] if flat[i] > 0]))
    chosen += [i for i in order[-top:] if flat[i] < 0]
    at = [divmod(i, len(columns)) for i in chosen]
    return pd.DataFrame(
        {
            "query": [_text(model, int(rows[i])) for i, _ in at],
            "key": [_text(model, int(columns[j])) for _, j in at],
            "score": flat[chosen].tolist(),
        }
    )


def _both_ends(scores: Float[Tensor, "token n"], top: int) -> np.ndarray:
    order = scores.argsort(dim=0)
    ends = torch.cat([order[:top], order[-top:]])
    return np.unique(ends.cpu().numpy())
