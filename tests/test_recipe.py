"""Recipes: every shipped one, overrides, and mistakes reported all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tlexport import targets
from tlexport.errors import RecipeError
from tlexport.recipe import Recipe, load, parse, shipped, with_overrides

SHIPPED = {"digits-quickstart", "chest-xray", "gi-lesion", "pathology", "insects", "cifar10-resnet50"}


def test_the_promised_recipes_are_shipped() -> None:
    assert set(shipped()) >= SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_recipe_is_valid_described_and_takes_any_data(name: str) -> None:
    recipe = load(name, ["data.path=elsewhere/images.npz"])
    assert recipe.name == name
    assert len(recipe.description) > 20
    assert recipe.data.path == "elsewhere/images.npz"


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_round_trip_through_yaml(name: str) -> None:
    recipe = load(name)
    assert parse(yaml.safe_load(recipe.to_yaml()), []) == recipe


def test_recipes_are_found_by_name_by_recipes_path_and_by_file(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_text("data: {path: images/}\n")
    assert load("insects") == load("insects.yaml") == load("recipes/insects.yaml")
    assert load(copy).name == "mine"


def test_every_mistake_is_reported_at_once_with_the_nearest_key() -> None:
    with pytest.raises(RecipeError) as caught:
        load(
            "insects",
            [
                "transfer.epohcs=3",
                "dat.path=x",
                "targets=[rtx4009]",
                "transfer.lr=-1",
                "nonsense",
                "data.path.deep=1",
            ],
        )
    text = str(caught.value)
    for expected in (
        "'transfer.epochs'",
        "'data'",
        "'rtx4090'",
        "transfer.lr",
        "'nonsense'",
        "data.path.deep",
    ):
        assert expected in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "data.image_size=4",
        "gates.max_drop=.nan",
        "transfer.lr=.inf",
        "precision=[]",
        "precision=[fp7]",
        "targets=[]",
        "name=../up",
        "export.opset=11",
    ],
)
def test_impossible_values_are_refused(override: str) -> None:
    with pytest.raises(RecipeError, match=override.split("=")[0].split(".")[-1]):
        load("insects", [override])


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="chest-xray"):
        load("chest-xrays")


@pytest.mark.parametrize("text", ["- a\n- b\n", "key: [unclosed\n", "\x00"])
def test_a_file_that_is_not_a_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load(path)


def test_yaml_cannot_construct_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("data: !!python/object/apply:os.system ['touch " + str(tmp_path / "pwned") + "']\n")
    with pytest.raises(RecipeError):
        load(path)
    assert not (tmp_path / "pwned").exists()


def test_flags_replace_whole_sections_and_are_checked() -> None:
    recipe = load("insects")
    changed = with_overrides(recipe, ["gates.max_drop=0.5"], targets=["L4", "cpu"])
    assert changed.targets == ("sm89", "cpu")
    assert changed.gates.max_drop == 0.5
    with pytest.raises(RecipeError, match="unknown target"):
        with_overrides(recipe, [], targets=["sm42"])


def test_a_recipe_is_frozen() -> None:
    recipe = load("insects")
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("CPU", "cpu"),
        ("8.9", "sm89"),
        ("RTX 4090", "sm89"),
        ("rtx-5090", "sm120"),
        ("h200", "sm90"),
        ("sm_75", "sm75"),
        ("T4", "sm75"),
    ],
)
def test_targets_as_people_type_them(typed: str, canonical: str) -> None:
    assert targets.resolve(typed) == canonical


def test_compute_capability() -> None:
    assert targets.compute_capability("sm89") == (8, 9)
    assert targets.compute_capability("sm120") == (12, 0)
