"""GGUF files: whole or in parts, dequantised once, and refused where anything is missing."""

import gguf
import numpy as np
import pytest
import torch

import eigenlens as el
from eigenlens.files import FileFormatError
from eigenlens.models import gguf_files

WORDS = ["<s>", "1", "2", "12", "+", "=", "Ġ"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("EIGENLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def write_gguf(path, *, drop=(), extra=(), head=False, parts=0):
    """A one-layer Llama with random weights as a GGUF file, or split into files of some tensors."""
    rng, words = np.random.default_rng(0), WORDS
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=parts)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd": (len(words), 32),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    shapes |= {"output": (len(words), 32)} if head else {}
    shapes |= dict.fromkeys(extra, (2, 32))
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        if name in drop:
            continue
        writer.add_tensor(
            f"{name}.weight",
            gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0),
            raw_dtype=gguf.GGMLQuantizationType.Q8_0,
        )
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_gguf_is_dequantised_once(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    weights = write_gguf(path)
    model = el.load_model(path, device="cpu")
    down = model.blocks[0].mlp.out.original_component.weight
    expected = gguf.dequantize(
        gguf.quantize(weights["blk.0.ffn_down"], gguf.GGMLQuantizationType.Q8_0),
        gguf.GGMLQuantizationType.Q8_0,
    )
    np.testing.assert_allclose(down.numpy(), expected, rtol=1e-6)
    monkeypatch.setattr(gguf_files, "dequantise", lambda *a: pytest.fail("dequantised again"))
    again = el.load_model(path, device="cpu")
    assert torch.equal(down, again.blocks[0].mlp.out.original_component.weight)


def test_of_two_processes_that_dequantise_at_once_the_first_keeps_its_folder(tmp_path, monkeypatch):
    """The first may be reading what it wrote when the second is done."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    dequantise, made = gguf_files.dequantise, []

    def slower(parts, target):
        monkeypatch.setattr(gguf_files, "dequantise", dequantise)
        made.append((first := gguf_files.dequantised(path)).stat().st_ino)
        dequantise(parts, target)
        assert first.stat().st_ino == made[0]

    monkeypatch.setattr(gguf_files, "dequantise", slower)
    folder = gguf_files.dequantised(path)
    assert [folder.stat().st_ino] == made
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def split(folder, name="tiny", **options):
    """The parts of a split file."""
    write_gguf(folder / f"{name}.gguf", parts=4, **options)
    return sorted(folder.glob(f"{name}-*.gguf"))


TOKENS = torch.tensor([[0, 1, 2, 4]])


@pytest.mark.parametrize("head", [False, True])
def test_a_split_file_is_the_whole_one(tmp_path, head):
    parts = split(tmp_path, head=head)
    assert [p.name for p in parts] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    write_gguf(tmp_path / "whole.gguf", head=head)
    whole = el.load_model(tmp_path / "whole.gguf", device="cpu")
    for part in (parts[0], parts[2]):
        model = el.load_model(part, device="cpu")
        assert torch.equal(model(TOKENS), whole(TOKENS))
        assert model.tokenizer("12 + 1")["input_ids"] == whole.tokenizer("12 + 1")["input_ids"]


def test_a_missing_part_is_named_and_nothing_is_cached(tmp_path, cache):
    parts = split(tmp_path)
    parts[1].unlink()
    with pytest.raises(FileFormatError, match=r"tiny-00002-of-00003\.gguf of it is not in"):
        el.load_model(parts[0], device="cpu")
    alone = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(FileFormatError, match=r"renamed\.gguf says that it is part 1 of 3"):
        el.load_model(alone, device="cpu")
    assert not cache.exists() or not list(cache.iterdir())


def test_parts_in_wrong_order_are_told(tmp_path):
    parts = split(tmp_path)
    parts[0].rename(tmp_path / "aside")
    parts[1].rename(parts[0])
    (tmp_path / "aside").rename(parts[1])
    with pytest.raises(FileFormatError, match="says that it is part 2 of 3, where part 1 of 3"):
        el.load_model(parts[0], device="cpu")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"drop": ["blk.0.ffn_up"]}, r"1 missing \(model\.layers\.0\.mlp\.up_proj\.weight\)"),
        ({"extra": ["rope_freqs", "blk.0.attn_q_extra"]}, r"not read: blk.*q_extra.*, rope_freqs"),
        ({"extra": ["blk.1.ffn_up"]}, r"does not read: blk\.1\.ffn_up\.weight"),
    ],
    ids=["a tensor missing", "tensors too many", "a block too many"],
)
def test_tensors_that_are_not_the_architectures_are_named(tmp_path, cache, options, told):
    write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(FileFormatError, match=rf"tiny\.gguf .*{told}"):
        el.load_model(tmp_path / "tiny.gguf", device="cpu")
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "is a Git LFS pointer"),
        (b"GGUF", "is truncated or no GGUF file"),
        (b"something else" * 100, "is truncated or no GGUF file"),
        (-2000, "is truncated or no GGUF file"),
        (100, "is truncated or no GGUF file"),
    ],
    ids=["empty", "pointer", "magic only", "foreign", "tail cut", "header cut"],
)
def test_damaged_files_are_named(tmp_path, cache, content, told):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:content])
    with pytest.raises(FileFormatError, match=rf"tiny\.gguf {told}"):
        el.load_model(path, device="cpu")
    assert not cache.exists() or not list(cache.iterdir())


def number(value, size=8):
    """Bytes of a number."""
    return value.to_bytes(size, "little")


TYPES = "tokenizer.ggml.token_type"


@pytest.mark.parametrize(
    ("name", "distance", "data", "told"),
    [
        ("GGUF", 4, number(2**60), "it ends at byte"),  # tensors
        ("GGUF", 12, number(2**60), "it ends at byte"),  # metadata
        (TYPES, 8, number(2**60), "an array of 1,152,921,504,606,846,976 values"),
        (TYPES, 8, number(2**21), "it ends at byte"),
        ("llama.block_count", 4, number(2**30, 4), "block_count is 1073741824"),
        ("llama.embedding_length", 4, number(2**30, 4), "embedding_length is 1073741824"),
        ("llama.block_count", -1, b"d", "block_count is missing"),
        ("llama.embedding_length", -1, b"g", "embedding_length is missing"),
        ("general.architecture", -1, b"_", "general.architecture"),
        ("general.architecture", 12, b"xxxxx", "xxxxx.block_count is missing"),
        ("general.architecture", 12, b"\xff", "utf-8"),
        ("blk.0.attn_q.weight", 0, number(2**31, 4), "it ends at byte"),  # dimensions
        ("blk.0.attn_q.weight", 4, number(2**60), "it ends at byte|reshape"),
    ],
)
def test_a_damaged_head_neither_hangs_nor_fills_the_memory(tmp_path, name, distance, data, told):
    """Bytes that stand at a distance behind a name are others."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    place = whole.index(name.encode()) + len(name) + distance
    path.write_bytes(whole[:place] + data + whole[place + len(data) :])
    with pytest.raises(FileFormatError, match=rf"tiny\.gguf is truncated or no GGUF .*({told})"):
        gguf_files.dequantised(path)


def test_tensors_follow_one_another(tmp_path):
    """A tensor that is said to lie elsewhere would be made of another one's numbers."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    found = gguf.GGUFReader(path).tensors[2]
    entry = whole.index(found.name.encode()) + len(found.name)
    place = entry + 4 + 8 * len(found.shape) + 4  # number of sizes, sizes, type
    path.write_bytes(whole[:place] + bytes(8) + whole[place + 8 :])
    with pytest.raises(FileFormatError, match=rf"{found.name} begins at"):
        gguf_files.dequantised(path)


def test_a_damaged_part_is_named(tmp_path):
    parts = split(tmp_path)
    parts[1].write_bytes(parts[1].read_bytes()[:-300])
    with pytest.raises(FileFormatError, match=r"00002-of-00003\.gguf is truncated"):
        el.load_model(parts[0], device="cpu")


def test_capitals_in_the_suffix(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    lower = el.load_model(tmp_path / "tiny.gguf", device="cpu")
    (tmp_path / "tiny.gguf").rename(tmp_path / "Other.GGUF")
    assert torch.equal(el.load_model(tmp_path / "Other.GGUF", device="cpu")(TOKENS), lower(TOKENS))


def test_a_damaged_cache_is_made_anew(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = el.load_model(path, device="cpu")(TOKENS)
    weights = gguf_files.dequantised(path) / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-100], content[:-2] + bytes([content[-2] ^ 64]) + content[-1:]):
        weights.unlink()
        weights.write_bytes(damaged)
        assert torch.equal(el.load_model(path, device="cpu")(TOKENS), whole)
        assert weights.read_bytes() == content


def test_what_an_earlier_version_cached_is_not_trusted(tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    folder = gguf_files.dequantised(path)
    old = cache / folder.name.removesuffix("-v3")
    folder.rename(old)
    (old / "config.json").write_text("of an earlier version")
    el.load_model(path, device="cpu")
    assert {p.name for p in cache.iterdir()} == {old.name, folder.name}
