"""What a component reads and writes, in tokens and in other components.

Reading: the cosine of what the component's coordinate is of its map's input with every token's
embedding behind the norm (position embeddings left out). Writing: the direction that the coordinate
adds to, through the final norm's weight and the unembedding, in logits per unit written at scale
one, over the mean of all tokens. ``W_Q``, ``W_K`` and ``QK`` write no tokens: they give pairs
(query token, key token) whose attention score they raise or lower, the key ``distance`` tokens
before the query (turned as :mod:`eigenlens.circuits.rotary` says), norms of queries and keys left
out.

Signs: the tokens with positive scores drive the coordinate up, and those ``promoted`` get higher
logits when it is up; when it is down everything turns round. A degenerate block has no signs: its
scores are lengths, and nothing is suppressed.
"""

import html
import os
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.composition import reads_from
from eigenlens.circuits.nodes import Node, Nodes, make_nodes
from eigenlens.circuits.norms import final_gain, gain_before
from eigenlens.circuits.residual import (
    Rows,
    at_norm_one,
    head_rows,
    map_of,
    read_rows,
    weight_of,
    write_rows,
)
from eigenlens.circuits.rotary import turns
from eigenlens.far_side import unit
from eigenlens.files import FileFormatError, load_record, save_record
from eigenlens.provenance import Provenance
from eigenlens.spectra import Spectra

_TABLES = ("reads", "reads_from", "writes", "pairs")


@dataclass(frozen=True)
class Readout:
    """What one component (or degenerate block) reads and writes.

    Attributes:
        node: its name.
        reads: ``token, side, score``: cosine with the embedding; the highest, then the lowest.
            ``side`` is ``query`` or ``key`` where a ``QK`` reads, and else empty.
        reads_from: ``writer, side, score``: cosine with earlier write directions, largest first.
        writes: ``token, through, score``: logits per unit written; the most promoted, then the most
            suppressed; ``through`` is the query head of ``W_O`` that a ``W_V`` passes.
        pairs: ``query, key, through, score`` for ``W_Q``, ``W_K`` and ``QK``: attention score per
            unit embeddings, before the division by ``√d_head``.
        provenance: model and versions.
        distance: tokens that the key stands before the query in ``pairs``, and in ``reads`` of a
            ``QK`` on the side of the key.
    """

    node: str
    reads: pd.DataFrame
    reads_from: pd.DataFrame
    writes: pd.DataFrame
    pairs: pd.DataFrame
    provenance: Provenance
    distance: int = 0

    def _repr_html_(self) -> str:
        parts = [
            f"<b>{name.replace('_', ' ')}</b>{table.to_html(index=False)}"
            for name in _TABLES
            if len(table := getattr(self, name))
        ]
        note = f", key {self.distance} tokens before the query" if self.distance else ""
        return f"<p>{html.escape(self.node)}{note}</p>" + "".join(parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file."""
        tables = {name: getattr(self, name).to_dict(orient="list") for name in _TABLES}
        rest = {"node": self.node, "distance": self.distance}
        provenance = self.provenance.model_dump()
        save_record(path, "readout", {**rest, "provenance": provenance, **tables})

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
            provenance = Provenance(**record["provenance"])
            return cls(record["node"], **tables, provenance=provenance, distance=record["distance"])
        except KeyError as error:
            raise FileFormatError(f"{path} lacks {error}.") from error


@torch.no_grad()
def readout(
    model: TransformerBridge,
    spectra: Spectra,
    layer: int,
    matrix: str,
    head: int,
    index: int,
    *,
    top: int = 10,
    distance: int = 0,
) -> Readout:
    """Describe what a component reads and writes.

    Args:
        model: gives embeddings, norms and the maps in between.
        spectra: its decomposition, or that of another object with the same weights.
        layer: of the component.
        matrix: its kind, such as ``W_V``.
        head: 0 for MLP maps.
        index: in the order of singular values. In a degenerate block, the whole block is described.
        top: rows of each kind.
        distance: tokens that the key stands before the query, where an attention score is read:
            rotary embeddings turn the two against each other.

    Raises:
        ValueError: no such component; ``top`` below 1; spectra of other weights; a ``distance``
            beyond the context, or in a model whose turns cannot be read off.
    """
    if top < 1:
        raise ValueError(f"top={top}: ask for one row at least.")
    spectra = spectra.on(model)
    place = {"layer": layer, "matrix": matrix, "head": head, "index": index}
    (node,) = make_nodes(spectra, pd.DataFrame([place]))
    tokens = _Tokens(model, distance)
    read = tokens.reads(node)
    written = {h: tokens.logits(rows) for h, rows in write_rows(model, node).items()}
    return Readout(
        node=node.name,
        reads=_concat(
            [tokens.ends(scores, top).assign(side=side) for side, scores in read.items()],
            ["token", "side", "score"],
        ),
        reads_from=reads_from(model, spectra, node, top),
        writes=_concat(
            [tokens.ends(scores, top).assign(through=h) for h, scores in written.items()],
            ["token", "through", "score"],
        ),
        pairs=tokens.pairs(node, top),
        provenance=Provenance.of(model),
        distance=distance,
    )


@torch.no_grad()
def token_summary(model: TransformerBridge, nodes: Nodes, top: int = 4) -> pd.DataFrame:
    """Top tokens of each node as text: columns ``reads, promotes, suppresses``.

    For ``W_Q``, ``W_K`` and ``QK``, ``promotes`` and ``suppresses`` hold pairs ``query→key``, and
    ``reads`` of ``QK`` names the tokens of either side; of several query heads that a ``W_V``
    feeds, the one that passes on most speaks.
    """
    tokens = _Tokens(model)
    rows = [_one_summary(tokens, node, top) for node in nodes]
    return pd.DataFrame(rows, columns=["reads", "promotes", "suppresses"])


def _one_summary(tokens: "_Tokens", node: Node, top: int) -> tuple[str, str, str]:
    reads = [
        (f"{side}: " if side else "") + _joined(tokens.ends(scores, top), 1)
        for side, scores in tokens.reads(node).items()
    ]
    written = list(write_rows(tokens.model, node).values())
    if written:
        through = int(torch.stack([rows.norm() for rows in written]).argmax())
        table = tokens.ends(tokens.logits(written[through]), top)
    else:
        pairs = tokens.pairs(node, top)
        table = pairs.assign(token=pairs["query"].astype(str) + "→" + pairs["key"].astype(str))
    return "; ".join(reads), _joined(table, 1), _joined(table, -1)


@torch.no_grad()
def shared_tokens(
    model: TransformerBridge, nodes: Nodes, weight: np.ndarray, top: int = 4
) -> tuple[str, str]:
    """Top tokens that several nodes read, and top tokens that they write.

    The length over the nodes of their scores, each node's own at length one times its ``weight``:
    signs, which are arbitrary, do not matter. What writes no tokens adds none.
    """
    tokens = _Tokens(model)
    read: list[Tensor] = []
    written: list[Tensor] = []
    for node, share in zip(nodes, weight.tolist(), strict=True):
        read += _scaled(list(tokens.reads(node).values()), share)
        rows = write_rows(model, node).values()
        written += _scaled([tokens.logits(through) for through in rows], share)
    reads, writes = (
        _joined(tokens.ends(torch.stack(found).norm(dim=0), top), 1) if found else ""
        for found in (read, written)
    )
    return reads, writes


def _scaled(scores: list[Tensor], length: float) -> list[Tensor]:
    """Scores of a node, all of them together at this length; zeros stay."""
    if not scores:
        return []
    whole = torch.stack(scores)
    tiny = torch.finfo(whole.dtype).tiny
    return list(whole * (length / whole.norm().clamp_min(tiny)))


def _joined(table: pd.DataFrame, sign: int) -> str:
    return " ".join(table.loc[table["score"] * sign > 0, "token"])


def _concat(tables: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    if not tables:
        return pd.DataFrame(columns=columns)
    return pd.concat(tables, ignore_index=True)[columns]


class _Tokens:
    """Scores of all tokens; keeps the embeddings behind the norm that was used last."""

    def __init__(self, model: TransformerBridge, distance: int = 0) -> None:
        self.model = model
        self.distance = distance
        self._norm: tuple[int, bool] | None = None
        self._embeddings: Float[Tensor, "token d_model"] | None = None

    def embeddings(self, node: Node, like: Tensor) -> Float[Tensor, "token d_model"]:
        """Token embeddings at length one behind the norm before a node's map."""
        matrix = node.site.find(self.model)
        norm = (matrix.layer, matrix.head_axis is None)
        if norm != self._norm or self._embeddings is None:
            embedding = self.model.W_E.detach().to(like)
            self._norm, self._embeddings = norm, unit(gain_before(self.model, matrix)(embedding))
        return self._embeddings.to(like)

    def reads(self, node: Node) -> dict[str, Float[Tensor, " token"]]:
        """Cosine of what the node reads with every token, by side."""
        return {
            side: _lengths(at_norm_one(rows) @ self.embeddings(node, rows).T)
            for side, rows in read_rows(self.model, node, self.distance).items()
        }

    def logits(self, rows: Rows) -> Float[Tensor, " token"]:
        """Logits of what is written to the residual stream, over the mean of all tokens."""
        logits = final_gain(self.model)(rows) @ self.model.W_U.detach().to(rows)
        return _lengths(logits - logits.mean(-1, keepdim=True))

    def ends(self, scores: Float[Tensor, " token"], top: int) -> pd.DataFrame:
        """The highest and, where there are signs, the lowest scores, with their tokens."""
        values = scores.cpu().double().numpy()
        order = np.argsort(-values, kind="stable")
        last = order[top:][-top:]
        chosen = np.concatenate([order[:top], last[values[last] < 0]])
        return pd.DataFrame({"token": self._texts(chosen), "score": values[chosen]})

    def pairs(self, node: Node, top: int) -> pd.DataFrame:
        """Pairs of tokens with the highest and lowest share of the attention score."""
        columns = ["query", "key", "through", "score"]
        if node.site.matrix not in ("W_Q", "W_K"):
            return pd.DataFrame(columns=columns)
        is_query = node.site.matrix == "W_Q"
        other = map_of(self.model, node.site.layer, "W_K" if is_query else "W_Q")
        reads, writes = head_rows(self.model, node)
        turn = turns(self.model, node.site.layer, self.distance, writes)
        writes = writes @ (turn if is_query else turn.T)
        tokens = self.embeddings(node, reads)
        own, parts = tokens @ reads.T, []
        # One key head serves as many query heads as there are more of them.
        each = max(1, other.n_heads // node.site.n_heads)
        for q in range(node.head * each, (node.head + 1) * each):
            partner = q * other.n_heads // self.model.cfg.n_heads
            across = tokens @ (weight_of(other, writes)[partner] @ writes.T)
            query, key = (own, across) if is_query else (across, own)
            parts.append(self._best_pairs(query, key, top).assign(through=q))
        return _concat(parts, columns)

    def _best_pairs(
        self, query: Float[Tensor, "token n"], key: Float[Tensor, "token n"], top: int
    ) -> pd.DataFrame:
        """Top entries of ``query keyᵀ``, exact for one component.

        The largest products of two lists are among the ends of each list, so only those are
        multiplied out; for a block the ends of every member.
        """
        rows, columns = _both_ends(query, top), _both_ends(key, top)
        products = (query[rows] @ key[columns].T).cpu().double().numpy().flatten()
        order = np.argsort(-products, kind="stable")
        first, last = order[:top], order[-top:]
        chosen = np.concatenate([first[products[first] > 0], last[products[last] < 0]])
        at_row, at_column = np.divmod(chosen, len(columns))
        return pd.DataFrame(
            {
                "query": self._texts(rows[at_row]),
                "key": self._texts(columns[at_column]),
                "score": products[chosen],
            }
        )

    def _texts(self, tokens: np.ndarray) -> list[str]:
        return [str(self.model.tokenizer.decode([t])) or f"#{t}" for t in tokens.tolist()]


def _lengths(scores: Float[Tensor, "n token"]) -> Float[Tensor, " token"]:
    """Scores of a block as lengths; of a single component as they are."""
    return scores[0] if len(scores) == 1 else scores.norm(dim=0)


def _both_ends(scores: Float[Tensor, "token n"], top: int) -> np.ndarray:
    order = scores.argsort(dim=0)
    return np.unique(torch.cat([order[:top], order[-top:]]).cpu().numpy())
