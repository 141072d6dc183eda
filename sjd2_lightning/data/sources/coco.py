"""COCO's captions: the one reader of its annotation files, pictures as records, protocols of metrics."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sjd2_lightning.data.captions import NO_CAPTION, json_of, plain_caption
from sjd2_lightning.data.sources.record import Record, checked_records, file_record, key_of
from sjd2_lightning.run.values import Count, wrong_values


def read_coco(path: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """File names, and captions in the order of their own ids, by the id of the image.

    Captions that are null or empty are none. Annotations of images that the file lacks are passed over.

    Raises:
        ValueError: the file cannot be read, names files in other folders, or gives an id to two files.
    """
    try:
        content: Any = json_of(path.read_bytes())
        entries = [(_id(entry, "id"), str(entry["file_name"])) for entry in content["images"]]
        names = dict(entries)
        captions: dict[int, list[str]] = {image_id: [] for image_id in names}
        annotations = content["annotations"]
        if all("id" in entry for entry in annotations):  # else in the order of the file
            annotations = sorted(annotations, key=lambda entry: _id(entry, "id"))
        if annotations and not any("caption" in entry for entry in annotations):
            raise KeyError("caption")
        for entry in annotations:
            if (own := captions.get(_id(entry, "image_id"))) is not None:
                own += _captions_of(entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as COCO captions ({type(error).__name__}: {error}); "
            "give captions_val2017.json or its like, from COCO's archive of annotations"
        ) from error
    unsafe = [name for name in names.values() if Path(name).name != name]
    if unsafe:
        raise ValueError(f"{path} names the file {unsafe[0]!r}; names of COCO hold no folders")
    if twice := [entry for entry in entries if names[entry[0]] != entry[1]]:
        number, name = twice[0]
        raise ValueError(
            f"{path} gives the id {number} to {name} and to {names[number]}; correct one of them"
        )
    return names, captions


def _id(entry: Any, field: str) -> int:
    value = entry[field]
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).isdecimal():
        raise ValueError(f"{field} {value!r} is no number")
    return int(value)


def _captions_of(entry: Any) -> list[str]:
    try:
        return [plain_caption(entry.get("caption"))]
    except ValueError:
        return []


def coco_records(root: Path, annotations: Path, captions_per_image: int | None = 1) -> list[Record]:
    """Pictures of COCO with their captions.

    Args:
        root: folder of the pictures, such as ``train2017``.
        annotations: file of the captions, such as ``annotations/captions_train2017.json``.
        captions_per_image: number of captions of a picture, the first ones, a sample each; None for all.

    Raises:
        ValueError: the annotations cannot be read, or no picture that they name is in the folder.
    """
    names, captions = read_coco(annotations)
    records = []
    for number in sorted(names):
        name, own = names[number], captions[number][:captions_per_image]
        if not own:
            records.append(file_record(root, name, key_of(name), "", NO_CAPTION))
        for place, caption in enumerate(own):
            key = key_of(name) + (f"_c{place}" if place else "")
            records.append(file_record(root, name, key, caption))
    return checked_records(records, root, f"give the folder of the pictures that {annotations} names")


@dataclass(frozen=True)
class CocoProtocol:
    """Captions and images of COCO, as its archives unpack.

    Attributes:
        name: name of the protocol; goes into every report.
        annotations: file of captions, captions_*.json.
        images: folder of the JPEGs that it names.
        num_images: number of captions to draw, each of another image.
    """

    name: str
    annotations: Path
    images: Path
    num_images: Count

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        remedy = (
            "unpack COCO's archives of images and annotations beside each other and give the places with "
            "metrics.protocol.annotations and metrics.protocol.images"
        )
        found = wrong_values(self)
        if not self.name:
            found.append("name: is empty; give the protocol a name for the report")
        if not self.annotations.is_file():
            found.append(f"annotations={self.annotations}: there is no such file; {remedy}")
        if not self.images.is_dir():
            found.append(f"images={self.images}: there is no such folder; {remedy}")
        return found


@dataclass(frozen=True)
class CocoItem:
    """One image with the caption that stands for it."""

    image_id: int
    file_name: str
    caption: str

    @property
    def key(self) -> str:
        return f"coco-{self.image_id:012d}"


def coco_items(protocol: CocoProtocol) -> list[CocoItem]:
    """The images of a protocol with one caption each, in the order of their ids.

    The caption of an image is the one with the lowest annotation id. Where the file holds more images than
    the protocol wants, those whose id has the smallest sha256 are taken: a fixed draw that no seed changes.

    Raises:
        ValueError: the file is missing, is no COCO captions file, or holds too few images with captions.
    """
    names, captions = read_coco(protocol.annotations)
    chosen = sorted(image_id for image_id in names if captions[image_id])
    if len(chosen) < protocol.num_images:
        raise ValueError(
            f"{protocol.annotations} has captions of {len(chosen)} images and {protocol.name} needs "
            f"{protocol.num_images}; use the whole file, or set metrics.protocol.num_images and another name"
        )
    if len(chosen) > protocol.num_images:
        chosen = sorted(sorted(chosen, key=_draw)[: protocol.num_images])
    return [CocoItem(image_id, names[image_id], captions[image_id][0]) for image_id in chosen]


def _draw(image_id: int) -> str:
    return hashlib.sha256(f"coco:{image_id}".encode()).hexdigest()
