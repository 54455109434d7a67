"""The circuit of kept and pruned paths: nodes, edges, and questions to ask of them.

Sign: an effect below zero says that taking the path (or node) away lowers the loss.
"""

import html
import json
import os
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd

from eigenlens.circuits.nodes import EMBED, LOGITS
from eigenlens.files import FileFormatError, atomic_path, load_record, save_record
from eigenlens.provenance import Provenance

_TABLES = ("nodes", "edges", "outflows", "inflows")


@dataclass(frozen=True)
class Circuit:
    """Components and the first-order effects along the direct paths between them.

    Attributes:
        nodes: one row each: ``node`` (name), ``layer, matrix, head, index, size`` (members of a
            degenerate block), ``sigma``, ``strength`` (of freezing; 0 for kept), ``delta_loss``
            (the scores' criterion), ``effect`` (first order, on this data), ``outflow`` and
            ``inflow`` (sums of the effects along all edges out and in, chosen nodes or not),
            ``answer_logit`` and ``answer_logprob`` (what the component's deviation from its mean
            adds at the last position of the prompt, through its own block's output and then
            directly, to the right answer's logit over the mean logit, and to its log-probability:
            the first may be above zero and the second below where a rival gains more), and the
            tokens that it ``reads``, ``promotes`` and ``suppresses`` at a positive activation.
        edges: one row per writer and reader: ``effect`` and its ``stderr`` in nats, the
            ``position`` of the writer with the largest effect, and whether the path is ``pruned``
            (its writer or reader is frozen). Writers are nodes and ``embed`` (the whole residual
            stream that enters the first block); readers are nodes and ``logits``.
        outflows: ``writer, map, effect``: of each writer through every map as a whole and through
            ``logits``; they sum to ``outflow``.
        inflows: ``reader, map, effect``: of every map as a whole, and of ``embed``, through each
            node; they sum to ``inflow``.
        norm: whether norms were linearised at the scale of the run (``frozen``) or in full.
        n_examples: examples that effects are means over.
        provenance: model, data, seed and versions.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    outflows: pd.DataFrame
    inflows: pd.DataFrame
    norm: str
    n_examples: int
    provenance: Provenance

    def __len__(self) -> int:
        return len(self.nodes)

    def strongest(self, count: int) -> pd.DataFrame:
        """The edges with the largest effects of either sign."""
        return _by_size(self.edges).head(count)

    def sources(self, node: str) -> pd.DataFrame:
        """Edges into ``node``, strongest first.

        Raises:
            ValueError: no such node.
        """
        return self._edges_of("reader", node)

    def readers(self, node: str) -> pd.DataFrame:
        """Edges out of ``node``, strongest first.

        Raises:
            ValueError: no such node.
        """
        return self._edges_of("writer", node)

    def way_back(self, node: str = LOGITS, each: int = 2, sign: int = -1) -> pd.DataFrame:
        """Edges on the strongest ways from the embedding to ``node``.

        The ``each`` strongest edges of one sign into ``node``, then into each of their writers, and
        so on.

        Args:
            node: where to start from.
            each: edges into each reader.
            sign: −1 for harmful edges (cutting lowers the loss), 1 for helpful ones.

        Raises:
            ValueError: no such node, or a sign that is neither 1 nor −1.
        """
        if sign not in (-1, 1):
            raise ValueError(f"sign={sign} must be −1 (harmful edges) or 1 (helpful ones).")
        parts, waiting, seen = [], [node], {node}
        while waiting:
            into = self.sources(waiting.pop(0))
            parts.append(into[np.sign(into["effect"]) == sign].head(each))
            new = [writer for writer in parts[-1]["writer"] if writer not in seen]
            waiting += new
            seen |= {*new}
        return _by_size(pd.concat(parts, ignore_index=True))

    def _edges_of(self, end: str, node: str) -> pd.DataFrame:
        known = [*self.nodes["node"], EMBED, LOGITS]
        if node not in known:
            raise ValueError(f"No node {node!r} here; there are {', '.join(known[:4])}, …")
        return _by_size(self.edges[self.edges[end] == node])

    def against_answer(self, sources: int = 3) -> pd.DataFrame:
        """Which pruned components wrote against the right answer, and from where did they read?

        One row per frozen node whose deviation from its mean lowers the right answer's
        log-probability at the last position of the prompt by a direct path, the strongest first:
        ``node``, ``answer_logprob`` (nats), ``answer_logit`` (logits), ``delta_loss`` (nats), the
        tokens; ``read_from``, the maps whose output as that node reads it changes the loss most
        when it is frozen, with the effect in nats; and ``sources``, the same among the nodes, with
        the position that each wrote at.

        Args:
            sources: how many of each to name.
        """
        against = self.nodes[(self.nodes["strength"] > 0) & (self.nodes["answer_logprob"] < 0)]
        columns = ["node", "answer_logprob", "answer_logit", "delta_loss"]
        columns += ["reads", "promotes", "suppresses"]
        table = against.sort_values("answer_logprob")[columns].reset_index(drop=True)
        inflows = _by_size(self.inflows)
        read_from, written_by = [], []
        for node in table["node"]:
            maps = inflows[inflows["reader"] == node].head(sources)
            read_from.append(_listed(maps["map"], maps["effect"]))
            own = self.sources(node)
            own = own[own["writer"] != EMBED].head(sources)
            written_by.append(
                _listed(own["writer"] + " at " + own["position"].astype(str), own["effect"])
            )
        return table.assign(read_from=read_from, sources=written_by)

    def to_networkx(self, min_effect: float = 0.0) -> nx.DiGraph:
        """A directed graph with the columns of :attr:`nodes` and :attr:`edges` as attributes.

        Args:
            min_effect: leave out edges whose effect is smaller than this, in nats.
        """
        graph = nx.DiGraph(norm=self.norm, n_examples=self.n_examples)
        graph.add_node(EMBED, label=EMBED)
        for row in json.loads(self.nodes.to_json(orient="records", double_precision=15)):
            name = row.pop("node")
            graph.add_node(name, **{key: value for key, value in row.items() if value is not None})
        graph.add_node(LOGITS, label=LOGITS)
        kept = self.edges[self.edges["effect"].abs() >= min_effect]
        for row in json.loads(kept.to_json(orient="records", double_precision=15)):
            writer, reader = row.pop("writer"), row.pop("reader")
            graph.add_edge(writer, reader, **{k: v for k, v in row.items() if v is not None})
        return graph

    def to_graphml(self, path: str | os.PathLike[str], min_effect: float = 0.0) -> None:
        """Write the graph as GraphML, which Gephi, Cytoscape and yEd open."""
        with atomic_path(Path(path)) as temporary:
            nx.write_graphml(self.to_networkx(min_effect), temporary)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file."""
        tables = {name: getattr(self, name).to_dict(orient="list") for name in _TABLES}
        rest = {"norm": self.norm, "n_examples": self.n_examples}
        save_record(path, "circuit", {**tables, **rest, "provenance": self.provenance.model_dump()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Circuit":
        """Read back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated or foreign.
        """
        record = load_record(path, "circuit")
        try:
            nodes, edges, outflows, inflows = (pd.DataFrame(record[name]) for name in _TABLES)
            provenance = Provenance(**record["provenance"])
            norm, n_examples = record["norm"], record["n_examples"]
        except KeyError as error:
            raise FileFormatError(f"{path} lacks {error}.") from error
        return cls(nodes, edges, outflows, inflows, norm, n_examples, provenance)

    def _repr_html_(self) -> str:
        frozen = int((self.nodes["strength"] > 0).sum())
        note = (
            f"{len(self.nodes)} nodes ({frozen} frozen), {len(self.edges)} edges; "
            f"{self.n_examples} examples, norms {self.norm}. "
            "Effects in nats: below zero, taking the path away lowers the loss. Strongest edges:"
        )
        return f"<p>{html.escape(note)}</p>{self.strongest(10).to_html(index=False)}"


def _by_size(table: pd.DataFrame) -> pd.DataFrame:
    """Rows ordered by the size of their effect, of either sign."""
    order = np.argsort(-table["effect"].abs().to_numpy(), kind="stable")
    return table.iloc[order].reset_index(drop=True)


def _listed(names: pd.Series, effects: pd.Series) -> str:
    pairs = zip(names, effects, strict=True)
    return ", ".join(f"{name} ({effect:+.2g})" for name, effect in pairs).replace("-", "−")
