"""Corpora of lines: the same rows whatever the shards, bad rows by name, and memory that does not grow."""

import csv
import io
import json
import random
from collections import deque
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.corpus import Record, fetch_image, open_corpus
from pipelines.corpus import lines as module
from slq.errors import DataError
from tests.corpora import png, upload
from tests.traced import with_peaks


def read(path: Path, shard_rows: int = 4096, **columns: str) -> list[Record]:
    return list(open_corpus(path, columns=columns).all_records(shard_rows))


def written(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def problems(found: list[Record]) -> list[str | None]:
    assert all(record.reason == "bad_row" for record in found if record.problem)
    return [record.problem for record in found]


def random_table(seed: int, num_rows: int) -> list[list[str]]:
    """Values with everything that CSV quotes."""
    draw = random.Random(seed)
    letters = ["a", "ü", "\n", "\r\n", ",", '"', '""', " ", "漢", "'", ";", "\t"]
    return [
        [f"i{n}", "".join(draw.choices(letters, k=draw.randrange(12))) + ".", draw.choice(letters)]
        for n in range(num_rows)
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("seed", range(5))
def test_csv_rows_are_those_of_the_standard_parser_for_any_shards(
    tmp_path: Path, seed: int, end: str
) -> None:
    table = random_table(seed, 40)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator=end)
    writer.writerows([["id", "text", "tag"], *table[:20]])
    buffer.write(end)  # a blank line
    writer.writerows(table[20:])
    path = written(tmp_path / "c.csv", buffer.getvalue())
    for shard_rows in (1, 3, 7, 40):
        found = read(path, shard_rows)
        assert [[r.id, r.text, r.columns["tag"]] for r in found] == table
        assert problems(found) == [None] * 40


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_rows_of_any_bytes_are_the_same_for_any_shards(
    tmp_path: Path, seed: int, suffix: str
) -> None:
    draw = random.Random(seed)
    pieces = [b'{"text": "x"}', b"\n", b"\n\n", b"\r\n", b"\xff", b"[1]", b" ", b"\x00", b'"', b"{"]
    data = b'{"text": "x"}\n' + b"".join(draw.choices(pieces, k=200))
    path = written(tmp_path / f"c.{suffix}", data)
    lines = [line for line in data.split(b"\n") if line.strip()]  # another way to count rows
    whole = read(path)
    assert len(whole) == len(lines)
    for shard_rows in (1, 3, 10):
        assert read(path, shard_rows) == whole
    if suffix == "txt":
        good = [(n, line) for n, line in enumerate(lines) if b"\xff" not in line]
        assert [(r.id, r.text) for r in whole if not r.problem] == [
            (f"c.txt:{n}", line.rstrip(b"\r").decode()) for n, line in good
        ]


def test_bytes_of_any_kind_make_the_same_csv_rows_for_any_shards(tmp_path: Path) -> None:
    for seed in range(20):
        draw = random.Random(seed)
        pieces = [b"a", b",", b'"', b"\n", b"\r\n", b"\xff", b"\r", b"\x00"]
        data = b"id,text\n" + b"".join(draw.choices(pieces, k=300))
        path = written(tmp_path / f"{seed}.csv", data)
        whole = read(path)
        for shard_rows in (1, 3, 10):
            assert read(path, shard_rows) == whole


def test_a_bad_row_of_json_lines_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    bad = {
        "[1]": "it is no JSON object, but a list",
        '{"id": ': "it is no JSON: Expecting value",
        '{"id": "e", "text": 5}': "text cannot be 5",
        '{"id": 1.5}': "id cannot be 1.5",
        '{"id": true}': "id cannot be true",
        '{"uri": ["a"]}': r'uri cannot be ["a"]',
        '{"id": "t", "tag": 1.5}': "tag is no int64, which it is in the corpus' first lines",
        '{"id": "t", "tag": "x"}': "tag is no int64",
        '{"tag": 99999999999999999999}': "tag is no int64",
        '{"tag": true}': "tag is no int64",
        '{"share": "x"}': "share is no double",
        '{"words": ["a", 1]}': "words is no list",
        '{"more": {"deep": "x"}}': "more is no struct",
        "[" * 100_000: "it is no JSON",
        "9" * 10_000: "it is no JSON",
    }
    first = {"id": "a", "text": "x", "tag": 1, "share": 0.5, "words": ["w"], "more": {"deep": 1}}
    # the first MiB tells types; what comes behind it is judged by them
    lines = [json.dumps(first), json.dumps({"text": "y" * 2**20}), *bad, json.dumps(first)]
    path = written(tmp_path / "c.jsonl", "\n".join(lines))
    found = read(path)
    assert len(found) == len(lines)
    assert found[0].columns == found[-1].columns == {k: first[k] for k in list(first)[2:]}
    for number, (record, problem) in enumerate(zip(found[2:-1], bad.values(), strict=True), 2):
        assert record.problem is not None
        assert record.problem.startswith(f"row {number} of c.jsonl: {problem}")
        assert record.reason == "bad_row"
    assert [r.id for r in found[4:6]] == ["c.jsonl:4", "c.jsonl:5"]
    assert [r.id for r in found[8:10]] == ["t", "t"]


def test_a_line_that_is_no_utf8_is_a_bad_row(tmp_path: Path) -> None:
    for name, data in {
        "c.jsonl": b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n',
        "c.csv": b"text\na\n\xff\nb\n",
        "c.txt": b"a\n\xff\nb\n",
    }.items():
        found = read(written(tmp_path / name, data))
        assert [record.text for record in found] == ["a", None, "b"]
        assert "is no UTF-8" in str(found[1].problem)


def test_ids_are_kept_or_made_of_file_and_row(tmp_path: Path) -> None:
    data = '{"id": 7, "text": "a"}\n\n{"text": "b"}\n{"id": null, "text": "c"}\n{"id": "", "text": "d"}'
    ids = [record.id for record in read(written(tmp_path / "c.jsonl", data))]
    assert ids == ["7", "c.jsonl:1", "c.jsonl:2", "c.jsonl:3"]
    ids = [record.id for record in read(written(tmp_path / "c.csv", "id,text\n7,a\n,b\n"))]
    assert ids == ["7", "c.csv:1"]


def test_halves_of_surrogate_pairs_do_not_stop_a_row(tmp_path: Path) -> None:
    data = r'{"id": "a\ud83d", "text": "x\uDE00 \ud83d\ude00", "tag": "\ud800"}'
    (record,) = read(written(tmp_path / "c.jsonl", data))
    assert (record.id, record.text, record.columns) == ("a?", "x? 😀", {"tag": "?"})


def test_columns_that_the_first_lines_lack_are_ignored_and_ours_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    rows = [
        {"text": "y" * 2**20, "empty": None, "none": [], "nothing": {}},
        {"uri": "a.png", "x": 1},
    ]
    path = written(tmp_path / "c.jsonl", "\n".join(map(json.dumps, rows)))
    assert open_corpus(path).user_schema() == pa.schema([])
    first, second = read(path)
    assert (first.columns, second.columns, second.image) == ({}, {}, png(1))


def test_whole_numbers_fit_where_fractions_were(tmp_path: Path) -> None:
    path = written(tmp_path / "c.jsonl", '{"text": "a", "n": 1}\n{"text": "b", "n": 0.5}\n')
    assert open_corpus(path).user_schema() == pa.schema([("n", pa.float64())])
    assert problems(read(path)) == [None, None]


def test_the_first_lines_of_all_files_tell_the_types(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", '\n{"text": "a"}\n')
    written(tmp_path / "b.jsonl", '{"text": "b", "n": 1}\n')
    assert open_corpus(tmp_path).user_schema() == pa.schema([("n", pa.int64())])


@pytest.mark.parametrize(
    ("name", "data", "columns", "message"),
    [
        ("c.jsonl", b"", {}, r"none of its first lines is a JSON object; each line must hold one"),
        ("c.jsonl", b'[\n{"text": "a"},\n]', {}, "none of its first lines is a JSON object"),
        ("c.jsonl", b'{"a": 1}', {}, "needs one of `image`, `text`, `uri`"),
        ("c.jsonl", b'{"text": "a", "image": "a.png"}', {}, r"set data\.columns to \{uri: image\}"),
        ("c.jsonl", b'{"text": "a"}', {"id": "key"}, r"no column 'key', which data\.columns names"),
        (
            "c.jsonl",
            b'{"text": "a", "n": 1}\n{"text": "b", "n": "x"}',
            {},
            "the values of n have no common type in the first lines",
        ),
        ("c.jsonl", b"\x1f\x8b\x08\x00", {}, "is compressed with gzip"),
        ("c.csv", b"\x28\xb5\x2f\xfd", {}, "is compressed with zstd"),
        ("c.txt", "x".encode("utf-16"), {}, "is UTF-16; write it as UTF-8"),
        ("c.csv", b"", {}, "is empty"),
        ("c.csv", b"id,text\n", {}, "is empty"),
        ("c.txt", b"\n \n", {}, "is empty"),
        ("c.csv", b"id;text\na;b\n", {}, r"needs one of .* it has \['id;text'\]"),
        ("c.csv", b"text,a,a\n", {}, "has a column twice in its header"),
        ("c.csv", b'"text\n', {}, "the header cannot be read: it is no CSV: unexpected end"),
        ("c.csv", b"\xff\n", {}, "the header cannot be read: byte 0 is no UTF-8"),
        ("c.csv", b"text,image\na,b\n", {}, r"set data\.columns to \{uri: image\}"),
        ("c.csv", b"text\na\n", {"image": "text"}, "which a manifest cannot hold"),
    ],
)
def test_a_file_of_lines_that_cannot_be_used_says_why(
    tmp_path: Path, name: str, data: bytes, columns: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=rf"c\.(jsonl|csv|txt).* ?{message}"):
        read(written(tmp_path / name, data), **columns)


def test_the_image_column_of_a_manifest_may_be_its_uri(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    for name, data in {"c.jsonl": '{"image": "a.png"}', "c.csv": "image\na.png\n"}.items():
        (record,) = read(written(tmp_path / name, data), uri="image")
        assert (record.image, record.columns) == (png(1), {})
        assert fetch_image(record.uri) == png(1)


def test_a_header_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    for name, data in {"c.jsonl": '{"text": "a"}', "c.csv": "text\na\n", "c.txt": "a\n"}.items():
        (record,) = read(written(tmp_path / name, data.encode("utf-8-sig")))
        assert record.text == "a"


def test_files_of_a_folder_must_have_one_header_in_any_order(tmp_path: Path) -> None:
    written(tmp_path / "a.csv", "id,text\n1,x\n")
    written(tmp_path / "b.csv", "text,id\ny,2\n")
    written(tmp_path / "c.csv", "")
    assert [(record.id, record.text) for record in read(tmp_path)] == [("1", "x"), ("2", "y")]
    written(tmp_path / "c.csv", "text,id,tag\ny,2,z\n")
    with pytest.raises(
        DataError, match=r"c\.csv has the columns \['id', 'tag', 'text'\], .* first"
    ):
        read(tmp_path)


def test_bad_rows_of_csv_are_named_and_an_open_quote_costs_few(tmp_path: Path) -> None:
    rows = [f"{n},{'x' * 100}" for n in range(3000)]
    rows[7] = "7,a,b"
    rows[8] = '8,"a"b'
    rows[9] = '9,"never closed'
    found = read(written(tmp_path / "c.csv", "id,text\n" + "\n".join(rows)), 50)
    bad = [record.problem for record in found if record.problem]
    assert bad[:2] == [
        "row 7 of c.csv: it has 3 values for 2 columns",
        "row 8 of c.csv: it is no CSV: ',' expected after '\"'",
    ]
    assert bad[2] == "row 9 of c.csv: it is no CSV: field larger than field limit (131072)"
    assert found[-1].id == "2999"
    lost = 3000 - len(found)
    assert 131_072 / 110 < lost < 131_072 / 100
    assert len(bad) == 3


def test_a_line_that_is_too_long_is_a_bad_row_and_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    for name, header, row in (
        ("c.txt", "", "{}"),
        ("c.jsonl", "", '{{"text": "{}"}}'),
        ("c.csv", "text\n", "{}"),
    ):
        lines = [row.format("x" * n) for n in (5, 80, 1000, 300, 6)]
        path = written(tmp_path / name, header + "\n".join(lines))
        for shard_rows in (1, 2, 10):
            found = read(path, shard_rows)
            assert [len(record.text or "") for record in found] == [5, 80, 0, 0, 6]
            assert "the line has more than 100 bytes" in str(found[2].problem)
        assert read(written(path, header + "\n".join(lines[:4])))[-1].problem


def write_rows(path: Path, num_rows: int) -> Path:
    with path.open("w") as file:
        file.writelines(
            f'{{"id": "{n}", "text": "row {n}", "tag": {n}}}\n' for n in range(num_rows)
        )
    return path


def planned(path: Path) -> None:
    corpus = open_corpus(path)
    corpus.user_schema()
    deque(corpus.shards(1000), maxlen=0)


@pytest.mark.slow
def test_the_memory_of_planning_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    paths = [write_rows(tmp_path / f"{n}.jsonl", n) for n in (100, 100_000, 1_000_000)]
    _, few, many = (peak for _, peak in with_peaks(planned, *((path,) for path in paths)))
    assert many < few + 100_000


def test_a_shard_reads_only_its_own_bytes(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}"} for n in range(10)]
    path = written(tmp_path / "c.jsonl", "\n".join(map(json.dumps, rows)))
    corpus = open_corpus(path)
    shards = list(corpus.shards(3))
    wanted = [list(corpus.records(shard)) for shard in shards]
    assert [shard.end for shard in shards[:-1]] == [shard.offset for shard in shards[1:]]
    data = bytearray(path.read_bytes())
    data[shards[1].offset : shards[1].end] = b"#" * (shards[1].end - shards[1].offset)
    path.write_bytes(data)
    for number in (0, 2, 3):
        assert list(corpus.records(shards[number])) == wanted[number]
    with pytest.raises(DataError, match="shard 1 has 1 rows, 3 were planned; let it rest"):
        list(corpus.records(shards[1]))


def test_a_table_in_a_bucket_is_read_by_ranges(tmp_path: Path, object_store: str) -> None:
    rows: list[dict[str, Any]] = [{"text": "x" * 50_000} for _ in range(200)]  # 10 MB
    written(tmp_path / "c.jsonl", "\n".join(map(json.dumps, rows)))
    corpus = open_corpus(upload(tmp_path, object_store, "c"))
    found = [record.text for record in corpus.all_records(70)]
    assert found == [row["text"] for row in rows]
