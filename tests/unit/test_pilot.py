"""The pilot's scores against direct calls of encoders, its files, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from jobs.piloting import columns, pilot_markdown
from jobs.report.pilot_plot import write_pilot_plot
from pipelines.loading import backbone_of, untrained_latents
from pipelines.pilot import MOST, Case, pilot, read_case, shipped_case
from pipelines.recipe import Recipe
from slq.artifacts import load_adapter, save_adapter
from slq.encoder import Encoder
from slq.errors import ArtifactError, ConfigError, DataError
from slq.pilot import Cosines
from tests.families import BUILDERS, save
from tests.integration.runs import changed

SEEDS = 3
RECIPE = changed(Recipe(), adapter={"num_latents": 4})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of another seed than those of the draws, in the place of trained ones."""
    recipe = changed(RECIPE, adapter={"seed": 99})
    backbone = backbone_of(recipe)
    return save_adapter(
        tmp_path_factory.mktemp("pilot") / "adapter", backbone, untrained_latents(recipe, backbone)
    )


@pytest.fixture(scope="module")
def case() -> Case:
    return shipped_case()


@pytest.fixture(scope="module")
def result(case: Case, adapter: Path) -> dict[str, Any]:
    return pilot(RECIPE, case, num_seeds=SEEDS, adapter=adapter)


def direct(encoder: Encoder, case: Case) -> np.ndarray:
    return encoder.encode([one.text for one in case.texts]) @ encoder.encode(list(case.images)).T


def test_scores_equal_direct_calls_of_encoders(
    result: dict[str, Any], case: Case, adapter: Path
) -> None:
    backbone = backbone_of(RECIPE)
    draws = [
        direct(
            Encoder(backbone, untrained_latents(changed(RECIPE, adapter={"seed": s}), backbone)),
            case,
        )
        for s in range(SEEDS)
    ]
    methods = result["methods"]
    np.testing.assert_allclose(methods["untrained"]["draws"], draws, atol=2e-6)
    np.testing.assert_allclose(methods["untrained"]["mean"], np.mean(draws, axis=0), atol=2e-6)
    np.testing.assert_allclose(
        methods["untrained"]["spread"], np.std(draws, axis=0, ddof=1), atol=2e-6
    )
    np.testing.assert_allclose(
        methods["last_token"]["draws"], [direct(Encoder(backbone), case)], atol=2e-6
    )
    trained = Encoder(backbone, load_adapter(adapter, backbone))
    np.testing.assert_allclose(methods["slq"]["mean"], direct(trained, case), atol=2e-6)
    assert result["seeds"] == [0, 1, 2]


def test_the_best_image_is_judged_by_what_is_right() -> None:
    draws = np.array(
        [[[0.9, 0.1], [0.2, 0.3], [0.5, 0.4]], [[0.3, 0.4], [0.2, 0.3], [0.5, 0.4]]], np.float32
    )
    told = Cosines(draws).to_json([frozenset({0}), frozenset({0}), frozenset()])
    assert told["best"] == [0, 1, 0]
    assert told["is_right"] == [True, False, None]
    assert told["share_right"] == [0.5, 0.0, None]
    assert Cosines(draws[:1]).to_json([frozenset()] * 3)["spread"] == np.zeros((3, 2)).tolist()


def test_the_table_ticks_right_ones_and_crosses_wrong_ones(result: dict[str, Any]) -> None:
    methods, found = result["methods"], columns(result)
    assert len(found["text"]) == len(result["texts"]) * len(methods)
    for row, (n, name) in enumerate((n, name) for n in range(3) for name in methods):
        means = methods[name]["mean"][n]
        for image, title in enumerate(result["images"]):
            cell = found[f"image: {title}"][row]
            assert cell.startswith(f"{means[image]:.3f}")
            assert ("±" in cell) == (name == "untrained")
            is_best, right = image == int(np.argmax(means)), image in result["texts"][n]["answers"]
            assert (
                cell[-1] == ("\N{CHECK MARK}" if right else "\N{MULTIPLICATION SIGN}")
                if is_best
                else cell[-1].isdigit()
            )
    assert "a single draw is noise" in pilot_markdown(result)


def test_a_text_without_an_answer_gets_a_dot_and_hostile_names_do_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("$x_1$", "a|b"):
        Image.new("RGB", (48, 32), "red" if "x" in name else "blue").save(folder / f"{name}.png")
    (tmp_path / "texts.tsv").write_text("$\\frac{1}$ | red\n\nblue\ta|b, $x_1$\tlook\n")
    case = read_case(tmp_path / "texts.tsv", folder)
    assert [one.answers for one in case.texts] == [frozenset(), frozenset({0, 1})]
    found = pilot(RECIPE, case, num_seeds=2)
    assert found["methods"]["last_token"]["is_right"] == [None, True]
    first = {cells[0] for name, cells in columns(found).items() if name.startswith("image: ")}
    assert sum(cell.endswith("•") for cell in first) == 1
    table = pilot_markdown(found).split("\n\n")[0].splitlines()
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    first_picture = write_pilot_plot(found, case.images, tmp_path / "a.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 600
    assert write_pilot_plot(found, case.images, tmp_path / "b.png").read_bytes() == first_picture


def test_it_works_on_a_folder_with_another_family(tmp_path: Path, case: Case) -> None:
    folder = save(BUILDERS["intern_vl"](), tmp_path / "model")
    found = pilot(changed(RECIPE, backbone={"name": str(folder)}), case, num_seeds=2)
    assert np.isfinite(found["methods"]["untrained"]["draws"]).all()


def refusal(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["pilot", *map(str, arguments)])
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.stderr
    return str(done.stderr)


def test_the_command_writes_picture_table_and_json(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["pilot", "--seeds", "2", "--json", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((tmp_path / "pilot.json").read_text())
    assert (tmp_path / "pilot.png").read_bytes().startswith(b"\x89PNG")
    assert "±" in (tmp_path / "pilot.md").read_text()


def test_a_dry_run_loads_no_model_and_writes_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["pilot", "--dry-run", "--json", "--out", str(tmp_path / "p")])
    assert json.loads(done.stdout)["draws"] == 8
    assert not (tmp_path / "p").exists()


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    assert "--texts and --images go together" in refusal("--texts", tmp_path / "a.tsv")
    assert "--set changes a recipe" in refusal("--set", "adapter.num_latents=2")
    assert "does not exist" in refusal(tmp_path / "none.yaml")


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    folder, texts = tmp_path / "images", tmp_path / "texts.tsv"
    with pytest.raises(ConfigError, match="is no folder"):
        read_case(texts, folder)
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    with pytest.raises(ConfigError, match=r"holds 1 images .* compares 2 to 12"):
        read_case(texts, folder)
    Image.new("RGB", (8, 8)).save(folder / "one.jpg")
    with pytest.raises(ConfigError, match="'one' is the name of two files"):
        read_case(texts, folder)
    (folder / "one.jpg").rename(folder / "two.jpg")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        read_case(texts, folder)
    texts.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        read_case(texts, folder)
    for content, message in {
        "\n \n": "holds 0 texts",
        "a\n" * (MOST + 1): "holds 13 texts",
        "a\tthree\n": "'three' is none of the images; they are one, two",
        "\tone\n": "a line is a text",
        "a\tone\tlevel\tmore\n": "a line is a text",
    }.items():
        texts.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_case(texts, folder)
    texts.write_text("a\n")
    (folder / "two.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"two\.jpg cannot be read"):
        read_case(texts, folder)


def test_a_missing_adapter_is_refused(tmp_path: Path, case: Case, adapter: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no adapter"):
        pilot(RECIPE, case, num_seeds=2, adapter=tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="is incomplete"):
        pilot(RECIPE, case, num_seeds=2, adapter=broken)
