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
# # Bring your own model and task
#
# Any dense model that TransformerLens opens, any prompts with answers.
#
# ## A model
#
# `el.load_model` takes a short name (`eigenlens models` lists them), a Hugging Face name, a
# folder that transformers wrote, or a GGUF file, and returns a `TransformerBridge` in eval mode:
# hooks, caches and generation work as you know them from TransformerLens. Here we pass a folder.

# %%
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import eigenlens as el
from eigenlens.metrics import logit_diff, wrong_candidates
from eigenlens.zoo import ARITH_TINY

folder = Path(ARITH_TINY)
print(sorted(path.name for path in folder.iterdir()))
model = el.load_model(folder)
el.weight_matrices(model)

# %% [markdown]
# Check that the bridge is the model you know, before anything else:

# %%
print(model.generate("7 + 8 =", max_new_tokens=1, do_sample=False, verbose=False))

# %% [markdown]
# ## A task
#
# One JSON object a line: a `prompt`, its `answer` (with the space that it begins with, if it
# does), and if there are alternatives, `candidates`. We ask for the sum where the two readings of
# `?` differ, and offer both.

# %%
rows = [
    {
        "prompt": f"{a} ? {b} =",
        "answer": f" {a + b}",
        "candidates": [f" {a + b}", f" {a * b}"],
    }
    for a in range(20)
    for b in range(20)
    if a + b != a * b
]
random.Random(0).shuffle(rows)
workspace = TemporaryDirectory()
path = Path(workspace.name) / "sums.jsonl"
path.write_text("\n".join(map(json.dumps, rows)))

task = el.load_task("jsonl", model.tokenizer, path=path, seed=0)
task

# %% [markdown]
# Files that are malformed, answers that are not among their candidates or tokenise to nothing are
# refused with the line that is wrong. Long prompts of many lengths: `el.score(...,
# n_positions=16)` keeps a mean activation for each of the last 16 positions and one for all
# earlier ones.
#
# ## The whole job
#
# `el.eigenprune` scores on train, searches, chooses on validation and measures on test. With
# `out=` every stage is written as it ends, and an interrupted run goes on from there.

# %%
result = el.eigenprune(model, task, out=Path(workspace.name) / "run")
result

# %%
el.plots.search_trace(result.search)

# %%
sorted(path.name for path in (Path(workspace.name) / "run").iterdir())

# %% [markdown]
# From a shell, the same: `eigenlens run --model FOLDER --task jsonl --task-arg path=FILE --out
# RUN`.
#
# ## A metric of your own
#
# The loss is the default. Any function from the logits at the answer positions to one number per
# example will do; here `logit(wrong) − logit(right)` of the two candidates. Scores then predict
# changes of that number.

# %%
wrong = wrong_candidates(task.train, model.tokenizer)
scores = el.score(model, el.decompose(model), task.train, metric=logit_diff(wrong))
scores

# %%
frozen = el.select(scores, count=10)
with el.freeze(model, frozen):
    edited = el.evaluate(model, task.test)
el.compare(result.before, edited)

# %% [markdown]
# ## Only a part of a large model
#
# Decompose and score what you need: `el.decompose(model, matrices=("W_V", "W_O"), layers=range(8,
# 16))`. Decompositions are kept in your cache, so the next call reads them back.

# %%
el.decompose(model, matrices=("W_V", "W_O"), layers=(1,))

# %%
workspace.cleanup()
