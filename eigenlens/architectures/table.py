"""The table: every decoder that TransformerLens lists, and what of it is decomposed exactly."""

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Literal, get_args

import huggingface_hub
import torch
from datasets import Dataset
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.architectures import classify_architecture
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eigenlens.architectures.oracles import Inexact, check_exact, check_same_logits
from eigenlens.architectures.tiny_models import VOCABULARY, NotBootable, tiny_model
from eigenlens.blocks import UnsupportedModelError, left_out_lines
from eigenlens.double import StayDouble
from eigenlens.matrices import weight_matrices
from eigenlens.models import load_model
from eigenlens.zoo import ARITH_TINY

Status = Literal["exact", "partly", "refused", "not bootable"]
NATIVE = "TransformerLensNative"
_SECONDS = 180.0
# Of several lengths, so that batches are padded.
_EXAMPLES = [
    {"prompt": "1 + 2 =", "answer": " 3 7"},
    {"prompt": "9 x 4 + 11 =", "answer": " 47"},
    {"prompt": "7 + 7 + 7 + 7 =", "answer": " 28 0 5"},
    {"prompt": "5 + 6 x 2 =", "answer": " 17"},
]


@dataclass(frozen=True)
class Row:
    """What came of one architecture.

    Attributes:
        architecture: as TransformerLens lists it.
        status: ``exact``, where all matrices of its blocks are decomposed and the oracles agree;
            ``partly``, where they agree for what is listed, and some is left out; ``refused``,
            where eigenlens says no; ``not bootable``, where no tiny model of it can be made.
        maps: kinds that are listed.
        note: what is left out, or why.
    """

    architecture: str
    status: Status
    maps: tuple[str, ...]
    note: str


def decoders() -> list[str]:
    """The architectures of TransformerLens that are meant to predict the next token."""
    return sorted(
        (
            name
            for name in SUPPORTED_ARCHITECTURES
            if classify_architecture(name) in ("causal_lm", "multimodal")
        ),
        key=str.lower,
    )


def rows(names: Sequence[str] = (), seconds: float = _SECONDS) -> Iterator[Row]:
    """Try each architecture in a process of its own: a crash or a hang is one row.

    Args:
        names: architectures (default: :func:`decoders`).
        seconds: most that one may take.

    Raises:
        ValueError: TransformerLens lists no such architecture.
    """
    unknown = [name for name in names if name not in SUPPORTED_ARCHITECTURES]
    if unknown:
        raise ValueError(f"TransformerLens lists no {', '.join(unknown)}.")
    for name in names or decoders():
        yield _apart(name, seconds)


def _apart(name: str, seconds: float) -> Row:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, name))
    # A fork has everything imported. One thread in it: others do not survive.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        process.start()
    finally:
        torch.set_num_threads(threads)
    there.close()
    try:
        row: Row = here.recv() if here.poll(seconds) else _refused(name, "it takes too long")
    except EOFError:
        row = _refused(name, "the process that tried it died")
    process.kill()
    process.join()
    return row


def _send(connection: Connection, name: str) -> None:
    # Models that see or hear look for a processor under their name: there is none.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    connection.send(tried(name))


def _refused(name: str, why: str) -> Row:
    return Row(name, "refused", (), why)


def tried(name: str) -> Row:
    """Make a tiny model, list its maps, and try the oracles on them."""
    twin = next((other for other in decoders() if other.lower() == name.lower()), name)
    if twin != name:
        return Row(name, "not bootable", (), f"another spelling of {twin}")
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of constants that models make as they run
    try:
        with StayDouble():
            return _tried(name)
    except NotBootable as error:
        return Row(name, "not bootable", (), _line(error))
    except (UnsupportedModelError, Inexact) as error:
        return _refused(name, _line(error))
    except Exception as error:  # of any library: it is told, and the table goes on
        return _refused(name, f"{type(error).__name__}: {_line(error)}")
    finally:
        torch.set_default_dtype(usual)


def _tried(name: str) -> Row:
    tokenizer = AutoTokenizer.from_pretrained(ARITH_TINY)
    model = _native(tokenizer) if name == NATIVE else _bridge(name, tokenizer)
    maps = weight_matrices(model, skip_unsupported=True)
    check_exact(model, Dataset.from_list(_EXAMPLES))
    kinds = tuple(dict.fromkeys(m.kind for m in maps))
    notes = [] if model.cfg.neutral_padding else ["Padding changes it: batches have one length."]
    notes += left_out_lines(maps.left_out)
    return Row(name, "partly" if maps.left_out else "exact", kinds, " ".join(notes))


def _bridge(name: str, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    plain = tiny_model(name)
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        wanted = getattr(plain(tokens), "logits", None)
    model = load_model(plain, tokenizer)  # refuses what has no logits
    assert wanted is not None
    with torch.no_grad():
        check_same_logits(model(tokens), wanted)
    return model


def _native(tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    """TransformerLens' own model, which is none of transformers."""
    config = TransformerBridgeConfig(
        d_model=32,
        n_layers=2,
        n_heads=4,
        d_head=8,
        n_ctx=32,
        d_vocab=VOCABULARY,
        act_fn="gelu",
        seed=0,
        architecture=NATIVE,
    )
    return load_model(TransformerBridge.boot_native(config, dtype=torch.float64), tokenizer)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def to_json(found: Sequence[Row]) -> str:
    """The rows as a JSON list."""
    return json.dumps([asdict(row) for row in found], indent=1, ensure_ascii=False) + "\n"


def to_markdown(found: Sequence[Row]) -> str:
    """The rows as a page."""
    counts = {s: sum(row.status == s for row in found) for s in get_args(Status)}
    others = sorted(set(SUPPORTED_ARCHITECTURES) - set(decoders()), key=str.lower)
    lines = [
        "# Architectures",
        "",
        "Made by `eigenlens architectures --out docs/architectures.md`, with TransformerLens "
        f"{version('transformer-lens')} and transformers {version('transformers')}.",
        "",
        "Every decoder that TransformerLens lists, as a tiny model with random weights in float64. "
        "Of what is listed, scores are −σ ∂L/∂σ by autograd through the weights, freezing under "
        "means of zero is an edit of the weights, padding changes no loss, and the bridge computes "
        "the logits of transformers. *Exact*: the blocks hold no other matrix. *Partly*: "
        "`skip_unsupported=True` leaves out what the last column names.",
        "",
        ", ".join(f"{count} {status}" for status, count in counts.items()) + ".",
        "",
        "| architecture | | maps | left out, or why |",
        "|---|---|---|---|",
        *(
            f"| `{row.architecture}` | {row.status} | {', '.join(row.maps)} | "
            f"{row.note.replace('|', chr(92) + '|')} |"
            for row in found
        ),
        "",
        f"No decoders, and not tried: {', '.join(f'`{name}`' for name in others)}.",
        "",
    ]
    return "\n".join(lines)
