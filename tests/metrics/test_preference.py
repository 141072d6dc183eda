"""PickScore equals transformers' own CLIP on the same inputs, and is compared image by image."""

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
from sjd2_lightning.metrics.preference import PickScorer
from sjd2_lightning.report.table import columns, markdown_table
from sjd2_lightning.report.write import report_object
from tests.tools.small_evaluation import METHODS, evaluate, reference_set
from tests.tools.small_scorers import SIDE, pictures, small_clip, small_pickscore

CAPTIONS = ["a red cat", "dog", "a dog and a cat", "dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pickscore(tmp_path_factory.mktemp("pickscore"))


@pytest.fixture(scope="module")
def scorer(folder):
    return PickScorer(folder, "owner/pick@v1")


def test_scores_are_those_of_transformers(folder, scorer):
    network = CLIPModel.from_pretrained(folder).eval()
    prepare, tokenize = CLIPImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    images = [*pictures(3, SIDE), pictures(1, 90)[0, :60]]
    found = scorer.scores(scorer.embed_images(images), scorer.embed_captions(CAPTIONS))
    for image, caption, score in zip(images, CAPTIONS, found, strict=True):
        pixels = prepare(images=[image.permute(2, 0, 1)], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            alone = network(**tokenize(caption, return_tensors="pt"), pixel_values=pixels)
        assert float(score) == pytest.approx(float(alone.logits_per_image[0, 0]), abs=1e-3)
    assert scorer.scale == pytest.approx(float(network.logit_scale.detach().exp()))


def test_a_score_is_of_single_images(scorer):
    images = list(pictures(4, SIDE))
    meter = QualityMeter(QualityMetrics(pick=scorer, num_resamples=50), None)
    quality = meter.measure(images, CAPTIONS)
    found = quality.measured["pick_score"]
    own = scorer.scores(scorer.embed_images(images), scorer.embed_captions(CAPTIONS))
    assert quality.pick_scores == pytest.approx(own.tolist())
    assert found.value == pytest.approx(float(own.mean()))
    assert found.interval[0] <= found.value <= found.interval[1]
    for said in ("owner/pick@v1 (weights ", "MIT"):
        assert said in found.protocol
    assert not found.flags
    assert not meter.measure(images, ["", "a", "b", "c"]).measured, "where a caption is missing"
    long = ["a dog " * 9, *CAPTIONS[1:]]
    assert meter.measure(images, long).measured["pick_score"].flags == (
        "1 prompt cut by PickScore, which reads 16 tokens",
    )


def test_a_scorer_that_sees_no_objects_is_not_shown(scorer, tmp_path):
    """Random weights rank real pictures as they rank copies with shuffled blocks."""
    reference = reference_set()
    metrics = QualityMetrics(pick=scorer, num_resamples=50, cache_dir=tmp_path)
    meter = QualityMeter(metrics, reference)
    [control] = meter.controls
    assert not control.passed
    assert control.sentence.startswith("pick_score is not shown: its gain is")
    found = meter.measure(list(reference.images), reference.captions)
    assert (found.measured, found.pick_scores) == ({}, ())
    rows, texts = scorer.embed_images(reference.images), scorer.embed_captions(reference.captions)
    own = [
        float(scorer.scores(row, text))
        - np.mean([float(scorer.scores(row, other)) for other, said in pairs if said != caption])
        for row, text, caption, pairs in (
            (rows[i], texts[i], reference.captions[i], list(zip(texts, reference.captions, strict=True)))
            for i in range(len(rows))
        )
    ]
    assert control.measured["real"].value == pytest.approx(np.mean(own), abs=1e-3)


def test_methods_are_compared_image_by_image(scorer, tmp_path):
    methods = {name: METHODS[name] for name in ("ar", "sjd", "sjd2_paper")}
    metrics = QualityMetrics(pick=scorer, num_resamples=50)
    result = evaluate(tmp_path, methods=methods, metrics=metrics, reference=None)
    same, other = (result.methods[name].measured["pick_score_minus_ar"] for name in ("sjd", "sjd2_paper"))
    means = {name: method.measured["pick_score"].value for name, method in result.methods.items()}
    assert other.value == pytest.approx(means["sjd2_paper"] - means["ar"])
    assert other.interval[0] <= other.value <= other.interval[1]
    assert same.value == pytest.approx(means["sjd"] - means["ar"])
    assert "pick_score_minus_ar" not in result.methods["ar"].measured
    headings = [column.heading for column in columns(result)]
    assert {"PickScore", "PickScore less ar"} <= set(headings)
    assert "PickScore" in markdown_table(result)
    report = report_object(result, {})
    assert report["methods"]["sjd"]["pick_score_minus_ar_interval"] is not None
    assert report["metrics"]["pick_score"]["num_images"] == 5


def test_a_release_without_its_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json in .*; download the release with"):
        PickScorer(small_clip(tmp_path), "x")
