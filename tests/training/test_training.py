"""Fine-tuning: strategies, exact repeats and resumes, and what the loop promises about every epoch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline import SMALL, Ended

import tlexport
from tlexport.errors import RecipeError, RunError, TrainingError
from tlexport.modalities import MODALITIES, metrics
from tlexport.models.checkpoint import load_checkpoint
from tlexport.models.network import Spec
from tlexport.progress import Silent
from tlexport.recipe import Augment, Transfer, load
from tlexport.results import FinetuneResult
from tlexport.run import Run, digest
from tlexport.stages import finetune as stage
from tlexport.training import loop, schedule
from tlexport.training.augment import augmentation
from tlexport.training.losses import loss_of
from tlexport.training.transfer import parameter_groups, train_mode

Cli = Callable[..., Ended]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def fit(out: Path, *overrides: str) -> Run:
    return tlexport.finetune(
        "digits-quickstart", out=out, overrides=[*SMALL, "data.limit=60", "transfer.epochs=2", *overrides]
    )


def weights(run: Run) -> str:
    return digest(run / "checkpoint/model.safetensors")


def result(run: Run) -> FinetuneResult:
    return run.result("finetune", FinetuneResult)


def history(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run / "checkpoint/history.jsonl").read_text().splitlines()]


VARIED = {
    "probe": ["transfer.strategy=probe"],
    "partial": ["transfer.strategy=partial", "transfer.stages=2"],
    "full": [
        "transfer.ema=0.9",
        "transfer.augment.horizontal_flip=true",
        "transfer.augment.crop=0.6",
        "transfer.balance=sampler",
    ],
    "sgd": [
        "transfer.optimizer=sgd",
        "transfer.balance=weights",
        "transfer.label_smoothing=0.1",
        "backbone.dropout=0.3",
    ],
}


@pytest.mark.parametrize("kind", VARIED)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path, kind: str) -> None:
    first, second, other = (
        fit(tmp_path / n, *VARIED[kind], f"seed={s}") for n, s in (("a", 1), ("b", 1), ("c", 2))
    )
    assert weights(first) == weights(second)
    assert (result(first).metrics, result(first).best_epoch) == (
        result(second).metrics,
        result(second).best_epoch,
    )
    assert weights(other) != weights(first)


class Stop(Exception):
    pass


class Stopping(Silent):
    """Ends the process's work in the middle of an epoch, as a kill would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def bar(self, label: str, *, still: bool = False):  # type: ignore[no-untyped-def]
        if label.startswith(f"epoch {self.epoch}/"):
            import contextlib

            def step(done: int, total: int) -> None:
                raise Stop

            return contextlib.nullcontext(step)
        return super().bar(label)


@pytest.mark.parametrize("kind", VARIED)
def test_an_interrupted_training_ends_bit_identical(tmp_path: Path, kind: str) -> None:
    overrides = [*SMALL, "data.limit=60", "transfer.epochs=3", *VARIED[kind]]
    whole = tlexport.finetune("digits-quickstart", out=tmp_path / "whole", overrides=overrides)
    recipe = load("digits-quickstart", overrides)
    run = Run.create(tmp_path / "broken", recipe)
    for epoch in (2, 3):
        with pytest.raises(Stop):
            stage.run(run, recipe, Stopping(epoch))
        assert not (run / "checkpoint").exists()
    done = stage.run(run, recipe, Silent())
    assert done.resumed_from == 2 and done.epochs == 3
    assert weights(run) == weights(whole)
    exact = [{k: v for k, v in entry.items() if "second" not in k} for entry in history(run)]
    assert exact == [{k: v for k, v in entry.items() if "second" not in k} for entry in history(whole)]


def test_a_state_of_other_data_is_not_resumed(tmp_path: Path) -> None:
    folder = images(tmp_path / "data", classes=2)
    overrides = [*SMALL, f"data.path={folder}", "transfer.epochs=3"]
    recipe = load("insects", overrides)
    run = Run.create(tmp_path / "run", recipe)
    with pytest.raises(Stop):
        stage.run(run, recipe, Stopping(3))
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "train/class0/0.png")
    done = stage.run(run, recipe, Silent())
    fresh = tlexport.finetune("insects", out=tmp_path / "fresh", overrides=overrides)
    assert done.resumed_from == 0 and weights(run) == weights(fresh)


def test_a_broken_state_file_is_begun_anew(tmp_path: Path) -> None:
    overrides = [*SMALL, "data.limit=60", "transfer.epochs=2"]
    recipe = load("digits-quickstart", overrides)
    run = Run.create(tmp_path / "run", recipe)
    (run / "training").mkdir()
    (run / "training/state.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      not a state")
    assert stage.run(run, recipe, Silent()).resumed_from == 0


def images(root: Path, classes: int = 3, per_class: int = 10, size: int = 40) -> Path:
    """The layout of hymenoptera: train/<class>/ and val/<class>/; each class has its own colour."""
    for split, count in (("train", per_class), ("val", 4)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                noise = np.random.default_rng((label, index, split == "val")).integers(0, 90, (size, size, 3))
                noise[..., label % 3] += 150
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index}.png")
    return root


def test_unchanged_is_skipped_and_said_and_changed_data_trains_again(tmp_path: Path, tlx: Cli) -> None:
    folder = images(tmp_path / "data")
    arguments = [
        "finetune",
        "insects",
        *SMALL,
        f"data.path={folder}",
        "transfer.epochs=1",
        "--out",
        tmp_path / "run",
        "--json",
    ]
    first = tlx(*arguments)
    assert first.code == 0 and "skipped" not in first.err, first.err
    before = weights(Run(tmp_path / "run"))
    second = tlx(*arguments)
    assert "finetune: unchanged, skipped" in second.err and second.json == first.json
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "train/class0/0.png")
    third = tlx(*arguments)
    assert "skipped" not in third.err and third.code == 0
    assert weights(Run(tmp_path / "run")) != before
    other = tlx(*arguments, "--seed", 5)
    assert other.code == 6 and "seed" in other.json["error"]  # another recipe does not overwrite the run


def test_probe_features_are_computed_once(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", "transfer.strategy=probe")
    files = {p: p.stat().st_mtime_ns for p in (run / "cache").glob("features-*.npy")}
    assert {p.name.split("-")[1] for p in files} == {"train", "val"}
    import shutil

    shutil.rmtree(run / "checkpoint")
    again = fit(tmp_path / "run", "transfer.strategy=probe")
    assert {p: p.stat().st_mtime_ns for p in (run / "cache").glob("features-*.npy")} == files
    first = weights(again)
    # The cache is really read: what is planted in it changes the result.
    for path in files:
        np.save(path, np.load(path)[::-1].copy())
    shutil.rmtree(run / "checkpoint")
    assert weights(fit(tmp_path / "run", "transfer.strategy=probe")) != first


def test_a_probe_is_again_a_backbone_and_a_linear_head(tmp_path: Path) -> None:
    """Standardising is folded into the head: the plain model gives the numbers that training saw without it."""
    run = fit(tmp_path / "run", "transfer.strategy=probe", "transfer.epochs=5", "data.limit=120")
    model, _, _ = load_checkpoint(run / "checkpoint")
    data = MODALITIES["image"].load(run.recipe.data, task="auto", seed=run.recipe.seed, cache=None)
    images = torch.from_numpy(data.preprocessing.batch(data.val.images[np.arange(len(data.val))])).float()
    with torch.inference_mode():
        features, logits = model.eval().features(images), model(images)
    cached = np.load(next((run / "cache").glob("features-val-*.npy")))
    np.testing.assert_allclose(features.numpy(), cached, rtol=1e-4, atol=1e-4)
    assert not np.allclose(cached.std(axis=0), 1, atol=0.1)  # there was something to fold
    seen = history(run)[result(run).best_epoch - 1]["val"]
    plain = metrics.evaluate(data.val.labels, torch.softmax(logits, dim=1).numpy(), data.task)
    assert plain == pytest.approx(seen, abs=1e-4) and seen["accuracy"] > 0.3


def test_each_strategy_trains_what_it_says(tmp_path: Path) -> None:
    from tlexport.models import image as models

    torch.manual_seed(0)
    spec = models.describe_backbone(
        "timm/test_efficientnet", classes=10, task="multiclass", channels=3, image_size=32
    )
    model = models.create(spec)
    total = len(list(model.backbone.parameters()))

    def trained(**changes: object) -> int:
        parameter_groups(model, Transfer.model_validate(changes))
        return sum(p.requires_grad for p in model.backbone.parameters())

    counts = [
        trained(strategy="probe"),
        trained(strategy="partial"),
        trained(strategy="partial", stages=2),
        trained(strategy="full"),
    ]
    assert counts[0] == 0 and counts[3] == total and sorted(set(counts)) == counts
    train_mode(model)
    parameter_groups(model, Transfer(strategy="partial"))
    train_mode(model)
    frozen = [
        m
        for m in model.backbone.modules()
        if isinstance(m, torch.nn.BatchNorm2d) and not m.weight.requires_grad
    ]
    assert frozen and not any(module.training for module in frozen)
    groups = parameter_groups(model, Transfer(strategy="full", layer_decay=0.5))
    rates = list(dict.fromkeys(group["lr"] for group in groups))
    assert rates[:3] == [1e-3, 5e-4, 2.5e-4] and rates == sorted(rates, reverse=True)
    assert all(group["weight_decay"] == 0 for group in groups for p in group["params"] if p.ndim <= 1)
    with pytest.raises(RecipeError, match=r"transfer\.stages is 99, the backbone has \d+ stages"):
        parameter_groups(model, Transfer(strategy="partial", stages=99))


def test_history_has_one_true_line_an_epoch(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", "transfer.epochs=3", "transfer.warmup=0")
    lines = history(run)
    assert [entry["epoch"] for entry in lines] == [1, 2, 3] and [e["images"] for e in lines] == [60] * 3
    assert lines[0]["train_loss"] > lines[-1]["train_loss"] > 0
    assert all(entry["images_per_second"] == pytest.approx(60 / entry["train_seconds"]) for entry in lines)
    assert [entry["lr"] for entry in lines] == sorted((entry["lr"] for entry in lines), reverse=True)
    done = result(run)
    assert done.metrics.val == lines[done.best_epoch - 1]["val"]
    scores = [entry["val"]["accuracy"] for entry in lines]
    assert scores[done.best_epoch - 1] == max(scores)
    assert (run / "training/history.jsonl").read_bytes() == (run / "checkpoint/history.jsonl").read_bytes()
    assert not (run / "training/state.safetensors").exists()


def problem(classes: int = 3, n: int = 60) -> tuple[loop.Problem, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.arange(n) % classes
    points = torch.nn.functional.one_hot(labels, classes).float() * 3 + torch.randn(n, classes)
    network = torch.nn.Linear(classes, classes)
    made = loop.Problem(
        network=network,
        groups=[{"params": list(network.parameters()), "lr": 0.1, "peak_lr": 0.1}],
        inputs=lambda indices: (points[indices],),
        labels=labels,
        loss=torch.nn.functional.cross_entropy,
        task="multiclass",
        validate=lambda net: {"accuracy": float((net(points).argmax(1) == labels).float().mean())},
        prepare=lambda net: net.train() and None,
        device=torch.device("cpu"),
    )
    return made, points


def looped(made: loop.Problem, folder: Path, **transfer: object) -> loop.Fitted:
    return loop.fit(
        made,
        Transfer.model_validate({"lr": 0.1, **transfer}),
        metric="accuracy",
        seed=0,
        identity="x",
        folder=folder,
        progress=Silent(),
    )


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path) -> None:
    made, _ = problem()
    scores = iter([0.5, 0.7, 0.6, 0.65, 0.9])
    made = loop.Problem(**{**made.__dict__, "validate": lambda net: {"accuracy": next(scores)}})
    kept: list[torch.Tensor] = []
    judged = made.validate
    made = loop.Problem(
        **{
            **made.__dict__,
            "validate": lambda net: (kept.append(net.weight.detach().clone()), judged(net))[1],
        }
    )
    fitted = looped(made, tmp_path, epochs=5, patience=2)
    assert len(fitted.history) == 4 and fitted.best_epoch == 2
    assert torch.equal(fitted.weights["weight"], kept[1]) and not torch.equal(kept[1], kept[3])


def test_the_average_is_what_is_judged_and_kept(tmp_path: Path) -> None:
    made, _ = problem()
    plain = looped(made, tmp_path / "a", epochs=2)
    other, _ = problem()
    averaged = looped(other, tmp_path / "b", epochs=2, ema=0.99)
    assert not torch.equal(plain.weights["weight"], averaged.weights["weight"])
    assert not torch.equal(averaged.weights["weight"], other.network.weight)
    # decay 0.99 for 4 updates: the average has hardly left where it began
    torch.manual_seed(0)
    torch.randn(60, 3)
    begun = torch.nn.Linear(3, 3).weight
    near, far = ((w - begun).norm() for w in (averaged.weights["weight"], plain.weights["weight"]))
    assert near < 0.5 * far


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_a_training_error(tmp_path: Path, poison: float) -> None:
    made, points = problem()
    points[7] = poison
    with pytest.raises(
        TrainingError, match=r"the loss became (nan|inf) in epoch 1; lower transfer\.lr \(now 0\.1\)"
    ):
        looped(made, tmp_path, epochs=2)
    assert not (tmp_path / "state.safetensors").exists()


def test_an_undefined_metric_is_a_training_error(tmp_path: Path) -> None:
    made, _ = problem()
    made = loop.Problem(**{**made.__dict__, "validate": lambda net: {"auc": 0.5}})
    with pytest.raises(
        TrainingError, match=r"'accuracy' is undefined on the validation split \(defined: auc\)"
    ):
        looped(made, tmp_path, epochs=1)


def test_class_weights_equal_the_formula() -> None:
    labels = torch.tensor([0] * 8 + [1] * 2)
    logits = torch.tensor([[0.3, -0.2], [0.1, 0.4]])
    spec = Spec(modality="image", backbone="x", classes=2, task="binary")
    got = loss_of(spec, Transfer(balance="weights"), labels)(logits, torch.tensor([0, 1]))
    each = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
    assert got == pytest.approx(float((0.625 * each[0] + 2.5 * each[1]) / 3.125))


def test_the_sampler_draws_classes_evenly_and_epochs_differ() -> None:
    labels = torch.tensor([0] * 900 + [1] * 100)
    made, _ = problem()
    made = replace(made, labels=labels)
    drawn = torch.cat(loop._batches(made, Transfer(balance="sampler"), seed=3))
    assert 0.45 < labels[drawn].float().mean() < 0.55
    plain = [torch.cat(loop._batches(made, Transfer(), seed=s)) for s in (3, 3, 4)]
    assert torch.equal(plain[0], plain[1]) and not torch.equal(plain[0], plain[2])
    assert sorted(plain[0].tolist()) == list(range(1000))
    few = replace(made, labels=labels[:33])
    assert [len(b) for b in loop._batches(few, Transfer(batch_size=32), seed=0)] == [32]


def test_a_part_of_the_schedule_and_the_rest_are_the_whole(tmp_path: Path) -> None:
    whole = looped(problem()[0], tmp_path / "whole", epochs=4)
    made, _ = problem()
    part = loop.fit(
        made,
        Transfer(lr=0.1, epochs=4),
        metric="accuracy",
        seed=0,
        identity="x",
        folder=tmp_path / "parts",
        progress=Silent(),
        until=2,
    )
    assert len(part.history) == 2
    rest = looped(problem()[0], tmp_path / "parts", epochs=4)
    assert rest.resumed_from == 2
    assert torch.equal(rest.weights["weight"], whole.weights["weight"])


def test_the_rate_rises_and_falls_as_stated() -> None:
    rates = [schedule.rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0 and max(rates) == 1.0
    assert (
        rates[:10] == sorted(rates[:10])
        and rates[10:] == sorted(rates[10:], reverse=True)
        and rates[-1] < 0.001
    )


def test_augmentation_changes_each_image_by_itself() -> None:
    batch = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
    batch[:, :, :, 0] = 255
    assert augmentation(Augment(), 8) is None
    torch.manual_seed(0)
    flipped = augmentation(Augment(horizontal_flip=True), 8)(batch)
    sides = flipped[:, 0, 0, 0] == 255
    assert 0 < sides.sum() < 16 and flipped.dtype == torch.uint8
    torch.manual_seed(0)
    assert torch.equal(augmentation(Augment(horizontal_flip=True), 8)(batch), flipped)
    everything = Augment(crop=0.5, rotate=20, color=0.3, erase=0.5, vertical_flip=True)
    assert augmentation(everything, 6)(batch).shape == (16, 3, 6, 6)


def test_cuda_is_not_quietly_replaced(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(RecipeError, match=r"transfer\.device is cuda"):
        fit(tmp_path / "run", "transfer.device=cuda")


def test_a_run_of_another_recipe_is_kept(tmp_path: Path) -> None:
    run = fit(tmp_path / "run")
    before = weights(run)
    with pytest.raises(RunError, match="another recipe"):
        fit(tmp_path / "run", "seed=4")
    assert weights(run) == before
