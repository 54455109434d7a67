"""The picture of a circuit: layers from bottom to top, a row for every matrix that has nodes."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from eigenlens.circuits import Circuit
from eigenlens.circuits.nodes import EMBED, LOGITS
from eigenlens.matrices import MLP_KINDS
from eigenlens.plots.style import BLUE, FULL_WIDTH, TEMPLATE, VERMILION, heading, kind_label, plain

_ORDER = ("W_Q", "W_K", "QK", "W_V", "W_O", "OV", "W_gate", "W_in", "W_out")
_KEPT, _FROZEN = "#FFFFFF", "#333333"
_WIDEST = 8.0  # pixels
_CROWDED = 16  # nodes in a row from which neighbours are drawn at two heights
_SIGNS = (
    (-1, VERMILION, "cutting lowers the loss (harmful path)"),
    (1, BLUE, "cutting raises the loss (helpful path)"),
)


def circuit(found: Circuit, edges: int | pd.DataFrame = 60) -> go.Figure:
    """Draw the strongest edges of a circuit and the nodes that they join.

    Line width grows with the size of the first-order effect; colour is its sign. Dark nodes are
    frozen. A node's text is ``head.index``, or its index in an MLP map.

    Args:
        found: what :func:`eigenlens.circuit` returned.
        edges: how many of the strongest edges to draw, or rows of ``found.edges``.

    Raises:
        ValueError: no edges.
    """
    if (edges if isinstance(edges, int) else len(edges)) < 1:
        raise ValueError(f"edges={edges}: draw at least one.")
    shown = found.strongest(edges) if isinstance(edges, int) else edges
    nodes = _placed(found.nodes, shown)
    figure = go.Figure()
    for sign, colour, name in _SIGNS:
        own = shown[np.sign(shown["effect"]) == sign]
        _add_edges(figure, own, nodes, colour, name, float(shown["effect"].abs().max()))
    for frozen, name in ((False, "kept"), (True, "frozen")):
        part = nodes[(nodes["strength"] > 0) == frozen]
        figure.add_trace(_markers(part, frozen, name))
    rows = nodes.groupby("row")["label"].first()
    figure.update_xaxes(
        visible=True,
        showticklabels=False,
        showgrid=False,
        zeroline=False,
        range=[-0.04, 1.04],
        title_text=f"components ({len(shown)} of {len(found.edges)} direct paths)",
    )
    figure.update_yaxes(
        tickvals=rows.index.to_list(),
        ticktext=rows.to_list(),
        zeroline=False,
        range=[-0.6, rows.index.max() + 0.6],
        title_text="layer and matrix",
    )
    height = 150 + 72 * (len(rows) + 1)
    figure.update_layout(
        template=TEMPLATE,
        title=heading(
            "Direct paths between components",
            "first-order effect of cutting a path, in nats; "
            f"norms {plain(found.norm)}; {found.n_examples} examples",
            height,
        ),
        width=FULL_WIDTH,
        height=height,
        margin={"l": 110, "r": 20, "t": 105, "b": 50},
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.0,
            "yanchor": "bottom",
            "font": {"size": 12},
            "itemsizing": "trace",
        },
        hovermode="closest",
    )
    return figure


def _placed(table: pd.DataFrame, edges: pd.DataFrame) -> pd.DataFrame:
    """Nodes that the edges join, with ``row, x, y`` and the ``label`` of their row."""
    ends = {*edges["writer"], *edges["reader"]}
    nodes = table[table["node"].isin(ends)].copy()
    nodes["stage"] = nodes["layer"] * len(_ORDER) + nodes["matrix"].map(_ORDER.index)
    nodes["label"] = [
        f"L{layer} {kind_label(matrix)}"
        for layer, matrix in zip(nodes["layer"], nodes["matrix"], strict=True)
    ]
    last = int(table["layer"].max() + 1) * len(_ORDER)
    for name, stage in ((EMBED, -1), (LOGITS, last)):
        if name in ends:
            extra = {"node": name, "stage": stage, "label": name, "strength": 0.0}
            nodes = pd.concat([nodes, pd.DataFrame([extra])], ignore_index=True)
    nodes["row"] = nodes["stage"].rank(method="dense").astype(int) - 1
    return _spread(nodes, edges)


def _spread(nodes: pd.DataFrame, edges: pd.DataFrame) -> pd.DataFrame:
    """Order each row by the mean place of what it reads, so that fewer lines cross."""
    x: dict[str, float] = {}
    y: dict[str, float] = {}
    for row, part in nodes.sort_values("row").groupby("row"):
        centre = []
        for node in part["node"]:
            own = edges[(edges["reader"] == node) & edges["writer"].isin(list(x))]
            weight = own["effect"].abs()
            at = own["writer"].map(x)
            centre.append(float((at * weight).sum() / weight.sum()) if len(own) else np.nan)
        order = part.assign(centre=centre).sort_values(["centre", "node"], na_position="last")
        n = len(order)
        # Rows are shifted against each other: a line that passes a row should miss its nodes.
        aside = min(0.07, 0.4 / n) * (int(str(row)) % 3 - 1)
        for place, node in enumerate(order["node"]):
            x[node] = (place + 0.5) / n + aside
            shift = 0.17 if place % 2 else -0.17
            y[node] = float(str(row)) + (shift if n >= _CROWDED else 0.0)
    return nodes.assign(x=nodes["node"].map(x), y=nodes["node"].map(y))


def _add_edges(
    figure: go.Figure,
    edges: pd.DataFrame,
    nodes: pd.DataFrame,
    colour: str,
    name: str,
    largest: float,
) -> None:
    at = nodes.set_index("node")
    figure.add_trace(
        go.Scatter(
            x=[None],
            y=[None],
            mode="lines",
            line={"color": colour, "width": 4},
            name=name,
            legendgroup=name,
        )
    )
    middle: dict[str, list] = {"x": [], "y": [], "text": []}
    for row in edges.sort_values("effect", key=np.abs).to_dict("records"):
        writer, reader = at.loc[row["writer"]], at.loc[row["reader"]]
        figure.add_trace(
            go.Scatter(
                x=[writer["x"], reader["x"]],
                y=[writer["y"], reader["y"]],
                mode="lines",
                line={"color": colour, "width": max(0.6, _WIDEST * abs(row["effect"]) / largest)},
                opacity=0.55,
                hoverinfo="skip",
                legendgroup=name,
                showlegend=False,
            )
        )
        middle["x"].append((writer["x"] + reader["x"]) / 2)
        middle["y"].append((writer["y"] + reader["y"]) / 2)
        middle["text"].append(
            f"{plain(row['writer'])} → {plain(row['reader'])}<br>effect {row['effect']:+.4g} ± "
            f"{row['stderr']:.2g} nats<br>most at position {row['position']}"
        )
    figure.add_trace(
        go.Scatter(
            **middle,
            mode="markers",
            marker={"size": 10, "opacity": 0, "color": colour},
            hoverinfo="text",
            showlegend=False,
            legendgroup=name,
        )
    )


def _markers(nodes: pd.DataFrame, frozen: bool, name: str) -> go.Scatter:
    return go.Scatter(
        x=nodes["x"],
        y=nodes["y"],
        mode="markers+text",
        name=name,
        text=[_text(row) for row in nodes.to_dict("records")],
        textfont={"size": 12, "color": _KEPT if frozen else _FROZEN},
        hovertext=[_details(row) for row in nodes.to_dict("records")],
        hoverinfo="text",
        customdata=nodes["node"],  # which the report's page asks for
        marker={
            "symbol": "circle",
            "size": 32,
            "color": _FROZEN if frozen else _KEPT,
            "line": {"color": _FROZEN, "width": 1.5},
        },
    )


def _text(node: dict) -> str:
    if node["node"] in (EMBED, LOGITS):
        return ""
    in_mlp = node["matrix"] in MLP_KINDS
    place = f"{node['index']:.0f}" if in_mlp else f"{node['head']:.0f}.{node['index']:.0f}"
    return place if node["size"] == 1 else f"{place}+"


def _details(node: dict) -> str:
    if node["node"] in (EMBED, LOGITS):
        return plain(node["node"])
    return (
        f"{plain(node['node'])}, σ {node['sigma']:.3g}"
        + (f", frozen with strength {node['strength']:.2g}" if node["strength"] else ", kept")
        + f"<br>ΔL {node['delta_loss']:+.4g} nats, first order {node['effect']:+.4g}"
        f"<br>adds {node['answer_logprob']:+.3g} nats to the right answer's log-probability"
        f"<br>reads: {plain(node['reads'])}<br>promotes: {plain(node['promotes'])}"
        f"<br>suppresses: {plain(node['suppresses'])}"
    )
