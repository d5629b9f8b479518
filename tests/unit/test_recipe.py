"""Recipes: what is wrong is said with file, key and the nearest right one; every shipped recipe loads."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines.recipe import Recipe, load_recipe, require_files
from pipelines.serving.config import ServeConfig
from slq.errors import ConfigError
from slq.reranking.framings import FRAMINGS, PRESETS

SHIPPED = sorted(
    path
    for path in (Path(__file__).parents[2] / "jobs" / "recipes").glob("*.yaml")
    if not path.name.startswith("pretrain_")
)


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_survives_json(path: Path) -> None:
    recipe = load_recipe(path)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_there_are_shipped_recipes() -> None:
    assert {path.name for path in SHIPPED} >= {"demo.yaml", "hub.yaml"}


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    for text in ("", "# nothing\n"):
        loaded, plain = load_recipe(recipe_file(tmp_path, text)), Recipe()
        assert loaded.storage.dir == plain.storage.dir.resolve()
        assert loaded.data.dir == plain.data.dir.resolve()
        folders = {"storage", "data"}
        assert loaded.model_dump(exclude=folders) == plain.model_dump(exclude=folders)


def test_the_folders_of_caches_are_absolute_for_workers_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(tmp_path, "train: {disk_cache: prefixes, vision_cache: ../features}")
    monkeypatch.chdir(tmp_path)
    train = load_recipe(path).train
    assert train.disk_cache == tmp_path.resolve() / "prefixes"
    assert train.vision_cache == tmp_path.resolve().parent / "features"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {num_step: 4}",
            "mine.yaml: train.num_step is unknown; did you mean train.num_steps?",
        ),
        ("tran: {lr: 1}", "mine.yaml: tran is unknown; did you mean train?"),
        (
            "data: {scenes: {trian: 4}}",
            "mine.yaml: data.scenes.trian is unknown; did you mean data.scenes.train?",
        ),
    ],
)
def test_an_unknown_key_names_the_file_and_the_nearest_key(
    tmp_path: Path, text: str, message: str
) -> None:
    assert refusal(recipe_file(tmp_path, text)) == message


def test_an_unknown_key_that_resembles_nothing_lists_the_known_ones(tmp_path: Path) -> None:
    text = refusal(recipe_file(tmp_path, "rerank: {zzzzzz: 4}"))
    assert "rerank.zzzzzz is unknown; known keys: adaptive, backbone, batch_size" in text


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train: {lr: -1}", "train.lr", "-1"),
        ("train: {zero_stage: 4}", "train.zero_stage", "4"),
        ("train: {num_steps: many}", "train.num_steps", "'many'"),
        ("index: {kind: hnsw}", "index.kind", "'hnsw'"),
        ("eval: {systems: [slq, best]}", "eval.systems.1", "'best'"),
        ("embed: {max_error_share: 2}", "embed.max_error_share", "2"),
        ("serve: {port: 0}", "serve.port", "0"),
        ("train:", "train", "None"),
    ],
)
def test_a_bad_value_names_file_key_and_value(
    tmp_path: Path, text: str, key: str, value: str
) -> None:
    message = refusal(recipe_file(tmp_path, text))
    assert message.startswith(f"mine.yaml: {key}: ")
    assert message.endswith(f"(got {value})")


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    lines = refusal(recipe_file(tmp_path, "train: {lrr: 1, seed: x}\nrerank: {depth: 0}"))
    assert len(lines.splitlines()) == 3


@pytest.mark.parametrize("framing", [*FRAMINGS, *PRESETS])
def test_every_framing_and_preset_can_be_asked_for(tmp_path: Path, framing: str) -> None:
    asked = "instruction: Find it., context_free: query"
    recipe = load_recipe(recipe_file(tmp_path, f"rerank: {{framing: {framing}, {asked}}}"))
    assert recipe.rerank.framing == framing
    assert recipe.rerank.instruction == "Find it."
    assert recipe.rerank.context_free == "query"


def test_an_unknown_framing_names_the_known_ones(tmp_path: Path) -> None:
    text = refusal(recipe_file(tmp_path, "rerank: {framing: maybe}"))
    known = ", ".join([*FRAMINGS, *PRESETS])
    assert "rerank.framing: " in text
    assert f"framing 'maybe' is unknown; choose one of {known} (got 'maybe')" in text


def test_a_missing_recipe_names_the_nearest_file(tmp_path: Path) -> None:
    recipe_file(tmp_path, "")
    text = refusal(tmp_path / "mime.yaml")
    assert text == f"recipe {tmp_path}/mime.yaml does not exist; did you mean {tmp_path}/mine.yaml?"
    assert refusal(tmp_path / "other" / "x.yaml").endswith("x.yaml does not exist")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "is not valid YAML"),
        ("- train", "must hold sections.*not a list"),
        ("x", "not a str"),
    ],
)
def test_a_file_that_is_no_recipe_says_so(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"mine\.yaml.*{message}"):
        load_recipe(recipe_file(tmp_path, text))


def test_overrides_set_single_keys_in_order(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "train: {num_steps: 4, seed: 1}")
    recipe = load_recipe(
        path,
        [
            "train.num_steps=5",
            "train.num_steps=6",
            "data.scenes={train: 4, test: 8}",
            "data.scenes.seed=3",
            "eval.ks=[1, 2]",
            "adapter.prompt=a=b",
            "resources.address=null",
            "storage.dir=/x",
        ],
    )
    assert (recipe.train.num_steps, recipe.train.seed) == (6, 1)
    assert recipe.data.scenes is not None
    assert (recipe.data.scenes.train, recipe.data.scenes.seed) == (4, 3)
    assert recipe.eval.ks == (1, 2)
    assert recipe.adapter.prompt == "a=b"
    assert recipe.resources.address is None
    assert recipe.storage.adapter == Path("/x/adapter")


@pytest.mark.parametrize(
    "override",
    ["train.num_steps", "=5", "", "train.num_steps=[1", "train..seed=1", "train.seed.x=1", ".=1"],
)
def test_an_override_of_the_wrong_form_is_a_config_error(tmp_path: Path, override: str) -> None:
    path = recipe_file(tmp_path, "train: {seed: 1}")
    with pytest.raises(ConfigError):
        load_recipe(path, [override])


def test_an_override_of_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    text = refusal(recipe_file(tmp_path, ""), ["train.lrr=1"])
    assert "train.lrr is unknown; did you mean train.lr?" in text


def test_an_override_can_fill_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "data: {scenes: null}")
    recipe = load_recipe(path, ["data.scenes.seed=3"])
    assert recipe.data.scenes is not None
    assert recipe.data.scenes.seed == 3


def test_a_variant_is_as_the_section_but_for_what_it_names(tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file(
            tmp_path,
            "adapter: {num_latents: 8, seed: 4, variants: {last: {pooling: last}, one: {num_latents: 1}, as_is: }}\n"
            "train: {zero_stage: 0}",
        )
    )
    found = {
        name: (variant.num_latents, variant.pooling, variant.seed)
        for name, variant in recipe.adapter.variants.items()
    }
    assert found == {"last": (8, "last", 4), "one": (1, "mean", 4), "as_is": (8, "mean", 4)}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapter: {variants: {a: {poolin: last}}}", "did you mean .*pooling"),
        ("adapter: {variants: {../a: {}}}", "should match pattern"),
        ("adapter: {variants: {a: {prompt: x}}}", "prompt is unknown"),
        (
            "adapter: {method: lora, variants: {a: {}}}\ntrain: {zero_stage: 0}",
            "method lora has none",
        ),
        ("adapter: {variants: {a: {}}}", "train.zero_stage 2 leaves no worker a whole gradient"),
        ("train: {distillation: 0.5}", "set train.negatives too"),
        ("train: {negatives: 2, zero_stage: 3}", "they would not for mined negatives"),
    ],
)
def test_variants_and_teachers_that_cannot_be_are_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file(tmp_path, text))


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().train.lr = 1.0  # type: ignore[misc]


def test_paths_are_relative_to_the_data_folder_unless_absolute() -> None:
    recipe = load_recipe(
        SHIPPED[0], ["data.dir=/d", "data.corpus=c.parquet", "data.train=/t.parquet"]
    )
    assert recipe.data.path("corpus") == Path("/d/c.parquet")
    assert recipe.data.path("train") == Path("/t.parquet")


def test_a_missing_data_file_names_its_key_and_path(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, f"data: {{dir: {tmp_path}}}"))
    with pytest.raises(
        ConfigError, match=rf"data\.train: {tmp_path}/train\.parquet does not exist"
    ):
        require_files(recipe, "train")


def test_every_field_is_documented_or_obvious() -> None:
    """A person reads the settings in the code or in the JSON schema; both need words."""
    schema = Recipe.model_json_schema()
    undocumented = {
        f"{name}.{key}"
        for name, section in schema["$defs"].items()
        for key, value in section.get("properties", {}).items()
        if "description" not in value
    }
    obvious = {"seed", "dtype", "weight_decay", "port", "train_workers"}
    assert {name for name in undocumented if name.split(".")[1] not in obvious} == set()


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.7", False),
        ("localhost.example.com", False),
    ],
)
def test_versions_can_be_changed_over_http_only_from_this_machine_unless_it_is_said(
    host: str, is_local: bool
) -> None:
    assert ServeConfig(host=host).has_admin is is_local
    assert ServeConfig(host=host, admin=True).has_admin is True
    assert ServeConfig(host=host, admin=False).has_admin is False
