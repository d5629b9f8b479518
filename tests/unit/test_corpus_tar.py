"""WebDataset tars: samples by key, nothing lost at a damaged end, members that are no samples passed over."""

import io
import tarfile
from pathlib import Path

import pytest

from pipelines.corpus import Record, fetch_image, open_corpus
from slq.errors import DataError
from slq.media import DEFAULT_LIMITS
from tests.corpora import members_of, png, rows, tar_bytes

Members = list[tuple[str, bytes]]


def read(path: Path) -> list[Record]:
    return list(open_corpus(path).all_records())


def written(path: Path, members: Members) -> Path:
    path.write_bytes(tar_bytes(members))
    return path


def test_consecutive_members_with_one_key_are_one_record(tmp_path: Path) -> None:
    members = [
        ("a/001.jpg", b"1"),
        ("a/001.txt", b"one"),
        ("b/001.PNG", b"2"),
        ("./c.v2.x/003.webp", b"3"),
        ("./c.v2.x/003.caption", "drei ü".encode()),
        ("./c.v2.x/003.json", b'{"n": 3}'),
        ("004.txt", b"four"),
        ("005.seg.png", b"a mask"),
        ("005.jpeg", b"5"),
        ("006.cls", b"7"),
    ]
    found = read(written(tmp_path / "c.tar", members))
    assert [(r.id, r.image, r.text, r.columns["json"], r.problem) for r in found] == [
        ("c.tar:a/001", b"1", "one", None, None),
        ("c.tar:b/001", b"2", None, None, None),
        ("c.tar:c.v2.x/003", b"3", "drei ü", '{"n": 3}', None),
        ("c.tar:004", None, "four", None, None),
        ("c.tar:005", b"5", None, None, None),
        ("c.tar:006", None, None, None, None),
    ]
    assert [fetch_image(record.uri) for record in found] == [b"1", b"2", b"3", None, b"5", None]


def test_members_that_are_no_samples_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for name, kind in {
            "folder.d": tarfile.DIRTYPE,
            "link.jpg": tarfile.SYMTYPE,
            "hard.jpg": tarfile.LNKTYPE,
            "pipe.jpg": tarfile.FIFOTYPE,
        }.items():
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/hostname"
            tar.addfile(header)
        for name in ("README", "._001.jpg", "001.jpg"):
            header = tarfile.TarInfo(name)
            header.size = 1
            tar.addfile(header, io.BytesIO(b"x"))
    assert [(r.id, r.image) for r in read(tmp_path / "c.tar")] == [("c.tar:001", b"x")]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_kept(tmp_path: Path, kind: int) -> None:
    name = "/".join(["deep" * 20] * (2 if kind == tarfile.USTAR_FORMAT else 5)) + "/ü.png"
    with tarfile.open(tmp_path / "c.tar", "w", format=kind) as tar:
        header = tarfile.TarInfo(name)
        header.size = 3
        tar.addfile(header, io.BytesIO(b"abc"))
    (record,) = read(tmp_path / "c.tar")
    assert (record.id, record.image) == (f"c.tar:{name.removesuffix('.png')}", b"abc")
    assert fetch_image(record.uri) == b"abc"


def test_a_name_that_is_no_utf8_makes_an_id_that_is(tmp_path: Path) -> None:
    with tarfile.open(
        tmp_path / "c.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT
    ) as tar:
        header = tarfile.TarInfo("ü.png")
        tar.addfile(header)
    (record,) = read(tmp_path / "c.tar")
    assert record.id == r"c.tar:\udcfc"
    record.id.encode()


def test_a_sample_that_cannot_be_used_is_named_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [
        ("a.jpg", b"1"),
        ("a.png", b"2"),
        ("b.txt", b"x"),
        ("b.caption", b"y"),
        ("c.txt", b"\xff"),
        ("d.json", b"\xff"),
        ("e.png", b"x" * 101),
        ("f.png", b"x" * 100),
    ]
    path = written(tmp_path / "c.tar", members)
    limits = type(DEFAULT_LIMITS)(max_bytes=100)
    monkeypatch.setattr("pipelines.corpus.webdataset.DEFAULT_LIMITS", limits)
    found = read(path)
    assert [(record.reason, record.problem) for record in found[:-1]] == [
        ("bad_row", "c.tar:a: it has more than one image, the second in 'a.png'"),
        ("bad_row", "c.tar:b: it has more than one text, the second in 'b.caption'"),
        ("bad_row", "c.tar:c: 'c.txt': byte 0 is no UTF-8"),
        ("bad_row", "c.tar:d: 'd.json': byte 0 is no UTF-8"),
        ("too_many_bytes", "c.tar:e: 'e.png' has 101 bytes; at most 100 are allowed"),
    ]
    assert (found[-1].image, found[-1].problem) == (b"x" * 100, None)


def test_a_sparse_member_is_no_image(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.png")
    header.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    (tmp_path / "c.tar").write_bytes(bytes(block) + bytes(1024))
    (record,) = read(tmp_path / "c.tar")
    assert (record.image, record.reason) == (None, "unreadable")
    assert "is sparse; make the tar without holes" in str(record.problem)


def test_a_tar_that_was_cut_anywhere_is_an_error_and_no_lost_tail(tmp_path: Path) -> None:
    members = members_of(rows(4))
    data = tar_bytes(members)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        end = max(header.offset_data + -(-header.size // 512) * 512 for header in tar)
    path = tmp_path / "c.tar"
    for size in {*range(0, end + 512, 128), *range(512, end, 512), end - 1, end, end + 511}:
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"c\.tar is no whole tar: .*; copy it again"):
            read(path)
    path.write_bytes(data[: end + 512])  # one of the two blocks that end a tar is enough
    assert len(read(path)) == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:1024] + b"\xff" * 512 + data[1536:], "there is no member at byte 1024"),
        (lambda data: data + data, "but the file goes on"),  # two tars in one file
        (lambda data: data + bytes(2**21), "but the file goes on"),  # a copy that was not finished
        (lambda _: bytes(2**21), "but the file goes on"),
        (lambda _: b"no tar at all", "no whole tar"),
        (lambda _: b"\x1f\x8b" + bytes(1000), "no whole tar"),
    ],
)
def test_a_damaged_tar_is_an_error(tmp_path: Path, damage: object, message: str) -> None:
    assert callable(damage)
    path = tmp_path / "c.tar"
    path.write_bytes(damage(tar_bytes([("a.png", b"x"), ("b.png", b"x"), ("c.png", b"x")])))
    with pytest.raises(DataError, match=message):
        read(path)


def test_an_empty_tar_holds_no_record(tmp_path: Path) -> None:
    written(tmp_path / "a.tar", [])
    written(tmp_path / "b.tar", [("a.png", png(1))])
    assert [record.id for record in read(tmp_path)] == ["b.tar:a"]
