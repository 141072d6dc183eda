"""Names: what is passed over, and which files belong to one sample."""

from functools import partial

import pytest

from sjd2_lightning.data.names import Part, captioned, files_below, passed_over, sample_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("000.jpg", ("000", "jpg")),
        ("./000.jpg", ("000", "jpg")),
        ("././a/./000.jpg", ("a/000", "jpg")),
        ("a.b/c.d.e", ("a.b/c", "d.e")),
        ("k.image_ids.npy", ("k", "image_ids.npy")),
        ("LICENSE", ("LICENSE", "")),
        ("/etc/x.txt", ("/etc/x", "txt")),
        ("../x.txt", ("../x", "txt")),
        ("._000.jpg", None),
        ("./._000.jpg", None),
        ("a/.ipynb_checkpoints/000.jpg", None),
        ("__MACOSX/a/000.jpg", None),
        (".DS_Store", None),
    ],
)
def test_sample_and_suffix(name, expected):
    assert sample_name(name) == expected
    assert passed_over(name) == (expected is None)


def pairs(*names, fields=False, **contents):
    """Captions or problems of made-up files; a text holds its own name unless said otherwise."""
    read = {name: (contents.get(name.partition(".")[0], name)).encode() for name in names}
    parts = [Part(name, partial(read.get, name)) for name in names]
    return {one.part.name: one.caption or one.problem for one in captioned(parts, fields)}


def test_which_text_belongs_to_a_picture():
    assert pairs("a.jpg", "a.txt", "b.png", "b.TXT") == {"a.jpg": "a.txt", "b.png": "b.TXT"}
    assert pairs("a.jpg", "a.PNG", "a.txt") == {"a.jpg": "a.txt", "a.PNG": "a.txt"}
    assert pairs("c.1.jpg", "c.1.txt", "c.2.jpg", "c.2.txt") == {"c.1.jpg": "c.1.txt", "c.2.jpg": "c.2.txt"}
    assert pairs("x/a.jpg", "y/a.txt") == {
        "x/a.jpg": "no caption",
        "y/a.txt": "no picture (the files of this name are .txt)",
    }
    # the same name in the two forms of Unicode
    assert pairs("carr\u00e9.jpg", "carre\u0301.txt") == {"carr\u00e9.jpg": "carre\u0301.txt"}


def test_fields_of_a_sample_are_no_pictures():
    mask = ("a.jpg", "a.txt", "a.seg.png")
    assert pairs(*mask, fields=True) == {"a.jpg": "a.txt"}
    assert pairs(*mask)["a.seg.png"].startswith("no caption (beside it lie .jpg, .txt")
    assert pairs("a.in.png", "a.out.txt", fields=True) == {"a.in.png": "no caption (beside it lie .out.txt)"}


def test_an_empty_text_leaves_the_word_to_the_json():
    files = {"a.jpg": b"", "a.txt": b" \n", "a.json": b'{"caption": null, "text": "red\\n cat"}'}
    parts = [Part(name, partial(files.get, name)) for name in files]
    assert [(one.caption, one.problem) for one in captioned(parts, False)] == [("red cat", "")]
    files["a.json"] = b'{"url": "u"}'
    assert [(one.caption, one.problem) for one in captioned(parts, False)] == [("", "no caption")]


def test_files_below_a_folder(tmp_path):
    for name in ("b.txt", "a/c.txt", ".x/d.txt", "a/.e", "__MACOSX/f", "out/g.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "a" / "round").symlink_to(tmp_path)
    assert list(files_below(tmp_path, tmp_path / "out")) == ["b.txt", "a/c.txt"]
    assert list(files_below(tmp_path)) == ["b.txt", "a/c.txt", "out/g.txt"]
    with pytest.raises(ValueError, match=r"none cannot be listed \(No such file"):
        list(files_below(tmp_path / "none"))
