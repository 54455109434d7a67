"""Text that a model writes by itself: what an edit should leave as it is where no data are given.

Sequences are sampled from the model's own distribution, after the token that begins a text or,
where there is none, ends one. The gradient of their likelihood has the Fisher information as its
second moment, exactly and not only empirically, and the mean rise of their loss under an edit is
the divergence from the unedited model.
"""

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eigenlens.bridges import TransformerBridge
from eigenlens.cache import kept
from eigenlens.inputs import tokenizer_of
from eigenlens.metrics import check_eval_mode
from eigenlens.provenance import model_fingerprint, text_hash
from eigenlens.tasks.task import to_dataset
from eigenlens.tasks.tokenising import tokenise

OWN_TEXT = "own_text"  # its name among what is protected
_AT_ONCE = 50  # sequences


class OwnTextError(ValueError):
    """A toy: no room for text in the context, or a tokenizer that misreads what was written."""


def own_text(
    model: TransformerBridge,
    *,
    n_examples: int = 192,
    n_tokens: int = 48,
    seed: int = 0,
) -> Dataset:
    """Sample passages from a model: the first third of each is the prompt, the rest the answer.

    Prompts end where a word ends, so some are a few tokens longer than asked for. What was sampled
    is kept on disk, for the weights that wrote it.

    Args:
        model: unedited, in eval mode.
        n_examples: passages.
        n_tokens: of a passage.
        seed: of the draw.

    Raises:
        OwnTextError: the context has no room for a passage, the tokenizer no token that begins a
            text, or it reads more than half of the passages otherwise than they were written.
        ValueError: no passages, or of less than three tokens; a model in training mode or without
            tokenizer.
    """
    check_eval_mode(model)
    if n_examples < 1 or n_tokens < 3:
        raise ValueError(f"{n_examples} passages of {n_tokens} tokens: at least 1 of 3 are needed.")
    if n_tokens >= model.cfg.n_ctx:
        raise OwnTextError(
            f"A context of {model.cfg.n_ctx} tokens has no room for passages of {n_tokens}: give "
            "data that the edit must leave as they are, or a smaller n_tokens."
        )
    tokenizer = tokenizer_of(model)
    begin = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), -1)
    if begin < 0:
        raise OwnTextError(
            "This tokenizer has no token that begins or ends a text, so the model cannot be asked "
            "to write one: give data that the edit must leave as they are."
        )
    key = text_hash(["own text", model_fingerprint(model), n_examples, n_tokens, seed])
    found = kept(key, lambda: {"tokens": _sampled(model, begin, n_examples, n_tokens, seed)})
    passages = [_passage(row, tokenizer, n_tokens // 3) for row in found["tokens"].tolist()]
    readable = [row for row in passages if _is_readable(row, tokenizer)]
    if 2 * len(readable) < n_examples:
        raise OwnTextError(
            f"{len(readable)} of {n_examples} passages are read by the tokenizer as this model "
            "wrote them: its own text cannot stand for what it should go on doing. Give data."
        )
    return to_dataset(readable)


def _sampled(
    model: TransformerBridge, begin: int, n_examples: int, length: int, seed: int
) -> Int[Tensor, "example pos"]:
    """Sequences without the token that they begin with."""
    devices = [model.cfg.device] if torch.device(model.cfg.device).type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        parts = [
            model.generate(
                torch.full((min(_AT_ONCE, n_examples - done), 1), begin, device=model.cfg.device),
                max_new_tokens=length,
                stop_at_eos=False,
                do_sample=True,
                return_type="tokens",
                verbose=False,
            )[:, 1:]
            for done in range(0, n_examples, _AT_ONCE)
        ]
    return torch.cat(parts).cpu()


def _passage(
    tokens: list[int], tokenizer: PreTrainedTokenizerBase, n_prompt: int
) -> dict[str, str]:
    """Cut before the first word that begins at ``n_prompt`` or later, if there is any."""
    special = set(tokenizer.all_special_ids)
    tokens = [token for token in tokens if token not in special]
    cuts = range(n_prompt, len(tokens))
    cut = next((c for c in cuts if tokenizer.decode([tokens[c]])[:1].isspace()), n_prompt)
    prompt, whole = tokenizer.decode(tokens[:cut]), tokenizer.decode(tokens)
    return {"prompt": prompt, "answer": whole[len(prompt) :]}


def _is_readable(example: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> bool:
    if not (example["prompt"] and example["answer"]):
        return False
    try:
        tokenise(to_dataset([example]), tokenizer)
    except ValueError:
        return False
    return True
