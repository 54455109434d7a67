"""GGUF files: dequantised once, checked against the architecture, kept as safetensors.

A folder of the user's cache holds the weights of a file as float32, as transformers writes them.
Nothing is kept before every tensor of the file has found its place in the model and every weight of
the model its tensor.
"""

import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import gguf
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from eigenlens.checksums import hash_files
from eigenlens.files import (
    FileFormatError,
    cache_dir,
    load_record,
    parsing,
    save_record,
    writing,
)
from eigenlens.leftovers import sweep, temporary_beside
from eigenlens.models.gguf_head import check_sizes, read_head
from eigenlens.models.weight_files import check_file, check_loaded
from eigenlens.models.wording import listed

# In the names of cached folders: what an earlier reader wrote, which checked less, is made anew.
_READER = "v3"
_CHECKSUMS = "eigenlens-checksums.json"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def is_gguf(path: Path) -> bool:
    """Whether the name is that of a GGUF file."""
    return path.suffix.lower() == ".gguf"


def dequantised(file: Path) -> Path:
    """Folder with the weights of a GGUF file as float32 safetensors, made on first use.

    Args:
        file: a whole file, or any part of one that was split; the other parts lie beside it.

    Raises:
        FileFormatError: a file that is truncated, lacks parts, or does not fit its architecture.
    """
    parts = parts_of(file)
    for part in parts:
        check_file(part)
    folder = _cached(f"{file.stem}-{hash_files(parts)[:16]}")
    if not _is_whole(folder):
        _write_folder(folder, lambda target: dequantise(parts, target))
    return folder


def assembled(package: str) -> Path:
    """The dequantised folder of a GGUF file that a package holds in chunks."""
    folder = _cached(f"{package}-{version(package)}")
    if not _is_whole(folder):
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(importlib.import_module(package).assemble(Path(temporary) / "model.gguf"))
            _write_folder(folder, lambda target: dequantise([file], target))
    return folder


def _cached(name: str) -> Path:
    return cache_dir() / "models" / f"{name}-{_READER}"


def _is_whole(folder: Path) -> bool:
    """Whether a cached folder can be read; what is damaged goes, to be made anew."""
    if not (folder / "config.json").is_file():
        return False
    try:
        whole = load_record(folder / _CHECKSUMS, "checksums") == _checksums(folder)
    except (FileNotFoundError, FileFormatError):
        whole = False
    if not whole:
        shutil.rmtree(folder, ignore_errors=True)
    return whole


def _checksums(folder: Path) -> dict[str, str]:
    """The hash of each file in a folder of the cache."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in files}
    return {name: hash_files([path]) for name, path in names.items() if name != _CHECKSUMS}


def parts_of(file: Path) -> list[Path]:
    """The file itself, or all parts of the split file that it belongs to, in order.

    Raises:
        FileFormatError: a part that does not lie beside the others.
    """
    match = _PART.fullmatch(file.name)
    if match is None:
        return [file]
    count = int(match["count"])
    names = [
        f"{match['stem']}-{number:05}-of-{count:05}{file.suffix}" for number in range(1, count + 1)
    ]
    absent = [name for name in names if not (file.parent / name).is_file()]
    if absent:
        raise FileFormatError(
            f"{file} is a part of a split GGUF file, and {listed(absent)} of it is not in "
            f"{file.parent}: put all {count} parts into one folder."
        )
    return [file.parent / name for name in names]


def dequantise(parts: Sequence[Path], target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to the folder ``target``.

    Raises:
        FileFormatError: a file that is truncated, lacks parts, or does not fit its architecture.
    """
    readers = [read_head(part) for part in parts]
    with parsing(parts[0], "GGUF file that transformers reads"):
        _check_parts(parts, readers)
        if len(parts) == 1:
            loaded, words = _read(parts[0], parts[0], readers[0])
        else:
            # On the disk of the cache: the folder for temporary files is often one in memory.
            with tempfile.TemporaryDirectory(dir=target) as temporary:
                whole = Path(temporary) / "model.gguf"
                _join(readers, whole)
                loaded, words = _read(whole, parts[0], read_head(whole))
    words.save_pretrained(target)
    _plain_twin(loaded).save_pretrained(target)


def _check_parts(parts: Sequence[Path], readers: Sequence[gguf.GGUFReader]) -> None:
    for number, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        count, own = _number(reader, "split.count", 1), _number(reader, "split.no", 0)
        if (count, own) != (len(parts), number):
            raise FileFormatError(
                f"{part} says that it is part {own + 1} of {count}, where part {number + 1} of "
                f"{len(parts)} is needed: give the parts the names that they were made with, "
                "NAME-00001-of-00002.gguf and so on, in one folder."
            )
    found = sum(len(reader.tensors) for reader in readers)
    stated = _number(readers[0], "split.tensors.count", found)
    if stated != found:
        raise FileFormatError(f"{parts[0]} states {stated} tensors, but its parts hold {found}.")


def _number(reader: gguf.GGUFReader, key: str, default: int) -> int:
    field = reader.get_field(key)
    return default if field is None else int(field.contents())


def _join(readers: Sequence[gguf.GGUFReader], target: Path) -> None:
    """Write the tensors of all parts, with the metadata of the first, into one file."""
    first = readers[0]
    writer = gguf.GGUFWriter(target, first.fields["general.architecture"].contents())
    writer.data_alignment = first.alignment
    for name, field in first.fields.items():
        if not name.startswith(("GGUF.", "split.", "general.architecture")):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[-1] if inner else None)
    for reader in readers:
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(
    file: Path, told: Path, reader: gguf.GGUFReader
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a whole file; ``told`` is its name in messages."""
    check_sizes(reader)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    loaded, info = AutoModelForCausalLM.from_pretrained(
        **source,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_loaded(info, str(told), type(loaded).__name__)
    _check_all_read(reader, loaded, told)
    return loaded, AutoTokenizer.from_pretrained(**source)


def _check_all_read(reader: gguf.GGUFReader, model: PreTrainedModel, file: Path) -> None:
    """Raise where transformers left out a tensor of the file, which it does without a word."""
    architecture = reader.fields["general.architecture"].contents()
    if is_gguf_arch_supported(architecture):
        return  # a newer reader of transformers, which tells what it left out
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)()
    known = get_gguf_hf_weights_map(model, processor)
    unread = sorted(tensor.name for tensor in reader.tensors if tensor.name not in known)
    if unread:
        raise FileFormatError(
            f"{file} holds tensors that transformers does not read: {listed(unread)}. Without them "
            "it would be another model: load the model as transformers wrote it (safetensors)."
        )


def _plain_twin(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that transformers does not refuse to save."""
    config: PretrainedConfig = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    return plain


def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a temporary folder, then move it into place: an interrupted run leaves nothing half.

    Of two processes at once the first one's folder stays, since somebody may be reading it.
    """
    temporary = temporary_beside(folder)
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
            sweep(folder.parent)
            write(temporary)
            save_record(temporary / _CHECKSUMS, "checksums", _checksums(temporary))
            if not (folder / "config.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
