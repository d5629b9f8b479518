"""Adapters that come and go while a service answers: found by name and by fingerprint, the same for all replicas."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.serving import adapters as adapters_module
from pipelines.serving.adapters import OWN, Adapters
from pipelines.serving.course import Course, Record
from slq.artifacts import load_adapter_config, save_adapter
from slq.backbones import PromptSettings
from slq.backbones.base import Backbone
from slq.encoder import Encoder
from slq.errors import ArtifactError, ArtifactMismatchError, DataError, UnknownModelError
from slq.finetuning import TunedBackbone
from slq.latent_queries import LatentQueries
from tests.families import qwen3_vl


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return qwen3_vl()


def saved(folder: Path, backbone: Backbone, seed: int, num_latents: int = 3) -> str:
    """Write an adapter; gives its fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder, backbone, LatentQueries(num_latents, backbone.hidden_size, seed=seed))
    return load_adapter_config(folder).fingerprint


@pytest.fixture
def own(backbone: Backbone) -> Encoder:
    return Encoder(backbone, LatentQueries(4, backbone.hidden_size, seed=0))


ELSE = "the space that is searched"
Given = dict[str, tuple[str, str]]


def replica(own: Encoder, root: Path, given: Given | None = None) -> Adapters:
    """One of several that share what changed."""
    record = Record(root / "serve" / "course.json", Course("v000001"))
    return Adapters(own, given or {}, root, record)


def test_the_own_adapter_goes_by_its_name_and_its_fingerprint(own: Encoder, tmp_path: Path) -> None:
    adapters = replica(own, tmp_path)
    assert adapters.encoder(OWN) is own is adapters.encoder(own.fingerprint)
    assert adapters.models() == {OWN: own.fingerprint}
    with pytest.raises(UnknownModelError, match=r"no model 'shop'; this service has slq$"):
        adapters.encoder("shop")


def test_what_one_replica_adds_all_of_them_serve_and_what_one_removes_none(
    own: Encoder, backbone: Backbone, tmp_path: Path
) -> None:
    given = saved(tmp_path / "given", backbone, 1)
    shop = saved(tmp_path / "runs" / "shop", backbone, 2, num_latents=6)
    named = {"given": (str(tmp_path / "given"), given)}
    here, there = (replica(own, tmp_path, named) for _ in range(2))
    assert there.models() == {OWN: own.fingerprint, "given": given}
    assert here.add("shop", "runs/shop", ELSE) == shop
    for one in (here, there, replica(own, tmp_path, named)):
        assert one.models() == {OWN: own.fingerprint, "given": given, "shop": shop}
        assert one.encoder("shop") is one.encoder(shop)
        assert one.encoder(shop).fingerprint == shop
        assert one.encoder("shop").backbone is own.backbone
    there.remove("given", ELSE)
    there.remove("shop", ELSE)
    for one in (here, there):
        assert one.models() == {OWN: own.fingerprint}
        for name in ("shop", shop, "given"):
            with pytest.raises(UnknownModelError):
                one.encoder(name)
    with pytest.raises(UnknownModelError, match="no model 'shop' to remove"):
        here.remove("shop", ELSE)


def test_another_adapter_under_the_same_name_replaces_the_first_one_everywhere(
    own: Encoder, backbone: Backbone, tmp_path: Path
) -> None:
    first = saved(tmp_path / "shop", backbone, 1)
    here, there = replica(own, tmp_path), replica(own, tmp_path)
    here.add("shop", "shop", ELSE)
    assert there.encoder("shop").fingerprint == first
    second = saved(tmp_path / "shop", backbone, 2)
    assert there.encoder("shop").fingerprint == first  # until it is added again
    with pytest.raises(ArtifactMismatchError, match=rf"{first} and has {second} by now; add it"):
        replica(own, tmp_path).encoder("shop")
    assert here.add("shop", "shop", ELSE) == second
    assert there.encoder("shop").fingerprint == second


@pytest.mark.parametrize("folder", ["../outside", "/etc", "a/../../outside", "link", "absent", ""])
def test_only_folders_below_the_root_are_looked_at(
    own: Encoder, backbone: Backbone, tmp_path: Path, folder: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    saved(tmp_path / "outside", backbone, 1)
    (root / "link").symlink_to(tmp_path / "outside")
    adapters = replica(own, root)
    with pytest.raises(DataError, match=r"adapters_dir|holds no adapter"):
        adapters.add("shop", folder, ELSE)
    assert adapters.models() == {OWN: own.fingerprint}


def test_what_does_not_fit_the_model_is_refused_and_changes_nothing(
    own: Encoder, backbone: Backbone, tmp_path: Path
) -> None:
    adapters = replica(own, tmp_path)
    foreign = qwen3_vl(seed=5)
    save_adapter(tmp_path / "foreign", foreign, LatentQueries(3, foreign.hidden_size))
    prompted = qwen3_vl(settings=PromptSettings(prompt="Find:"))
    save_adapter(tmp_path / "prompted", prompted, LatentQueries(3, prompted.hidden_size))
    for folder in ("foreign", "prompted"):
        fingerprint = load_adapter_config(tmp_path / folder).fingerprint
        with pytest.raises(ArtifactMismatchError, match=fingerprint):
            adapters.add("shop", folder, ELSE)
    saved(tmp_path / "good", backbone, 1)
    with pytest.raises(DataError, match="'slq' is the adapter that the service was started with"):
        adapters.add(OWN, "good", ELSE)
    with pytest.raises(DataError, match="'slq' is the adapter"):
        adapters.remove(OWN, ELSE)
    assert adapters.models() == {OWN: own.fingerprint}


def test_a_changed_model_shares_itself_with_nobody(tmp_path: Path, backbone: Backbone) -> None:
    saved(tmp_path / "good", backbone, 1)
    tuned: Any = qwen3_vl()
    own = Encoder(tuned, TunedBackbone(tuned, "lora"))
    with pytest.raises(DataError, match="only latent queries share a model"):
        replica(own, tmp_path).add("shop", "good", ELSE)


def test_one_that_is_gone_is_told_where_it_is_asked_for_and_hides_no_other(
    own: Encoder, backbone: Backbone, tmp_path: Path
) -> None:
    here, there = replica(own, tmp_path), replica(own, tmp_path)
    saved(tmp_path / "gone", backbone, 1)
    good = saved(tmp_path / "good", backbone, 2)
    here.add("gone", "gone", ELSE)
    here.add("good", "good", ELSE)
    shutil.rmtree(tmp_path / "gone")
    assert there.models() == {OWN: own.fingerprint, "good": good}
    assert there.encoder(good).fingerprint == good
    with pytest.raises(ArtifactError, match="holds no adapter"):
        there.encoder("gone")
    with pytest.raises(ArtifactError, match="holds no adapter"):  # the recipe's own must be there
        replica(own, tmp_path / "other", {"given": (str(tmp_path / "gone"), good)})


def test_the_adapter_of_the_version_that_answers_is_neither_removed_nor_replaced(
    own: Encoder, backbone: Backbone, tmp_path: Path
) -> None:
    needed = saved(tmp_path / "shop", backbone, 1)
    saved(tmp_path / "else", backbone, 2)
    adapters = replica(own, tmp_path)
    adapters.add("shop", "shop", ELSE)
    with pytest.raises(DataError, match="was built with adapter 'shop'; it stays"):
        adapters.remove("shop", needed)
    with pytest.raises(DataError, match="was built with adapter 'shop'; it stays"):
        adapters.add("shop", "else", needed)
    assert adapters.encoder(needed).fingerprint == needed
    assert adapters.add("shop", "shop", needed) == needed  # the same again changes nothing
    adapters.add("twin", "shop", needed)
    adapters.remove("shop", needed)  # it goes by another name, too
    assert adapters.encoder(needed).fingerprint == needed


def test_what_the_recipe_names_is_what_was_there_at_the_start(
    own: Encoder, backbone: Backbone, tmp_path: Path
) -> None:
    before = saved(tmp_path / "given", backbone, 1)
    named = {"given": (str(tmp_path / "given"), before)}
    assert replica(own, tmp_path, named).encoder("given").fingerprint == before
    now = saved(tmp_path / "given", backbone, 2)
    with pytest.raises(ArtifactMismatchError, match=rf"{before} and has {now} by now"):
        replica(own, tmp_path, named)


def test_one_that_fails_is_logged_once_and_not_loaded_for_each_query(
    own: Encoder,
    backbone: Backbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = replica(own, tmp_path), replica(own, tmp_path)
    saved(tmp_path / "gone", backbone, 1)
    here.add("gone", "gone", ELSE)
    shutil.rmtree(tmp_path / "gone")
    for _ in range(5):
        assert there.models() == {OWN: own.fingerprint}
    assert len([one for one in caplog.records if "cannot be served" in one.message]) == 1
    saved(tmp_path / "gone", backbone, 1)
    monkeypatch.setattr(adapters_module, "_AGAIN_S", 0.0)  # a while later
    assert set(there.models()) == {OWN, "gone"}


@pytest.mark.parametrize("folder", ["\x00", "x" * 5000])
def test_what_is_no_name_of_a_folder_is_told_so(own: Encoder, tmp_path: Path, folder: str) -> None:
    with pytest.raises(DataError, match="is no name of a folder"):
        replica(own, tmp_path).add("shop", folder, ELSE)
