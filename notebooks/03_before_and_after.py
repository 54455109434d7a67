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
# # Before and after
#
# What does an edit do inside the model? We freeze what a search found in `arith-tiny`, run every
# test prompt twice, without and with the edit, and compare activations. Positions are counted from
# the end of the prompt: −1 is `=`, where the answer is read off.

# %%
import eigenlens as el

model = el.load_model("arith-tiny")
task = el.load_task("ambiguous", model.tokenizer, reading="product", seed=0)
scores = el.score(model, el.decompose(model), task.train, criterion="margin")
frozen = el.learned(model, scores, task.train, task.validation).frozen
frozen

# %%
before = el.evaluate(model, task.test)
with el.freeze(model, frozen):
    after = el.evaluate(model, task.test)
el.compare(before, after)

# %% [markdown]
# ## Inside
#
# Depth 0 enters the first block, depth 2 leaves the last. *Cosine* is that of an activation with
# itself after the edit. The logit lens reads the right answer off the residual stream at every
# depth, through the model's own final norm and unembedding.

# %%
change = el.activation_change(model, frozen, task.test)
el.plots.activation_change(change)

# %% [markdown]
# Read from the bottom: after the first block the product is on top for most prompts already.
# Unedited, the last block adds the sum, and the product falls to a half; with the edit it stays.
# Above: which positions, heads and MLPs moved.
#
# Every panel is a table, too:

# %%
change.heads.query("position == -1").sort_values("change", ascending=False).head(6)

# %% [markdown]
# ## Attention
#
# Freezing components of `W_Q` and `W_K` moves attention directly, freezing others only through
# what later blocks see. The head that changed most:

# %%
el.plots.attention_change(change)

# %% [markdown]
# All heads of a layer in CircuitsVis, here `after − before` (blue: more attention, orange: less).
# It fetches its script from the network when you run the cell, so its output is not stored.

# %% tags=["live"]
el.plots.attention_heads(change, layer=1, tokens=["a", "?", "b", "="])
