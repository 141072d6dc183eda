"""The documentation site builds without warnings, links lead somewhere, and no host is asked for anything."""

import re
import threading
import time
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from hydra import compose, initialize_config_dir
from mkdocs.commands.build import build
from mkdocs.config import load_config
from omegaconf import OmegaConf

from docs.site import configuration
from docs.site.commands import help_of
from sjd2_lightning import __main__ as table
from tests.tools.browser import chromium
from tests.tools.source import REPO

# Configurations in which groups that are null otherwise have their keys.
FULL = {
    "train": (
        *("experiment=tiny_tokenizer", "experiment=tiny_clip"),
        *("experiment=tiny_base", "experiment=tarflow", "experiment=pccot", "experiment=ceed_teacher"),
    ),
    "evaluate": ("metrics=coco2017_5k", "experiment=tarflow", "experiment=pccot", "experiment=ceed"),
}


class Page(HTMLParser):
    """What a page links to, what it loads, and where links into it can lead."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids.add(found.get("id", ""))
        if tag == "a":
            self.links.append(found.get("href", ""))
        elif not (tag == "link" and found.get("rel") in ("canonical", "prev", "next")):
            names = ("src", "srcset", "href", "data", "poster", "action")
            self.loads += [found[name] for name in names if name in found]
            self.loads += re.findall(r"url\(['\"]?([^)'\"]+)", found.get("style", ""))


def is_outside(address: str) -> bool:
    """Whether an address names a host."""
    return address.startswith("//") or urlsplit(address).scheme in ("http", "https", "ws", "wss")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(REPO / "mkdocs.yml"), site_dir=str(folder), strict=True)
    build(config)  # raises at the first warning, since it is strict
    return folder


def test_links_lead_to_pages_and_their_parts(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 20
    wrong = []
    for path, page in pages.items():
        for address in page.links + page.loads:
            if is_outside(address) or address.startswith(("mailto:", "data:", "javascript:")):
                continue
            where, _, part = address.partition("#")
            inside = unquote(where.partition("?")[0])
            base = site if inside.startswith("/") else path.parent
            target = (base / inside.lstrip("/")).resolve() if inside else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (part and target in pages and unquote(part) not in pages[target].ids):
                wrong.append(f"{path.relative_to(site)}: {address}")
    assert not wrong


def test_nothing_is_loaded_from_another_host(site):
    assert not [
        f"{path.name}: {address}"
        for path in site.rglob("*.html")
        for address in Page(path).loads
        if is_outside(address)
    ]
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import) *['\"]?(?:https?:)?//", path.read_text()), path.name
    assert "mermaid" not in "".join(path.read_text() for path in site.rglob("*.html")), (
        "drawn by a script of a host"
    )


@pytest.mark.browser
def test_a_browser_asks_no_host_and_reports_nothing(site):
    """Scripts may load more than a page names; served, since a browser counts no files of the disk."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asks_no_other_host(f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()


def asks_no_other_host(root: str) -> None:
    with chromium() as driver:
        for name in ("index", "reference/configuration"):
            driver.get(f"{root}{name}.html")
            time.sleep(1)
            asked = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
            assert asked
            assert not [address for address in asked if not address.startswith((root, "data:"))]
            assert driver.get_log("browser") == []


def test_a_page_that_loads_from_a_host_is_seen(tmp_path):
    (tmp_path / "a.html").write_text(
        '<img src="//a.example/x.png"><a href="https://b.example">b</a><p id="c" style="background: url(http://d/e)">'
    )
    page = Page(tmp_path / "a.html")
    assert [address for address in page.loads if is_outside(address)] == ["//a.example/x.png", "http://d/e"]
    assert page.links == ["https://b.example"]
    assert "c" in page.ids


@cache
def tree(root: str, *overrides: str) -> dict:
    with initialize_config_dir(str(configuration.conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose(root, list(overrides)), resolve=False)


def leaves(node: dict, path: str = "") -> dict[str, object]:
    """Values of a composed tree by key; all methods are one."""
    found = {}
    for name, value in node.items():
        here = f"{path}.{name}" if path else name
        here = configuration.NAMED.get(path, here)
        found |= leaves(value, here) if isinstance(value, dict) else {here: value}
    return found


@pytest.mark.parametrize("root", ["train", "evaluate"])
def test_every_key_that_hydra_composes_is_explained(root):
    rows = {row.path: row for row in configuration.all_keys() if root in row.roots}
    page = configuration.page()
    for overrides in ((), *((override,) for override in FULL[root])):
        found = leaves(tree(root, *overrides))
        # an experiment file may hold keys of both commands
        own = configuration.ROOTS[root].model_fields
        found = {key: value for key, value in found.items() if key.partition(".")[0] in own}
        known = {key for key, value in found.items() if value is not None or key in rows}
        null_groups = {key for key in found if any(row.startswith(f"{key}.") for row in rows)}
        of_names = {key for key in known if key.rpartition(".")[0] in rows}  # the reader's own, below a key
        assert not known - rows.keys() - null_groups - of_names
    for row in rows.values():
        assert row.type, row.path
        assert row.meaning, f"{row.path}: say in conf/ what it means"
        assert not row.meaning.startswith(("of ", "over ")), f"{row.path}: the sentence has no noun"
        assert f"| `{row.path}` | " in page
    for key, value in leaves(tree(root)).items():
        if key in rows and not key.startswith(configuration.METHOD):
            assert rows[key].default == configuration.shown(value), key


def test_types_say_what_is_allowed():
    rows = {row.path: row for row in configuration.all_keys()}
    assert rows["trainer.max_steps"].type == "whole number ≥ -1"
    assert rows["device"].type == "`auto`, `cpu`, `cuda`, `mps`"
    assert rows["callbacks.ema_decay"].type == "number > 0 and < 1 or null"
    assert rows["optimizer.betas"].type.startswith("[number")
    assert rows["methods.<name>.window"].default == "${decoding.window}"
    assert {row.default for row in configuration.all_keys() if row.path == "compare"} == {
        "[ar, sjd2]",
        "[ar, sjd, mc_sjd, sjd2, sjd2_exact, sjd2_paper]",
    }


def test_comments_go_on_below():
    text = "a: 1   # one\n       # and more\nb:  # two\n  c: x\n  d: [1]  # `four` | five\n"
    text += "e: 2\n# head of f\nf: 3  # six\n"
    found = dict(configuration.comments_in(text))
    assert found == {"a": "one and more", "b": "two", "b.d": "`four` | five", "f": "six"}


@pytest.mark.parametrize("name", table.COMMANDS)
def test_every_command_is_on_its_page(name, site):
    text = re.sub(r"<[^>]+>", "", (site / "reference" / "commands.html").read_text())
    words = ["sjd2", name] if name in ("train", "evaluate") else ["usage:", "sjd2", name]
    assert " ".join(words) in help_of(name)
    assert " ".join(words) in text
