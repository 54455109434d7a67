"""What tokenizers put around a text: found by comparing, whatever their vocabulary."""

import pytest
import torch
import transformers as tf
from tiny_models import CONFIGS, dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import eigenlens as el
from eigenlens.models.special_tokens import added_tokens
from eigenlens.tasks.batches import make_batches

DIGITS = ["<s>", "</s>", *"0123456789", "+", "="]
TEMPLATES = {
    "nothing": None,
    "bos": "<s> $A",
    "eos": "$A </s>",
    "both": "<s> $A </s>",
    "bos as eos": "$A <s>",
    "bos twice": "<s> $A <s>",
}
WANTED = {
    "nothing": ([], []),
    "bos": ([0], []),
    "eos": ([], [1]),
    "both": ([0], [1]),
    "bos as eos": ([], [0]),
    "bos twice": ([0], [0]),
}


def words(**options):
    """Digits alone: a letter becomes ``unk``, here the beginning-of-sequence token."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(DIGITS)}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return core, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>", **options}


def byte_pairs(**options):
    """Byte-level pieces without most bytes: a letter becomes nothing at all."""
    vocabulary = {w: i for i, w in enumerate([*DIGITS, "Ġ"])}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core, {"bos_token": "<s>", "eos_token": "</s>", **options}


def letters(**options):
    """A vocabulary with the letter a."""
    core, special = words(**options)
    core.add_tokens(["a"])
    return core, special


def tokenizer(kind, template, **options):
    core, special = kind(**options)
    if template in ("bos as eos", "bos twice"):
        special["eos_token"] = "<s>"
    special = {name: token for name, token in special.items() if token}
    if TEMPLATES[template]:
        core.post_processor = processors.TemplateProcessing(
            single=TEMPLATES[template], special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", [words, byte_pairs, letters])
def test_special_tokens_are_found_in_any_vocabulary(kind, template):
    assert added_tokens(tokenizer(kind, template)) == WANTED[template]


def test_a_tokenizer_of_special_tokens_alone():
    core = Tokenizer(models.WordLevel({"<s>": 0}, unk_token="<s>"))
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    alone = tf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<s>")
    assert added_tokens(alone) == ([0], [])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(("kind", "saved"), [(words, True), (byte_pairs, False)])
def test_evaluation_and_generation_read_what_the_checkpoint_reads(kind, template, saved, tmp_path):
    wanted = tokenizer(kind, template)
    plain = tf.LlamaForCausalLM(CONFIGS["llama"]())
    if saved:
        plain.save_pretrained(tmp_path)
        wanted.save_pretrained(tmp_path)
        model = el.load_model(tmp_path, device="cpu")
    else:
        model = el.load_model(plain, wanted)
    before, _ = WANTED[template]
    digits = wanted("1 + 2 =", add_special_tokens=False)["input_ids"]
    assert model.cfg.default_prepend_bos is bool(before)
    assert model.to_tokens("1 + 2 =").tolist() == [before + digits]
    data = dataset([("1 + 2 =", " 3")])
    read = make_batches(data, model, 1)[0].tokens[0].tolist()
    assert read[: len(before + digits)] == before + digits
    written = model.generate("1 + 2 =", max_new_tokens=1, return_type="tokens", verbose=False)
    assert written[0, :-1].tolist() == before + digits


def test_without_a_beginning_of_sequence_token(tmp_path):
    model = el.load_model(
        tf.LlamaForCausalLM(CONFIGS["llama"]()), tokenizer(byte_pairs, "nothing", bos_token=None)
    )
    assert model.cfg.default_prepend_bos is False
    assert torch.equal(model.to_tokens("1+2"), torch.tensor([[3, 12, 4]]))
