"""Encoders of Hugging Face: from a folder made here, with its own tokenizer, the whole way to a graph."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import polars as pl
import pytest
import torch

from tlexport.errors import DataError, NotInstalledError, RecipeError, WeightsError
from tlexport.graph import trace
from tlexport.modalities import molecule as modality
from tlexport.modalities.dataset import Dataset
from tlexport.models import checkpoint, molecule, weights
from tlexport.models.network import ServingModel
from tlexport.recipe import Pretrain, Recipe, parse
from tlexport.tensors import named

pytest.importorskip("rdkit")
pytest.importorskip("transformers")

RINGS = ("c1ccccc1", "C1CCCCC1", "c1ccncc1", "c1ccoc1", "c1ccsc1", "C1CCNC1", "C1CC1", "C1CCC1")
PAD = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights, and a tokenizer of single characters that wraps them in <s> and </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    made = tmp_path_factory.mktemp("bert")
    kinds = ["<s>", "<pad>", "</s>", "<unk>", *"CNOSFclnos123()=#"]
    tokenizer = Tokenizer(
        models.WordLevel({kind: place for place, kind in enumerate(kinds)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        made
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(kinds),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        pad_token_id=PAD,
    )
    BertModel(config).save_pretrained(made)
    return made


def recipe(folder: Path, table: Path, **section: Any) -> Recipe:
    document = {
        "name": "x",
        "modality": "molecule",
        "data": {"path": str(table), "molecule": {"target": "y", "max_length": 24} | section},
        "backbone": {
            "name": f"huggingface/{folder}",
            "options": {"fingerprint": 16, "members": 2, "width": 16, "depth": 1},
        },
    }
    return parse(document, [])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    tails = ("", "C", "O", "N", "CO", "CN", "CC", "CCO", "F", "S")
    smiles = [ring + tail for ring in RINGS for tail in tails]
    rows = pl.DataFrame({"smiles": smiles, "y": [float(len(one)) for one in smiles]})
    rows.write_csv(tmp_path / "table.csv")
    return tmp_path / "table.csv"


def load(made: Recipe) -> Dataset:
    return modality.load(made.data, task="regression", seed=0, cache=None)


def model(made: Recipe, data: Dataset) -> Any:
    torch.manual_seed(1)
    return molecule.create(molecule.describe(made, data)).eval()


def test_its_own_tokenizer_reads_the_smiles(folder: Path, table: Path) -> None:
    made = recipe(folder, table)
    assert made.data.molecule.tokenizer == str(folder), "filled in when the recipe is resolved"
    data = load(made)
    (split,) = (split for split in (data.train, data.val, data.test) if "Cc1ccccc1" in split.keys)
    tokens = split.inputs["tokens"][split.keys.index("Cc1ccccc1")]
    assert tokens[0] == 0 and tokens[10] == 2 and (tokens[11:] == PAD).all(), "<s> nine characters </s>"
    names, inputs = modality.samples(str(table), data.preprocessing.describe())
    assert names[0] == "row 2" and (inputs["tokens"][:, 0] == 0).all(), "the description alone is enough"


def test_weights_come_from_its_safetensors_and_the_graph_agrees(
    folder: Path, table: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import BertModel

    made = recipe(folder, table)
    data = load(made)
    network = model(made, data)
    capfd.readouterr()
    report = weights.load(network, made.backbone.weights)
    assert capfd.readouterr().err == ""
    assert report.exact and report.matched == report.total and report.origin == f"Hugging Face {folder}"
    tokens = torch.from_numpy(data.test.inputs["tokens"].copy())
    present = tokens != PAD
    library = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = library(input_ids=tokens.long(), attention_mask=present.long()).last_hidden_state
        mean = (states * present[:, :, None]).sum(dim=1) / present.sum(dim=1, keepdim=True)
        torch.testing.assert_close(network.backbone.encoder(tokens), mean, rtol=1e-4, atol=1e-5)
    serving = ServingModel(network).eval()
    feed = named(data.test.inputs, serving.model.INPUTS)
    example = tuple(torch.from_numpy(array[:2].copy()) for array in feed.values())
    metadata = {"class_names": "[]", "preprocessing": "{}", "task": "regression"}
    graph = trace.trace(
        serving, example, opset=20, input_names=serving.model.INPUTS, output_name="values", metadata=metadata
    )
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, feed)
    with torch.no_grad():
        expected = serving(*(torch.from_numpy(array) for array in feed.values())).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_needs_the_folder_no_more(folder: Path, table: Path, tmp_path: Path) -> None:
    made = recipe(folder, table)
    data = load(made)
    network = model(made, data)
    weights.load(network, "default")
    checkpoint.save_checkpoint(tmp_path / "kept", network, network.spec, {})
    description = (tmp_path / "kept/model.json").read_text().replace(str(folder), "/gone")
    (tmp_path / "kept/model.json").write_text(description)
    loaded, _, _ = checkpoint.load_checkpoint(tmp_path / "kept")
    inputs = tuple(torch.from_numpy(a) for a in named(data.test.inputs, network.INPUTS).values())
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs), network.eval()(*inputs))


def test_layers_are_stages(folder: Path, table: Path) -> None:
    made = recipe(folder, table)
    network = model(made, load(made))
    assert [name for name, _ in network.stages()] == ["embeddings", "layer1", "layer2", "branch", "ensemble"]
    staged = [name for _, names in network.stages() for name in names]
    assert sorted(staged) == sorted(name for name, _ in network.backbone.named_parameters())


def test_pickled_weights_are_not_read(folder: Path, table: Path, tmp_path: Path) -> None:
    made = recipe(folder, table)
    network = model(made, load(made))
    other = tmp_path / "pickled"
    other.mkdir()
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(torch.load, other / "pytorch_model.bin")
    spec = network.spec.model_copy(update={"backbone": f"huggingface/{other}"})
    with pytest.raises(WeightsError, match="they must be safetensors"):
        molecule.published(spec)


def test_mistakes_say_what_does_not_fit(folder: Path, table: Path, tmp_path: Path) -> None:
    data = load(recipe(folder, table))
    with pytest.raises(DataError, match="no fast Hugging Face tokenizer under the folder"):
        load(recipe(tmp_path, table))
    long = recipe(folder, table, max_length=64)
    with pytest.raises(RecipeError, match="reads at most 40 tokens"):
        molecule.describe(long, load(long))
    own = recipe(folder, table).model_copy(update={"backbone": parse_own(table).backbone})
    with pytest.raises(
        RecipeError, match=r"molecule/smiles does not read the tokens of data\.molecule\.tokenizer"
    ):
        molecule.describe(own, data)
    strange = data.train.inputs.copy()
    strange["tokens"][0, 0] = 99
    with pytest.raises(RecipeError, match=r"knows 21 tokens, its input holds number 99"):
        from tlexport.models import huggingface

        huggingface.configured(f"huggingface/{folder}", 24, strange["tokens"])
    with pytest.raises(RecipeError, match="is not pretrained here; molecule/smiles is"):
        molecule.pretext(model(recipe(folder, table), data), Pretrain(), data)


def parse_own(table: Path) -> Recipe:
    return parse({"name": "x", "modality": "molecule", "data": {"path": str(table)}}, [])


def test_without_transformers_the_extra_is_named(
    folder: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(folder, table)
    data = load(made)
    spec = molecule.describe(made, data)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name)
    )
    for use in (lambda: load(made), lambda: molecule.create(spec), lambda: molecule.published(spec)):
        with pytest.raises(NotInstalledError, match=r"tlexport\[transformers\]"):
            use()
