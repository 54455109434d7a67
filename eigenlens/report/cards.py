"""What the cards of pinned components say: texts and numbers by node, which ``pin.js`` reads."""

from typing import Any

import pandas as pd

from eigenlens.circuits import Circuit, Examples
from eigenlens.report.inside import Inside
from eigenlens.spectra import COMPONENT

_MOST_PATHS = 6
_TOKENS = ("reads", "promotes", "suppresses")
_NUMBERS = {
    "sigma": ("σ", ".4g"),
    "delta_loss": ("ΔL predicted (nats)", "+.4g"),
    "effect": ("first-order effect (nats)", "+.4g"),
    "answer_logprob": ("adds to log p of the answer (nats)", "+.4g"),
}


def cards(found: Inside) -> dict[str, dict[str, Any]]:
    """What to say of every described node, by its name.

    ``numbers`` and ``tokens`` are pairs of a name and a text; ``writers`` and ``readers``, which
    nodes of the circuit have, the strongest paths and how many there are in ``all``; ``examples``
    the passages of either end of the coordinate.
    """
    joined = _groups(found)
    made = {}
    for row in found.nodes.to_dict("records"):
        strength = row["strength"]
        state = "kept" if not strength else "frozen" if strength == 1 else "attenuated"
        numbers = [["state", f"{state}, strength {strength:.3g}" if 0 < strength < 1 else state]]
        numbers += [
            [name, _signed(row[column], form)]
            for column, (name, form) in _NUMBERS.items()
            if row[column] == row[column]  # not NaN: only nodes of the circuit have the last two
        ]
        group = joined.get(tuple(row[name] for name in COMPONENT))
        made[row["node"]] = {
            "numbers": numbers + ([["group", group]] if group else []),
            "tokens": [[name, row[name]] for name in _TOKENS if row[name]],
            **(_paths(found.paths, row["node"]) if found.paths is not None else {}),
            "examples": _ends(found.examples[row["node"]]),
        }
    return made


def _groups(found: Inside) -> dict[tuple[Any, ...], str]:
    """Number and size of the group of each component."""
    if found.groups is None:
        return {}
    sizes = found.groups.table.set_index("group")["components"]
    return {
        tuple(place): f"{group}, of {sizes[group]}"
        for *place, group in found.groups.members[[*COMPONENT, "group"]].itertuples(index=False)
    }


def _paths(circuit: Circuit, node: str) -> dict[str, Any]:
    if node not in set(circuit.nodes["node"]):
        return {}
    return {
        "writers": _strongest(circuit.sources(node), "writer"),
        "readers": _strongest(circuit.readers(node), "reader"),
    }


def _strongest(edges: pd.DataFrame, end: str) -> dict[str, Any]:
    rows = edges.head(_MOST_PATHS)
    shown = [
        [name, f"{_signed(effect, '+.3g')} ± {stderr:.1g}", _signed(position, "d")]
        for name, effect, stderr, position in rows[
            [end, "effect", "stderr", "position"]
        ].itertuples(index=False)
    ]
    return {"shown": shown, "all": len(edges)}


def _ends(examples: Examples) -> list[list[Any]]:
    """Passages of either end; the share of each token's coordinate of the largest of all."""
    table = examples.passages
    strongest = max(abs(value) for row in table["coordinates"] for value in row) or 1.0
    return [
        [
            f"Where its coordinate is {end}",
            [
                {
                    "coordinate": _signed(row["coordinate"], "+.3g"),
                    "tokens": [token.replace("\n", "⏎") for token in row["tokens"]],
                    "shares": [round(value / strongest, 2) for value in row["coordinates"]],
                    "at": row["at"],
                }
                for row in rows.to_dict("records")
            ],
        ]
        for end, rows in table.groupby("end", sort=False)
    ]


def _signed(value: float | int, form: str) -> str:
    return format(value, form).replace("-", "−")
