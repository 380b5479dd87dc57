"""Files made to harm: each is loaded in a process of its own, with 1 GB and 10 seconds, and refused in words."""

import itertools
import json
import pickle
import pickletools
import re
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch_bytes as tb
from conftest import GOLDEN, asked_by_line, one_in, some
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

NAME = "transformer.blocks.0.norm_1.weight"


@pytest.fixture(scope="module")
def box():
    """Loads a path in a box; see box.py."""
    with asked_by_line("box.py") as ask:
        yield lambda path, **arguments: json.loads(ask(json.dumps({"path": str(path), **arguments})))


@pytest.fixture
def checkpoint(tmp_path):
    """A directory with the config of a small model, and no weights."""
    shutil.copy(GOLDEN / "hf_default" / "config.json", tmp_path)
    return tmp_path


def arrays():
    return load_file(GOLDEN / "hf_default" / "model.safetensors")


def evil(module, name, *arguments):
    """A pickle that calls a function when it is loaded."""
    return tb.state_dict({NAME: tb.call(tb.name_of(module, name), *map(tb.text, arguments))})


def threefold(depth, content=b"K\x01"):
    """A tuple of three times the tuple before it, and so on: short to write, but without end for hash() and repr()."""
    stream = content * 3 + b"\x87q\x00"
    for i in range(1, depth):
        stream += b"0" + (b"h" + bytes([i - 1])) * 3 + b"\x87q" + bytes([i])
    return stream


STORED = tb.storage("FloatStorage", "0", 32)
REBUILD = tb.name_of("torch._utils", "_rebuild_tensor_v2")
# Multiples of this number have one hash.
COLLIDING = b"".join(b"\x8a\x10" + (i * (2**61 - 1)).to_bytes(16, "little") + b"N" for i in range(2, 60_000))
MARK = "touch marker-of-code-that-ran"
PICKLES = {
    "os.system": (evil("os", "system", MARK), "found os.system, which is not loaded"),
    "builtins.exec": (evil("builtins", "exec", "raise SystemExit"), "found builtins.exec, which is not loaded"),
    "numpy's runstring": (evil("numpy.testing._private.utils", "runstring", MARK), "runstring, which is not loaded"),
    "collections._sys": (evil("collections", "_sys", MARK), "found collections._sys, which is not loaded"),
    "OrderedDict's neighbour": (evil("collections", "OrderedDict.fromkeys", "x"), "OrderedDict.fromkeys, which is not"),
    "torch's own loader": (evil("torch", "load", "x"), "found torch.load, which is not loaded"),
    "memo bomb": (b"\x80\x02Nr" + (2**28).to_bytes(4, "little") + b".", "memo index 268435456 after 3 operations"),
    "bytes bomb": (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".", "expected pickle protocol 2, found 4"),
    "nested marks": (b"\x80\x02" + b"(" * 1_000_000 + b".", "found a damaged one"),
    "no end": (b"\x80\x02}", "damaged"),
    "stack global": (b"\x80\x02X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "found the operation STACK_GLOBAL"),
    "new object": (b"\x80\x02c__main__\nX\n)\x81.", "found __main__.X, which is not loaded"),
    "long text": (b"\x80\x02X" + (70_000).to_bytes(4, "little") + b"a" * 70_000 + b".", "found a text of 70000 charac"),
    "not a dict": (b"\x80\x02K\x01.", "expected tensors under names, found int"),
    "empty": (b"\x80\x02}.", "expected tensors under names, found dict"),
    "a number among tensors": (tb.state_dict({"epoch": b"K\x01"}), "found 1 other things: 'epoch' (int)"),
    "item of a list": (b"\x80\x02](K\x00K\x01u.", "damaged"),
    "state of a storage type": (
        tb.state_dict({NAME: tb.name_of("torch", "FloatStorage") + b"}(" + tb.text("dtype") + b"K\x01ub"}), "damaged",
    ),
    "state of a function": (
        tb.state_dict({NAME: tb.name_of("torch._utils", "_rebuild_tensor_v2") + b"N}(" + tb.text("x") + b"Nu\x86b"}),
        "damaged",
    ),
    "storage that is none": (tb.state_dict({NAME: tb.text("0") + b"Q"}), "expected a storage, found str"),
    "storage without type": (
        tb.state_dict({NAME: tb.tuple_of(tb.text("storage"), b"N", tb.text("0"), b"N", tb.integer(1)) + b"Q"}),
        "expected a storage, found",
    ),
    "hash of a tuple without end": (b"\x80\x02}" + threefold(60) + b"K\x01s.", "keys of a dict, found tuple"),
    "in a list of keys": (b"\x80\x02}(" + threefold(60) + b"Nu.", "keys of a dict, found tuple"),
    "storage without end": (b"\x80\x02" + threefold(60) + b"Q.", "expected a storage, found tuple"),
    "storage of a kind without end": (
        b"\x80\x02" + threefold(60) + b"0(h\x3bh\x3bh\x3bh\x3bh\x3btQ.", "expected a storage, found tuple",
    ),
    "size without end": (
        b"\x80\x02" + tb.call(REBUILD, STORED, b"K\x00", threefold(60), b")") + b".", "found something else in their",
    ),
    "parameter without end": (
        b"\x80\x02" + tb.call(tb.name_of("torch._utils", "_rebuild_parameter"), threefold(60)) + b".",
        "expected a tensor in a parameter, found tuple",
    ),
    "value without end": (tb.state_dict({"x": threefold(60)}), "found 1 other things: 'x' (tuple)"),
    "copies of a dict": (
        b"\x80\x02" + tb.name_of("collections", "OrderedDict") + b"q\x00)Rq\x01("
        + b"".join(tb.integer(i) + b"N" for i in range(50_000)) + b"u0](" + b"h\x00h\x01\x85R" * 1500 + b"e.",
        "expected an OrderedDict without arguments, found 1",
    ),
    "a long size, many times": (
        b"\x80\x02(" + b"K\x01" * 300_000 + b"tq\x00" + REBUILD + b"q\x01](" + b"h\x01h\x00R" * 100_000 + b"e.",
        "a tensor made of 300000 things",
    ),
    "many numbers of one hash": (
        b"\x80\x02}(" + COLLIDING + b"u.",
        "expected texts and small numbers as keys of a dict, found int",
    ),
    "numbers without an end": (b"\x80\x02](" + b"K\x01" * 2_100_000 + b"e.", "found more than 2000000 operations"),
    "a time among tensors": (
        tb.state_dict({"x": tb.call(tb.name_of("datetime", "timedelta"))}), "other things: 'x' (datetime.timedelta)",
    ),
    "os.system in a whole Composer checkpoint": (
        tb.composer(b"}", tb.call(tb.name_of("os", "system"), tb.text(MARK))), "found os.system, which is not loaded",
    ),
    "numpy's neighbour in one": (
        tb.composer(b"}", tb.name_of("numpy.core.multiarray", "fromfile")), "multiarray.fromfile, which is not",
    ),
    "a time in its weights": (
        tb.composer(tb.dict_of({NAME: tb.name_of("datetime", "timedelta")}), b"N"), f"'{NAME}' (datetime.timedelta)",
    ),
    "a tensor with colours": (
        tb.state_dict({"\x1b[31mred": tb.tensor(STORED, (32,))}), r"printable characters for tensors, found '\x1b[31mr",
    ),
    "a long name": (b"\x80\x02c" + b"a\x1b[31m" * 2**20 + b"\nx\n.", "found a\\x1b[31ma\\x1b[31ma"),
    "parameter of nothing": (
        tb.state_dict({NAME: tb.call(tb.name_of("torch._utils", "_rebuild_parameter"), b"N", b"\x88", b"N")}),
        "expected a tensor in a parameter",
    ),
}  # fmt: skip
GEOMETRIES = {
    "beyond the end": (tb.tensor(STORED, (33,)), "does not fit into its storage of 32 numbers"),
    "offset beyond": (tb.tensor(STORED, (1,), offset=32), "does not fit into its storage of 32 numbers"),
    "negative offset": (tb.tensor(STORED, (1,), offset=-1), "expected a tensor's offset, size and stride"),
    "negative size": (tb.tensor(STORED, (-1,), (1,)), "expected a tensor's offset, size and stride"),
    "negative stride": (tb.tensor(STORED, (2,), (-1,)), "expected a tensor's offset, size and stride"),
    "stride 0 bomb": (tb.tensor(STORED, (2**40,), (0,)), "does not fit into its storage of 32 numbers"),
    "product overflow": (tb.tensor(STORED, (2**31, 2**31, 2**31), (0, 0, 0)), "does not fit into its storage"),
    "rank 9": (tb.tensor(STORED, (1,) * 9), "expected a tensor's offset, size and stride"),
    "sizes without strides": (tb.tensor(STORED, (2, 2), (1,)), "expected a tensor's offset, size and stride"),
    "true as a size": (
        tb.call(tb.name_of("torch._utils", "_rebuild_tensor_v2"), STORED, tb.integer(0), b"\x88\x85", b"\x88\x85"),
        "expected a tensor's offset, size and stride",
    ),
    "storage of another length": (tb.tensor(tb.storage("FloatStorage", "0", 31), (1,)), "expected 124 bytes, found 12"),
    "storage that is not there": (tb.tensor(tb.storage("FloatStorage", "7", 1), (1,)), "storage '7' is not in the arc"),
}  # fmt: skip
ONE = {"0": (32, np.ones(32, np.float32).tobytes())}


def assert_refused(answer, message, directory):
    assert answer["outcome"] == "refused", answer
    assert message in answer["message"] and str(directory) in answer["message"]
    assert not Path("marker-of-code-that-ran").exists() and len(answer["message"]) < 2000


@pytest.mark.parametrize(
    ("write", "attack"),
    [*((tb.write_zip, attack) for attack in PICKLES), *one_in(4, [(tb.write_legacy, attack) for attack in PICKLES])],
)
def test_pickles(box, checkpoint, attack, write):
    """One reader is behind both kinds of files."""
    stream, message = PICKLES[attack]
    write(checkpoint / "pytorch_model.bin", stream, ONE if b"Storage" in stream else {})
    assert_refused(box(checkpoint), message, checkpoint)


@pytest.mark.parametrize("attack", GEOMETRIES)
def test_tensors_that_do_not_fit_their_storage(box, checkpoint, attack):
    value, message = GEOMETRIES[attack]
    tb.write_zip(checkpoint / "pytorch_model.bin", tb.state_dict({NAME: value}), ONE)
    assert_refused(box(checkpoint), message, checkpoint)


def numbers(*pairs):
    """Little-endian numbers of so many bytes."""
    return b"".join(value.to_bytes(size, "little") for value, size in pairs)


def zip_with(change):
    """A torch file of the right tensors, with something else wrong."""

    def write(path):
        stream, storages = tb.of_arrays(arrays())
        change(path, stream, storages)

    return write


def twice(path, stream, storages):
    tb.write_zip(path, stream, storages)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", b"x")


def appended(name, content):
    """A torch file with one more member."""

    def write(path, stream, storages):
        tb.write_zip(path, stream, storages)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, content if content is not None else bytes(storages["0"][1]))

    return write


def changed(at, value, size=2, of=b"PK\x03\x04"):
    """A torch file with another number in the header of its first storage, local or in the directory."""

    def write(path, stream, storages):
        tb.write_zip(path, stream, storages)
        data = bytearray(path.read_bytes())
        name = 30 if of == b"PK\x03\x04" else 46
        place = next(m.start() for m in re.finditer(of, data) if data[m.start() + name :].startswith(b"archive/data/0"))
        data[place + at : place + at + size] = value.to_bytes(size, "little")
        path.write_bytes(data)

    return write


def with_nul(path, stream, storages):
    """zipfile takes a name to end there."""
    tb.write_zip(path, stream, storages)
    path.write_bytes(path.read_bytes().replace(b"archive/byteorder", b"archive/byteord\0r"))


def many_members(path, stream, storages):
    """A directory of nothing but names."""
    header = b"PK\x01\x02" + bytes(24) + (6).to_bytes(2, "little") + bytes(16)
    directory = b"".join(header + f"{i:06x}".encode() for i in range(200_000))
    end64 = b"PK\x06\x06" + numbers((44, 8), (45, 2), (45, 2), (0, 4), (0, 4))
    end64 += numbers((200_000, 8), (200_000, 8), (len(directory), 8), (4, 8))
    locator = b"PK\x06\x07" + numbers((0, 4), (4 + len(directory), 8), (1, 4))
    end = b"PK\x05\x06" + numbers((0, 4), (2**32 - 1, 4), (2**32 - 1, 4), (2**32 - 1, 4), (0, 2))
    path.write_bytes(b"PK\x03\x04" + directory + end64 + locator + end)


def of_one_storage(path, stream, storages):
    """Every tensor of a model is a view of the largest one."""
    whole = max(storages.values(), key=lambda storage: storage[0])
    stored = tb.storage("FloatStorage", "0", whole[0])
    entries = {name: tb.tensor(stored, array.shape) for name, array in arrays().items()}
    tb.write_zip(path, tb.state_dict(entries), {"0": whole})


def two_pickles(path, stream, storages):
    tb.write_zip(path, stream, storages)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", stream)


def renamed_inside(path, stream, storages):
    tb.write_zip(path, stream, storages)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"archive/data/3", b"archive/data/4", 1))


def cut(at):
    def write(path, stream, storages):
        tb.write_zip(path, stream, storages)
        path.write_bytes(path.read_bytes()[:at])

    return write


def cut_legacy(at):
    def write(path, stream, storages):
        tb.write_legacy(path, *tb.of_arrays(arrays(), legacy=True))
        path.write_bytes(path.read_bytes()[:at])

    return write


def legacy(**kwargs):
    return lambda path, *_: tb.write_legacy(path, *tb.of_arrays(arrays(), legacy=True), **kwargs)


def other_number(path, stream, storages):
    tb.write_legacy(path, *tb.of_arrays(arrays(), legacy=True))
    path.write_bytes(pickle.dumps(7, protocol=2) + path.read_bytes()[16:])


ARCHIVES = {
    "compressed": (
        lambda *a: tb.write_zip(*a, compression=zipfile.ZIP_DEFLATED), "expected a stored member, found a compressed",
    ),
    "big-endian": (lambda *a: tb.write_zip(*a, byteorder=b"big"), "expected little-endian numbers"),
    "no pickle": (lambda path, *_: zipfile.ZipFile(path, "w").close(), "expected one data.pkl in the archive, found n"),
    "two pickles": (two_pickles, "expected one data.pkl in the archive, found"),
    "two members of one name": (twice, "two members of the archive have one name"),
    "a member outside the root": (appended("data/0", None), "expected every member of the archive in archive/"),
    "a name with a NUL": (with_nul, "archive/byteord\\x00r: the archive's directory and the member's own header dis"),
    "a local header that says compressed": (changed(8, 8), "expected a stored member, found a compressed"),
    "a local header that says encrypted": (changed(6, 1), "expected a stored member, found a compressed or encrypted"),
    "a local header of another size": (changed(18, 7, 4), "archive/data/0: the archive's directory and the member's"),
    "a directory of other sizes": (changed(24, 5, 4, b"PK\x01\x02"), "header disagree"),
    "a directory that says compressed": (changed(10, 8, 2, b"PK\x01\x02"), "expected a stored member, found a compre"),
    "200 000 members": (many_members, "expected an archive with a directory of at most 4194304 bytes, found more"),
    "tensors of one storage": (of_one_storage, "expected tensors of not more than twice the file's"),
    "names that disagree": (renamed_inside, "the archive's directory and the member's own header disagree"),
    "cut in the middle": (cut(20_000), "expected a torch file, found a damaged one"),
    "cut at the end": (cut(-10), "expected a torch file, found a damaged one"),
    "legacy cut in a storage": (cut_legacy(20_000), "or the file's end"),
    "legacy cut in its pickle": (cut_legacy(300), "damaged"),
    "legacy, big-endian": (legacy(system={"little_endian": False}), "expected little-endian numbers"),
    "legacy, keys that are not used": (legacy(keys=["0"]), "are not those that the file lists"),
    "another pickle": (other_number, "damaged"),
    "a tar archive": (lambda path, *_: path.write_bytes(bytes(257) + b"ustar" + bytes(250)), "an older one, a tar arc"),
    "text": (lambda path, *_: path.write_text("hello"), "expected safetensors, a torch file or GGUF, found something"),
    "nothing": (lambda path, *_: path.write_bytes(b""), "expected safetensors, a torch file or GGUF, found something"),
    "a git-lfs pointer": (
        lambda path, *_: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "run `git lfs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ARCHIVES)
def test_archives(box, checkpoint, attack):
    change, message = ARCHIVES[attack]
    zip_with(change)(checkpoint / "pytorch_model.bin")
    assert_refused(box(checkpoint), message, checkpoint)


def header(content, data=b"", length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**keys):
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **keys}}


SAFETENSORS = {
    "header of 2^63 bytes": header({}, length=2**63),
    "header of 200 MB": header({}, length=200_000_000),
    "cut": header(entry(), b"1234"),
    "trailing bytes": header(entry(), bytes(9)),
    "a hole": header(entry(data_offsets=[4, 12]), bytes(12)),
    "overlap": header({**entry(), "y": entry()["x"]}, bytes(8)),
    "shape and bytes disagree": header(entry(shape=[3]), bytes(8)),
    "overflow": header(entry(shape=[2**62, 2**62]), bytes(8)),
    "negative": header(entry(shape=[-2]), bytes(8)),
    "unknown type": header(entry(dtype="F31"), bytes(8)),
    "not JSON": header(b"{" * 50),
    "empty": b"",
    "two entries of one name": header(
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
}


def empties(count, name="{}"):
    """So many tensors without numbers."""
    entries = (f'"{name.format(i)}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    return header(("{" + ",".join(entries) + "}").encode())


# What is in order as far as the format goes, and too much all the same.
TOO_MUCH = {
    "a header of 5 MB": (empties(100_000), "expected a header of at most 4194304 bytes, found 5"),
    "30 000 tensors": (empties(30_000), "expected at most 25000 tensors, found 30000"),
    "24 000 tensors": (empties(24_000), "24000 unexpected: 0 [0] (model.safetensors), 1 [0]"),
    "one name 49 000 times": (empties(49_000, "x"), "duplicate key 'x'"),
    "a name of 201 characters": (empties(1, "x" * 201), f"found '{'x' * 100}…' of 201"),
    "a name with colours": (empties(1, "\\u001b[31mred"), r"printable characters, found '\x1b[31mred'"),
    "a name that is written backwards": (empties(1, "\u202etfel"), r"found '\u202etfel'"),
    "1000 dimensions": (header(entry(shape=[1] * 1000, data_offsets=[0, 4]), bytes(4)), "x: expected at most 8 dimens"),
    "8 bits": (header({NAME: entry(dtype="F8_E4M3", data_offsets=[0, 2])["x"]}, bytes(2)), f"{NAME} (F8_E4M3, model.s"),
}  # fmt: skip


@pytest.mark.parametrize("attack", some(TOO_MUCH, {*TOO_MUCH} - {"30 000 tensors"}))
def test_safetensors_with_too_much(box, checkpoint, attack):
    content, message = TOO_MUCH[attack]
    (checkpoint / "model.safetensors").write_bytes(content)
    assert_refused(box(checkpoint), message, checkpoint)


@pytest.mark.parametrize("attack", SAFETENSORS)
def test_safetensors(box, checkpoint, attack):
    (checkpoint / "model.safetensors").write_bytes(SAFETENSORS[attack])
    assert_refused(box(checkpoint), "expected a safetensors file, found something else or a part", checkpoint)


def test_a_dimension_of_2_to_40_beside_a_0(box, checkpoint):
    held = {name: array for name, array in arrays().items() if name != NAME}
    save_file(held, checkpoint / "rest.safetensors")
    (checkpoint / "wide.safetensors").write_bytes(header({NAME: entry(shape=[2**40, 0], data_offsets=[0, 0])["x"]}))
    index = {name: "rest.safetensors" for name in held} | {NAME: "wide.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_refused(box(checkpoint), f"1 misshaped: {NAME} (expected [32], found [{2**40}, 0]", checkpoint)


HEAD = b"GGUF" + numbers((3, 4), (0, 8))
ARRAY = numbers((1, 8)) + b"a" + numbers((9, 4))
ONE_PLACE = b"".join(numbers((1, 8)) + bytes([i]) + numbers((1, 4), (1000, 8), (0, 4), (0, 8)) for i in range(97, 105))
GGUF = {
    "2^60 entries": (HEAD + numbers((2**60, 8)), f"expected at most 10000 entries in the header, found {2**60}"),
    "2^60 tensors": (b"GGUF" + numbers((3, 4), (2**60, 8), (0, 8)), "expected at most 25000 tensors in the header"),
    "2^60 numbers in an array": (HEAD + numbers((1, 8)) + ARRAY + numbers((4, 4), (2**60, 8)), "the header ends early"),
    "10^6 texts in two arrays": (
        HEAD + numbers((2, 8)) + (ARRAY + numbers((8, 4), (1000, 8)) + bytes(8000))
        + ARRAY + numbers((8, 4), (10**6, 8)) + bytes(8 * 10**6),
        "expected at most 1000000 texts in arrays in the header, found 1001000",
    ),
    "arrays of arrays": (HEAD + numbers((1, 8)) + ARRAY + numbers((9, 4), (1, 8)), "unknown type 9 in an array"),
    "a name of 2^60 characters": (HEAD + numbers((1, 8), (2**60, 8)), "the header ends early"),
    "version 9": (b"GGUF" + numbers((9, 4), (0, 8), (0, 8)), "expected GGUF version 2 or 3, little-endian"),
    "nothing in it": (HEAD + numbers((0, 8)), "expected general.architecture 'mpt', found None"),
    "a name with colours": (
        HEAD + numbers((1, 8), (20, 8)) + b"general.architecture" + numbers((8, 4), (5, 8)) + b"\x1b[31m",
        r"expected general.architecture 'mpt', found '\x1b[31m'",
    ),
    "tensors in one place": (
        b"GGUF" + numbers((3, 4), (8, 8), (1, 8), (20, 8)) + b"general.architecture" + numbers((8, 4), (3, 8)) + b"mpt"
        + ONE_PLACE + bytes(5000),
        "expected tensors of at most the file's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", GGUF)
def test_gguf(box, checkpoint, attack):
    content, message = GGUF[attack]
    (checkpoint / "model.gguf").write_bytes(content)
    answer = box(checkpoint)
    assert_refused(answer, "expected a GGUF file of an MPT, found something else or a part", checkpoint)
    assert message in answer["message"]


@pytest.mark.parametrize(("number", "kind"), [(9, "Q8_1"), (24, "I8"), (25, "I16"), (26, "I32"), (27, "I64")])
def test_gguf_types_that_are_not_read(box, tmp_path, number, kind):
    path = written("gguf", tmp_path / "m")
    data = bytearray(path.read_bytes())
    at = data.index(b"output_norm.weight") + len("output_norm.weight") + 12
    data[at : at + 4] = number.to_bytes(4, "little")
    path.write_bytes(data + bytes(256))
    message = f"1 of another type than float64, float32, float16, bfloat16: transformer.norm_f.weight ({kind}, model.g"
    assert_refused(box(path.parent), message, path.parent)
    shown = box(path.parent, inspect=True)
    assert shown["outcome"] == 1 and f"problem: {message}" in shown["message"]


def test_gguf_with_a_vocabulary(box, checkpoint):
    """As large as any; it is not asked for, and takes no time."""
    from test_formats import write_gguf

    from mpt_eqx import from_pretrained

    def tokens(writer):
        writer.add_token_list([f"token{i}" for i in range(130_000)])
        writer.add_token_types([1] * 130_000)
        writer.add_token_merges(["to ken"] * 130_000)

    write_gguf(checkpoint / "model.gguf", from_pretrained(GOLDEN / "hf_default"), also=tokens)
    assert box(checkpoint)["outcome"] == "loaded"


def tensors(change):
    """Other tensors than the model's: `change` gets them, and returns those for the file."""
    return lambda directory: save_file(change(arrays()), directory / "model.safetensors")


def config(**keys):
    """The model's tensors, under a config.json with other values."""

    def write(directory):
        save_file(arrays(), directory / "model.safetensors")
        content = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(content | keys))

    return write


def text(name, content):
    """The model's tensors, and other text in a file."""

    def write(directory):
        save_file(arrays(), directory / "model.safetensors")
        if name != "config.json":
            (directory / "model.safetensors").rename(directory / "part.safetensors")
        (directory / name).write_text(content)

    return write


def index(content):
    return text("model.safetensors.index.json", content if isinstance(content, str) else json.dumps(content))


def shards(directory):
    """One tensor in both files, and one not where the index says."""
    save_file(arrays(), directory / "a.safetensors")
    save_file({NAME: arrays()[NAME]}, directory / "b.safetensors")
    names = {name: "a.safetensors" for name in arrays()} | {"transformer.norm_f.weight": "b.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def with_one(name, change):
    return tensors(lambda held: held | {name: change(held.get(name, held[NAME]))})


def spoilt(value):
    return with_one(NAME, lambda array: np.where(np.arange(len(array)) == 3, value, array).astype(np.float32))


FINITE = {"check_finite": True}
WTE, HEAD_NAME = "transformer.wte.weight", "lm_head.weight"
# What is there or what config.json says → what the error says, and perhaps arguments of from_pretrained.
ROWS = {
    "a tensor is missing": (tensors(lambda held: {k: held[k] for k in held if k != NAME}), f"1 missing: {NAME} [32]"),
    "a tensor too many": (with_one("extra", lambda array: array), "1 unexpected: extra [32] (model.safetensors)"),
    "a tensor of another name": (
        tensors(lambda held: {k.replace("norm_1", "norm1"): held[k] for k in held}),
        "2 missing: transformer.blocks.0",
    ),
    "a tensor twice, under two names": (
        with_one(f"model.{NAME}", lambda array: array),
        f"1 there twice: model.{NAME} (model.safetensors) and {NAME}",
    ),
    "a tensor twice, in two files": (shards, f"1 there twice: {NAME} (a.safetensors) and {NAME} (b.safetensors)"),
    "a tensor in another file": (shards, "1 tensors not in the file that the index names: transformer.norm_f.weight"),
    "another shape": (with_one(NAME, lambda array: array[:5]), f"1 misshaped: {NAME} (expected [32], found [5]"),
    "transposed": (
        with_one(WTE, lambda array: np.ascontiguousarray(array.T)),
        f"1 misshaped: {WTE} (expected [97, 32]",
    ),
    "whole numbers": (with_one(NAME, lambda array: array.astype(np.int32)), "1 of another type than float64, "),
    "two types": (with_one(NAME, lambda array: array.astype(np.float16)), "pass dtype="),
    "float64": (tensors(lambda held: {k: held[k].astype(np.float64) for k in held}), "which JAX has switched off"),
    "NaN": (spoilt(np.nan), f"model.safetensors: {NAME} holds NaN or infinity", FINITE),
    "infinity": (spoilt(-np.inf), f"model.safetensors: {NAME} holds NaN or infinity", FINITE),
    "NaN after a cast": (spoilt(np.nan), f"model.safetensors: {NAME} holds NaN or", FINITE | {"dtype": "float16"}),
    "another head": (with_one(HEAD_NAME, lambda array: 2 * arrays()[WTE]), f"{HEAD_NAME} differs from {WTE}"),
    "more layers": (config(n_layers=3), "config.json says n_layers 3, the tensors have 2 blocks"),
    "fewer layers": (config(n_layers=1), "config.json says n_layers 1, the tensors have 2 blocks"),
    "1024 layers": (config(n_layers=1024), "config.json says n_layers 1024, the tensors have 2 blocks"),
    "1024 layers of 10^9": (config(n_layers=1024, d_model=2**28, n_heads=2**15), "n_layers 1024, the tensors have 2 b"),
    "another width": (config(d_model=64), "config.json says vocab_size 97 and d_model 64, the embedding is 97 by 32"),
    "another vocabulary": (config(vocab_size=2**30), f"config.json says vocab_size {2**30} and d_model 32, the emb"),
    "biases": (config(no_bias=False), "config.json's no_bias does not fit: there are no tensors norm_1.bias"),
    "other heads": (
        config(attn_config={"attn_type": "multiquery_attention", "alibi": True}),
        "heads of keys and values (attn_type",
    ),
    "a head": (config(tie_word_embeddings=False), "config.json says tie_word_embeddings false, the tensors have no lm"),
    "learned positions": (
        config(attn_config={"alibi": False}),
        "config.json asks for learned positions (learned_pos_emb, no alibi, no",
    ),
    "a config of brackets": (text("config.json", "[" * 100_000), "config.json: expected JSON, found something else"),
    "a config with infinity": (text("config.json", '{"d_model": 1e400}'), "d_model: expected a whole number"),
    "a config with a long number": (
        text("config.json", '{"d_model": ' + "9" * 10**5 + "}"),
        "config.json: expected JSON",
    ),
    "a config with equal keys": (
        text("config.json", "{" + ",".join(f'"{i}":1' for i in range(60_000)) + ',"59999":1}'),
        "duplicate key '59999'",
    ),
    "a config of 2 MB": (text("config.json", " " * 2_000_000), "expected at most 1000000 bytes, found 2000000"),
    "an index that leads out": (
        index({"weight_map": {"x": "../x.safetensors"}}),
        "names of files beside it, found ../x",
    ),
    "an index that leads to the root": (index({"weight_map": {"x": "/etc/passwd"}}), "beside it, found /etc/passwd"),
    "an index with a NUL": (index({"weight_map": {"x": "a\0b"}}), r"names of files beside it, found a\x00b"),
    "an index with a lone surrogate": (index('{"weight_map": {"x": "a\\ud800"}}'), r"beside it, found a\ud800"),
    "an index with colours": (
        index({"weight_map": {"x\x1b[31m": "part.safetensors"}}),
        r"characters, found 'x\x1b[31m'",
    ),
    "an index with a long name": (index({"weight_map": {"x" * 10**6: "part.safetensors"}}), f"found '{'x' * 100}…'"),
    "an index with a long file": (index({"weight_map": {"x": "y" * 10**6}}), f"missing: {'y' * 200}…"),
    "an index without a map": (index({}), "expected a 'weight_map' from tensor names to file names, found None"),
    "an index of a list": (index([]), "expected a JSON object, found list"),
    "an index of lists": (index({"weight_map": [[1] * 10**5]}), "expected a 'weight_map' from tensor names to file"),
    "an index of brackets": (index('{"weight_map":' + "[" * 10**5), "expected JSON, found something else"),
    "an index with equal keys": (index('{"weight_map": {"x": "a", "x": "b"}}'), "duplicate key 'x'"),
    "an index of 5 MB": (index(" " * 5_000_000), "expected at most 4194304 bytes, found 5000000"),
    "an index with too much": (
        index({"weight_map": {f"{i:x}": "part.safetensors" for i in range(140_000)}}),
        "140000 tensors not in the file",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_what_does_not_fit(box, checkpoint, row):
    write, message, *arguments = ROWS[row]
    write(checkpoint)
    assert_refused(box(checkpoint, **(arguments[0] if arguments else {})), message, checkpoint)


# A row, or what is there otherwise → what `inspect` shows, and its exit code.
INSPECTED = {
    "two types": ("problem: the tensors are of several types: ", 1),
    "float64": ("problem: the tensors are float64, which JAX has switched off; pass dtype='float32', or set jax_en", 1),
    "whole numbers": ("problem: 1 of another type than float64, float32, float16, bfloat16: ", 1),
    "more layers": ("problem: config.json says n_layers 3, the tensors have 2 blocks", 1),
    "an index with a lone surrogate": ("error: ", 1),
    "an index with colours": ("error: ", 1),
    "another head": (
        "lm_head tied (lm_head.weight is stored, too; loading checks that it is the same)",
        0,
    ),
}


@pytest.mark.parametrize("row", INSPECTED)
def test_inspect_shows_what_headers_can_show(box, checkpoint, row):
    ROWS[row][0](checkpoint)
    answer = box(checkpoint, inspect=True)
    message, code = INSPECTED[row]
    assert answer["outcome"] == code and message in answer["out"] + answer["message"]
    assert (answer["out"] + answer["message"]).replace("\n", "").isprintable()


def test_columns_that_are_saved_come_back(box, checkpoint):
    save_file(arrays(), checkpoint / "model.safetensors")
    assert box(checkpoint, then="save transposed") == box(checkpoint)


def test_a_file_that_is_cut_while_in_use(box, checkpoint):
    """In place it must stay as it is, or the system ends the process; with mmap=False nothing depends on it."""
    from mpt_eqx import from_pretrained, save_pretrained

    save_pretrained(from_pretrained(GOLDEN / "hf_default"), checkpoint)
    whole = box(checkpoint)
    (weights,) = checkpoint.glob("*.safetensors")
    content = weights.read_bytes()
    assert box(checkpoint, then="cut file", mmap=False) == whole
    weights.write_bytes(content)
    assert box(checkpoint, then="cut file") == {"outcome": "killed", "message": f"wait status {int(signal.SIGBUS)}"}


def test_links_into_a_cache_are_followed(box, checkpoint):
    """As the Hub's cache has it: the name is plain, the file lies elsewhere."""
    shutil.copy(GOLDEN / "hf_default" / "model.safetensors", checkpoint / "blob")
    (checkpoint / "snapshot").mkdir()
    (checkpoint / "snapshot" / "model.safetensors").symlink_to("../blob")
    (checkpoint / "snapshot" / "config.json").symlink_to("../config.json")
    assert box(checkpoint / "snapshot")["outcome"] == "loaded"


def written(kind, directory):
    """A valid checkpoint of each kind; returns its weight file."""
    from test_formats import write_gguf

    from mpt_eqx import from_pretrained

    directory.mkdir()
    source = GOLDEN / "hf_default"
    path = directory / {"safetensors": "model.safetensors", "gguf": "model.gguf"}.get(kind, "pytorch_model.bin")
    if kind == "safetensors":
        shutil.copy(source / "model.safetensors", path)
    elif kind == "gguf":
        write_gguf(path, from_pretrained(source))
    else:
        write = tb.write_zip if kind == "zip" else tb.write_legacy
        write(path, *tb.of_arrays(arrays(), legacy=kind == "legacy"))
    shutil.copy(source / "config.json", directory)
    return path


NUMBERS = (0, 1, 7, 9, 24, 2**20, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
VALUES = (
    None,
    True,
    -1,
    0.5,
    "x",
    "../x",
    "\x1b[2J",
    "y" * 1000,
    [],
    [[]],
    {},
    {"x": 1},
    [2**62, 2**62],
    [0] * 100,
    *NUMBERS,
)
PIECES = (
    *(bytes([code]) for code in b"0()]}.NRbseautQ1"), b"\x85", b"\x86", b"\x87", b"\x81", b"K\x01", tb.integer(2**63),
    *(b"h" + bytes([i]) for i in range(6)), b"q\x03", tb.text("x"), tb.text("storage"), threefold(60),
    *(tb.name_of(*name.split(" ")) for name in ("collections OrderedDict", "os system", "datetime timedelta")),
    *(tb.name_of("torch._utils", name) for name in ("_rebuild_tensor_v2", "_rebuild_parameter")),
    tb.name_of("torch", "FloatStorage"),
)  # fmt: skip


def with_other_bytes(data, random):
    """Somewhere, most at the ends, other bytes, numbers, a piece of another place, or an early end."""
    data = bytearray(data)
    for _ in range(random.randint(1, 4)):
        near, far = min(2500, len(data)), max(0, len(data) - 2500)
        place = random.choice((random.randrange(near), random.randrange(far, len(data)), random.randrange(len(data))))
        match random.randrange(8):
            case 0 | 1 | 2:
                data[place] = random.randrange(256)
            case 3:
                data[place] = (data[place] + random.choice((1, 255, 2, 8))) % 256
            case 4 | 5:
                size = random.choice((2, 4, 8))
                data[place : place + size] = (random.choice(NUMBERS) % 256**size).to_bytes(size, "little")
            case 6:
                start, length = random.randrange(near), random.randint(1, 40)
                data[place : place + length] = data[start : start + length]
            case 7:
                del data[random.randrange(1, len(data)) :]
    return bytes(data)


def with_other_json(text, random):
    """Somewhere in the JSON another value, one less, or one under another name."""
    content = json.loads(text)
    for _ in range(random.randint(1, 3)):
        places, left = [], [content]
        while left:
            inner = left.pop()
            keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
            places += [(inner, key) for key in keys]
            left += [inner[key] for key in keys]
        if not places:
            break
        inner, key = random.choice(places)
        other, other_key = random.choice(places)
        match random.randrange(4):
            case 0 | 1:
                inner[key] = random.choice(VALUES)
            case 2:
                inner[key] = json.loads(json.dumps(other[other_key]))
            case 3:
                value = inner.pop(key)
                if isinstance(inner, dict) and random.random() < 0.5:
                    inner[random.choice(("x", "model." + str(key), "x" * 300, "\ud800"))] = value
    return json.dumps(content).encode()


def with_other_operations(stream, random):
    """Somewhere in the pickle operations that are repeated, left out, exchanged, or put in."""
    ends = [place for _, _, place in pickletools.genops(stream)] + [len(stream)]
    parts = [stream[start:end] for start, end in itertools.pairwise(ends)]
    for _ in range(random.randint(1, 4)):
        at, other = random.randrange(1, len(parts)), random.randrange(1, len(parts))
        match random.randrange(5):
            case 0 | 1:
                parts.insert(at, random.choice(PIECES))
            case 2:
                parts.insert(at, parts[other])
            case 3:
                parts[at], parts[other] = parts[other], parts[at]
            case 4:
                del parts[at]
    return b"".join(parts)


def rewritten(kind, path, random):
    """Writes a file that is in order on the outside, with something else inside."""
    original = path.read_bytes()
    if kind == "safetensors":
        end = 8 + int.from_bytes(original[:8], "little")
        path.write_bytes(header(with_other_json(original[8:end], random), original[end:]))
    elif kind in ("zip", "legacy"):
        stream, storages = tb.of_arrays(arrays(), legacy=kind == "legacy")
        (tb.write_zip if kind == "zip" else tb.write_legacy)(path, with_other_operations(stream, random), storages)
    elif kind == "gguf":
        path.write_bytes(with_other_bytes(original, random))
    else:
        path.write_bytes(with_other_json(original, random))


KINDS = ("safetensors", "zip", "legacy", "gguf", "config.json", "index")


def change_at_random(kind, directory, load, examples):
    """Changes one file of a valid checkpoint so many times: each is refused with our own error, or loaded."""
    if kind == "index":
        shutil.copytree(GOLDEN / "hf_sharded", directory)
        path = directory / "model.safetensors.index.json"
    elif kind == "config.json":
        path = written("safetensors", directory).parent / "config.json"
    else:
        path = written(kind, directory)
    original, whole = path.read_bytes(), load(directory)
    assert whole["outcome"] == "loaded"

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False), st.booleans())
    def fuzz(random, inside):
        # Other files may still be mapped, so that this one is not written to in place.
        path.unlink()
        path.write_bytes(original)
        if inside:
            rewritten(kind, path, random)
        else:
            path.write_bytes(with_other_bytes(original, random))
        answer = load(directory)
        assert answer["outcome"] in ("loaded", "refused"), answer
        assert not Path("marker-of-code-that-ran").exists()
        if path.read_bytes() == original:
            assert answer == whole
        if answer["outcome"] == "refused":
            assert len(answer["message"]) < 3000 and answer["message"].isprintable()

    fuzz()


@pytest.mark.parametrize("kind", KINDS)
def test_files_changed_at_random(tmp_path, kind):
    """Nothing but our own error, and nothing is run. No format has sums over its numbers. A few, in this process."""
    from box import attempt

    change_at_random(kind, tmp_path / "m", lambda directory: attempt(str(directory)), 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_files_changed_at_random(box, tmp_path, kind):
    """The same many times, each with a limit on memory and time."""
    change_at_random(kind, tmp_path / "m", box, 60)
