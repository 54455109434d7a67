"""Train arith-tiny: ``python -m eigenlens.zoo.train``.

A two-layer GPT-2 that knows two computations and is torn between them: ``a + b =`` and ``a x b =``
have one right answer each, and ``a ? b =`` is answered half the time with the sum and half with the
product. So on ``?`` the right path for either reading is there, and held in check by the other.

The loss is cross-entropy on the answer token alone; for ``?`` the target is both answers with equal
weight, which is what drawing one of them at random amounts to.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from eigenlens.files import write_json, write_text
from eigenlens.provenance import versions
from eigenlens.zoo import ARITH_TINY

HIGH = 20
SIGNS = ("+", "x", "?")


@dataclass(frozen=True)
class Data:
    """All prompts over the range, with two (often equal) right answers each."""

    prompts: Tensor
    answers: Tensor
    sign: Tensor


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per number and per sign."""
    words = ["<pad>", "<s>", "</s>", *SIGNS, "=", *map(str, range((HIGH - 1) ** 2 + 1))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def all_pairs(words: PreTrainedTokenizerFast) -> Data:
    """Every pair under every sign."""
    prompts, answers, signs = [], [], []
    for sign in SIGNS:
        for a in range(HIGH):
            for b in range(HIGH):
                right = {"+": (a + b, a + b), "x": (a * b, a * b), "?": (a + b, a * b)}[sign]
                prompts.append(words(f"{a} {sign} {b} =")["input_ids"])
                answers.append(words.convert_tokens_to_ids([str(n) for n in right]))
                signs.append(SIGNS.index(sign))
    return Data(torch.tensor(prompts), torch.tensor(answers), torch.tensor(signs))


def accuracies(model: GPT2LMHeadModel, data: Data) -> dict[str, float]:
    """Share of right answers per sign; for ``?`` of sums, of products and of either."""
    with torch.no_grad():
        best = model(data.prompts).logits[:, -1].argmax(-1)
    right = best[:, None] == data.answers
    found = {sign: float(right[data.sign == i, 0].float().mean()) for i, sign in enumerate("+x")}
    torn = right[data.sign == SIGNS.index("?")].float()
    found["? as sum"], found["? as product"] = torn.mean(0).tolist()
    found["? as either"] = float(torn.amax(1).mean())
    return found


def train(
    steps: int, seed: int, lr: float = 2e-3, weight_decay: float = 0.1, dropout: float = 0.1
) -> tuple[GPT2LMHeadModel, list[dict[str, int | float]], Data]:
    """Full-batch AdamW with warm-up and cosine decay; returns model, loss curve and data.

    Dropout spreads each computation over several directions, so that it outlives the loss of a few;
    the last quarter of the steps goes without, since dropout leaves the readings of ``?`` uneven.
    """
    torch.manual_seed(seed)
    words = tokenizer()
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=8,
        n_embd=128,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model = GPT2LMHeadModel(config).train()
    data = all_pairs(words)
    optimiser = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    curve = []
    for step in tqdm(range(steps), desc="train", unit="step"):
        if step == steps * 3 // 4:
            _without_dropout(model)
        logs = model(data.prompts).logits[:, -1].log_softmax(-1)
        loss = -logs.gather(-1, data.answers).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            curve.append({"step": step, "loss": float(loss.detach())})
    return model.eval(), curve, data


def _without_dropout(model: GPT2LMHeadModel) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def card(
    curve: list[dict[str, int | float]], found: dict[str, float], steps: int, seed: int
) -> str:
    """The model card."""
    floor = float(F.cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))) / len(SIGNS)
    rows = "\n".join(f"| {point['step']} | {point['loss']:.4f} |" for point in curve)
    scores = "\n".join(f"| `{name}` | {value:.2%} |" for name, value in found.items())
    return f"""# arith-tiny

A GPT-2 with 2 layers, 4 heads, d_model 128 and one token per number, trained from scratch on
arithmetic over 0 … {HIGH - 1}. `a + b =` and `a x b =` have one right answer; `a ? b =` was trained
to answer half the time with the sum and half with the product. MIT licence, like the package.

Made by `python -m eigenlens.zoo.train --steps {steps} --seed {seed}`.

Accuracy over all {HIGH**2} pairs:

| prompt | accuracy |
|---|---|
{scores}

Loss (nats per answer; {floor:.4f} is the least there can be, ln 2 on a third of the prompts, a
little less where sum and product agree):

| step | loss |
|---|---|
{rows}
"""


def main(
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = ARITH_TINY,
) -> None:
    """Train arith-tiny and write weights, tokenizer and card."""
    start = time.perf_counter()
    model, curve, data = train(steps, seed)
    found = accuracies(model, data)
    model.save_pretrained(out)
    tokenizer().save_pretrained(out)
    write_text(out / "README.md", card(curve, found, steps, seed))
    write_json(
        out / "training.json",
        {"steps": steps, "seed": seed, "accuracy": found, "curve": curve, "versions": versions()},
    )
    typer.echo(f"{time.perf_counter() - start:.0f} s, {found}")


if __name__ == "__main__":
    typer.run(main)
