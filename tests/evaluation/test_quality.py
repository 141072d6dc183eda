"""Quality of image sets: equal images get equal numbers and are looked at once."""

import pytest
import torch

from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
from sjd2_lightning.metrics.alignment import CLIPScorer, own_scores
from sjd2_lightning.metrics.features import extract_features
from sjd2_lightning.metrics.fidelity import frechet_result
from tests.tools.small_evaluation import Colours, fake_clip, reference_set

CAPTIONS = ["red cat", "a dog on a mat", "blue bird", "red cat"]


class Counting(Colours):
    def __init__(self):
        self.seen = []

    def __call__(self, images):
        self.seen.append(len(images))
        return super().__call__(images)


class Other(Colours):
    name = "Other"


def pictures(num_images=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (num_images, 8, 8, 3), generator=rng, dtype=torch.uint8))


def test_equal_images_are_looked_at_once():
    extractor = Counting()
    meter = QualityMeter(QualityMetrics([extractor], None, 10, 5), reference_set())
    images = pictures()
    first = meter.measure(images, CAPTIONS)
    assert extractor.seen == [12, 4]
    assert meter.measure([image.clone() for image in images], CAPTIONS) == first
    assert meter.measure([images[1], images[0], *images[2:]], CAPTIONS).measured["fd"].value == pytest.approx(
        first.measured["fd"].value
    )
    assert extractor.seen == [12, 4]
    meter.forget_images()
    meter.measure(images, CAPTIONS)
    assert extractor.seen == [12, 4, 4]


def test_distances_are_those_of_the_metrics_package():
    reference, images = reference_set(), pictures()
    meter = QualityMeter(QualityMetrics([Colours(), Other()], num_distance_resamples=5), reference)
    measured = meter.measure(images, CAPTIONS).measured
    expected = frechet_result(
        extract_features(Colours(), images), extract_features(Colours(), reference.images), 5
    )
    assert (measured["fd"].value, measured["fd"].interval) == (expected.value, expected.interval)
    assert f"12 reference images (sha256 {reference.identity[:12]})" in measured["fd"].protocol
    assert measured["fd_Other"].value == expected.value
    assert (measured["kid_Other"].name, measured["kid"].name) == ("kid_Other", "kid_Colours")


def test_clip_score_is_the_scorers_own_and_others_are_averaged():
    images, clip = pictures(), fake_clip()
    quality = QualityMeter(QualityMetrics(clip=clip), None).measure(images, CAPTIONS)

    def score(image, caption):
        return float(own_scores(clip.embed_images([image]), clip.embed_captions([caption])))

    own = [score(image, caption) for image, caption in zip(images, CAPTIONS, strict=True)]
    assert quality.clip_scores == pytest.approx(own)
    found = quality.measured["clip_score"]
    assert (found.name, found.value) == ("clip_score_fake", pytest.approx(sum(own) / len(own)))
    assert found.interval[0] <= found.value <= found.interval[1]
    assert quality.measured["clip_gain"].name == "clip_score_fake_matched_minus_shuffled"
    others = [
        score(image, other)
        for image, own in zip(images, CAPTIONS, strict=True)
        for other in dict.fromkeys(CAPTIONS)
        if other != own
    ]
    # "red cat" occurs twice: it counts twice for images of other captions.
    weights = [1, 1, 2, 1, 2, 1, 1, 1]
    means = [
        sum(w * s for w, s in zip(weights[i : i + 2], others[i : i + 2], strict=True))
        / sum(weights[i : i + 2])
        for i in range(0, 8, 2)
    ]
    assert quality.measured["clip_score_shuffled"].value == pytest.approx(sum(means) / 4)


def test_what_cannot_be_measured_is_left_out():
    meter = QualityMeter(QualityMetrics([Colours()], fake_clip(), 10, 5), reference_set())
    assert set(meter.measure(pictures(1), ["red"]).measured) == {"clip_score"}
    assert set(meter.measure(pictures(2), ["", "red"]).measured) == {"fd", "kid"}
    without_reference = QualityMeter(QualityMetrics([Colours()]), None)
    assert not without_reference.measure(pictures(2), ["a", "b"]).measured


def test_neighbours_are_looked_at_where_there_are_enough():
    manifold = {"precision", "recall", "density", "coverage"}
    for nearest_k, some in ((2, manifold), (4, set()), (None, set())):
        meter = QualityMeter(
            QualityMetrics([Colours()], num_distance_resamples=5, nearest_k=nearest_k), reference_set()
        )
        assert set(meter.measure(pictures(), CAPTIONS).measured) == {"fd", "kid"} | some


def test_figures_name_the_weights_they_were_made_with(tmp_path):
    class Weighted(Colours, torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(weight))

        def __call__(self, images):
            return super().__call__(images) * self.weight.detach()

    found = []
    for weight in (1.0, 2.0, 1.0):  # one name, other weights: their features must not meet in the cache
        metrics = QualityMetrics([Weighted(weight)], num_distance_resamples=2, cache_dir=tmp_path)
        found.append(QualityMeter(metrics, reference_set()).measure(pictures(), CAPTIONS).measured["fd"])
    assert found[0] == found[2]
    assert found[1].value == pytest.approx(4 * found[0].value)
    assert found[0].protocol != found[1].protocol
    assert "Colours (weights " in found[0].protocol
    assert len(list(tmp_path.iterdir())) == 2


def test_reference_features_are_kept_on_disk(tmp_path):
    for count in (1, 0):
        extractor = Counting()
        QualityMeter(QualityMetrics([extractor], cache_dir=tmp_path), reference_set())
        assert len(extractor.seen) == count


class Black(Colours):
    """Features that are not finite of an image whose first pixel is black."""

    def __call__(self, images):
        rows = super().__call__(images)
        rows[[number for number, image in enumerate(images) if not image[0, 0].any()], 2] = torch.nan
        return rows


def test_numbers_that_are_not_finite_name_their_set_and_image(tmp_path):
    images, reference = (
        [torch.full((8, 8, 3), value, dtype=torch.uint8) for value in (9, 9, 7, 8)],
        reference_set(),
    )
    images += pictures(2)
    meter = QualityMeter(QualityMetrics([Black()], num_distance_resamples=5), reference)
    meter.measure(images[:3], CAPTIONS[:3])
    images[4][0, 0] = 0
    with pytest.raises(ValueError, match="images to be measured by Colours: number 5 of 6"):
        meter.measure(images, [*CAPTIONS, "a", "b"])
    reference.images[7, 0, 0] = 0
    for settings in ({}, {"cache_dir": tmp_path}):
        with pytest.raises(ValueError, match="the reference images by Colours: number 8 of 12"):
            QualityMeter(QualityMetrics([Black()], **settings), reference)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["image", "text"])
def test_embeddings_that_are_not_finite_are_refused(part):
    clip = fake_clip()
    encode = getattr(clip.model, f"encode_{part}")

    def broken(values, normalize):
        rows = encode(values, normalize)
        rows[1] = torch.inf
        return rows

    setattr(clip.model, f"encode_{part}", broken)
    meter = QualityMeter(QualityMetrics(clip=clip), None)
    with pytest.raises(ValueError, match=r"CLIP fake of the (images|captions).* number 2 of 4"):
        meter.measure(pictures(), CAPTIONS)


def test_prompts_that_clip_cuts_are_flagged():
    clip = fake_clip()

    def tokenize(texts, context_length=4):
        rows = [[len(word) for word in text.split()][:context_length] for text in texts]
        return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])

    tokenize.context_length = 4
    scorer = CLIPScorer(Widened(clip.model), clip.preprocess, tokenize, "short")
    meter = QualityMeter(QualityMetrics(clip=scorer, num_resamples=10), None)
    measured = meter.measure(pictures(), ["a b c d", "a b c d e", "a", "a b c d e"]).measured
    for name in ("clip_score", "clip_score_shuffled", "clip_gain"):
        assert measured[name].flags == ("1 prompt cut by CLIP, which reads 4 tokens",)
    assert not meter.measure(pictures(), CAPTIONS[:1] * 4).measured["clip_score"].flags


class Widened(torch.nn.Module):
    """A model whose texts have four numbers; its images get a fourth."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def encode_image(self, images, normalize):
        return torch.nn.functional.pad(self.model.encode_image(images, normalize), (0, 1))

    def encode_text(self, ids, normalize):
        return self.model.encode_text(ids, normalize)
