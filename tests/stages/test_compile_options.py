"""What compile is told: the time limit, TensorRT's options, and how it says where it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from pipeline import RTX, Built, Ended

from tlexport.console import Terminal
from tlexport.errors import RecipeError
from tlexport.models.checkpoint import describe_checkpoint
from tlexport.progress import Silent
from tlexport.recipe import Recipe, with_overrides
from tlexport.results import Variant
from tlexport.run import Run
from tlexport.stages import compile, verify

Cli = Callable[..., Ended]
needs_rtx = pytest.mark.skipif(not RTX, reason="tensorrt-rtx is not installed")


class Listener(Silent):
    """Keeps what is said and where the bar stood."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[tuple[float, int, str]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    warn = say

    @contextmanager
    def bar(self, label: str, *, still: bool = False) -> Iterator[Callable[..., None]]:
        yield lambda done, total, doing="": self.steps.append((done, total, doing))


def asked(run: Run, *overrides: str, target: str = "sm89", precision: str = "fp16") -> Recipe:
    return with_overrides(run.recipe, [f"precision=[{precision}]", *overrides], targets=[target])


def rtx(variants: tuple[Variant, ...]) -> Variant:
    return next(variant for variant in variants if variant.backend == "tensorrt_rtx")


def test_a_build_over_the_limit_is_a_failed_variant_that_names_the_setting(run_copy: Run, tlx: Cli) -> None:
    told = tlx("compile", run_copy.path, "-t", "cpu", "-p", "fp32", "--timeout", "0.001", "--json")
    assert told.code == 9 and {v["verdict"] for v in told.json["variants"]} == {"fail"}
    for variant in told.json["variants"]:
        assert "no answer within 0.001 s (compile.timeout) and was stopped" in variant["reason"]
    assert not any((run_copy / "variants").iterdir())
    again = tlx("compile", run_copy.path, "-t", "cpu", "-p", "fp32", "--json")
    assert again.code == 0 and all(v["file"] for v in again.json["variants"])


def test_help_names_the_limit_and_the_options(tlx: Cli) -> None:
    shown = tlx("compile", "--help").out
    for words in ("--timeout", "tensorrt.workspace_mb", "tensorrt.tf32=true", "compile.timeout"):
        assert words in shown
    sections = json.loads(tlx("schema", "recipe").out)["$defs"]
    assert {"workspace_mb", "tf32", "timing_cache"} <= set(sections["TensorRT"]["properties"])


@pytest.mark.parametrize(
    "override, words",
    [
        ("compile.timeout=0", "compile.timeout: input should be greater than 0"),
        (
            "tensorrt.optimization_level=6",
            "tensorrt.optimization_level: input should be less than or equal to 5",
        ),
        ("tensorrt.workspace=512", "did you mean 'tensorrt.workspace_mb'"),
        ("tensorrt.hardware_compatibility=hopper", "tensorrt.hardware_compatibility: input should be 'none'"),
        ("tensorrt.aux_streams=-1", "tensorrt.aux_streams: input should be greater than or equal to 0"),
    ],
)
def test_a_value_that_no_library_knows_is_a_mistake_of_the_recipe(
    built: Built, override: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        asked(Run(built.run), override)


@needs_rtx
def test_options_are_recorded_and_a_change_compiles_again(run_copy: Run) -> None:
    plain = compile.run(run_copy, asked(run_copy), Silent())
    assert rtx(plain.variants).options == {}
    heard = Listener()
    same = compile.run(run_copy, asked(run_copy, "tensorrt.workspace_mb=null"), heard)
    assert same == plain and heard.said == ["compile: unchanged, skipped"]
    changed = compile.run(run_copy, asked(run_copy, "tensorrt.workspace_mb=4096"), heard)
    assert rtx(changed.variants).options == {"workspace_mb": 4096} and rtx(changed.variants).file
    assert heard.said.count("compile: unchanged, skipped") == 1
    judged = rtx(verify.run(run_copy, asked(run_copy, "tensorrt.workspace_mb=4096"), Silent()).variants)
    assert judged.options == {"workspace_mb": 4096}


@needs_rtx
@pytest.mark.parametrize("option", ["strip_weights=true", "timing_cache=run", "optimization_level=5"])
def test_an_option_that_the_backend_cannot_honour_is_never_dropped(run_copy: Run, option: str) -> None:
    """The variant is refused with the reason; a backend of another library is built as before."""
    recipe = with_overrides(
        run_copy.recipe, ["precision=[fp16]", f"tensorrt.{option}"], targets=["sm89", "cpu"]
    )
    heard = Listener()
    variants = compile.run(run_copy, recipe, heard).variants
    assert rtx(variants).verdict == "refused" and rtx(variants).file is None
    assert f"cannot honour tensorrt.{option.split('=')[0]}" in rtx(variants).reason
    assert any("cannot honour" in line for line in heard.said)
    for other in (variant for variant in variants if variant.backend == "openvino"):
        assert "tensorrt" not in other.reason


@needs_rtx
def test_tf32_is_what_the_receipt_says(run_copy: Run) -> None:
    made = rtx(
        compile.run(run_copy, asked(run_copy, "tensorrt.tf32=true", precision="fp32"), Silent()).variants
    )
    assert made.verdict == "unjudged" and made.receipt is not None and made.options == {"tf32": True}
    assert made.receipt.startswith("tf32 x ") and "fp32" not in made.receipt


@needs_rtx
def test_the_bar_moves_within_a_build_and_names_its_phase(run_copy: Run) -> None:
    heard = Listener()
    recipe = with_overrides(run_copy.recipe, ["precision=[fp32, fp16]"], targets=["sm89"])
    plans = len(compile.run(run_copy, recipe, heard).variants)
    shares = [done for done, _, _ in heard.steps]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == plans
    assert {total for _, total, _ in heard.steps} == {plans}
    assert sum(done != int(done) for done in shares) > 2 * plans
    assert any(doing.startswith("sm89-tensorrt_rtx-fp16, ") for _, _, doing in heard.steps)


def test_a_plain_line_says_what_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tlexport.console.PLAIN_INTERVAL", 0.0)
    with Terminal().bar("compiling") as step:
        step(0, 9, "first")
        step(2.75, 9, "third, timing")
        step(9, 9)
    told = capsys.readouterr().err.splitlines()
    assert (
        len(told) == 2
        and told[0].startswith("compiling: 2/9, ")
        and told[0].endswith(" s left, third, timing")
    )
    assert told[1] == "compiling: 9/9, 0 s left"


def test_an_engine_without_weights_is_judged_on_its_graph(run_copy: Run) -> None:
    """Such a variant cannot be built here: a CPU artifact is said to be one."""
    from tlexport.backends import registry

    recipe = asked(run_copy, target="cpu", precision="fp32")
    made = compile.run(run_copy, recipe, Silent()).variants
    stripped = next(v for v in made if v.backend == registry.ort.NAME)
    judge = verify.Judge(run_copy, recipe, describe_checkpoint(run_copy / "checkpoint"), 1)

    def judged_alone(variant: Variant) -> Variant:
        return judge.judged([judge.tried(variant)])[0][0]

    assert judged_alone(stripped).verdict == "pass"
    judged = judged_alone(stripped.model_copy(update={"options": {"strip_weights": True}}))
    assert judged.verdict == "compiled, not run here" and "on the same typed graph" in judged.reason
