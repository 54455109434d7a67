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
# # Reading scores
#
# A score is a prediction: how the loss would change, in nats per example, if one component were
# frozen. **Below zero the component hurts.** This notebook shows where scores lie, how large
# their errors are, and where they mislead.

# %%
import numpy as np

import eigenlens as el
from eigenlens.exact import exact_effects
from eigenlens.faithfulness import agreement, faithfulness_curve, set_effects, stratified_sample

model = el.load_model("arith-tiny")
task = el.load_task("ambiguous", model.tokenizer, reading="product", seed=0)
spectra = el.decompose(model)
# `max` asks for single positions, and brings along what the other criteria need.
scores = el.score(model, spectra, task.train, criterion="max").with_criterion("margin")
frozen = el.select(scores, count=15)

# %% [markdown]
# ## The spectrum
#
# A panel per kind of matrix, a dot per component, the largest singular value at index 0. The axis
# is logarithmic on both sides of zero, since scores span many decades. Bars are standard errors
# over examples.

# %%
el.plots.spectrum(scores, frozen)

# %% [markdown]
# Everything that was frozen sits in the MLP of layer 1. The same scores against the singular value
# itself, layer by layer (for `W_Q`, `W_K`, `W_V` and `W_O`, head by head):

# %%
el.plots.spectrum(scores, frozen, against="sigma", matrix="W_in")

# %% [markdown]
# Harmful is not the same as weak. The dashed line is where the singular values of a random matrix
# would end: the frozen ones stand out from the noise. They are something that the model learned.

# %%
el.plots.singular_values(spectra, frozen)

# %% [markdown]
# ## How true are they?
#
# `exact_effects` really freezes one component at a time and measures. We draw 60 components, a
# few from each stratum of the absolute score, and compare.

# %%
sample = stratified_sample(scores.delta_loss, 60, seed=0)
rows, strata = sample["row"].to_numpy(), sample["stratum"].to_numpy()
exact = exact_effects(model, scores, rows, task.validation).mean(axis=1)
el.plots.exact_against_estimate(scores.delta_loss[rows], exact, strata)

# %%
agreement(scores.delta_loss[rows], exact, strata)

# %% [markdown]
# Most estimates lie on the diagonal. The two largest have the wrong sign: a derivative says little
# about a component that does a lot. `eigenlens.refinement.refined` measures such components.
#
# ## Criteria
#
# The same pass ranks in several ways. `mean` is the plain first-order effect. `max` takes the
# worst effect over examples and positions, as the code of the paper does; it never falls below
# zero by much, since nearly every component hurts some example. `margin` supposes that freezing
# moves the answer's log-odds linearly, which holds further out than a straight line in the loss.

# %%
for criterion in ("mean", "max", "fisher", "margin"):
    chosen = el.select(scores.with_criterion(criterion), count=15)
    with el.freeze(model, chosen):
        reached = el.evaluate(model, task.validation)
    print(f"{criterion:8} 15 components: {reached.accuracy:.0%}, loss {reached.loss:.2f} nats")

# %% [markdown]
# ## Effects do not add up
#
# A score is of one component alone. Freeze many, and the sum of scores is no longer what happens:

# %%
sets = {str(n): el.select(scores, count=n) for n in (1, 5, 15, 50, 150)}
set_effects(model, scores, sets, task.validation)

# %% [markdown]
# This is why the searches (`el.iterative`, `el.guarded`, `el.learned`) look at the loss again and
# again.
#
# A faithfulness curve says how much of the model is needed: keep the components with the highest
# scores, freeze all others.

# %%
curve = faithfulness_curve(model, scores, task.validation)
shuffled = np.random.default_rng(0).permutation(scores.delta_loss)
control = faithfulness_curve(model, scores, task.validation, values=shuffled)
el.plots.faithfulness({"margin": curve, "random order": control})
