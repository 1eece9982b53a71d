"""Golden files open for ever; damaged, cut and foreign files are refused; readers and writers do no harm."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import vqrs
from benches.faults._mutate import Parts
from vqrs import _core, reference

DATA = Path(__file__).parent / "data"
GOLDEN = sorted(DATA.glob("*.safetensors"))

golden = pytest.mark.parametrize("path", GOLDEN, ids=[path.stem for path in GOLDEN])


def layout(path: Path) -> tuple[int, dict[str, dict], dict[str, str]]:
    """Size of the header, then tensors and metadata as the safetensors format describes them: no code of ours."""
    with open(path, "rb") as file:
        size = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size - 8))
    metadata = header.pop("__metadata__")
    return size, header, metadata


def byte_range(path: Path, tensor: str) -> range:
    size, tensors, _ = layout(path)
    start, end = tensors[tensor]["data_offsets"]
    return range(size + start, size + end)


def decoder_names(path: Path) -> list[str]:
    return [name for name in layout(path)[1] if not name.startswith(("vqrs.", "__pad.")) and name != "codes"]


def refusal(path: Path, verify: str = "header") -> str | None:
    """What opening says, None where it succeeds."""
    try:
        vqrs.open(path, verify=verify).close()
    except vqrs.TableError as error:
        return str(error)
    return None


def make_table(n_rows: int = 50, dim: int = 6, seed: int = 0, dtype: str = "int8") -> _core.Table:
    x = np.random.default_rng(seed).normal(size=(n_rows, dim)).astype(np.float32)
    codec, codes = _core.fit("scalar", {"dtype": dtype}, x)
    return _core.Table.from_codec(codec, codes, errors={"relative": codec.relative_error})


@pytest.fixture
def copy(tmp_path):
    """A golden table that may be damaged."""
    return Path(shutil.copy(DATA / "books-two-widths-float16-v1.safetensors", tmp_path / "copy.safetensors"))


def edit_header(path: Path, change) -> None:
    """Rewrites the vqrs description; checksums are left as they were."""
    size, tensors, metadata = layout(path)
    description = json.loads(metadata["vqrs"])
    change(description)
    text = json.dumps({"__metadata__": {**metadata, "vqrs": json.dumps(description)}, **tensors}, separators=(",", ":"))
    content = path.read_bytes()
    path.write_bytes(content[:8] + text.encode().ljust(size - 8) + content[size:])


# ---- golden files --------------------------------------------------------------------------------------------------


def test_every_form_and_version_has_a_golden_table():
    forms = {path.stem.split("-")[0] for path in GOLDEN}
    assert {kind["form"] for kind in _core.kinds()} <= forms <= set(reference.FORMS)
    assert all(path.with_suffix(".npy").exists() for path in GOLDEN)


@golden
@pytest.mark.parametrize("mode", ["mmap", "read"])
@pytest.mark.parametrize("verify", ["header", "lazy", "full"])
def test_golden_tables_open_and_decode_as_ever(path, mode, verify):
    expected = np.load(path.with_suffix(".npy"))
    table = vqrs.open(path, mode=mode, verify=verify)
    assert table.shape == expected.shape
    assert table.to_numpy().tobytes() == expected.tobytes()
    assert table[[3, 1, -1]].tobytes() == expected[[3, 1, -1]].tobytes()
    assert list(table.names) == [f"row {i}" for i in range(len(expected))]
    assert table.metadata == {"made by": "make_golden.py"}
    table.verify()


@golden
def test_golden_tables_are_valid_safetensors(path):
    from safetensors import safe_open

    table = vqrs.open(path)
    stored = {"codes": np.asarray(_core.Table.open(str(path), "header", "mmap").codes())}
    stored |= _core.Table.open(str(path), "header", "mmap").tensors()
    brain = {name for name, tensor in layout(path)[1].items() if tensor["dtype"] == "BF16"}
    with safe_open(path, framework="numpy") as file:
        assert set(stored) <= set(file.keys())
        assert file.metadata()["format"] == "pt"
        for name in set(stored) - brain:  # numpy has no bfloat16
            assert np.array_equal(file.get_tensor(name), stored[name])
        assert len(file.get_tensor("codes")) == len(table)


@golden
def test_golden_tables_keep_the_rules_of_the_profile(path):
    size, tensors, metadata = layout(path)
    content = path.read_bytes()
    assert size % 4096 == 0
    names = list(tensors)
    assert names[0] == "codes"
    assert [name for name in names if not name.startswith("__pad.")][-2:] == ["vqrs.blocks", "vqrs.footer"]
    assert all(isinstance(value, str) for value in metadata.values())
    end = 0
    for name, tensor in tensors.items():
        start, stop = tensor["data_offsets"]
        assert start == end, "no holes"
        end = stop
        if name.startswith("__pad."):
            assert not any(content[size + start : size + stop])
        else:
            assert start % 64 == 0
    assert size + end == len(content)


@pytest.mark.parametrize("last", [64, 128, 192, 256, 1024, 1088])
def test_reference_reads_blocks_of_every_length(last, tmp_path):
    """XXH3 has a way of its own for each range of lengths."""
    parts = Parts((DATA / "levels-float16-v1.safetensors").read_bytes())
    parts.tensors = {"codes": ["U8", [(65536 - 4096 + last) // 10, 10], bytes((65536 - 4096 + last) // 10 * 10)]}
    parts.description["rows"] = parts.tensors["codes"][1][0]
    path = tmp_path / "table.safetensors"
    path.write_bytes(parts.content())
    assert byte_range(path, "vqrs.blocks").start == 65536 + last
    assert reference.read_table(path).rows().tobytes() == vqrs.open(path, verify="full").to_numpy().tobytes()


# ---- damage --------------------------------------------------------------------------------------------------------


@golden
def test_every_flipped_byte_is_found(path, tmp_path):
    """One bit of each byte in turn: refused on opening outside the codes, and by verify wherever it is."""
    find_flips(path, tmp_path / "flipped.safetensors", lambda position: [position % 8])


@pytest.mark.slow
def test_every_flipped_bit_is_found(tmp_path):
    find_flips(DATA / "books-two-widths-float16-v1.safetensors", tmp_path / "flipped.safetensors", lambda _: range(8))


def find_flips(path: Path, target: Path, bits) -> None:
    content = path.read_bytes()
    size, codes = layout(path)[0], byte_range(path, "codes")
    strict = set(range(size)).union(*(byte_range(path, name) for name in decoder_names(path)))
    target.write_bytes(content)
    with open(target, "r+b", buffering=0) as file:
        for position, value in enumerate(content):
            for bit in bits(position):
                os.pwrite(file.fileno(), bytes([value ^ 1 << bit]), position)
                if position in strict:
                    assert refusal(target), f"bit {bit} of byte {position}"
                else:
                    assert refusal(target, verify="full"), f"bit {bit} of byte {position}"
            os.pwrite(file.fileno(), bytes([value]), position)
    assert refusal(target, verify="full") is None
    assert strict.isdisjoint(codes)


def test_flipped_codes_are_found_by_verify_and_on_first_touch(tmp_path):
    """Opening does not read the codes, whatever their number; a lazy reader notices where it looks."""
    path = tmp_path / "table.safetensors"
    make_table(3000, 60).save(str(path))
    content = bytearray(path.read_bytes())
    content[byte_range(path, "codes")[100_000]] ^= 4
    path.write_bytes(content)
    table = vqrs.open(path)
    with pytest.raises(vqrs.TableCorruptError, match="checksum"):
        table.verify()
    lazy = vqrs.open(path, verify="lazy")
    assert np.isfinite(lazy[[0, 2999]]).all()
    with pytest.raises(vqrs.TableCorruptError, match="checksum"):
        lazy[100_000 // lazy.codes.shape[1]]
    with pytest.raises(vqrs.TableCorruptError, match="checksum"):
        vqrs.open(path, verify="full")


@golden
def test_every_truncation_is_refused(path, tmp_path):
    target = Path(shutil.copy(path, tmp_path / "cut.safetensors"))
    for size in range(target.stat().st_size - 1, -1, -1):
        os.truncate(target, size)
        with pytest.raises(vqrs.TableCorruptError):
            vqrs.open(target)


@pytest.mark.parametrize("extra", [b"\0", b"x", bytes(64), bytes(4096), "itself"])
def test_appended_bytes_are_refused(copy, extra):
    content = copy.read_bytes()
    copy.write_bytes(content + (content if extra == "itself" else extra))
    with pytest.raises(vqrs.TableCorruptError, match="appended"):
        vqrs.open(copy)


def test_infinite_scales_inside_rows_are_found_by_verify(tmp_path):
    """Opening does not read the codes; a checksum cannot tell that a scale is not a number."""
    x = np.ones((4, 3), np.float32)
    codec, codes = _core.fit("scalar", {"dtype": "int8"}, x)
    codes[2, 3:5] = np.array([np.inf], np.float16).view(np.uint8)
    path = tmp_path / "infinite.safetensors"
    try:
        _core.Table.from_codec(codec, codes, errors={"relative": 0.0}).save(str(path))
    except ValueError:
        return  # refused before it could be written: as good
    with pytest.raises(vqrs.TableCorruptError, match="2"):
        vqrs.open(path).verify()


# ---- other versions and other files --------------------------------------------------------------------------------


def test_a_newer_profile_is_named(copy):
    edit_header(copy, lambda description: description.update(profile="vqrs-table/2"))
    with pytest.raises(vqrs.TableVersionError, match=r"vqrs-table/2.*vqrs-table/1.*update"):
        vqrs.open(copy)


def test_unknown_required_features_are_named(copy):
    edit_header(copy, lambda description: description.update(requires=["holograms", "sonar"]))
    with pytest.raises(vqrs.TableVersionError, match=r"holograms, sonar.*update"):
        vqrs.open(copy)


def test_an_edited_description_is_refused(copy):
    edit_header(copy, lambda description: description.update(kind="kmeans"))
    with pytest.raises(vqrs.TableCorruptError):
        vqrs.open(copy)


def test_other_versions_and_damage_are_table_errors():
    assert issubclass(vqrs.TableVersionError, vqrs.TableError)
    assert issubclass(vqrs.TableCorruptError, vqrs.TableError)
    assert issubclass(vqrs.TableError, ValueError)


def header(text: str | bytes, length: int | None = None) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text


FOREIGN = {
    "empty": b"",
    "text": b"the quick brown fox jumps over the lazy dog\n" * 9,
    "zeros": bytes(10_000),
    "zip": b"PK\x03\x04" + bytes(3000),
    "npy": b"\x93NUMPY\x01\x00" + bytes(3000),
    "pickle": b"\x80\x04\x95" + bytes(3000),
    "huge header": header(b"{}", length=2**63),
    "header beyond the end": header(b"{}", length=4088),
    "header beyond 16 MiB": header(b"{}", length=(16 << 20) + 8),
    "not JSON": header("x" * 4088),
    "not UTF-8": header(b"\xff" * 4088),
    "a list": header("[]".ljust(4088)),
    "deep nesting": header("[" * 4088),
    "deep objects": header('{"a":' * 800 + " " * 88),
    "an empty object": header("{}".ljust(4088)),
    "no description": header('{"__metadata__":{"format":"pt"}}'.ljust(4088)),
    "metadata of numbers": header('{"__metadata__":{"vqrs":1}}'.ljust(4088)),
    "description not JSON": header('{"__metadata__":{"format":"pt","vqrs":"{"}}'.ljust(4088)),
    "duplicate keys": header('{"__metadata__":{"vqrs":"{}"},"__metadata__":{"vqrs":"{}"}}'.ljust(4088)),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("mode", ["mmap", "read"])
def test_files_that_are_not_tables_are_refused(content, mode, tmp_path):
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(content)
    with pytest.raises(vqrs.TableCorruptError, match=r"foreign\.safetensors"):
        vqrs.open(path, mode=mode)


def test_safetensors_of_others_are_refused_with_the_way_out(tmp_path):
    from safetensors.numpy import save_file

    save_file({"weight": np.ones((3, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(vqrs.TableCorruptError, match=r"not a vqrs table.*vqrs compress"):
        vqrs.open(tmp_path / "model.safetensors")


def change_tensor(name: str, **values):
    return lambda tensors: tensors[name].update(values)


EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}

HOSTILE = {
    "overlap": change_tensor("codebooks.0", data_offsets=[0, 48]),
    "hole": change_tensor("codebooks.0", data_offsets=[128, 176]),
    "end before start": change_tensor("codebooks.0", data_offsets=[112, 64]),
    "overflowing offset": change_tensor("codes", data_offsets=[0, 2**64 - 1]),
    "offset beyond 64 bits": change_tensor("codes", data_offsets=[0, 2**64]),
    "negative size": change_tensor("codes", shape=[-1, 1]),
    "overflowing shape": change_tensor("codes", shape=[2**63, 4]),
    "more rows": change_tensor("codes", shape=[21, 1]),
    "wrong type": change_tensor("codes", dtype="F32"),
    "unknown type": change_tensor("codes", dtype="F4"),
    "missing codes": lambda tensors: tensors.pop("codes"),
    "missing codebook": lambda tensors: tensors.pop("codebooks.0"),
    "renamed codebook": lambda tensors: tensors.update({"codebooks.9": tensors.pop("codebooks.0")}),
    "extra tensor of no size": lambda tensors: tensors.update(
        {"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}
    ),
    "unknown field": change_tensor("codes", colour="red"),
    "5000 tensors": lambda tensors: tensors.update({f"t{i}": EMPTY for i in range(5000)}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused(copy, change):
    """Before any checksum is asked: sizes are compared with the file first."""
    size, tensors, metadata = layout(copy)
    change(tensors)
    text = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // 4096) * 4096 - 8)
    copy.write_bytes(header(text) + copy.read_bytes()[size:])
    with pytest.raises(vqrs.TableCorruptError) as refused:
        vqrs.open(copy)
    assert "checksum" not in str(refused.value)


def test_missing_files_and_folders_are_pythons_own_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        vqrs.open(tmp_path / "nowhere.safetensors")
    with pytest.raises((IsADirectoryError, vqrs.TableError), match=tmp_path.name):
        vqrs.open(tmp_path)
    with pytest.raises(FileNotFoundError):
        make_table().save(str(tmp_path / "no" / "folder.safetensors"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(vqrs.TableError, match="not a regular file"):
        vqrs.open(tmp_path / "pipe")


# ---- readers and writers at once -----------------------------------------------------------------------------------

CUT_WHILE_MAPPED = """
import os, sys
import numpy as np, vqrs
path, other = sys.argv[1:]
table, sound = vqrs.open(path), vqrs.open(other)
before = table[:10]
os.truncate(path, 8192)
for name, read in {
    "lookup": lambda: table[[19_999]],
    "decode": lambda: table.to_numpy(),
    "pool": lambda: table.pool(np.array([19_000, 5]), np.array([0])),
    "search": lambda: table.search(before[:1], 3),
    "verify": lambda: table.verify(),
}.items():
    try:
        read()
    except vqrs.TableCorruptError as error:
        assert "cut" in str(error), error
    else:
        raise SystemExit(f"{name} did not notice")
assert sound[:].shape == (50, 6)
print("alive")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not cut files that are mapped")
def test_a_file_cut_while_mapped_does_not_end_the_process(tmp_path):
    paths = [str(tmp_path / name) for name in ("cut.safetensors", "sound.safetensors")]
    make_table(20_000, 64).save(paths[0])
    make_table().save(paths[1])
    program = [sys.executable, "-c", CUT_WHILE_MAPPED, *paths]
    done = subprocess.run(program, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_saving_over_a_mapped_table_leaves_its_rows_alone(tmp_path):
    path = tmp_path / "table.safetensors"
    old, new = make_table(3000, seed=0), make_table(200, seed=1)
    old.save(str(path))
    opened = vqrs.open(path)
    new.save(str(path))
    assert np.array_equal(opened.to_numpy(), old.decode(0, 3000))
    opened.verify()
    assert np.array_equal(vqrs.open(path).to_numpy(), new.decode(0, 200))


def test_a_table_can_be_saved_over_itself(tmp_path):
    path = tmp_path / "table.safetensors"
    make_table().save(str(path))
    content = path.read_bytes()
    table = vqrs.open(path)
    table.save(path)
    assert path.read_bytes() == content
    assert table.to_numpy().tobytes() == vqrs.open(path).to_numpy().tobytes()


def test_concurrent_writers_leave_one_whole_table(tmp_path):
    path = tmp_path / "table.safetensors"
    tables = [make_table(2000, seed=seed) for seed in range(4)]
    failures = []

    def write(table):
        try:
            for _ in range(10):
                table.save(str(path), durable=False)
                vqrs.open(path, verify="full")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=[table]) for table in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    rows = vqrs.open(path, verify="full").to_numpy()
    assert any(np.array_equal(rows, table.decode(0, 2000)) for table in tables)
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.safetensors"]


def test_writing_to_the_array_of_codes_does_not_reach_the_file(tmp_path):
    path = tmp_path / "table.safetensors"
    make_table().save(str(path))
    content = path.read_bytes()
    codes = _core.Table.open(str(path), "header", "mmap").codes()
    codes[:] = 0
    assert path.read_bytes() == content


def test_stale_temporaries_are_swept_and_other_files_are_not(tmp_path):
    stale, other = tmp_path / ".table.safetensors.vqrs-tmp.abc", tmp_path / ".table.safetensors.backup"
    stale.write_bytes(b"x")
    other.write_bytes(b"x")
    make_table().save(str(tmp_path / "table.safetensors"))
    assert not stale.exists()
    assert other.exists()


def test_an_abandoned_writer_leaves_nothing(tmp_path):
    path = tmp_path / "table.safetensors"
    x = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    codec, _ = _core.fit("scalar", {}, x)
    for abandon in (lambda writer: writer.abort(), lambda writer: None):
        writer = _core.TableWriter(str(path), codec)
        writer.write(x)
        abandon(writer)
        del writer
        assert list(tmp_path.iterdir()) == []


def test_a_refused_block_does_not_spoil_what_was_there(tmp_path):
    path = tmp_path / "table.safetensors"
    make_table().save(str(path))
    content = path.read_bytes()
    x = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    codec, _ = _core.fit("scalar", {}, x)
    writer = _core.TableWriter(str(path), codec)
    writer.write(x)
    with pytest.raises(ValueError, match="NaN"):
        writer.write(np.full((1, 4), np.nan, np.float32))
    del writer
    assert path.read_bytes() == content


def test_closed_tables_say_so(tmp_path):
    path = tmp_path / "table.safetensors"
    make_table().save(str(path))
    with vqrs.open(path) as table:
        table[0]
    with pytest.raises(ValueError, match="closed"):
        table[0]


def test_names_and_metadata_of_any_text_survive(tmp_path):
    path = tmp_path / "table.safetensors"
    names = ["", "a", "ä\n\t", "日本語", "a", "x" * 1000]
    metadata = {"": "empty key", "quote": '"\\', "日本": "\u0000"}
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    codec, codes = _core.fit("scalar", {}, x)
    _core.Table.from_codec(codec, codes, errors={"relative": 0.1}, names=names, metadata=metadata).save(str(path))
    table = _core.Table.open(str(path), "full", "mmap")
    assert table.names() == names
    assert table.metadata == metadata
    assert [table.find(name) for name in ("a", "日本語", "nobody")] == [1, 3, None]


def test_golden_script_names_what_is_there():
    """The script and the files tell the same story."""
    text = (DATA / "make_golden.py").read_text()
    assert all(f'"{path.stem}"' in text for path in GOLDEN)
    assert all((DATA / f"{a}.safetensors").exists() for a in stems_in(text))


def stems_in(text: str) -> list[str]:
    words = itertools.chain.from_iterable(line.split('"') for line in text.splitlines())
    return [word for word in words if word.endswith("-v1")]
