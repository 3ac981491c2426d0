"""The benchmark's classifier: read from its files, and as a judge. Its weights here are random."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ipr_fast.tasks.counting_polygons import ClassifierJudge, CountingPolygons
from ipr_fast.tasks.polygons.classifier import PREFIX, PolygonsClassifier, load_classifier, pairs_of_numbers

CONFIG = {"min_vertices": 3, "max_vertices": 7, "min_num_polygons": 1, "max_num_polygons": 9, "device": "cpu"}


def write_classifier(folder, images):
    """Write a classifier of random weights in the published format, whose heads' classes vary over these images."""
    torch.manual_seed(0)
    model = PolygonsClassifier((3, 7), (1, 9)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
    with torch.no_grad():
        logits = model(images)
        for name, head in model.get_submodule("fc.heads").named_children():
            head.bias -= logits[name].mean(0)
    save_file({PREFIX + name: value for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return model


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return CountingPolygons().sample(12, generator) * torch.linspace(0.2, 1, 12).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("classifier")
    write_classifier(folder, images)
    return folder


def test_pairs_are_in_the_order_of_the_benchmarks_classes():
    pairs = pairs_of_numbers((3, 7))
    assert len(pairs) == len(set(pairs)) == 35
    assert pairs[:9] == [(1, 3), (2, 3), (3, 3), (3, 4), (3, 5), (3, 6), (3, 7), (3, 8), (3, 9)]
    assert pairs[9:12] == [(1, 4), (2, 4), (4, 4)]


def test_the_judge_says_what_the_classifier_sees(folder, images):
    classifier, judge = load_classifier(folder), CountingPolygons(classifier=str(folder)).judge()
    assert isinstance(judge, ClassifierJudge)
    logits, report = classifier(images), judge(images)
    assert torch.equal(report.polygons, logits["num_polygons"].argmax(1) + 1)
    assert torch.equal(report.vertices, logits["num_vertices"].argmax(1) + 3)
    assert torch.equal(report.uniform, logits["is_uniform"].argmax(1) == 1)
    assert len(report.polygons.unique()) > 1
    assert len(report.numbers.unique(dim=0)) > 1
    for polygons, vertices, numbers, match in zip(
        report.polygons.tolist(), report.vertices.tolist(), report.numbers.tolist(), report.numbers_match, strict=True
    ):
        assert match == (sorted([polygons, vertices]) == numbers)
    assert torch.equal(report.good, report.uniform & report.numbers_match)
    assert "benchmark's classifier" in judge.note


def test_it_equals_the_benchmarks_own(folder, images, monkeypatch):
    """The same logits and, image by image, the same two metrics as srmbench's."""
    # torchvision's build for CUDA, beside a torch without, lacks operators; the network needs none.
    monkeypatch.setattr(torch.library, "register_fake", lambda *_, **__: lambda function: function)
    module = pytest.importorskip("srmbench.evaluations.counting_objects_evaluation", exc_type=ImportError)
    monkeypatch.setattr(module.CountingObjectsEvaluation, "repo_ids", {"polygons": str(folder)})
    theirs = module.CountingObjectsEvaluation("polygons", "cpu")
    logits = theirs.classifier.model(images)
    for name, ours in load_classifier(folder)(images).items():
        assert torch.allclose(ours, logits[name], rtol=1e-4, atol=1e-4)
    report = ClassifierJudge(str(folder))(images)
    for i in range(len(images)):
        found = theirs.evaluate(images[i : i + 1])
        assert found["are_vertices_uniform"].item() == report.uniform[i].item()
        assert found["numbers_match_objects"].item() == report.numbers_match[i].item()


def test_a_folder_that_is_not_the_classifiers_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match=r"classifier: .* must have the benchmark's config\.json and model"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "max_vertices": 9}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"size mismatch|loading state_dict"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="min_vertices"):
        load_classifier(tmp_path)
