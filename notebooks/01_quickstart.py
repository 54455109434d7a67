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
# # Quick start: what was frozen, and what changed
#
# Every weight matrix of a transformer is a sum of rank-one parts, `W = Σ σᵢ uᵢ vᵢᵀ` (its SVD).
# Part i reads how far the input lies along `uᵢ` and writes that much of `vᵢ`. eigenlens calls it
# a **component**. **Freezing** a component makes what it writes independent of the input:
# `σᵢ(x·uᵢ)` becomes its mean over the training prompts. No weight is trained, and nothing is set
# to zero.
#
# If a component works against a task, freezing it helps. Here we find such components in a small
# model, freeze them, and look.

# %%
import eigenlens as el

# %% [markdown]
# ## A model that is torn
#
# `arith-tiny` (2 layers, 4 heads, shipped with the package) knows `+` and `x`. On `?` it was
# trained to answer half the time with the sum and half with the product, so it can do either, and
# is torn. Our task is to read `?` as a product, on pairs of numbers that nothing below learns
# from.

# %%
model = el.load_model("arith-tiny")
task = el.load_task("ambiguous", model.tokenizer, reading="product", seed=0)
task

# %%
before = el.evaluate(model, task.test)
before

# %% [markdown]
# About half of the answers in `predicted` are sums.
#
# ## Score every component
#
# One forward and one backward pass predict, for each of the 1,536 components, how the loss would
# change if it were frozen. **`delta_loss` below zero: freezing is predicted to lower the loss**,
# the component hurts. Heads of `W_Q`, `W_K`, `W_V` and `W_O` are decomposed one by one.

# %%
spectra = el.decompose(model)
scores = el.score(model, spectra, task.train, criterion="margin")
scores

# %% [markdown]
# ## Freeze
#
# Freezing the 15 lowest scores at once would already do much. A search does better: it trains a
# gate per component on the training prompts, drives every gate to open or shut, and picks the
# stopping point on the validation prompts.

# %%
found = el.learned(model, scores, task.train, task.validation)
found.frozen

# %% [markdown]
# Where are they? Each cell is one head (or one MLP matrix) of one layer. Above, the share of its
# components that is frozen; below, the sum of their scores.

# %%
el.plots.pruned_map(found.frozen, scores)

# %% [markdown]
# ## What changed
#
# `el.freeze` puts the edit on inside `with` and takes it off again afterwards.

# %%
with el.freeze(model, found.frozen):
    after = el.evaluate(model, task.test)
el.compare(before, after)

# %%
answers = before.examples[["prompt", "answer"]].assign(
    before=before.examples["predicted"], after=after.examples["predicted"]
)
answers[answers["before"] != answers["after"]].head(10)

# %% [markdown]
# Sums have become products, on prompts that neither the scores nor the search have seen. And the
# rest of the model? The same frozen components, on the two operators that the model knew:

# %%
plus = el.load_task("int_add", model.tokenizer, low=0, high=20).test
times = el.load_task("int_mult", model.tokenizer, low=0, high=20).test
with el.freeze(model, found.frozen):
    print(f"a + b: {el.evaluate(model, plus).accuracy:.0%} (before: 100%)")
    print(f"a x b: {el.evaluate(model, times).accuracy:.0%} (before: 100%)")

# %% [markdown]
# `?` shared its sums with `+`, so `+` suffers, unless it is protected during the search:
# `el.learned(..., protect=el.Protection(model, {"+": ..., "x": ...}))`.
#
# ## Keep it
#
# A frozen set is a small file. It belongs to exactly these weights and refuses others.

# %%
found.frozen.save("frozen.safetensors")
el.FrozenSet.load("frozen.safetensors").to_pandas().head()

# %% [markdown]
# Where next: what scores mean and how far to trust them ([02](02_reading_scores.ipynb)), what
# happens inside the model ([03](03_before_and_after.ipynb)), which paths were cut
# ([04](04_circuits_of_pruned_paths.ipynb)), how methods compare
# ([05](05_comparing_methods.ipynb)), your own model and task
# ([06](06_bring_your_own_model_and_task.ipynb)).
