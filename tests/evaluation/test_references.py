"""Real images, their altered copies, and COCO protocols on a tiny folder."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sjd2_lightning.data.pictures import read_picture
from sjd2_lightning.data.sources.coco import CocoProtocol, coco_items
from sjd2_lightning.data.sources.folder import folder_records
from sjd2_lightning.data.sources.record import FilePictures, read_stretch
from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
from sjd2_lightning.evaluation.references import (
    blurred,
    coco_prompts,
    coco_reference,
    held_out_emoji,
    image_folder,
    patch_shuffled,
)
from sjd2_lightning.metrics.features import extract_features
from tests.tools.small_evaluation import Colours, evaluate, metrics, reference_set

COCO_SIZES = {9: (20, 30), 3: (30, 20), 7: (16, 16), 5: (40, 12)}


def test_held_out_pictures_are_the_split():
    reference = held_out_emoji(16)
    assert reference.images.shape == (len(reference.keys), 16, 16, 3)
    assert reference.images.dtype == torch.uint8
    assert reference.identity == held_out_emoji(16).identity != held_out_emoji(17).identity


def test_blur_and_shuffle_keep_what_they_should():
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    assert (blurred(images).float().mean() - images.float().mean()).abs() < 2
    assert blurred(images).float().std() < 0.5 * images.float().std()
    shuffled = patch_shuffled(images)
    assert torch.equal(shuffled.flatten().sort().values, images.flatten().sort().values)
    assert not torch.equal(shuffled, images)
    assert torch.equal(shuffled, patch_shuffled(images))
    patches = {image[:8, :8].numpy().tobytes() for image in shuffled}
    originals = {
        image[y : y + 8, x : x + 8].numpy().tobytes()
        for image in images
        for y in (0, 8, 16, 24)
        for x in (0, 8, 16, 24)
    }
    assert patches <= originals


def test_image_folder_crops_the_middle(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(tmp_path / "b.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a bar\n")
    reference = image_folder(tmp_path, (10, 10))
    assert (reference.keys, reference.captions) == (("a", "b"), ("a bar", ""))
    assert (reference.images == 200).all()


def test_bad_folders_are_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        image_folder(tmp_path / "absent", (8, 8))
    with pytest.raises(ValueError, match="holds 0 images"):
        image_folder(tmp_path, (8, 8))
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        image_folder(tmp_path, (8, 8))


def subjects(folder: Path, num: int = 24) -> tuple[Path, Path]:
    """The same own pictures on transparent ground and on white."""
    rng = np.random.default_rng(0)
    for number in range(num):
        picture = Image.new("RGBA", (24, 24))
        colour = (*(int(part) for part in rng.integers(40, 255, 3)), 255)
        picture.paste(colour, (3 + number % 5, 4, 20, 15 + number % 7))
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        for name, image in (("alpha", picture), ("white", white.convert("RGB"))):
            (folder / name).mkdir(exist_ok=True)
            image.save(folder / name / f"p{number:02d}.png")
    return folder / "alpha", folder / "white"


def test_transparent_ground_is_white(tmp_path):
    sets = [image_folder(folder, (16, 16)) for folder in subjects(tmp_path)]
    assert torch.equal(sets[0].images, sets[1].images)
    metrics = QualityMetrics([Colours()], num_distance_resamples=2)
    found = QualityMeter(metrics, sets[0]).measure(list(sets[1].images), [""] * 24).measured["fd"]
    assert found.value == pytest.approx(0, abs=1e-6)
    assert "transparency on white; 16-bit grey by 1/257" in found.protocol
    assert "the largest centred part" in found.protocol


def odd_pictures(folder: Path) -> dict[str, Image.Image]:
    """Pictures that were read in two ways once, by name."""
    turned, rng = Image.Exif(), np.random.default_rng(1)
    turned[0x0112] = 6
    pixels = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    clear = pixels.convert("RGBA")
    clear.putalpha(Image.fromarray(rng.integers(0, 256, (20, 30), dtype=np.uint8)))
    deep = Image.fromarray(rng.integers(0, 65536, (20, 30), dtype=np.uint16))
    pixels.save(folder / "turned.jpg", exif=turned)
    clear.save(folder / "clear.png")
    deep.save(folder / "deep.png")
    clear.save(folder / "clear.webp", lossless=True)
    pixels.quantize(16).save(folder / "palette.png", transparency=3)
    pixels.convert("CMYK").save(folder / "cmyk.jpg")
    return {path.name: read_picture(path.read_bytes()) for path in sorted(folder.iterdir())}


def test_training_references_and_coco_see_the_same_pixels(tmp_path):
    pictures = odd_pictures(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.with_name(f"{path.name}.txt").write_text("x")  # a text that is no caption of any
        path.with_suffix(".txt").write_text("x")
    reference = image_folder(tmp_path, (8, 8))
    records = [record for record in folder_records(tmp_path) if not record.problem]
    training = FilePictures(str(tmp_path), records, (8, 8), 1, read_stretch)
    assert [record.file for record in records] == list(pictures)
    for record, image in zip(records, reference.images, strict=True):
        np.testing.assert_array_equal(training.image(record), image.numpy())
    notes = [{"id": n, "image_id": n, "caption": "x"} for n in range(len(pictures))]
    images = [{"id": n, "file_name": name} for n, name in enumerate(pictures)]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": notes}))
    protocol = CocoProtocol("coco", tmp_path / "c.json", tmp_path, len(pictures))
    coco = coco_reference(protocol, coco_items(protocol))
    for picture, image in zip(pictures.values(), coco.images, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), image.numpy())
    assert "transparency on white" in coco.reading
    assert "Lanczos" not in coco.reading, "the extractor resizes"


def test_folders_below_and_names_with_a_dot(tmp_path):
    alpha, _ = subjects(tmp_path, 4)
    for folder in ("sub", ".ipynb_checkpoints", "__MACOSX"):
        (alpha / folder).mkdir()
        (alpha / folder / "p9.png").write_bytes((alpha / "p00.png").read_bytes())
    (alpha / "._p00.png").write_bytes(b"\0\5\x16\7")
    (alpha / "README.txt").write_text("about")
    reference = image_folder(alpha, (8, 8))
    assert reference.keys == ("p00", "p01", "p02", "p03", "sub/p9")
    (alpha / "p5.tiff").write_bytes(b"II*\0")
    with pytest.raises(ValueError, match=r"p5\.tiff cannot be used \(format not read"):
        image_folder(alpha, (8, 8))
    (alpha / "p5.tiff").unlink()
    (alpha / "p00.txt").write_bytes(b"carr\xe9")
    with pytest.raises(ValueError, match=r"p00\.png cannot be used \(not UTF-8"):
        image_folder(alpha, (8, 8))


def tiny_coco(folder: Path, split: str = "val2017") -> CocoProtocol:
    """Four images of different sizes, some with several captions, one without any."""
    images, rng = folder / split, np.random.default_rng(0)
    images.mkdir(parents=True)
    for image_id, (height, width) in COCO_SIZES.items():
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{image_id:012d}.jpg", quality=95)
    annotations = [
        {"id": 50, "image_id": 9, "caption": "a later caption"},
        {"id": 41, "image_id": 9, "caption": " a dog on\na mat "},
        {"id": 2, "image_id": 3, "caption": "a red cat"},
        {"id": 8, "image_id": 7, "caption": "blue"},
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in COCO_SIZES],
        "annotations": annotations,
    }
    path = folder / "annotations" / f"captions_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return CocoProtocol("coco2017_5k", path, images, 3)


def test_one_caption_an_image_in_the_order_of_ids(tmp_path):
    items = coco_items(tiny_coco(tmp_path))
    assert [(item.image_id, item.caption) for item in items] == [
        (3, "a red cat"), (7, "blue"), (9, "a dog on a mat")
    ]  # fmt: skip
    prompts = coco_prompts(items)
    assert [item.key for item in prompts] == [f"coco-{i:012d}" for i in (3, 7, 9)]
    assert coco_prompts(items) == prompts != coco_prompts(items, seed=1)


def test_fewer_images_are_a_fixed_draw(tmp_path):
    protocol = tiny_coco(tmp_path)
    draws = [coco_items(CocoProtocol("x", protocol.annotations, protocol.images, n)) for n in (1, 2, 3)]
    ids = [{item.image_id for item in draw} for draw in draws]
    by_hash = sorted((3, 7, 9), key=lambda i: hashlib.sha256(f"coco:{i}".encode()).hexdigest())
    assert ids == [set(by_hash[:count]) for count in (1, 2, 3)]
    assert draws[1] == sorted(draws[1], key=lambda item: item.image_id)


def test_real_images_are_measured_at_their_own_sizes(tmp_path):
    protocol = tiny_coco(tmp_path)
    items = coco_items(protocol)
    reference = coco_reference(protocol, items)
    opened = [torch.from_numpy(np.array(Image.open(protocol.images / item.file_name))) for item in items]
    assert [tuple(image.shape[:2]) for image in reference.images] == [(30, 20), (16, 16), (20, 30)]
    expected = extract_features(Colours(), opened).features
    assert torch.equal(extract_features(Colours(), reference.images).features, expected)
    assert reference.identity == coco_reference(protocol, items).identity
    Image.fromarray(255 - opened[0].numpy()).save(protocol.images / items[0].file_name)
    assert reference.identity != coco_reference(protocol, items).identity
    assert reference.matching(coco_prompts(items)[1:]).keys == reference.keys[1:]


def test_an_evaluation_by_a_protocol(tmp_path):
    protocol = tiny_coco(tmp_path / "coco")
    items = coco_items(protocol)
    quality = replace(metrics(), clip=None)  # the small scorer prepares no images of many sizes
    settings = {"reference": coco_reference(protocol, items), "batch_size": 2, "metrics": quality}
    prompts = coco_prompts(items)
    result = evaluate(tmp_path / "all", prompts=prompts, **settings)
    assert (result.reference_name, result.references) == ("coco2017_5k", {})
    protocol_text = result.methods["ar"].measured["fd"].protocol
    assert f"3 reference images (sha256 {result.reference_identity[:12]})" in protocol_text
    assert not any("asks for" in text for text in result.warnings)
    part = evaluate(tmp_path / "part", prompts=prompts[:2], **settings)
    assert "coco2017_5k asks for 3 prompts and 2 were decoded" in part.warnings[0]


def test_reference_statistics_are_kept_by_content(tmp_path):
    protocol = tiny_coco(tmp_path / "coco")
    reference = coco_reference(protocol, coco_items(protocol))
    metrics = QualityMetrics([Colours()], num_distance_resamples=2, cache_dir=tmp_path / "kept")
    images = list(reference_set(3).images)
    first = QualityMeter(metrics, reference).measure(images, [""] * 3)
    (kept,) = (tmp_path / "kept").iterdir()
    before = kept.stat().st_mtime_ns
    assert QualityMeter(metrics, reference).measure(images, [""] * 3) == first
    assert kept.stat().st_mtime_ns == before


def test_what_lacks_is_one_clear_error(tmp_path):
    protocol = tiny_coco(tmp_path)
    items = coco_items(protocol)
    with pytest.raises(ValueError, match="captions of 3 images and coco2017_5k needs 5000"):
        coco_items(CocoProtocol("coco2017_5k", protocol.annotations, protocol.images, 5000))
    with pytest.raises(ValueError, match=r"gone\.json cannot be read as COCO captions"):
        coco_items(CocoProtocol("x", tmp_path / "gone.json", protocol.images, 1))
    broken = protocol.images / items[1].file_name
    broken.write_bytes(b"no picture")
    reference = coco_reference(protocol, items)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=rf"{broken.name} cannot be read"):
        evaluate(out, prompts=coco_prompts(items), reference=reference)
    assert not out.exists(), "found before anything was decoded or written"
    broken.unlink()
    with pytest.raises(ValueError, match=r"1 images of .* the first is 000000000007\.jpg"):
        coco_reference(protocol, items)
    for content in ("[]", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}', "{"):
        protocol.annotations.write_text(content)
        with pytest.raises(ValueError, match="cannot be read as COCO captions"):
            coco_items(protocol)
    entries = [{"id": 1, "file_name": "../../etc/passwd"}]
    protocol.annotations.write_text(json.dumps({"images": entries, "annotations": []}))
    with pytest.raises(ValueError, match="names of COCO hold no folders"):
        coco_items(protocol)


def test_problems_of_a_protocol_start_with_their_keys(tmp_path):
    assert tiny_coco(tmp_path).problems() == []
    found = CocoProtocol("", tmp_path / "gone.json", tmp_path / "gone", 0).problems()
    assert [re.split("[=:]", line)[0] for line in found] == ["num_images", "name", "annotations", "images"]
    assert "unpack COCO's archives" in found[2]
