"""data.sources.coco."""

from __future__ import annotations

import json
from pathlib import Path

from sjd2_lightning.data.sources.record import Record, _file_record, key_of


def coco_records(root: Path, annotations: Path, captions_per_image: int | None = 1) -> list[Record]:
    """Pictures of COCO with their captions.

    Args:
        root: folder of the pictures, e.g. ``train2017``.
        annotations: e.g. ``annotations/captions_train2017.json``.
        captions_per_image: the first so many captions of a picture, a sample each; None for all.

    Raises:
        ValueError: the annotations cannot be read.
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions: dict[int, list[str]] = {number: [] for number in names}
        for entry in sorted(content["annotations"], key=lambda entry: entry["id"]):
            captions[entry["image_id"]].append(" ".join(str(entry["caption"]).split()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{annotations} are no COCO captions ({error!r}); give --annotations captions_*.json."
        ) from error
    records = []
    for number in sorted(names):
        for place, caption in enumerate(list(filter(None, captions[number]))[:captions_per_image]):
            key = key_of(names[number]) + (f"_c{place}" if place else "")
            records.append(_file_record(root, names[number], key, caption))
    return records
