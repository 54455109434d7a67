# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
# %% [markdown]
# # Comparing methods
#
# The studies of this package store every measurement in `figures/NAME.parquet`. This notebook
# reads what is there; nothing is run again. `eigenlens experiment NAME` makes a study anew.

# %%
from pathlib import Path

import pandas as pd

from eigenlens.paper import plots as paper_plots
from eigenlens.paper.studies.repetitions import accuracy

figures = Path("../figures")
stored = {path.stem: pd.read_parquet(path) for path in sorted(figures.glob("*.parquet"))}
pd.Series({name: len(table) for name, table in stored.items()}, name="measurements").to_frame()

# %% [markdown]
# ## One row per method
#
# A study has a row per model, task, seed (a split into train, validation and test) and method, and
# per draw of what was drawn at random. Means and 95 % intervals are those of the studies' pages: of
# one split for further examples, of several splits or draws for the mean over further ones, which
# grow with the spread between them. Steps of a search on the way, and measurements on other data,
# are left out.


# %%
def final(table: pd.DataFrame) -> pd.DataFrame:
    """The last measurement of every method on its own task, under one set of names."""
    names = {"test_right": "right", "test_n": "n", "parameters_changed": "parameters"}
    if "parameters_changed" not in table:
        names["components"] = "parameters"
    table = table.rename(columns=names)
    for column, value in (("step", -1), ("data", "")):
        if column in table:
            table = table[table[column] == value]
    return table


def per_method(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy with its interval, time, and numbers set, by model, task and method."""
    rows = []
    for place, own in final(table).groupby(["model", "label", "method"], sort=False):
        found = accuracy(own)
        low, high = found.interval
        means = own[["seconds", "parameters"]].astype(float).mean()
        row = dict(zip(["model", "label", "method"], place, strict=True))
        row |= {"accuracy": found.mean, "low": low, "high": high, "each seed (%)": found.each}
        rows.append({**row, **means})
    return pd.DataFrame(rows)


needed = {"model", "label", "seed", "method", "seconds"}
summaries = {name: per_method(t) for name, t in stored.items() if needed <= set(t)}
list(summaries)

# %% [markdown]
# ## Searches on a real model
#
# SmolLM2-135M-Instruct adds two-digit numbers. What a search sets are the strengths of singular
# values that it froze or attenuated.

# %%
searches = summaries["searches"]
addition = searches.query("model == 'smollm2-135m' and label == 'a + b, 10 … 29'")
paper_plots.methods(addition)

# %% [markdown]
# And `arith-tiny`'s torn operator, read as a product:

# %%
paper_plots.methods(searches.query("label == '? as product'"))

# %% [markdown]
# ## Every study that compares methods

# %%
tables = [table.assign(study=name) for name, table in summaries.items()]
columns = ["accuracy", "low", "high", "each seed (%)", "seconds", "parameters"]
everything = pd.concat(tables)[["model", "study", "label", "method", *columns]]
everything.round({"accuracy": 3, "low": 3, "high": 3, "seconds": 1, "parameters": 0})

# %% [markdown]
# ## What uncovering one reading costs elsewhere
#
# The study `ambiguous` also tested every edit on `+` and `x`.

# %%
ambiguous = stored["ambiguous"].query("chosen or method == 'before'")
shares = ambiguous.groupby(["reading", "method"], sort=False)[
    ["test_right", "test_n", "+_right", "+_n", "x_right", "x_n"]
].sum()
pd.DataFrame({name: shares[f"{name}_right"] / shares[f"{name}_n"] for name in ("test", "+", "x")})

# %% [markdown]
# The same as a matrix of changes, for three ways to choose:

# %%
chosen = ["margin, one-shot", "learned, frozen", "learned, frozen, + and x protected"]
changes = []
for reading in ("product", "sum"):
    own = shares.loc[reading]
    for tested, name in (("?", "test"), ("+", "+"), ("x", "x")):
        share = own[f"{name}_right"] / own[f"{name}_n"]
        changes += [
            {
                "learned_on": f"? as {reading}: {method}",
                "tested_on": tested,
                "change": share[method] - share["before"],
            }
            for method in chosen
        ]
paper_plots.transfer(pd.DataFrame(changes))
