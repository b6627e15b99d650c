"""The emoji set as it is built from packages: what is in it, that a build repeats itself, and that a stopped one is never trained on.

The packages are small ones in the layout of the real ones, as tarballs in the cache; nothing here asks the registry.
"""

import functools
import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from sana_app.lines import resize_ink
from training.data import emoji
from training.data.emoji import LABELS, PACKAGES, Item, build, check_out, concept_of, fetch, list_items, load_labels, make_sample, svg_sources
from training.data.shards import Sample, ShardWriter, read_samples

# (hexcode, label, group, subgroup, skin tones); the held-out ones are victory hand, peacock, waffle
DRAWN = [("1F34E", "red apple", 4, 42, 0), ("2764-FE0F", "red heart", 0, 14, 0), ("1F534", "red circle", 8, 96, 0),
         ("1F44B", "waving hand", 1, 16, 1), ("270C-FE0F", "victory hand", 1, 17, 1), ("1F99A", "peacock", 3, 35, 0), ("1F9C7", "waffle", 4, 44, 0)]
LEFT_OUT = [("1F1E9-1F1EA", "flag: Germany", 9, 98, 0), ("1F6A9", "triangular flag", 9, 97, 0), ("0031-FE0F-20E3", "keycap: 1", 8, 94, 0),
            ("1F170-FE0F", "A button (blood type)", 8, 95, 0), ("1F1E6", "regional indicator A", None, None, 0), ("1F3FB", "light skin tone", 2, 32, 0)]
HELD_OUT = {"270c", "1f99a", "1f9c7"}
TONES = ("1F3FF",)
NO_WEBP = {"1F9C7"}  # not every style has every picture


def forms(code, tones):
    """The hexcodes of a concept: its own, and its skin tones (which stand in the place of FE0F)."""
    return [code, *(f"{code.removesuffix('-FE0F')}-{tone}" for tone in TONES[:tones])]


CODES = [(code, form) for code, _, _, _, tones in DRAWN + LEFT_OUT for form in forms(code, tones)]


def pack(cache, package, files):
    """A tarball as npm makes it: package.json first, all under package/."""
    name, _, version = package.lstrip("@").replace("/", "-").rpartition("@")
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(cache / f"{name}-{version}.tgz", "w:gz") as tar:
        for path, data in {"package.json": json.dumps({"name": package}).encode(), **files}.items():
            info = tarfile.TarInfo(f"package/{path}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return cache / f"{name}-{version}.tgz"


def icon_package(place, chars=True):
    """icons.json and chars.json of an iconify package; `place` 0..3 makes the four styles different pictures."""
    icons, names = {}, {}
    for number, (_, form) in enumerate(CODES):
        name = names[form.lower().replace("-fe0f", "")] = f"icon-{number}"
        icons[name] = {"body": f'<circle cx="16" cy="16" r="{8 + place}" fill="#{"d22 2a3 26d db2".split()[number % 4]}"/>'
                               f'<path fill="#222" d="M{4 + number % 8} {8 + place}h9v{3 + number // 8}h-9z"/>'}
    about = {"prefix": "icons", "icons": icons, "aliases": {}, "width": 32, "height": 32}
    return {"icons.json": json.dumps(about).encode(), "chars.json": json.dumps(names if chars else {}).encode()}


def webp(number):
    picture = np.zeros((256, 256, 4), np.uint8)
    cv2.rectangle(picture, (40 + number, 60), (200, 180 + number), (40, 90, 200, 255), -1)
    return cv2.imencode(".webp", picture)[1].tobytes()


def label(hexcode, text, group, subgroup):
    return {"label": text, "hexcode": hexcode, **({} if group is None else {"group": group, "subgroup": subgroup})}


def label_package():
    entries = []
    for code, text, group, subgroup, tones in DRAWN + LEFT_OUT:
        entry = label(code, text, group, subgroup) | {"tags": ["thing", *text.split()]}
        if tones:
            entry["skins"] = [label(form, f"{text}: tone", group, subgroup) for form in forms(code, tones)[1:]]
        entries.append(entry)
    return {"en/data.json": json.dumps(entries).encode()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where `npm pack` would have put all packages."""
    folder = tmp_path_factory.mktemp("raw")
    for place, style in enumerate(("fluent", "flat", "noto", "twemoji")):
        pack(folder, PACKAGES[style][0], icon_package(place, chars=style != "fluent"))  # fluent's chars.json is empty
    pack(folder, PACKAGES["3d"][0], {f"assets/{form.lower()}.webp": webp(n) for n, (code, form) in enumerate(CODES) if code not in NO_WEBP})
    pack(folder, LABELS[0], label_package())
    return folder


@pytest.fixture(scope="module")
def built(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "emoji"
    return out, build(out, 64, cache, workers=2)


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def is_whole(folder):
    """Whether a folder holds the shards that its manifest names, with their bytes, and no others."""
    named = json.loads((folder / "manifest.json").read_text())["sha256"]
    return named == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.tar")}


# ---- what is in the set -----------------------------------------------------------------------------------------


def test_flags_keycaps_letters_and_bare_tones_have_no_label(cache):
    labels = load_labels(fetch(LABELS[0], cache))
    assert set(labels) == {emoji.plain(form) for code, _, _, _, tones in DRAWN for form in forms(code, tones)}
    assert labels["2764"]["label"] == "red heart" and labels["1f34e"]["tags"] == ["thing", "red", "apple"]
    assert labels["1f44b-1f3ff"] == {"label": "waving hand: tone", "tags": ["thing", "waving", "hand"], "group": 1, "toned": True}
    assert not labels["1f44b"]["toned"]


def test_icons_are_found_by_code_through_aliases_each_in_its_own_box(tmp_path):
    (tmp_path / "sister").mkdir()
    icons = {"apple": {"body": "<g/>"}, "wide": {"body": "<path/>", "width": 40, "height": 33}}
    about = {"icons": icons, "aliases": {"fruit": {"parent": "apple"}}, "width": 32, "height": 32}
    (tmp_path / "icons.json").write_text(json.dumps(about))
    (tmp_path / "chars.json").write_text("{}")
    (tmp_path / "sister" / "chars.json").write_text(json.dumps({"1f34e": "fruit", "2764-fe0f": "wide", "1f34f": "not-there"}))
    assert svg_sources(tmp_path) == {}
    found = svg_sources(tmp_path, tmp_path / "sister")
    assert set(found) == {"1f34e", "2764"}
    assert 'viewBox="0 0 32 32"><g/></svg>' in found["1f34e"] and 'viewBox="0 0 40 33"><path/></svg>' in found["2764"]


def test_every_style_of_every_concept_is_listed_once_and_only_what_is_trained_on_is_copied(cache):
    items = list_items(cache)
    assert len({i.key for i in items}) == len(items) and items == list_items(cache)
    wanted = {(emoji.plain(form), style) for code, _, _, _, tones in DRAWN for form in forms(code, tones)
              for style in PACKAGES if style != "3d" or code not in NO_WEBP}
    assert {tuple(i.key.split("_")[:2]) for i in items} == wanted
    copied = {i.key.rpartition("_")[0] for i in items if i.copy}
    assert copied == {i.key.rpartition("_")[0] for i in items if not i.toned and i.concept not in HELD_OUT}


def test_a_build_has_five_styles_and_no_concept_in_both_splits(built):
    out, manifest = built
    found = {split: list(read_samples(out, split)) for split in ("train", "val")}
    concepts = {split: {s.meta["concept"] for s in samples} for split, samples in found.items()}
    assert concepts["val"] == HELD_OUT and concepts["train"] == {emoji.plain(d[0]) for d in DRAWN} - HELD_OUT
    for split, samples in found.items():
        assert {s.meta["style"] for s in samples} == set(PACKAGES) == {"fluent", "flat", "3d", "noto", "twemoji"}
        # a skin tone is on the side of its concept
        assert {concept_of(s.key.split("_")[0]) for s in samples if s.meta["toned"]} == ({"270c"} if split == "val" else {"1f44b"})
        assert all(len(s.lines) == (1 if s.meta["toned"] else 2) and s.image.shape == (64, 64, 3) for s in samples)


def test_the_manifest_says_what_was_built_from_what(built):
    out, manifest = built
    found = {split: list(read_samples(out, split)) for split in ("train", "val")}
    every = found["train"] + found["val"]
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["size_px"] == 64 and manifest["skipped"] == []
    assert manifest["samples"] == {split: len(samples) for split, samples in found.items()}
    assert manifest["styles"] == {style: sum(s.meta["style"] == style for s in every) for style in PACKAGES}
    assert manifest["concepts"] == len(DRAWN) and manifest["held_out_concepts"] == len(HELD_OUT)
    assert {name: s["licence"] for name, s in manifest["sources"].items()} == {
        "fluent": "MIT", "flat": "MIT", "3d": "MIT", "noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "labels": "MIT"}
    assert manifest["sources"]["noto"]["package"] == PACKAGES["noto"][0] and manifest["sources"]["labels"]["package"] == LABELS[0]
    assert set(manifest["sha256"]) == {"train-00000.tar", "val-00000.tar"} and is_whole(out)


def test_a_second_build_gives_the_same_bytes_whatever_the_number_of_workers(built, cache, tmp_path):
    build(tmp_path / "again", 64, cache, workers=1)
    assert content(tmp_path / "again") == content(built[0])


@pytest.mark.parametrize("gain", [1.0, 2.0, 3.0])
def test_drawings_are_brought_to_size_by_the_function_that_the_page_uses(gain, monkeypatch):
    monkeypatch.setattr("sana_app.lines.INK_GAIN", gain)
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><circle cx="16" cy="16" r="11" fill="#d22"/></svg>'
    item = Item("1f34e_flat_1", "1f34e", "flat", svg, "red apple", ("fruit",), 4, False, 1)
    for full, small in zip(make_sample(item, 256).lines, make_sample(item, 64).lines, strict=True):
        np.testing.assert_array_equal(resize_ink(full, 64), small)


# ---- builds that are stopped ------------------------------------------------------------------------------------


class Stopped(BaseException):
    """Stands for a kill: nothing in the code may catch it and tidy up."""


def stop_at(monkeypatch, place, name, call):
    """The `call`-th call of a function, from 0, is where the process ends."""
    real, calls = getattr(place, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) > call:
            raise Stopped
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, counted)


@pytest.fixture
def quick(monkeypatch):
    """Builds of several shards, of pictures that cost nothing."""
    blank = lambda item, size: Sample(item.key, np.zeros((size, size, 3), np.uint8), [], ["blank"], {"concept": item.concept, "style": item.style})
    monkeypatch.setattr(emoji, "make_sample", blank)
    monkeypatch.setattr(emoji, "ShardWriter", functools.partial(ShardWriter, per_shard=4))


@pytest.mark.parametrize("place, name, call", [(ShardWriter, "write", 10), (ShardWriter, "close", 6), (os, "replace", 0)])
def test_a_build_that_is_stopped_leaves_no_folder_and_the_next_is_whole(place, name, call, cache, tmp_path, quick, monkeypatch):
    build(tmp_path / "whole", 32, cache, workers=1, limit=16)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, place, name, call)
        build(tmp_path / "data", 32, cache, workers=1, limit=16)
    assert not (tmp_path / "data").exists() and list((tmp_path / "data.incomplete").glob("train-*.tar"))
    with pytest.raises(ValueError, match="no data at"):
        list(read_samples(tmp_path / "data"))
    build(tmp_path / "data", 32, cache, workers=1, limit=16)
    assert content(tmp_path / "data") == content(tmp_path / "whole") and is_whole(tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "whole"]


@pytest.mark.parametrize("place, name, call", [(ShardWriter, "write", 6), (os, "replace", 0), (os, "replace", 1), (emoji.shutil, "rmtree", 2)])
def test_a_rebuild_that_is_stopped_at_any_step_leaves_the_old_set_the_new_one_or_none(place, name, call, cache, tmp_path, quick, monkeypatch):
    out = tmp_path / "data"
    build(out, 32, cache, workers=1, limit=16)
    (out / "README.md").write_text("about the data")
    assert len(list(out.glob("*.tar"))) == 5
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, place, name, call)
        build(out, 32, cache, workers=1, limit=8)
    assert not out.exists() or is_whole(out)
    assert any((folder / "README.md").exists() for folder in tmp_path.iterdir())
    build(out, 32, cache, workers=1, limit=8)
    # a smaller set than before: no shard of the larger one is left to be trained on
    assert sorted(content(out)) == ["README.md", "manifest.json", "train-00000.tar", "train-00001.tar", "val-00000.tar"] and is_whole(out)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_shards_that_no_manifest_names_are_refused_before_any_work(tmp_path, monkeypatch):
    out = tmp_path / "data"
    out.mkdir()
    check_out(out)  # an empty folder is as good as none
    (out / "train-00000.tar").write_bytes(b"of a build of an older version that was stopped, or somebody's own")
    monkeypatch.setattr(emoji, "list_items", lambda cache: pytest.fail("work was begun"))
    for manifest in (None, "{", "[]", '{"sha256": {"train-00001.tar": ""}}'):
        if manifest:
            (out / "manifest.json").write_text(manifest)
        with pytest.raises(ValueError, match=r"train-00000\.tar.*no manifest\.json that names it.*Move or delete it"):
            build(out, 64, tmp_path)
    (out / "manifest.json").write_text('{"sha256": {"train-00000.tar": ""}}')
    check_out(out)


def test_a_folder_that_is_more_than_a_data_set_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "runs" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path / "runs" / "deep")
    monkeypatch.setattr(emoji, "list_items", lambda cache: pytest.fail("work was begun"))
    for out in (tmp_path / "runs", tmp_path / "file", Path("."), Path("/")):
        with pytest.raises(ValueError, match="Name a folder in it"):
            build(out, 64, tmp_path)


# ---- fetching ---------------------------------------------------------------------------------------------------

PACKAGE = "@some/icons@1.0.0"
FILES = {f"assets/{i}.webp": bytes([i]) * 4000 for i in range(9)}


def fake_npm(folder, monkeypatch, script):
    """An `npm` that runs `script` and writes a line into npm.log at each call, first on the PATH."""
    folder.mkdir()
    (folder / "npm").write_text(f'#!/bin/sh\necho "$@" >> {folder}/npm.log\n{script}\n')
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder / "npm.log"


def test_a_package_is_fetched_once(tmp_path, monkeypatch):
    there = pack(tmp_path / "registry", PACKAGE, FILES)
    log = fake_npm(tmp_path / "bin", monkeypatch, f"cp {there} .")
    for _ in range(2):
        folder = fetch(PACKAGE, tmp_path / "raw")
        assert folder.name == "some-icons-1.0.0" and {f"assets/{p.name}": p.read_bytes() for p in (folder / "assets").iterdir()} == FILES
    assert log.read_text().splitlines() == [f"pack {PACKAGE} --loglevel=error"]
    assert sorted(p.name for p in (tmp_path / "raw").iterdir()) == ["some-icons-1.0.0", "some-icons-1.0.0.tgz"]


def test_an_unpacking_that_is_stopped_is_not_taken_for_the_package(tmp_path, monkeypatch):
    pack(tmp_path, PACKAGE, FILES)

    def half(self, path, members, **_):
        for member in members[:4]:
            self.extract(member, path, filter="data")
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(tarfile.TarFile, "extractall", half)
        fetch(PACKAGE, tmp_path)
    assert len(list(fetch(PACKAGE, tmp_path).glob("assets/*"))) == len(FILES)


def test_a_torn_tarball_is_named_and_never_comes_of_an_npm_that_was_stopped(tmp_path, monkeypatch):
    whole = pack(tmp_path / "registry", PACKAGE, FILES)
    torn = tmp_path / "some-icons-1.0.0.tgz"
    torn.write_bytes(whole.read_bytes()[:-60])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"some-icons-1\.0\.0\.tgz.*Delete it and run the same command again"):
            fetch(PACKAGE, tmp_path)
    assert not (tmp_path / "some-icons-1.0.0").exists()
    fake_npm(tmp_path / "bin", monkeypatch, f"cp {torn} .; exit 9")
    with pytest.raises(ValueError, match="exit status 9"):
        fetch(PACKAGE, tmp_path / "raw")
    assert not list((tmp_path / "raw").glob("*.tgz"))


def test_without_npm_one_is_told_what_is_missing_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"wanted @some/icons@1\.0\.0, but npm.* not installed\. Install Node\.js.*some-icons-1\.0\.0\.tgz"):
        fetch(PACKAGE, tmp_path)


def test_a_failing_npm_is_heard_and_the_command_ends_without_a_traceback(tmp_path, monkeypatch):
    log = fake_npm(tmp_path / "bin", monkeypatch, "echo 'npm error code ENOTFOUND' >&2; echo 'npm error network is down' >&2; exit 1")
    monkeypatch.setattr(sys, "argv", ["emoji", "--out", str(tmp_path / "data"), "--cache", str(tmp_path / "raw")])
    with pytest.raises(SystemExit) as ended:
        emoji.main()
    said = str(ended.value.code)
    assert said.startswith(f"error: wanted {LABELS[0]}, but `npm pack` failed with exit status 1")
    assert "npm error code ENOTFOUND\n  npm error network is down" in said and "run the same command again" in said
    assert len(log.read_text().splitlines()) == 1 and not (tmp_path / "data").exists()
    fake_npm(tmp_path / "mute", monkeypatch, "exit 0")
    with pytest.raises(ValueError, match="nothing, and made no some-icons-1.0.0.tgz"):
        fetch(PACKAGE, tmp_path / "raw")
