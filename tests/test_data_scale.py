"""Data at scale: shards by name, over pipes and URLs; caches that are built in parts, resumed, shared; mixtures; what is broken is named."""

import functools
import http.server
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from pictures import open_corpus, picture, write_networks, write_pictures, write_shards
from training import text
from training.data.cache import Reading, pixel_cache, pixel_sets
from training.data.latents import latent_cache
from training.data.rows import Rows
from training.data.shards import encode_png, read_samples
from training.data.sources import list_shards, parse_mixture
from training.data.texts import text_cache
from training.loop import Draws

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return write_networks(tmp_path_factory.mktemp("networks"))


def keys_of(source, split="train"):
    return [s.key for s in read_samples(source, split)]


# ---- where samples come from --------------------------------------------------------------------------------------


def test_a_pipe_and_named_files_give_what_the_folder_gives(tmp_path):
    write_shards(tmp_path, 9, 3)
    wanted = list(read_samples(tmp_path, "train"))
    assert len(wanted) == 9
    piped = list(read_samples(f"pipe:cat {tmp_path}/train-0000{{0..2}}.tar"))
    named = list(read_samples(f"{tmp_path}/train-0000{{0..2}}.tar"))
    for found in (piped, named):  # the last of several shards is held out
        assert [s.key for s in found] == [s.key for s in wanted[:6]]
        assert all(np.array_equal(a.image, b.image) and np.array_equal(a.lines[0], b.lines[0]) for a, b in zip(found, wanted))
    assert keys_of(f"{tmp_path}/train-0000{{0..2}}.tar", "val") == [s.key for s in wanted[6:]]
    assert keys_of(f"{tmp_path}/train-00001.tar", "val") == keys_of(f"{tmp_path}/train-00001.tar") == [s.key for s in wanted[3:6]]


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads URLs through curl")
def test_shards_are_read_over_http_and_a_missing_one_stops(tmp_path):
    write_shards(tmp_path, 4, 2)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert keys_of(f"{url}/train-00000.tar") == ["p000", "p001"]
        with pytest.raises(ValueError, match="cannot be read.*run the same command again"):
            keys_of(f"pipe:curl -sfL {url}/train-00007.tar")
        server.shutdown()


def test_a_transfer_that_fails_halfway_stops_and_is_not_cached_as_whole(tmp_path):
    whole = write_shards(tmp_path / "shards", 12, 12)[0]
    failing = tmp_path / "fetch.sh"
    command = f"pipe:sh {failing}"
    # it fails when the first picture has arrived, not before
    failing.write_text(f"head -c {whole.stat().st_size // 2} {whole}; for i in $(seq 600); do ls {tmp_path}/cache/pixels-*/part-0* && break; sleep 0.1; done >&2; exit 5\n")
    read = lambda: pixel_sets(command, "train", 32, tmp_path / "cache", reading=Reading(part_mb=0))[0]  # each picture is a part
    with pytest.raises(ValueError, match="cannot be read"):
        read()
    built = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("pixels-*/part-*")}
    assert built and not list((tmp_path / "cache").glob("pixels-*/complete.json"))
    failing.write_text(f"cat {whole}\n")
    pixels = read()
    assert pixels.keys == [f"p{i:03d}" for i in range(12)]
    assert all(p.stat().st_mtime_ns == t for p, t in built.items())  # what was read before is not read again


@pytest.mark.parametrize("text, wanted", [
    ("a", [("a", 1.0)]), ("a*3,b", [("a", 0.75), ("b", 0.25)]), ("x/{00..03}.tar*0.7, y*0.3", [("x/{00..03}.tar", 0.7), ("y", 0.3)]),
    ("x/{a,b}.tar", [("x/{a,b}.tar", 1.0)]), (r"pipe:cut -d\, x*1,b*1", [("pipe:cut -d, x", 0.5), ("b", 0.5)]), ("pipe:cat *.tar", [("pipe:cat *.tar", 1.0)])])
def test_mixtures(text, wanted):
    found = parse_mixture(text)
    assert [s for s, _ in found] == [s for s, _ in wanted] and [w for _, w in found] == pytest.approx([w for _, w in wanted])


@pytest.mark.parametrize("text, named", [("a*x,b", "'x'"), ("a*0.5,,b", "''"), ("a*0", "above 0"), ("a*-1,b", "a\\*-1"), ("a*nan", "nan"), ("*0.5", "no data set"),
                                         ("data/*.tar", "'.tar'"), ("", "no data set")])
def test_a_broken_mixture_is_named(text, named):
    with pytest.raises(ValueError, match=named):
        parse_mixture(text)


def test_missing_shards_are_named(tmp_path):
    write_shards(tmp_path, 2, 1)
    with pytest.raises(ValueError, match="train-00002.tar .2 of 4"):
        list_shards(f"{tmp_path}/train-0000{{0..3}}.tar", "train")


# ---- broken files -------------------------------------------------------------------------------------------------


def test_every_kind_of_broken_file_is_named_skipped_and_counted(tmp_path, caplog):
    data = write_pictures(tmp_path / "data", 8)
    whole = encode_png(picture(50))
    for name, content in {"cut.png": whole[:len(whole) // 2], "cut.txt": b"the cat", "mute.png": whole, "word.png": b"no picture at all", "word.txt": b"a",
                          "torn.png": whole, "torn.json": b'{"caption": ', "box.png": whole, "box.json": b'{"caption": "a", "regions": [{"box": [5, 5, 2, 9]}]}',
                          "wide.png": whole, "wide.txt": b"a", "wide.lines.png": encode_png(picture(51, 32, 64))}.items():
        (data / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        pixels = pixel_cache(data, "train", 32, tmp_path / "cache")
    assert pixels.keys == [f"p{i:03d}" for i in range(8)] and pixels.images.shape == (8, 32, 32, 3)
    about = json.loads(next((tmp_path / "cache").glob("pixels-*/complete.json")).read_text())
    assert about["good"] == 8 and len(about["broken"]) == 6
    for name in ("cut.png", "mute.txt", "word.png", "torn.json", "box.json", "wide: the lines"):
        assert any(name in message for message in about["broken"]) and name in caplog.text, name
    assert "8 pictures, 6 broken" in caplog.text


def test_a_torn_tar_gives_what_lies_before_the_tear_and_the_next_ones(tmp_path, caplog):
    paths = write_shards(tmp_path, 9, 3)
    content = paths[1].read_bytes()
    second = content.index(b"p004.lines0.png")
    paths[1].write_bytes(content[:second + 600])  # its picture is there, its lines and caption are not
    with caplog.at_level(logging.WARNING):
        assert keys_of(tmp_path) == ["p000", "p001", "p002", "p003", "p006", "p007", "p008"]
    assert "train-00001.tar is torn after p004" in caplog.text


# ---- caches in parts ----------------------------------------------------------------------------------------------


def test_rows_read_as_one_array(tmp_path):
    whole = np.random.default_rng(0).integers(0, 255, (11, 3, 2)).astype(np.uint8)
    for i, (a, b) in enumerate([(0, 4), (4, 5), (5, 11)]):
        np.save(tmp_path / f"{i}.npy", whole[a:b])
    rows = Rows([(tmp_path / "0.npy", 4), (tmp_path / "1.npy", 1), (whole[:0], 0), (Rows([(tmp_path / "2.npy", 6)]), 6)])
    assert rows.shape == whole.shape and len(rows) == 11 and rows.dtype == whole.dtype
    for index in (0, 4, -1, slice(3, 9), slice(None), np.array([10, 0, 4, 4, 7]), np.array([], int), whole[:, 0, 0] > 100):
        np.testing.assert_array_equal(rows[index], whole[index])
    np.testing.assert_array_equal(np.asarray(rows), whole)
    with pytest.raises(IndexError):
        rows[11]


def same_pixels(a, b):
    return (a.keys, a.captions, a.meta) == (b.keys, b.captions, b.meta) and all(
        np.array_equal(getattr(a, n)[:], getattr(b, n)[:]) for n in ("images", "inks", "first_ink"))


def test_killed_while_caching_it_goes_on_and_ends_at_the_same_pictures(tmp_path):
    write_shards(tmp_path / "data", 40, 13)
    script = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom training.data import cache\nfrom training.data.cache import Reading, pixel_sets\n"
              f"draw = cache._drawings\nbuilt = lambda: [p for p in Path({str(tmp_path / 'cache')!r}).glob('pixels-*/part-*') if p.suffix != '.incomplete']\n"
              f"cache._drawings = lambda *a: time.sleep(600) if len(built()) == 17 else draw(*a)\n"  # stands still there until it is killed
              f"pixel_sets({str(tmp_path / 'data')!r}, 'train', 32, Path({str(tmp_path / 'cache')!r}), reading=Reading(part_mb=0))")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = lambda: sorted(p for p in (tmp_path / "cache").glob("pixels-*/part-*") if p.suffix != ".incomplete")
    while len(parts()) < 17 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    built = {p: p.stat().st_mtime_ns for p in parts()}
    assert len(built) == 17
    resumed = pixel_sets(str(tmp_path / "data"), "train", 32, tmp_path / "cache", reading=Reading(part_mb=0))[0]
    assert same_pixels(resumed, pixel_cache(tmp_path / "data", "train", 32, tmp_path / "other"))
    assert all(p.stat().st_mtime_ns == t for p, t in built.items())


def test_no_more_than_a_part_is_in_memory(tmp_path):
    write_pictures(tmp_path / "data", 60, (256, 256))
    tracemalloc.start()
    pixels = pixel_sets(str(tmp_path / "data"), "train", 256, tmp_path / "cache", reading=Reading(part_mb=1))[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    everything = pixels.images.shape[0] * 256 * 256 * 3 + len(pixels.inks) * 256 * 256
    assert len(pixels.parts) >= 10 and everything > 15e6
    assert peak < 0.5 * everything


class Encoder:
    """Counts what it encodes; stops with an error after `most` blocks."""

    def __init__(self, most=10 ** 9):
        self.seen, self.most = 0, most

    def __call__(self, x):
        if self.most == 0:
            raise KeyboardInterrupt
        self.most -= 1
        self.seen += len(x)
        return torch.nn.functional.avg_pool2d(x, 8)


def test_latents_are_computed_once_for_equal_pictures_and_an_interrupted_run_goes_on(tmp_path):
    write_shards(tmp_path / "a", 12, 4)
    read = lambda name, split="train": pixel_cache(tmp_path / name, split, 32, tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        latent_cache(read("a"), Encoder(most=3), "key", tmp_path / "cache", 4)  # one part: a block of pictures, a block of lines
    rest = Encoder()
    found = latent_cache(read("a"), rest, "key", tmp_path / "cache", 4)
    assert rest.seen == 16 and found.images.shape == (12, 3, 4, 4) and found.conds.shape == (12, 3, 4, 4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_shards(tmp_path / "b", 4, 4, "val")  # the same pictures as another split of another data set
    again = Encoder()
    np.testing.assert_array_equal(latent_cache(read("b", "val"), again, "key", tmp_path / "cache", 4).images[:], found.images[:4])
    assert again.seen == 0
    other = Encoder()
    latent_cache(read("a"), other, "other key", tmp_path / "cache", 4)
    assert other.seen == 24


def test_a_caption_is_encoded_once_whatever_set_it_comes_in(tmp_path):
    seen = []

    def encode(prompts):
        seen.extend(prompts)
        states = torch.stack([torch.arange(6.0).view(3, 2) + len(p) for p in prompts])
        return states, torch.tensor([[1.0, 1.0, float(len(p) > 3)] for p in prompts])

    first = text_cache(["a", "bb", "dddd"], encode, "key", tmp_path, 2)
    grown = text_cache(["bb", "ccc", "dddd", "a"], encode, "key", tmp_path, 2)
    assert sorted(seen) == ["a", "bb", "ccc", "dddd"]
    for texts in (first, grown):
        states, mask = texts.batch(["dddd", "a"])
        assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
        torch.testing.assert_close(states[0], torch.arange(6.0).view(3, 2) + 4)
        torch.testing.assert_close(states[1, :2], torch.arange(6.0).view(3, 2)[:2] + 1)
    text_cache(["a"], encode, "another encoder", tmp_path, 2)
    assert seen.count("a") == 2


def test_the_text_encoder_is_loaded_for_captions_that_are_missing_and_then_let_go(tmp_path, networks, monkeypatch):
    """It was loaded at every start, in every process, and stayed."""
    loaded, load = [], text.load_text_encoder

    def watched(*args):
        found = load(*args)
        loaded.append(weakref.ref(found[1]))
        return found
    monkeypatch.setattr(text, "load_text_encoder", watched)
    data = write_pictures(tmp_path / "data", 6)
    first = open_corpus(networks, tmp_path / "out", data)
    assert len(loaded) == 1 and loaded[0]() is None
    again = open_corpus(networks, tmp_path / "out", data)
    assert len(loaded) == 1 and torch.equal(again.fixed(6).text, first.fixed(6).text)
    write_pictures(tmp_path / "data", 1, first=6)
    open_corpus(networks, tmp_path / "out", data)
    assert len(loaded) == 2 and loaded[1]() is None


def test_a_cache_of_the_first_layout_is_read_as_it_is(tmp_path, networks):
    """Written here as the first version did: one array for everything."""
    data = write_pictures(tmp_path / "data", 6)
    new = open_corpus(networks, tmp_path / "new", data)
    key, folder = new.pixels.hash, tmp_path / "old" / "cache" / f"pixels-train-{new.pixels.hash}"
    folder.mkdir(parents=True)
    for name in ("images", "inks", "first_ink"):
        np.save(folder / f"{name}.npy", getattr(new.pixels, name)[:])
    (folder / "about.json").write_text(json.dumps({n: getattr(new.pixels, n) for n in ("captions", "meta", "keys")}))
    old = open_corpus(networks, tmp_path / "old", data)
    assert isinstance(old.pixels.images, np.memmap) and old.pixels.hash == key and [p.name for p in folder.parent.glob("pixels-*")] == [folder.name]
    a, b = new.draw(8, Draws(0, 1)), old.draw(8, Draws(0, 1))
    assert torch.equal(a.x0, b.x0) and torch.equal(a.cond, b.cond) and a.captions == b.captions


def test_pictures_may_be_dropped_once_encoded(tmp_path, networks):
    data = write_pictures(tmp_path / "data", 10)
    kept, dropped = (open_corpus(networks, tmp_path / str(keep), data, keep_pixels=keep, cache_part_mb=0) for keep in (True, False))
    assert list((tmp_path / "True" / "cache").glob("pixels-*/part-*/*/*.npy")) and not list((tmp_path / "False" / "cache").glob("pixels-*/part-*/*/*.npy"))
    a, b = kept.draw(16, Draws(0, 0)), dropped.draw(16, Draws(0, 0))
    torch.testing.assert_close(a.x0, b.x0, rtol=0, atol=0)
    assert torch.equal(open_corpus(networks, tmp_path / "False", data, keep_pixels=False).draw(16, Draws(0, 0)).cond, a.cond)
    with pytest.raises(ValueError, match="keep_pixels"):
        dropped.pictures(b)


# ---- drawing ------------------------------------------------------------------------------------------------------


def test_a_mixture_draws_its_data_sets_by_weight(tmp_path, networks):
    write_pictures(tmp_path / "many", 20, caption="many")
    write_pictures(tmp_path / "few", 3, first=50, caption="few")
    corpus = open_corpus(networks, tmp_path / "out", f"{tmp_path}/many*1,{tmp_path}/few*3", caption_dropout=0.0)
    captions = [c for step in range(20) for c in corpus.draw(64, Draws(0, step)).captions]
    assert captions.count("few") / len(captions) == pytest.approx(0.75, abs=0.04)  # 3.4 standard errors of 1280 draws
    assert len(corpus.pixels.meta) == 23
    batch = corpus.fixed(23)
    for row in range(23):  # rows of the second set are its own pictures and drawings
        wanted = picture(row if row < 20 else 30 + row)
        np.testing.assert_array_equal(corpus.pixels.images[row], wanted)
    assert corpus.pictures(batch).shape == (23, 3, 32, 32) and corpus.drawings(batch).shape == (23, 3, 32, 32)


def test_processes_draw_slices_of_the_one_batch(tmp_path, networks):
    corpus = open_corpus(networks, tmp_path / "out", write_pictures(tmp_path / "data", 12, (lambda i: (32, 32 + 16 * (i % 3)))), buckets=True)
    assert len(corpus.shelves) > 1
    for step in range(6):
        whole = corpus.draw(8, Draws(0, step))
        parts = [corpus.draw(4, Draws(0, step, rank, 2)) for rank in range(2)]
        assert [*parts[0].captions, *parts[1].captions] == whole.captions and {p.shelf for p in parts} == {whole.shelf}
        assert torch.equal(torch.cat([p.x0 for p in parts]), whole.x0) and torch.equal(torch.cat([p.cond for p in parts]), whole.cond)


def test_a_second_process_finds_the_cache_that_the_main_one_built(tmp_path, networks):
    """Two processes open the same corpus at once; each draws its half of the same batch."""
    data = write_pictures(tmp_path / "data", 6)
    script = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nimport sana_app, torch\nfrom pathlib import Path\n"
              f"from training.distributed import finish, rank, start\nfrom training.loop import Draws\nfrom pictures import open_corpus\nstart()\n"
              f"corpus = open_corpus(Path({str(networks)!r}), Path({str(tmp_path / 'out')!r}), {str(data)!r})\n"
              f"torch.save(corpus.draw(2, Draws(0, 0, rank(), 2)).x0, {str(tmp_path)!r} + f'/{{rank()}}.pt')\nfinish()")
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen([sys.executable, "-c", script], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)]
    said = [p.communicate(timeout=300)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said[0][-2000:] + said[1][-2000:]
    whole = open_corpus(networks, tmp_path / "out", data).draw(4, Draws(0, 0)).x0
    assert torch.equal(torch.cat([torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]), whole)
