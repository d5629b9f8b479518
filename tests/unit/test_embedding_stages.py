"""The stages of embedding in this process: what is read, refused, encoded and stored, item by item."""

import io
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.corpus import corpus_of, write_plan
from pipelines.embedding.encode import EncodePieces, encoding_threads
from pipelines.embedding.flow import PLAN, Flow
from pipelines.embedding.models import adapter_configs, new_flow
from pipelines.embedding.pieces import Piece, is_failure
from pipelines.embedding.prepare import prepare, prepared_pieces, quarantined_rows, size_of
from pipelines.embedding.seal import require_same_items
from pipelines.embedding.write import data_table, errors_table
from pipelines.failures import raise_failure
from pipelines.loading import backbone_of, untrained_latents
from pipelines.recipe import Recipe, ResourcesConfig
from slq.arrow import ITEMS
from slq.artifacts import save_adapter
from slq.backbones import Backbone
from slq.encoder import Encoder
from slq.errors import ArtifactError, ArtifactMismatchError, ConfigError, DataError, HardwareError
from slq.media import decode_image
from slq.quantization import calibrate, cut, to_bits, to_int8
from tests.integration.runs import changed, with_untrained_adapter

FP32 = 1e-5
Rows = list[dict[str, Any]]


def png(shade: int, size: tuple[int, int] = (24, 24)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 90, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def texts(count: int) -> Rows:
    return [{"id": f"t{n}", "text": "a red fox " * (1 + n % 7) + str(n)} for n in range(count)]


@pytest.fixture
def flow_over(tiny_run: Recipe, tmp_path: Path) -> Callable[..., Flow]:
    """A run over a Parquet file of these rows, planned as one shard."""

    def build(rows: Rows, **settings: Any) -> Flow:
        pq.write_table(pa.Table.from_pylist(rows, schema=ITEMS), tmp_path / "c.parquet")
        recipe = changed(
            tiny_run,
            data={"corpus": str(tmp_path / "c.parquet")},
            embed={"shard_rows": 10_000, **settings},
        )
        recipe = with_untrained_adapter(recipe)
        folder = Path(recipe.storage.embeddings)
        folder.mkdir(parents=True, exist_ok=True)
        write_plan(corpus_of(recipe).shards(10_000), folder / PLAN)
        return new_flow(recipe, adapter_configs(recipe))

    return build


def encoded(flow: Flow) -> list[Piece]:
    stage = EncodePieces(flow)
    return [stage.encoded(piece) for piece in prepared_pieces(flow, 0)]


def vectors_of(flow: Flow) -> dict[str, NDArray[np.float32]]:
    """id -> (adapters, hidden) float32 of the whole flow."""
    found = {}
    for piece in encoded(flow):
        good = [row["id"] for row in piece.rows.to_pylist() if row["error"] is None]
        if good:
            assert piece.vectors is not None
            found |= {name: piece.vectors[:, n] for n, name in enumerate(good)}
    return found


def reasons(flow: Flow) -> dict[str, tuple[str, str]]:
    """id -> (stage, error) of the quarantined rows."""
    return {
        row["id"]: (row["stage"], row["error"])
        for piece in encoded(flow)
        for row in errors_table(piece).to_pylist()
    }


def test_vectors_are_those_of_the_encoder_whatever_the_batches(
    flow_over: Callable[..., Flow],
) -> None:
    rows = texts(40)
    rows += [{"id": f"i{n}", "image": png(20 * n, (24 + n, 40)), "text": None} for n in range(9)]
    rows += [{"id": "both", "image": png(3), "text": "a fox"}]
    flow = flow_over(rows, piece_rows=17, batch_size=5, batch_tokens=300)
    encoder = Encoder.from_pretrained(flow.recipe.storage.adapter)
    inputs = [
        {name: row[name] for name in ("text", "image") if row.get(name) is not None} for row in rows
    ]
    alone = np.concatenate([encoder.encode([one]) for one in inputs])
    found = vectors_of(flow)
    assert list(found) == [row["id"] for row in rows]
    ours = np.concatenate(list(found.values()))
    np.testing.assert_allclose(ours, alone, rtol=0, atol=FP32)


def test_a_deterministic_run_gives_an_item_the_same_bits_whatever_stands_beside_it(
    flow_over: Callable[..., Flow],
) -> None:
    rows = [*texts(12), {"id": "i", "image": png(9), "text": None}]
    try:
        together = vectors_of(flow_over(rows, deterministic=True))
        for row in (rows[0], rows[7], rows[12]):
            alone = vectors_of(
                flow_over([{"image": None, "text": None, **row}], deterministic=True)
            )
            np.testing.assert_array_equal(alone[row["id"]], together[row["id"]])
    finally:
        torch.use_deterministic_algorithms(False)


def test_pieces_are_bounded_by_rows_and_bytes_and_the_last_one_says_so(
    flow_over: Callable[..., Flow],
) -> None:
    flow = flow_over(texts(40), piece_rows=16)
    pieces = list(prepared_pieces(flow, 0))
    assert [piece.rows.num_rows for piece in pieces] == [16, 16, 8]
    assert [(piece.number, piece.last) for piece in pieces] == [(0, False), (1, False), (2, True)]
    assert [row for piece in pieces for row in piece.rows["row"].to_pylist()] == list(range(40))
    images = [{"id": f"{n}", "image": png(n)} for n in range(20)]
    one = sum(t.nbytes for t in flow.builder().tokenised([_item(images[0])])[0].vision.values())
    flow = flow_over(images, piece_bytes=3 * one)
    assert [piece.rows.num_rows for piece in prepared_pieces(flow, 0)] == [3] * 6 + [2]


def _item(row: dict[str, Any]) -> Any:
    from slq.schema import Item

    return Item(image=decode_image(row["image"]))


def test_the_same_shard_gives_the_same_pieces_to_the_last_byte(
    flow_over: Callable[..., Flow],
) -> None:
    flow = flow_over([*texts(30), {"id": "i", "image": png(1), "text": None}], piece_rows=9)
    first, second = ([piece.to_block() for piece in prepared_pieces(flow, 0)] for _ in range(2))
    assert all(one.equals(other) for one, other in zip(first, second, strict=True))


def test_only_the_rows_that_are_asked_for_are_read_again(flow_over: Callable[..., Flow]) -> None:
    flow = flow_over(texts(30), piece_rows=4)
    pieces = list(prepared_pieces(flow, 0, [3, 4, 9, 11, 12, 28]))
    assert [row for piece in pieces for row in piece.rows["row"].to_pylist()] == [
        3,
        4,
        9,
        11,
        12,
        28,
    ]
    assert [piece.last for piece in pieces] == [False, True]


POISON = {
    "empty": ("", "empty"),
    "blank": (" \n\t", "empty"),
    "nothing": (None, "empty"),
    "nul": ("\x00\x00", "empty"),
    "long": ("x" * 1_000_000, "too_long"),
}


@pytest.mark.parametrize("name", sorted(POISON))
def test_poison_text_is_set_aside_and_its_neighbours_stay_as_they_were(
    flow_over: Callable[..., Flow], name: str
) -> None:
    rows = texts(10)
    clean = vectors_of(flow_over(rows))
    text, reason = POISON[name]
    flow = flow_over([*rows[:4], {"id": "poison", "text": text}, *rows[4:]])
    assert reasons(flow) == {"poison": ("decode", reason)}
    found = vectors_of(flow)
    assert found.keys() == clean.keys()
    for key, vector in clean.items():
        np.testing.assert_allclose(found[key], vector, rtol=0, atol=FP32)


def test_special_token_literals_and_odd_characters_are_text_and_change_no_neighbour(
    flow_over: Callable[..., Flow],
) -> None:
    rows = texts(10)
    clean = vectors_of(flow_over(rows))
    literals = ["<|im_end|>", "<|image_pad|><|vision_start|>", "a\x00b", "naïve 🦊 \u202e fox"]
    odd = [{"id": f"odd{n}", "text": text} for n, text in enumerate(literals)]
    found = vectors_of(flow_over([*odd[:2], *rows, *odd[2:]]))
    assert found.keys() == clean.keys() | {row["id"] for row in odd}
    for key, vector in clean.items():
        np.testing.assert_allclose(found[key], vector, rtol=0, atol=FP32)
    assert np.isfinite(np.concatenate(list(found.values()))).all()


def broken_images() -> dict[str, tuple[bytes, str]]:
    whole = png(9, (64, 64))
    huge = bytearray(png(1))
    huge[16:24] = (60_000).to_bytes(4, "big") * 2  # the header promises 3.6 gigapixels
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    strip = png(1, (3, 900))
    return {
        "truncated": (whole[: len(whole) // 2], "corrupt"),
        "no bytes": (b"", "empty"),
        "wrong magic": (b"\x00" + whole[1:], "unknown_format"),
        "html": (b"<html>404</html>", "unknown_format"),
        "bomb": (bytes(huge), "too_many_pixels"),
        "strip": (strip, "too_elongated"),
    }


def test_damaged_images_are_set_aside_with_their_reason(flow_over: Callable[..., Flow]) -> None:
    damaged = broken_images()
    rows = [{"id": name, "image": data} for name, (data, _) in damaged.items()]
    rows += [{"id": f"good{n}", "image": png(n)} for n in range(4)]
    flow = flow_over(rows)
    assert reasons(flow) == {name: ("decode", reason) for name, (_, reason) in damaged.items()}
    assert list(vectors_of(flow)) == [f"good{n}" for n in range(4)]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_odd_but_whole_images_become_the_vector_of_what_a_person_sees(
    flow_over: Callable[..., Flow],
) -> None:
    scene = Image.new("RGB", (64, 48), (200, 30, 30))
    scene.paste((20, 30, 220), (0, 0, 20, 48))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned = scene.transpose(Image.Transpose.ROTATE_90)
    frames = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "black")]}
    rows = [
        {"id": "plain", "image": saved(scene, "PNG")},
        {"id": "rotated", "image": saved(turned, "PNG", exif=exif)},
        {"id": "animated", "image": saved(scene, "WEBP", lossless=True, **frames)},
        {
            "id": "palette",
            "image": saved(scene.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        },
        {"id": "alpha", "image": saved(scene.convert("RGBA"), "PNG")},
        {"id": "cmyk", "image": saved(scene.convert("CMYK"), "JPEG", quality=95)},
        {"id": "deep", "image": saved(Image.new("I;16", (64, 48), 40_000), "PNG")},
    ]
    found = vectors_of(flow_over(rows))
    for name in ("rotated", "animated", "palette", "alpha"):
        np.testing.assert_allclose(found[name], found["plain"], rtol=0, atol=FP32)
    assert float((found["cmyk"] * found["plain"]).sum()) > 0.9  # JPEG shifts colours a little
    assert np.isfinite(found["deep"]).all()


# ---- a model that fails ----


def refusing(monkeypatch: pytest.MonkeyPatch, refused: Callable[[list[int]], bool]) -> None:
    """The real backbone, but its pass raises on some token sequences."""
    genuine = Backbone.prefix

    def prefix(self: Backbone, prompts: Any, *rest: Any) -> Any:
        for ids, mask in zip(prompts.input_ids, prompts.mask, strict=True):
            if refused(ids[mask].tolist()):
                raise ValueError("absolute aspect ratio must be smaller than 200")
        return genuine(self, prompts, *rest)

    monkeypatch.setattr(Backbone, "prefix", prefix)


def test_a_row_that_the_model_refuses_is_set_aside_and_its_neighbours_are_encoded(
    flow_over: Callable[..., Flow], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = texts(20)
    flow = flow_over(rows)
    clean = vectors_of(flow)
    builder = flow.builder()
    guilty = {tuple(builder.tokenised([_text(rows[n]["text"])])[0].ids) for n in (3, 17)}
    refusing(monkeypatch, lambda ids: tuple(ids) in guilty)
    assert reasons(flow) == dict.fromkeys(("t3", "t17"), ("encode", "model_refused"))
    found = vectors_of(flow)
    assert found.keys() == clean.keys() - {"t3", "t17"}
    for key, vector in found.items():
        np.testing.assert_allclose(vector, clean[key], rtol=0, atol=FP32)


def _text(text: str) -> Any:
    from slq.schema import Item

    return Item(text=text)


def test_a_model_that_refuses_everything_stops_the_run_instead_of_emptying_it(
    flow_over: Callable[..., Flow], monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = flow_over(texts(5))
    refusing(monkeypatch, lambda _: True)
    with pytest.raises(ValueError, match="aspect ratio"):
        encoded(flow)


def test_memory_that_ran_out_is_no_rows_fault_and_the_way_out_is_told(
    flow_over: Callable[..., Flow], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    flow = flow_over(texts(5))
    stage = EncodePieces(flow)
    (piece,) = prepared_pieces(flow, 0)
    monkeypatch.setattr(Backbone, "prefix", no_memory)
    block = stage(piece.to_block())
    assert is_failure(block)
    with pytest.raises(
        HardwareError, match=r"batch of 2 items and \d+ tokens: CUDA .* lower embed\.batch_tokens"
    ):
        raise_failure(block.to_pylist()[0])


def test_a_vector_that_is_not_finite_is_never_stored(flow_over: Callable[..., Flow]) -> None:
    flow = flow_over(texts(3))
    (piece,) = encoded(flow)
    assert piece.vectors is not None
    piece.vectors[0, 1, 5] = np.nan
    with pytest.raises(
        DataError, match=r"1 vectors without unit norm, first that of 't1': is backbone\.dtype"
    ):
        data_table(piece, flow)


def test_an_adapter_of_another_type_of_weights_is_refused_by_the_actor(
    flow_over: Callable[..., Flow],
) -> None:
    from dataclasses import replace

    flow = flow_over(texts(3))
    other = replace(flow, recipe=changed(flow.recipe, backbone={"dtype": "bfloat16"}))
    block = EncodePieces(other)(next(prepare(_asked(), other)))
    with pytest.raises(ArtifactMismatchError, match="backbone name, revision and dtype"):
        raise_failure(block.to_pylist()[0])


def test_who_prepares_yields_to_who_encodes(
    flow_over: Callable[..., Flow], priorities: list[tuple[int, ...]]
) -> None:
    assert list(prepare(_asked(), flow_over(texts(3))))
    assert priorities == [(os.PRIO_PROCESS, 0, 19)]


def _asked() -> pa.Table:
    return pa.table({"shard_id": [0], "generation": pa.nulls(1)})


def test_only_one_batch_at_a_time_is_encoded_with_care(
    flow_over: Callable[..., Flow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the death of an actor would count against what its other thread had announced."""
    flow = flow_over(texts(24), piece_rows=12, batch_size=4)
    stage = EncodePieces(flow)
    under_way: set[str] = set()
    most = 0

    class EverythingKills:
        @contextmanager
        def announced(self, work: str) -> Iterator[bool]:
            nonlocal most
            is_batch = len(work.split()) == 3
            under_way.update({work} if is_batch else ())
            most = max(most, len(under_way))
            yield len(work.split()) < 4  # pieces and batches killed before, items did not
            under_way.discard(work)

    monkeypatch.setattr(stage, "_announcer", EverythingKills())
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(stage.encoded, prepared_pieces(flow, 0)))
    assert most == 1
    assert [piece.vectors is not None and piece.vectors.shape[1] for piece in found] == [12, 12]


def test_long_texts_and_wide_columns_fill_a_piece_as_images_do(
    flow_over: Callable[..., Flow],
) -> None:
    rows = [{"id": f"t{n}", "text": "fox " * 500} for n in range(10)]
    sizes = [piece.rows.num_rows for piece in prepared_pieces(flow_over(rows, piece_bytes=1000), 0)]
    assert sizes == [1] * 10  # of 2,000 bytes and more
    assert size_of({"a": "äb", "b": [b"xyz", 1.5, None], "c": {"d": True}}) == 3 + 3 + 8 + 8


def test_a_list_of_rows_that_another_run_has_removed_is_told_in_words(
    flow_over: Callable[..., Flow],
) -> None:
    with pytest.raises(
        ArtifactError, match=r"part-000000\.1\.parquet is gone: another run has read"
    ):
        quarantined_rows(flow_over(texts(2)), 0, 1)


# ---- what is stored ----


def further_adapter(flow: Flow, folder: Path, seed: int, **settings: Any) -> Path:
    recipe = changed(flow.recipe, adapter={"seed": seed, "num_latents": 3, **settings})
    backbone = backbone_of(recipe)
    return save_adapter(folder, backbone, untrained_latents(recipe, backbone))


def test_several_adapters_in_one_pass_give_what_each_gives_alone(
    flow_over: Callable[..., Flow], tmp_path: Path
) -> None:
    rows = [*texts(9), {"id": "i", "image": png(5), "text": None}]
    flow = flow_over(rows)
    folders = {name: further_adapter(flow, tmp_path / name, n) for n, name in enumerate("ab", 5)}
    flow = flow_over(rows, adapters=folders)
    found = vectors_of(flow)
    inputs = [*(row["text"] for row in rows[:9]), {"image": rows[9]["image"]}]
    for number, folder in enumerate([flow.recipe.storage.adapter, *folders.values()]):
        alone = Encoder.from_pretrained(folder).encode(inputs)
        ours = np.stack([vector[number] for vector in found.values()])
        np.testing.assert_allclose(ours, alone, rtol=0, atol=FP32)
    (piece,) = encoded(flow)
    assert [n for n in data_table(piece, flow).column_names if n.startswith("embedding")] == [
        "embedding",
        "embedding_a",
        "embedding_b",
    ]


def test_adapters_that_cannot_share_a_pass_are_refused(
    flow_over: Callable[..., Flow], tmp_path: Path
) -> None:
    flow = flow_over(texts(3))
    folder = further_adapter(flow, tmp_path / "other", 3, prompt="in one word")
    recipe = changed(flow.recipe, embed={"adapters": {"other": folder}})
    with pytest.raises(
        ArtifactMismatchError, match=r"cannot embed in one pass: they differ in prompt"
    ):
        adapter_configs(recipe)


def stored(flow: Flow, name: str) -> NDArray[Any]:
    (piece,) = encoded(flow)
    column = data_table(piece, flow)[name].combine_chunks()
    flat: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), -1)


def test_cut_vectors_are_the_leading_values_at_unit_length(flow_over: Callable[..., Flow]) -> None:
    whole = np.concatenate(list(vectors_of(flow_over(texts(8))).values()))
    short = stored(flow_over(texts(8), dimension=48), "embedding").astype(np.float32)
    assert short.shape == (8, 48)
    np.testing.assert_allclose(short, cut(whole, 48), rtol=0, atol=1e-3)
    with pytest.raises(ConfigError, match="dimension is 500, but the adapter's vectors have 192"):
        flow_over(texts(3), dimension=500)


def test_int8_and_bits_follow_the_one_calibration(flow_over: Callable[..., Flow]) -> None:
    from dataclasses import replace

    outputs = ("float16", "int8", "binary")
    flow = flow_over(texts(20), outputs=outputs)
    vectors = np.concatenate(list(vectors_of(flow).values()))
    ranges = calibrate(vectors[:12])
    flow = replace(flow, calibration=ranges.to_json())
    np.testing.assert_array_equal(stored(flow, "embedding_int8"), to_int8(vectors, ranges))
    np.testing.assert_array_equal(stored(flow, "embedding_bits"), to_bits(vectors, ranges))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_rows_that_are_read_again_must_be_the_same_items() -> None:
    def table(*rows: tuple[int, str]) -> pa.Table:
        columns = [[row for row, _ in rows], [name for _, name in rows]]
        return pa.table([*columns, [3] * len(rows)], names=["row_in_shard", "id", "shard_id"])

    before = table((2, "a"), (5, "b"))
    require_same_items(before, [table((2, "a")), table((5, "b"))])
    with pytest.raises(DataError, match=r"row 2 of shard 3 was item 'a' and is gone"):
        require_same_items(before, [table((5, "b"))])
    with pytest.raises(DataError, match=r"row 7 of shard 3 was item None and is now 'x'"):
        require_same_items(before, [table((2, "a"), (5, "b"), (7, "x"))])
    with pytest.raises(DataError, match=r"row 5 of shard 3 was item 'b' and is now 'c'"):
        require_same_items(before, [table((2, "a")), table((5, "c"))])


@pytest.mark.parametrize(("gpus", "threads"), [(0.0, 1), (1.0, 2), (0.25, 2)])
def test_two_threads_take_turns_at_a_model_only_on_a_gpu(gpus: float, threads: int) -> None:
    assert encoding_threads(ResourcesConfig(gpus_per_worker=gpus)) == threads
