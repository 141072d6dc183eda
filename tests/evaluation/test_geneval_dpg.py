"""GenEval, DPG-Bench and GenEval 2: their prompts are read, and images lie where their judges look."""

import json

import pytest
import torch

from sjd2_lightning.data.pictures import read_image
from sjd2_lightning.evaluation.geneval_dpg import benchmark_prompts, export_benchmark, num_samples
from sjd2_lightning.evaluation.prompts import repeat_prompts
from sjd2_lightning.evaluation.store import RecordStore
from tests.tools.small_evaluation import METHODS, SIDE, evaluate

LINES = [
    '{"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "red cat"}',
    '{"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "blue"}], "prompt": "blue dog"}',
]

NEWER = [
    '{"prompt": "a  red cat", "atom_count": 2, "vqa_list": [["Is it red?", "Yes"]], "skills": ["attribute"]}',
    '{"prompt": "two dogs", "atom_count": 2, "vqa_list": [["How many?", "two"]], "skills": ["count"]}',
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(LINES) + "\n")
    (folder / "dpg").mkdir()
    (folder / "dpg" / "vrd2.txt").write_text("a red dog\non a mat\n")
    (folder / "dpg" / "COCOval2014000000000042.txt").write_text("blue cat")
    (folder / "geneval2_data.jsonl").write_text("\n".join(NEWER) + "\n")
    return {
        "geneval": folder / "evaluation_metadata.jsonl",
        "dpg": folder / "dpg",
        "geneval2": folder / "geneval2_data.jsonl",
    }


@pytest.fixture(scope="module")
def results(sources, tmp_path_factory):
    found = {}
    for name, source in sources.items():
        prompts = repeat_prompts(benchmark_prompts(name, source), num_samples(name))
        folder = tmp_path_factory.mktemp(name)
        settings = {"metrics": None, "reference": None, "methods": {"sjd": METHODS["sjd"]}}
        found[name] = evaluate(folder, prompts=prompts, batch_size=4, **settings)
    return found


def exported(name, sources, results, folder):
    result = results[name]
    return export_benchmark(name, sources[name], result.store, result.methods["sjd"].records, folder)


def test_prompts_keep_order_and_names(sources):
    geneval, dpg, newer = (benchmark_prompts(name, source) for name, source in sources.items())
    assert [(item.key, item.prompt) for item in geneval] == [("00000", "red cat"), ("00001", "blue dog")]
    assert [(item.key, item.prompt) for item in dpg] == [
        ("COCOval2014000000000042", "blue cat"), ("vrd2", "a red dog on a mat")
    ]  # fmt: skip
    assert [(item.key, item.prompt) for item in newer] == [("00000", "a red cat"), ("00001", "two dogs")]
    assert len({item.seed for item in [*geneval, *dpg]}) == 4


def test_geneval_layout(sources, results, tmp_path):
    folder = exported("geneval", sources, results, tmp_path / "geneval" / "sjd")
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001"]
    records = {record.key: record for record in results["geneval"].methods["sjd"].records}
    for number, line in enumerate(LINES):
        place = folder / f"{number:05d}"
        # The judge reads the file with json.load and takes samples whose names are digits.
        assert json.loads((place / "metadata.jsonl").read_text()) == json.loads(line)
        names = [f"{n:04d}.png" for n in range(4)]
        assert sorted(path.name for path in (place / "samples").iterdir()) == names
        for name, key in zip(names, ("", "-r1", "-r2", "-r3"), strict=True):
            own = results["geneval"].store.image_path(records[f"{number:05d}{key}"])
            assert (place / "samples" / name).read_bytes() == own.read_bytes()


def test_dpg_layout(sources, results, tmp_path):
    folder = exported("dpg", sources, results, tmp_path / "dpg" / "sjd")
    assert sorted(path.name for path in folder.iterdir()) == ["COCOval2014000000000042.png", "vrd2.png"]
    grid = read_image(folder / "vrd2.png")
    assert grid.shape == (2 * SIDE, 2 * SIDE, 3)
    records = {record.key: record for record in results["dpg"].methods["sjd"].records}
    for place, key in enumerate(("vrd2", "vrd2-r1", "vrd2-r2", "vrd2-r3")):
        row, column = divmod(place, 2)
        cut = grid[row * SIDE :, column * SIDE :][:SIDE, :SIDE]
        assert torch.equal(cut, read_image(results["dpg"].store.image_path(records[key])))


def test_geneval2_layout(sources, results, tmp_path):
    """Its judge finds images by the prompts as they are written in its own file."""
    folder = exported("geneval2", sources, results, tmp_path / "geneval2" / "sjd")
    paths = json.loads((folder / "image_paths.json").read_text())
    assert list(paths) == ["a  red cat", "two dogs"]
    assert paths["two dogs"] == str(folder / "00001.png")
    records = {record.key: record for record in results["geneval2"].methods["sjd"].records}
    for place, path in enumerate(paths.values()):
        own = results["geneval2"].store.image_path(records[f"{place:05d}"])
        assert (folder / path).read_bytes() == own.read_bytes()


def test_an_export_is_whole_and_replaces_the_old_one(sources, results, tmp_path):
    folder = tmp_path / "geneval" / "sjd"
    (folder / "00009").mkdir(parents=True)
    exported("geneval", sources, results, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001"]
    assert [path.name for path in folder.parent.iterdir()] == ["sjd"]
    records = [r for r in results["geneval"].methods["sjd"].records if r.key != "00001-r2"]
    with pytest.raises(ValueError, match=r"'00001' has no image '00001-r2'.*samples_per_prompt=4"):
        export_benchmark("geneval", sources["geneval"], results["geneval"].store, records, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["geneval"]


def test_bad_sources_are_named(tmp_path):
    path = tmp_path / "m.jsonl"
    for content in ("{", '{"text": "x"}\n', "[1]\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"m\.jsonl cannot be read as GenEval's metadata"):
            benchmark_prompts("geneval", path)
    path.write_text("")
    with pytest.raises(ValueError, match="no prompts"):
        benchmark_prompts("geneval", path)
    with pytest.raises(ValueError, match="is no folder"):
        benchmark_prompts("dpg", path)
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: no caption"):
        benchmark_prompts("dpg", tmp_path)
    with pytest.raises(ValueError, match="unknown benchmark 'coco'"):
        benchmark_prompts("coco", path)
    with pytest.raises(ValueError, match="unknown benchmark 'coco'; choose geneval, dpg, geneval2"):
        export_benchmark("coco", path, RecordStore(tmp_path, {}), [], tmp_path / "out")
