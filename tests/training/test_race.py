"""`strategy: auto`: the right candidate wins, those that fail are recorded, and what it may cost is kept to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tlexport.errors import RecipeError, TrainingError
from tlexport.modalities.dataset import Dataset
from tlexport.models import tabular
from tlexport.progress import Silent
from tlexport.recipe import Recipe
from tlexport.training import race
from tlexport.training.finetune import finetune


def racing(recipe: Recipe, candidates: tuple[str, ...], share: float = 0.9, **transfer: Any) -> Recipe:
    return recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update={"weights": "somewhere"}),
            "race": recipe.race.model_copy(update={"candidates": candidates, "share": share}),
            "transfer": recipe.transfer.model_copy(update=transfer),
        }
    )


def network(recipe: Recipe, data: Dataset) -> tabular.TabM:
    torch.manual_seed(0)
    made = tabular.create(tabular.describe(recipe, data))
    tabular.prepare(made, data)
    return made


def blind(recipe: Recipe, data: Dataset) -> tabular.TabM:
    """A backbone that sees nothing, because its embeddings are zero: a probe learns nothing on it, `full` mends it."""
    model = network(recipe, data)
    with torch.no_grad():
        model.backbone.cells.numbers.zero_()
        model.backbone.cells.categories.zero_()
    return model


def run(recipe: Recipe, data: Dataset, folder: Path, make: Any = network) -> race.Raced:
    return race.race(
        lambda source: make(recipe, data),
        data,
        recipe,
        folder=folder / "race",
        cache=folder / "cache",
        progress=Silent(),
    )


def learned(table_recipe: Recipe, table_data: Dataset, folder: Path) -> Any:
    """Makes a network whose backbone has learned this very task."""
    model = network(table_recipe, table_data)
    recipe = racing(table_recipe, ("full",), epochs=12, strategy="full")
    finetune(model, table_data, recipe, folder=folder / "l", cache=folder / "c", progress=Silent())
    state = model.state_dict()

    def make(recipe: Recipe, data: Dataset) -> tabular.TabM:
        made = network(recipe, data)
        made.load_state_dict(state)
        return made

    return make


def test_without_pretrained_weights_there_is_no_race(
    table_recipe: Recipe, table_data: Dataset, tmp_path: Path
) -> None:
    def unused(recipe: Recipe, data: Dataset) -> tabular.TabM:
        raise AssertionError("nothing is to be trained")

    found = run(table_recipe, table_data, tmp_path, unused)
    assert found.recipe.transfer.strategy == "scratch"
    assert "no pretrained weights" in found.evidence["why"]


def test_a_network_wins_where_the_probe_sees_nothing(
    table_recipe: Recipe, table_data: Dataset, tmp_path: Path
) -> None:
    found = run(racing(table_recipe, ("probe", "full"), share=1.0), table_data, tmp_path, blind)
    assert found.recipe.transfer.strategy == "full" == found.evidence["chosen"]
    assert found.evidence["val"]["full"] > found.evidence["val"]["probe"]
    assert "both trained to their end" in found.evidence["why"]
    assert (found.folder / "state.safetensors").is_file() and not (found.folder / "trial").exists()
    assert not (tmp_path / "race" / "probe").exists()
    assert 0 <= found.evidence["knn_probe"] <= 1


def test_the_probe_wins_where_the_backbone_knows_the_task(
    table_recipe: Recipe, table_data: Dataset, tmp_path: Path
) -> None:
    make = learned(table_recipe, table_data, tmp_path)
    found = run(racing(table_recipe, ("probe", "scratch"), share=1.0, epochs=2), table_data, tmp_path, make)
    # scratch is given the same backbone here and unlearns it at the full rate
    assert found.evidence["val"]["probe"] > 0.85
    assert found.evidence["chosen"] in ("probe", "scratch")
    best = max(found.evidence["val"], key=found.evidence["val"].__getitem__)
    assert found.evidence["chosen"] == best


@pytest.mark.parametrize("epochs", [1, 2, 16])
def test_only_what_may_win_is_trained_to_its_end(
    table_recipe: Recipe,
    table_data: Dataset,
    tmp_path: Path,
    epochs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted in samples that the networks learned on: at most the trials and one whole training, of four candidates."""
    seen: dict[str, int] = {}

    def counted(model: Any, data: Dataset, recipe: Recipe, **rest: Any) -> Any:
        strategy = recipe.transfer.strategy
        seen[strategy] = seen.get(strategy, 0) + len(data.train) * recipe.transfer.epochs
        return finetune(model, data, recipe, **rest)

    monkeypatch.setattr(race, "finetune", counted)
    recipe = racing(table_recipe, ("probe", "partial", "full", "scratch"), epochs=epochs, batch_size=4)
    found = run(recipe, table_data, tmp_path, blind)
    whole = epochs * len(table_data.train)
    trial = found.evidence["trial"]["samples"] * found.evidence["trial"]["epochs"]
    networks = [seen[name] for name in ("partial", "full", "scratch")]
    assert sum(networks) == 3 * trial + whole
    assert trial <= max(race.TRIAL * whole + 1, race.LEAST_UPDATES * 4)
    assert sorted(networks)[:2] == [trial, trial]


def test_a_network_that_costs_more_than_the_share_is_held_against_the_probe_by_its_trial(
    table_recipe: Recipe, table_data: Dataset, tmp_path: Path
) -> None:
    found = run(racing(table_recipe, ("probe", "full"), share=0.01), table_data, tmp_path, blind)
    assert "more than race.share allows" in found.evidence["why"]
    assert set(found.evidence["val"]) == {"probe"}, "the network was not trained to its end"
    better = found.evidence["trial"]["val"]["full"] > found.evidence["val"]["probe"]
    assert found.evidence["chosen"] == ("full" if better else "probe")


def test_a_schedule_is_cut_to_the_time_that_is_left(table_recipe: Recipe) -> None:
    network = race._Candidate("full", racing(table_recipe, ("full",), epochs=10), Path(), epoch_seconds=2.0)
    assert race._cut(network, 15.9) and network.recipe.transfer.epochs == 7
    assert race._cut(network, 99.0) and network.recipe.transfer.epochs == 7, "never longer than it is"
    assert not race._cut(network, 6.0), "three of seven epochs are too few"


def test_the_race_keeps_to_its_share(table_recipe: Recipe, table_data: Dataset, tmp_path: Path) -> None:
    """In epochs, which the clock of a busy machine does not move: four candidates, of which three are networks."""
    recipe = racing(
        table_recipe, ("probe", "partial", "full", "scratch"), share=0.3, epochs=40, batch_size=50
    )
    found = run(recipe, table_data, tmp_path, blind).evidence
    if found["chosen"] in found["epoch_seconds"] and found["chosen"] in found["val"]:
        assert found["epochs"] >= 20
        network_seconds = found["epochs"] * found["epoch_seconds"][found["chosen"]]
        assert network_seconds <= 0.3 * found["grid_seconds_estimated"] + 0.02


def test_candidates_that_fail_are_recorded_and_the_others_go_on(
    table_recipe: Recipe, table_data: Dataset, tmp_path: Path
) -> None:
    """`partial` asks for more stages than there are, `full` diverges: its weights are not finite."""
    recipe = racing(table_recipe, ("probe", "partial", "full", "scratch"), stages=99)

    def make(source: str) -> tabular.TabM:
        made = network(recipe, table_data)
        if source != "none":
            made.head[-1].bias.data.fill_(float("nan"))
        return made

    found = race.race(
        make, table_data, recipe, folder=tmp_path / "race", cache=tmp_path / "cache", progress=Silent()
    )
    assert found.evidence["chosen"] == "scratch"
    assert "transfer.stages is 99" in found.evidence["failed"]["partial"]
    assert "the loss became nan" in found.evidence["failed"]["full"]
    assert {"partial", "full", "probe"} == set(found.evidence["failed"])


def test_a_network_that_diverges_on_all_samples_gives_way(
    table_recipe: Recipe, table_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: Any, data: Dataset, recipe: Recipe, **rest: Any) -> Any:
        if recipe.transfer.strategy == "full" and len(data.train) == len(table_data.train):
            raise TrainingError("the loss became nan")
        return finetune(model, data, recipe, **rest)

    monkeypatch.setattr(race, "finetune", fails)
    found = run(racing(table_recipe, ("probe", "full"), share=1.0, batch_size=16), table_data, tmp_path)
    assert found.evidence["chosen"] == "probe" and found.evidence["failed"] == {"full": "the loss became nan"}


def test_where_nobody_can_be_trained_the_reasons_are_told(
    table_recipe: Recipe, table_data: Dataset, tmp_path: Path
) -> None:
    one_class = replace(table_data.val, labels=np.zeros_like(table_data.val.labels))
    with pytest.raises(TrainingError, match=r"no candidate .*probe: .*undefined.*full: .*undefined"):
        run(racing(table_recipe, ("probe", "full")), replace(table_data, val=one_class), tmp_path)


def test_an_audit_trains_the_grid_and_tells_a_planted_regret(
    table_recipe: Recipe, table_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = racing(table_recipe, ("probe", "full"), share=1.0, epochs=8)
    recipe = plain.model_copy(update={"race": plain.race.model_copy(update={"audit": True})})
    found = run(recipe, table_data, tmp_path / "right", make=blind)
    grid = found.evidence["grid"]
    assert found.evidence["chosen"] == "full" and set(grid) == {"probe", "full"}
    assert found.evidence["regret"] == 0 and grid["full"] > grid["probe"] and found.evidence["time_share"] > 0
    assert "regret" not in run(plain, table_data, tmp_path / "plain", make=blind).evidence
    # The planted mistake: the decision is turned round, so the probe that sees nothing is chosen.
    decided = race._decided

    def turned(probe: Any, networks: Any, *rest: Any) -> Any:
        decided(probe, networks, *rest)
        return probe, "planted"

    monkeypatch.setattr(race, "_decided", turned)
    wrong = run(recipe, table_data, tmp_path / "wrong", make=blind).evidence
    lost = wrong["grid"]["full"] - wrong["grid"]["probe"]
    assert wrong["chosen"] == "probe"
    assert wrong["regret"] == pytest.approx(lost / wrong["grid"]["full"]) and wrong["regret"] > 0.05


def test_a_trial_does_not_choose_between_partial_and_full() -> None:
    """Full starts slower than partial on few samples and wins on all (digits); scratch has to beat both to come first."""

    def candidate(strategy: Any, value: float) -> race._Candidate:
        return race._Candidate(strategy, None, Path(), trial=(value, 0.0))  # type: ignore[arg-type]

    few = [candidate("scratch", 0.1), candidate("partial", 0.5), candidate("full", 0.1)]
    assert [c.strategy for c in race._ordered(few)] == ["full", "partial", "scratch"]
    few[0].trial = (0.6, 0.0)
    assert [c.strategy for c in race._ordered(few)] == ["scratch", "full", "partial"]


def test_an_undefined_metric_is_worse_than_any() -> None:
    scores: list[race.Score | None] = [(float("nan"), 0.0), (-5.0, -9.0), None, (-4.0, float("-inf"))]
    assert max(scores, key=race._worth) == (-4.0, float("-inf"))
    assert race._worth((float("nan"), 0.0)) == race._worth(None)


def test_a_mistake_in_the_recipe_of_a_single_strategy_stays_an_error(
    table_recipe: Recipe, table_data: Dataset, tmp_path: Path
) -> None:
    recipe = racing(table_recipe, ("partial",), strategy="partial", stages=99)
    with pytest.raises(RecipeError, match=r"transfer.stages is 99"):
        finetune(
            network(recipe, table_data),
            table_data,
            recipe,
            folder=tmp_path,
            cache=tmp_path,
            progress=Silent(),
        )
