"""Attention before and after an edit: one head as a figure, a layer in CircuitsVis."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.activations import ActivationChange
from eigenlens.plots.style import BLUE, FULL_WIDTH, LESS_MORE, TEMPLATE, VERMILION, heading

_STATES = ("before", "after", "difference")


def attention_change(
    change: ActivationChange, layer: int | None = None, head: int | None = None
) -> go.Figure:
    """Attention of one head before and after an edit, and the difference.

    Args:
        change: what :func:`eigenlens.activation_change` returned.
        layer: of the head; by default that of the one whose attention changed most.
        head: which head of it.

    Raises:
        ValueError: only one of ``layer`` and ``head``, or no such head.
    """
    patterns = change.patterns
    if (layer is None) != (head is None):
        raise ValueError("Give both layer= and head=, or neither.")
    if layer is None:
        sizes = patterns.assign(size=(patterns["after"] - patterns["before"]).abs())
        sums = sizes.groupby(["layer", "head"], as_index=False)["size"].sum()
        most = sums.loc[sums["size"].idxmax()]
        layer, head = int(most["layer"]), int(most["head"])
    own = patterns[(patterns["layer"] == layer) & (patterns["head"] == head)]
    if own.empty:
        raise ValueError(f"There is no layer {layer}, head {head} in this change.")
    own = own.assign(difference=own["after"] - own["before"])
    figure = make_subplots(
        rows=1,
        cols=3,
        horizontal_spacing=0.06,
        shared_yaxes=True,
        subplot_titles=["before", "after", "after − before"],
    )
    widest = max(float(own["difference"].abs().max()), 1e-3)
    highest = float(own[["before", "after"]].to_numpy().max())
    scale = {"colorscale": "Viridis", "cmin": 0, "cmax": highest}
    for column, name in enumerate(_STATES, start=1):
        values = own.pivot(index="query", columns="key", values=name)
        seen = np.tril(np.ones(values.shape, bool))
        figure.add_trace(
            go.Heatmap(
                z=np.where(seen, values.to_numpy(), np.nan),
                x=values.columns,
                y=values.index,
                coloraxis="coloraxis" if column < 3 else "coloraxis2",
                hovertemplate=(
                    "query %{y}, key %{x}<br>attention %{z:.3f}<extra>" + name + "</extra>"
                ),
                xgap=1,
                ygap=1,
            ),
            row=1,
            col=column,
        )
    figure.update_xaxes(
        showgrid=False,
        zeroline=False,
        title_text="key position",
        dtick=max(1, len(own["key"].unique()) // 8),
    )
    figure.update_yaxes(
        showgrid=False,
        zeroline=False,
        autorange="reversed",
        dtick=max(1, len(own["query"].unique()) // 8),
    )
    figure.update_yaxes(title_text="query position", col=1)
    bar = {"orientation": "h", "y": -0.32, "yanchor": "top", "thickness": 12}
    figure.update_layout(
        template=TEMPLATE,
        title=heading(
            f"Attention of layer {layer}, head {head}",
            "mean over examples; positions counted from the end of the prompt (−1: its last token)",
            460,
        ),
        width=FULL_WIDTH,
        height=460,
        margin={"l": 80, "r": 30, "t": 110, "b": 130},
        coloraxis=scale
        | {"colorbar": bar | {"x": 0.31, "len": 0.6, "title": {"text": "attention (share)"}}},
        coloraxis2={
            "colorscale": LESS_MORE,
            "cmin": -widest,
            "cmax": widest,
            "colorbar": bar
            | {
                "x": 0.85,
                "len": 0.36,
                "title": {"text": "difference"},
                "nticks": 3,
                "tickangle": 0,
            },
        },
    )
    return figure


def attention_heads(
    change: ActivationChange,
    layer: int,
    state: str = "difference",
    tokens: Sequence[str] | None = None,
) -> Any:
    """All heads of a layer in CircuitsVis, for notebooks: hover a token to see where it looks.

    Args:
        change: what :func:`eigenlens.activation_change` returned.
        layer: which layer.
        state: ``before``, ``after`` or ``difference`` (after − before: blue is more attention,
            vermilion less).
        tokens: names of the positions, where all prompts share a form; by default the positions.

    Returns:
        What a notebook shows; CircuitsVis looks for the network then, to fetch its script.

    Raises:
        ImportError: CircuitsVis is not installed.
        ValueError: an unknown state, no such layer, or another number of tokens than positions.
    """
    try:
        from circuitsvis.attention import attention_heads as draw
    except ImportError as error:
        raise ImportError(
            "attention_heads needs CircuitsVis: pip install 'eigenlens[notebook]'. "
            "attention_change draws one head without it."
        ) from error
    if state not in _STATES:
        raise ValueError(f"Unknown state {state!r}; choose from {', '.join(_STATES)}.")
    values = attention_array(change, layer, state)
    positions = sorted(change.patterns["query"].unique())
    names = [str(p).replace("-", "−") for p in positions] if tokens is None else list(tokens)
    if len(names) != len(positions):
        raise ValueError(f"{len(names)} tokens for {len(positions)} positions {positions}.")
    low = -1.0 if state == "difference" else 0.0
    return draw(
        values,
        # CircuitsVis writes tokens into a script as they are: "</script>" would end it.
        [name.replace("</", "<\u200b/") for name in names],
        max_value=1.0,
        min_value=low,
        negative_color=VERMILION,
        positive_color=BLUE,
    )


def attention_array(change: ActivationChange, layer: int, state: str) -> np.ndarray:
    """Mean attention of a layer as ``[head, query, key]``; zero where a key is not seen.

    Raises:
        ValueError: no such layer.
    """
    own = change.patterns[change.patterns["layer"] == layer]
    if own.empty:
        raise ValueError(f"There is no layer {layer} in this change.")
    own = own.assign(difference=own["after"] - own["before"])
    heads = [
        part.pivot(index="query", columns="key", values=state) for _, part in own.groupby("head")
    ]
    return np.stack([head.fillna(0.0).to_numpy() for head in heads])
