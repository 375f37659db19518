"""DICOM slices, RTSTRUCTs, PNG masks and contours.json with headers damaged at random: refused by name, or read right.

Every file is read within a bound on time and memory, whatever its header asks for.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import few_or_many
from support.fuzzing import as_text, mutated, refused
from support.rtstruct import RTSTRUCT, grid, ring

from nnunet_uda.dataset_conversion.chaos import read_png
from nnunet_uda.errors import UDAError
from nnunet_uda.images.dicom import order_series, read_series
from nnunet_uda.images.rtstruct import Structures, rasterise, read_contours_json, read_rtstruct

MANY = few_or_many(150, 2000)
MEMORY = 300 * 2**20
"""Bytes that reading may take beyond what the process has: nothing here is larger than 100 kB."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Element = tuple[int, bytes, "bytes | list[list[Element]]"]
"""Tag, VR, and the value's bytes or the items of a sequence."""

STRANGE = [
    b"", b"  ", b"abc ", b"1\\2 ", b"1\\2\\3\\4\\5\\6\\7\\8 ", b"\\ ", b"1e19", b"1E300 ", b"-1e300", b"nan ", b"inf ",
    b"0 ", b"-1", b"1.5 ", b"9" * 400, b"1e-320", b"0\\0\\0 ", b"\xff\xfe\xfd\xfc", b"\0" * 6, b"\0\x80", b"\xff\xff",
    b"\1\0", b"\3\0", "ä€".encode(), b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.5 ", b"x" * 70000, b"../../x ",
    b"\x1b[31m\n", struct.pack("<I", 2**31), struct.pack("<d", float("nan")), struct.pack("<d", 1e300),
]  # fmt: skip
VRS = (b"ZZ", b"UN", b"SQ", b"OB", b"OW", b"DS", b"IS", b"US", b"UL", b"FD", b"AT", b"UI", b"PN", b"LO", b"\0\0", b"??")
LONG = (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC", b"UR", b"OF", b"OD")
SYNTAXES = (
    b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99",
    b"1.2.840.10008.1.2.5", b"1.2.840.10008.1.2.4.70", b"1.2.840.10008.1.2.4.90", b"1.2.840.113619.5.2",
    b"1.2.840.10008.1.1", b"1.2.3", b"none", b"", b"\xff\xfe", b"1\\2", b"1" * 70,
)  # fmt: skip


def slice_elements(z: int) -> list[Element]:
    """A slice of 4 x 4 pixels."""
    return [
        (0x00080016, b"UI", b"1.2.840.10008.5.1.4.1.1.4\0"), (0x00080018, b"UI", b"1.2.%d " % z),
        (0x00080060, b"CS", b"MR"), (0x0008103E, b"LO", b"t1"), (0x00100020, b"LO", b"P1"),
        (0x0020000E, b"UI", b"1.2.3\0"), (0x00200032, b"DS", b"0\\0\\%d " % (2 * z)),
        (0x00200037, b"DS", b"1\\0\\0\\0\\1\\0 "), (0x00280002, b"US", b"\1\0"),
        (0x00280004, b"CS", b"MONOCHROME2 "), (0x00280008, b"IS", b"1 "), (0x00280010, b"US", b"\4\0"),
        (0x00280011, b"US", b"\4\0"), (0x00280030, b"DS", b"1\\1 "), (0x00280100, b"US", b"\x10\0"),
        (0x00280101, b"US", b"\x10\0"), (0x00280102, b"US", b"\x0f\0"), (0x00280103, b"US", b"\0\0"),
        (0x00281052, b"DS", b"-10 "), (0x00281053, b"DS", b"2 "), (0x7FE00010, b"OW", bytes(range(32))),
    ]  # fmt: skip


def structure_elements() -> list[Element]:
    """An RTSTRUCT of one structure of three circles."""
    contours: list[list[Element]] = []
    for shift in range(3):
        points = ring(grid(), 5, corners=8, shift=shift).points
        data = "\\".join(f"{v:.3f}" for v in points.ravel()).encode()
        contours.append(
            [(0x30060042, b"CS", b"CLOSED_PLANAR "), (0x30060046, b"IS", b"8 "), (0x30060050, b"DS", even(data))]
        )
    series = [[(0x0020000E, b"UI", b"1.2.3\0")]]
    return [
        (0x00080016, b"UI", even(RTSTRUCT.encode())), (0x00080060, b"CS", b"RTSTRUCT"), (0x00100020, b"LO", b"P1"),
        (0x30060010, b"SQ", [[(0x30060012, b"SQ", [[(0x30060014, b"SQ", series)]])]]),
        (0x30060020, b"SQ", [[(0x30060022, b"IS", b"1 "), (0x30060026, b"LO", b"TV")]]),
        (0x30060039, b"SQ", [[(0x30060040, b"SQ", contours), (0x30060084, b"IS", b"1 ")]]),
    ]  # fmt: skip


def even(value: bytes) -> bytes:
    return value + b" " * (len(value) % 2)


def encoded(elements: list[Element], rng: random.Random, lies: float = 0.0) -> bytes:
    """Elements in explicit VR little endian; with probability ``lies`` a length is not the value's."""
    out = b""
    for tag, vr, value in elements:
        if isinstance(value, bytes):
            body = value
        else:
            items = [encoded(item, rng, lies) for item in value]
            body = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item for item in items)
        length = len(body)
        if rng.random() < lies:
            length = rng.choice((0, 1, 2, length + 2, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF))
        long = vr in LONG or length > 0xFFFF
        out += struct.pack("<HH", tag >> 16, tag & 0xFFFF) + (b"UN" if long and vr not in LONG else vr)
        out += (struct.pack("<HI", 0, length) if long else struct.pack("<H", length)) + body
    return out


def dicom_file(elements: list[Element], rng: random.Random, syntax: bytes = SYNTAXES[0], lies: float = 0.0) -> bytes:
    meta = encoded([(0x00020010, b"UI", even(syntax))], rng)
    meta = encoded([(0x00020000, b"UL", struct.pack("<I", len(meta)))], rng) + meta
    return bytes(128) + b"DICM" + meta + encoded(elements, rng, lies)


def lists_of(elements: list[Element]) -> Iterator[list[Element]]:
    yield elements
    for _, _, value in elements:
        for item in value if isinstance(value, list) else ():
            yield from lists_of(item)


def damaged(make: Callable[[], list[Element]], rng: random.Random) -> bytes:
    """A file with one to three faults in its elements, its transfer syntax, its lengths or its bytes."""
    elements, syntax, lies = make(), SYNTAXES[0], 0.0
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        held = rng.choice([part for part in lists_of(elements) if part])
        at = rng.randrange(len(held))
        tag, vr, value = held[at]
        action = rng.choice(
            ("value",) * 6 + ("vr", "vr", "remove", "double", "twice", "syntax", "lies", "order", "tag")
        )
        if action == "value":
            held[at] = (tag, vr, rng.choice(STRANGE))
        elif action == "vr":
            held[at] = (tag, rng.choice(VRS), value)
        elif action == "remove":
            del held[at]
        elif action == "double":
            held.insert(at, (tag, vr, rng.choice(STRANGE)))
        elif action == "twice" and isinstance(value, bytes):
            held[at] = (tag, vr, value + value)
        elif action == "twice":
            held[at] = (tag, vr, [*value, *value])
        elif action == "syntax":
            syntax = rng.choice(SYNTAXES)
        elif action == "lies":
            lies = 0.1
        elif action == "tag":
            held[at] = (rng.choice((tag ^ 1 << rng.randrange(32), 0x00090010, 0xFFFEE00D)), vr, value)
        else:
            rng.shuffle(held)
    content = bytearray(dicom_file(elements, rng, syntax, lies))
    kind = rng.random()
    if kind < 0.1:
        del content[rng.randrange(len(content)) :]
    elif kind < 0.25:
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


@pytest.fixture(autouse=True)
def little_memory():
    """The test's peak of resident memory stays within ``MEMORY`` of what the process had before."""
    if not CLEAR.exists():
        yield
        return
    CLEAR.write_text("5")
    before = peak()
    yield
    assert peak() - before < MEMORY


def peak() -> int:
    return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))


def refused_by_name(read: Callable[[], object], path: Path, content: bytes) -> bool:
    """``refused`` with a message of one line that names the file."""

    def attempt() -> None:
        try:
            read()
        except UDAError as error:
            assert path.name in str(error) and str(error).isprintable() and len(str(error)) < 1500
            raise

    return refused(attempt, content)


@MANY
def test_dicom_slices(tmp_path, count):
    rng = random.Random(0)
    for z in range(2):
        (tmp_path / f"{z}.dcm").write_bytes(dicom_file(slice_elements(z), rng))

    def read() -> None:
        image, series = read_series(tmp_path), order_series(tmp_path)
        assert np.isfinite(sitk.GetArrayViewFromImage(image)).all()
        assert len(series.slices) == image.GetSize()[2] == 2 and np.isfinite(image.GetOrigin()).all()

    assert not refused(read, "undamaged")
    bad = 0
    for _ in range(count):
        content = damaged(lambda: slice_elements(1), rng)
        (tmp_path / "1.dcm").write_bytes(content)
        bad += refused_by_name(read, tmp_path, content)
    assert 0.5 < bad / count < 0.95


def draw(structures: Structures) -> None:
    image = grid()
    for _, contours in structures.named:
        rasterise(contours, image, structures.path)


@MANY
def test_rtstructs(tmp_path, count):
    rng, path = random.Random(1), tmp_path / "RTSS.dcm"
    path.write_bytes(dicom_file(structure_elements(), rng))
    assert len(read_rtstruct(path).named[0][1]) == 3
    assert not refused(lambda: draw(read_rtstruct(path)), "undamaged")
    bad = 0
    for _ in range(count):
        content = damaged(structure_elements, rng)
        path.write_bytes(content)
        bad += refused_by_name(lambda: draw(read_rtstruct(path)), path, content)
    assert 0.3 < bad / count < 0.95


@MANY
def test_contours_json(tmp_path, count):
    rng, path = random.Random(2), tmp_path / "contours.json"
    content = [{"structure_name": "TV", "LPS_contour_points": [ring(grid(), 5, corners=6).points.tolist()] * 2}]

    def read() -> None:
        draw(read_contours_json(path))

    path.write_text(json.dumps(content))
    assert not refused(read, "undamaged")
    bad = 0
    for _ in range(count):
        path.write_bytes(as_text(mutated(content, rng), rng))
        bad += refused_by_name(read, path, path.read_bytes())
    assert 0.3 < bad / count < 0.98


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@MANY
def test_png_masks(tmp_path, count):
    rng, path = random.Random(3), tmp_path / "mask.png"
    pixels, text = zlib.compress(b"".join(b"\0" + bytes(8) for _ in range(8))), zlib.compress(bytes(10**6))

    def read() -> None:
        assert read_png(path).dtype == np.uint8

    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b"")]
    path.write_bytes(png(chunks))
    assert not refused(read, "undamaged")
    bad = 0
    for _ in range(count):
        sizes = (8, 8, 8, 0, 1, 7, 9, 255, 8193, 65536, 2**31 - 1, 2**31, 2**32 - 1)
        header = struct.pack(
            ">IIBBBBB", rng.choice(sizes), rng.choice(sizes), rng.choice((8, 8, 1, 2, 4, 16, 3, 255)),
            rng.choice((0, 0, 0, 2, 3, 4, 6, 9)), rng.choice((0, 0, 0, 1)), 0, rng.choice((0, 0, 1, 2)),
        )  # fmt: skip
        more = rng.choice((
            (), (), ((b"PLTE", rng.randbytes(rng.choice((3, 4, 768, 1000)))),), ((b"tRNS", rng.randbytes(3)),),
            ((b"zTXt", b"a\0\0" + text),), ((b"iCCP", b"a\0\0" + rng.randbytes(50)),),
        ))  # fmt: skip
        content = bytearray(png([(b"IHDR", header), *more, *chunks[1:]]))
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        elif rng.random() < 0.3:
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        bad += refused_by_name(read, path, bytes(content))
    assert 0.5 < bad / count < 0.98
