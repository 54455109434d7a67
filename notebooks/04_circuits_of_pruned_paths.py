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
# # Circuits of pruned paths
#
# Which paths did freezing cut? A **node** is a component. An **edge** is the direct path from
# what one component (the writer) writes to what another (the reader) reads: through the residual
# stream and the norm before the reader, inside a head through the attention pattern, inside an
# MLP through the activation function. Its number is the first-order change of the loss, in nats,
# if the reader alone saw the writer at its mean. **Below zero, cutting the path lowers the
# loss.**
#
# We trace `arith-tiny` on `a ? b =`, read as a product. The other reading, the sum, is what
# freezing suppresses.

# %%
import pandas as pd

import eigenlens as el

model = el.load_model("arith-tiny")
task = el.load_task("ambiguous", model.tokenizer, reading="product", seed=0)
spectra = el.decompose(model)
scores = el.score(model, spectra, task.train, criterion="margin")
frozen = el.select(scores, count=15)

# %% [markdown]
# ## One component
#
# What does the component with the lowest score read and write? `reads`: the tokens whose
# embedding lies along what it reads. `reads_from`: earlier components that write in that
# direction. `writes`: the logits that go up and down when its activation is positive.

# %%
worst = scores.to_pandas().sort_values("delta_loss").iloc[0]
place = worst[["layer", "matrix", "head", "index"]].to_dict()
el.readout(model, spectra, **place, top=5)

# %% [markdown]
# And where does it act? Tokens say what lies along its directions; `el.examples` shows the passages
# on which its coordinate is largest and smallest, every token on the colour of its own coordinate.

# %%
el.examples(model, spectra, place, task.train, top=4)

# %% [markdown]
# ## Groups
#
# Fifteen components are fifteen stories, and an edit of a language model has thousands. `el.groups`
# puts together those whose effects go up and down on the same examples, and freezes each group as
# a whole. `joint` is what that really does to the loss; `first_order` and `single` are the sums of
# what the members do one at a time, estimated and exact.

# %%
groups = el.groups(model, spectra, frozen, task.train, count=4, singles=True)
groups

# %% [markdown]
# Every group helps less than its members one by one would add up to: they overlap.
#
# ## The graph
#
# Nodes are the 15 frozen components, the two strongest writers to each, the two strongest to these,
# and the 20 strongest kept ones.

# %%
circuit = el.circuit(model, scores, task.train, frozen, depth=2)
circuit

# %% [markdown]
# **Which pruned components wrote against the right answer at the last position, and from where
# did they read?** `answer_logprob` is what a component adds, through its own block's output and
# then directly, to the right answer's log-probability.

# %%
against = circuit.against_answer(sources=2)
against

# %% [markdown]
# ## The path of the suppressed reading
#
# Do these components write the *sum*? We trace the same nodes on the same prompts with the sums
# as answers. What wrote against the product should write for the sum.

# %%
sums = el.load_task("ambiguous", model.tokenizer, reading="sum", seed=0)
rival = el.circuit(model, scores, sums.train, frozen, components=circuit.nodes)
both = circuit.nodes[["node", "strength", "answer_logprob"]].merge(
    rival.nodes[["node", "answer_logprob"]], on="node", suffixes=("_product", "_sum")
)
both[both["strength"] > 0].sort_values("answer_logprob_product").round(3)

# %% [markdown]
# All 15 wrote against the product, and as much for the sum.
#
# The picture walks back from the logits: the two most harmful edges into each reader. Layers go
# from bottom to top; frozen components are dark; `1.10` is head 1, index 10, and MLP matrices have
# no heads. The first matrix of layer 1's MLP reads at `=` what layer 0 brought there from the
# numbers, and its second writes the sum.

# %%
el.plots.circuit(circuit, edges=circuit.way_back(each=2))

# %% [markdown]
# ## Is it true?
#
# A graph of derivatives is a claim. `el.cut_paths` cuts for real: one pass with every output held
# gives what the reader would see without the writer, a second runs the model with only the
# reader's output changed. We cut the twelve edges of frozen components that the graph calls most
# harmful, and freeze the six strongest nodes.

# %%
pruned = circuit.edges[circuit.edges["pruned"]]
harmful = pruned.sort_values("effect").head(12)
cut = el.cut_paths(model, scores, task.train, circuit, edges=harmful, nodes=6)
el.plots.path_cuts(cut)

# %% [markdown]
# The same cuts, judged by the sum: what lowers the product's loss should raise the sum's.

# %%
rival_edges = harmful[["writer", "reader"]].merge(rival.edges, on=["writer", "reader"])
on_sums = el.cut_paths(model, scores, sums.train, rival, edges=rival_edges, nodes=0)
pd.DataFrame(
    {
        "path": harmful["writer"].to_numpy() + " → " + harmful["reader"].to_numpy(),
        "product, predicted": cut["predicted"].head(12),
        "product, measured": cut["measured"].head(12),
        "sum, predicted": on_sums["predicted"],
        "sum, measured": on_sums["measured"],
    }
).round(3)

# %% [markdown]
# A real cut lowers the one loss by less than the derivative says and raises the other by more: a
# loss is convex in the log-odds. Cut at a hundredth of the strength, both agree:

# %%
weak = el.cut_paths(model, scores, task.train, circuit, edges=harmful, nodes=6, strength=0.01)
(weak["measured"] / weak["predicted"]).describe()[["min", "mean", "max"]]

# %% [markdown]
# ## By weights alone
#
# Composition scores need no data: the cosine between what one component writes and what another
# reads, with the norm between them.

# %%
el.composition(model, spectra, frozen.components).head(8)

# %% [markdown]
# For other tools: `circuit.to_networkx()`, `circuit.to_graphml("circuit.graphml")` (Gephi,
# Cytoscape, yEd), `circuit.save("circuit.json")`.
