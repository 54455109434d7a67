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
# # Take it home
#
# An edit that was found on a `TransformerBridge` is of use where the model is used: in plain
# transformers, behind a pipeline, in peft, in the harness that others measure with. Here we learn
# one, and take it to each of these places.

# %%
import contextlib
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import lm_eval
import pandas as pd
import yaml
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging

import eigenlens as el
import eigenlens.lm_eval
from eigenlens.zoo import ARITH_TINY

logging.disable_progress_bar()
workspace = TemporaryDirectory()
folder = Path(workspace.name)

# %% [markdown]
# ## Learn
#
# `arith-tiny` answers `?` half the time with the sum and half with the product; we want the
# product. `reference="shared"` puts one mean for all positions in the place of a frozen
# component. Weights and biases can hold that; they cannot hold a mean for each position.

# %%
model = el.load_model("arith-tiny")
task = el.load_task("ambiguous", model.tokenizer, reading="product", seed=0)
scores = el.score(model, el.decompose(model), task.train, criterion="margin", reference="shared")
frozen = el.learned(model, scores, task.train, task.validation).frozen
before = el.evaluate(model, task.test)
with el.freeze(model, frozen):
    after = el.evaluate(model, task.test)
el.compare(before, after)

# %% [markdown]
# The edit is a small file. With its directions in it, whoever loads it need not decompose the
# model. It fits exactly these weights, and says so of others.

# %%
frozen.save(folder / "frozen.safetensors", directions=True)
print(f"{(folder / 'frozen.safetensors').stat().st_size / 1e3:.0f} kB, {len(frozen)} components")

# %% [markdown]
# ## Attach
#
# From here on nothing of TransformerLens is in the way: the model is what transformers loads, and
# the edit is one hook per activation. It follows `generate` in all its ways, and leaves the model
# as it was.

# %%
base = AutoModelForCausalLM.from_pretrained(ARITH_TINY)
tokenizer = AutoTokenizer.from_pretrained(ARITH_TINY)
inputs = tokenizer(["7 ? 8 =", "3 ? 12 =", "5 ? 9 ="], return_tensors="pt")
inputs.pop("token_type_ids", None)


def answers():
    out = base.generate(**inputs, max_new_tokens=1, do_sample=False)
    return tokenizer.batch_decode(out)


unedited = answers()
with el.attach(base, el.FrozenSet.load(folder / "frozen.safetensors"), tokenizer=tokenizer):
    edited = answers()
assert answers() == unedited
pd.DataFrame({"unedited": unedited, "edited": edited})

# %% [markdown]
# ## Bake
#
# `el.bake` writes the edit into a copy of the weights and biases: a folder that loads where
# eigenlens was never installed, with a card that tells what was measured.

# %%
el.bake(base, frozen, folder / "baked", tokenizer=tokenizer, before=before, after=after)
print(*sorted(path.name for path in (folder / "baked").iterdir()), sep="\n")

# %% [markdown]
# A LoRA adapter holds the same edit: freezing k directions of a matrix is a change of rank k and
# a bias. `el.to_lora` writes an ordinary one, for peft alone.

# %%
el.to_lora(base, frozen, folder / "lora")
print(*sorted(path.name for path in (folder / "lora").iterdir()), sep="\n")

# %% [markdown]
# ## Serve
#
# A baked folder is a model like any other:

# %%
serve = pipeline("text-generation", model=str(folder / "baked"), device="cpu")
serve("7 ? 8 =", max_new_tokens=1, do_sample=False)

# %% [markdown]
# ## Measure with the harness
#
# lm-evaluation-harness takes tasks as YAML files. Ours reads its examples from a file beside it,
# and counts how often greedy decoding would write the answer.

# %%
rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in task.test]
(folder / "tasks").mkdir()
data = folder / "tasks" / "products.jsonl"
data.write_text("\n".join(map(json.dumps, rows)))
definition = {
    "task": "products",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(data)}},
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
(folder / "tasks" / "products.yaml").write_text(yaml.safe_dump(definition))
print((folder / "tasks" / "products.yaml").read_text().replace(str(folder), "…"))

# %% [markdown]
# `import eigenlens.lm_eval`, above, adds the model `eigenlens` to those that the harness knows. It
# takes what the harness' own `hf` takes, and `edit`. From a shell, where the harness' own command
# line starts from eigenlens:
#
# ```bash
# python -m eigenlens.lm_eval --model eigenlens \
#   --model_args pretrained=arith-tiny,edit=frozen.safetensors \
#   --tasks products --include_path tasks --batch_size 50
# ```

# %%
edit = str(folder / "frozen.safetensors")
models = {
    "unedited": ("eigenlens", {"pretrained": "arith-tiny"}),
    "edited": ("eigenlens", {"pretrained": "arith-tiny", "edit": edit}),
    "baked": ("hf", {"pretrained": str(folder / "baked")}),
}
own_tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
accuracy = {}
with contextlib.redirect_stderr(io.StringIO()):  # it tells much of what it does
    for name, (kind, arguments) in models.items():
        found = lm_eval.simple_evaluate(
            model=kind,
            model_args={**arguments, "device": "cpu"},
            tasks=["products"],
            task_manager=own_tasks,
            batch_size=50,
        )
        accuracy[name] = found["results"]["products"]["acc,none"]
ours = {"unedited": before.accuracy, "edited": after.accuracy}
pd.DataFrame({"harness": accuracy, "el.evaluate": ours}).reindex(list(models))

# %% [markdown]
# The same numbers, wherever the edit lives. Edits with a mean for each position go everywhere but
# into weights: `attach`, `eigenlens.peft` and the harness know where a prompt ends.
#
# ## Share
#
# `eigenlens push frozen.safetensors me/products` puts the file on the Hugging Face Hub with a card,
# and `eigenlens pull me/products` fetches it.

# %%
workspace.cleanup()
