"""GenEval and MJHQ-30K runners: the official layouts, a kill in the middle, the scorer's results; the one report of all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from layouts import build_small_folder, tiny_bert, tiny_transformer, tiny_vae
from PIL import Image

from training.evaluation import geneval, mjhq
from training.evaluation.__main__ import evaluate, parse
from training.evaluation.features import own_features
from training.evaluation.models import check_steps, load_model, picture_seed

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "assets" / "sample"
METADATA = [  # lines of evaluation_metadata.jsonl as create_prompts.py writes them
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {"tag": "counting", "include": [{"class": "car", "count": 3}], "exclude": [{"class": "car", "count": 4}], "prompt": "a photo of three cars"},
    {"tag": "colors", "include": [{"class": "apple", "count": 1, "color": "red"}], "prompt": "a photo of a red apple"},
    {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
     "prompt": "a photo of a cat left of a dog"},
]
MJHQ = {f"{i:040x}": {"category": ("animals", "food", "people")[i % 3], "prompt": f"{colour} {thing}, 8k render"}
        for i, (colour, thing) in enumerate((c, t) for c in ("red", "green", "blue", "yellow") for t in ("cat", "apple", "face", "car", "house"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_small_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The two metadata files in the published formats."""
    place = tmp_path_factory.mktemp("inputs")
    (place / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METADATA))
    (place / "meta_data.json").write_text(json.dumps(MJHQ))
    return place


@pytest.fixture(scope="module")
def written(model, inputs, tmp_path_factory):
    """Both benchmarks, written without a stop."""
    out = tmp_path_factory.mktemp("whole")
    write_both(model, inputs, out)
    return out


def write_both(model, inputs, out):
    geneval.write_pictures(model, {"model": "x"}, geneval.read_metadata(inputs / "evaluation_metadata.jsonl"), out / "geneval", 1, 4, seed=3)
    mjhq.write_pictures(model, {"model": "x"}, mjhq.read_metadata(inputs / "meta_data.json"), out / "mjhq", 1, seed=3)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- layouts ----------------------------------------------------------------------------------------------------


def official_walk(imagedir):
    """What geneval's evaluate_images.py finds in a folder: (path, metadata) of every picture."""
    for subfolder in sorted(os.listdir(imagedir)):
        place = os.path.join(imagedir, subfolder)
        if not os.path.isdir(place) or not subfolder.isdigit():
            continue
        with open(os.path.join(place, "metadata.jsonl")) as file:
            metadata = json.load(file)
        for name in sorted(os.listdir(os.path.join(place, "samples"))):
            path = os.path.join(place, "samples", name)
            if os.path.isfile(path) and re.match(r"\d+\.png", name):
                yield path, metadata


def test_geneval_folders_are_what_the_official_scorer_walks(written):
    found = list(official_walk(written / "geneval"))
    assert [metadata for _, metadata in found] == [row for row in METADATA for _ in range(4)]
    assert [Path(path).relative_to(written / "geneval").as_posix() for path, _ in found[:5]] == [
        *(f"00000/samples/0000{n}.png" for n in range(4)), "00001/samples/00000.png"]
    pictures = [np.array(Image.open(path)) for path, _ in found]
    assert all(p.shape == (32, 32, 3) and p.dtype == np.uint8 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == len(pictures)  # four seeds a prompt
    assert Image.open(written / "geneval" / "00000" / "grid.png").width > 64


def test_mjhq_pictures_lie_by_category_under_their_ids(written):
    found = sorted(p.relative_to(written / "mjhq").as_posix() for p in (written / "mjhq").rglob("*.png"))
    assert found == sorted(f"{row['category']}/{name}.png" for name, row in MJHQ.items())


def test_a_picture_depends_on_its_own_seed_and_not_on_its_neighbours(model, written):
    name, row = list(MJHQ.items())[9]
    alone = model.make([row["prompt"]], [picture_seed(3, "mjhq", name)], 1)[0].astype(int)
    stored = np.array(Image.open(written / "mjhq" / row["category"] / f"{name}.png")).astype(int)
    assert np.abs(alone - stored).max() <= 1  # another batch size may round another way
    assert picture_seed(3, "mjhq", name) != picture_seed(4, "mjhq", name)


# ---- stopped and gone on ----------------------------------------------------------------------------------------


def test_killed_in_the_middle_and_run_again_gives_the_same_files(folder, inputs, written, model, tmp_path):
    code = ("import sana_app, torch; torch.set_num_threads(1)\nfrom pathlib import Path\nfrom training.evaluation import geneval, mjhq\n"
            f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom test_evaluation_runners import write_both\n"
            f"from training.evaluation.models import load_model\nimport time\nmodel, out = load_model({str(folder)!r}), Path({str(tmp_path)!r})\nmake = model.make\n"
            "model.make = lambda *a: time.sleep(600) if any((out / 'mjhq').rglob('*.png')) else make(*a)\n"  # stands still there until it is killed
            f"write_both(model, Path({str(inputs)!r}), out)")
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any((tmp_path / "mjhq").rglob("*.png")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert 0 < len(list((tmp_path / "mjhq").rglob("*.png"))) < len(MJHQ)

    shutil.rmtree(tmp_path / "geneval" / "00001")  # as if it had been killed in the first benchmark too:
    (tmp_path / "geneval" / "00002").rename(tmp_path / "geneval" / "00002.incomplete")
    (tmp_path / "geneval" / "00002.incomplete" / "metadata.jsonl").unlink()
    write_both(model, inputs, tmp_path)
    again = {name: data for name, data in contents(tmp_path).items() if not name.endswith(".tmp")}
    assert again == contents(written)


def test_another_run_does_not_go_on_in_the_same_folder(model, inputs, written, tmp_path):
    metadata = geneval.read_metadata(inputs / "evaluation_metadata.jsonl")
    with pytest.raises(ValueError, match=r"begun with steps 1 \(now 2\)"):
        geneval.write_pictures(model, {"model": "x"}, metadata, written / "geneval", 2, 4, seed=3)
    with pytest.raises(ValueError, match=r"begun with model 'x' \(now 'y'\)"):
        mjhq.write_pictures(model, {"model": "y"}, MJHQ, written / "mjhq", 1, seed=3)
    with pytest.raises(ValueError, match="answers another prompt"):
        geneval.write_pictures(model, {"model": "x"}, metadata[1:], written / "geneval", 1, 4, seed=3)
    (tmp_path / "holiday.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds files, but no run.json"):
        geneval.write_pictures(model, {"model": "x"}, metadata, tmp_path, 1, 4, seed=3)


# ---- what comes in ----------------------------------------------------------------------------------------------


def test_broken_metadata_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(METADATA[0]) + "\n{'tag'\n")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        geneval.read_metadata(path)
    path.write_text(json.dumps(METADATA[0] | {"tag": "singing"}))
    with pytest.raises(ValueError, match="unknown tags .'singing'."):
        geneval.read_metadata(path)


@pytest.mark.parametrize("name, category", [("../../x", "animals"), ("x", "../animals"), ("a/b", "food"), (".x", "food"), ("", "food")])
def test_names_that_would_leave_the_folder_are_refused(tmp_path, name, category):
    (tmp_path / "meta_data.json").write_text(json.dumps({name: {"category": category, "prompt": "a cat"}}))
    with pytest.raises(ValueError, match="plain names"):
        mjhq.read_metadata(tmp_path / "meta_data.json")


def test_a_limit_takes_prompts_from_the_whole_file(inputs):
    some = mjhq.read_metadata(inputs / "meta_data.json", 4)
    assert list(some) == [list(MJHQ)[i] for i in (0, 6, 12, 19)]


# ---- results ----------------------------------------------------------------------------------------------------


def official_results(folder, correct):
    """results.jsonl as pandas writes it for evaluate_images.py; `correct(index, n)` judges sample n of prompt `index`."""
    lines = []
    for path, metadata in official_walk(folder):
        index, n = int(Path(path).parts[-3]), int(Path(path).stem)
        good = bool(correct(index, n))
        lines.append({"filename": path, "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": good, "reason": "" if good else "expected",
                      "metadata": json.dumps(metadata), "details": "{}"})
    lines.sort(key=lambda row: row["filename"][::-1])  # os.listdir has no order either
    return "".join(json.dumps(row) + "\n" for row in lines)


def test_the_overall_score_is_the_mean_over_tasks_not_over_pictures(written, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(official_results(written / "geneval", lambda index, n: index == 0 or (index == 1 and n == 2) or (index == 3 and n < 2)))
    found = geneval.read_results(path, METADATA, 4)
    tasks = {"single_object": 5 / 8, "counting": 0.0, "colors": 2 / 4, "position": 0.0}
    assert found == pytest.approx({f"geneval_{task}": share for task, share in tasks.items()} | {
        "geneval": (5 / 8 + 2 / 4) / 4, "geneval_all_pictures": 7 / 20, "geneval_any_of_prompt": 3 / 5})


def test_results_of_an_unfinished_folder_are_refused(written, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(official_results(written / "geneval", lambda index, n: True).splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="judges 19 pictures, the folder has 4 of each of 5 prompts"):
        geneval.read_results(path, METADATA, 4)


def test_mjhq_distance_is_nothing_to_itself_and_more_to_other_pictures(folder, written, tmp_path):
    features = own_features(folder)
    made = mjhq.folder_features(mjhq.picture_paths(written / "mjhq", MJHQ), features)
    same = mjhq.compare(made, made, MJHQ, "_own")
    assert sorted(same) == ["mjhq_fid_own", "mjhq_fid_own_animals", "mjhq_fid_own_food", "mjhq_fid_own_people", "mjhq_kid_own"]
    assert all(abs(value) < 1e-3 for key, value in same.items() if "fid" in key)
    negative = tmp_path / "reference"
    for path in mjhq.picture_paths(written / "mjhq", MJHQ):
        target = negative / path.relative_to(written / "mjhq").with_suffix(".jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - np.array(Image.open(path))).save(target)
    paths = mjhq.picture_paths(negative, MJHQ)
    other = mjhq.folder_features(paths, features, tmp_path / "cache")
    assert all(mjhq.compare(made, other, MJHQ, "_own")[key] > 100 * abs(value) + 1e-3 for key, value in same.items() if "fid" in key)
    assert torch.equal(mjhq.folder_features(paths, features, tmp_path / "cache"), other)
    paths[0].unlink()
    with pytest.raises(ValueError, match="lacks 1 of 20 pictures"):
        mjhq.picture_paths(negative, MJHQ)


# ---- other models -----------------------------------------------------------------------------------------------


def test_a_flow_teacher_makes_the_stock_pipelines_pictures(tmp_path):
    tokenizer, text_encoder = tiny_bert()
    transformer = tiny_transformer(guidance_embeds=False)
    SanaPipeline(tokenizer, text_encoder, tiny_vae(), transformer, FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "prompt.json").write_text('{"max_tokens": 32, "instruction": ""}')
    model = load_model(str(tmp_path / "teacher"))
    assert model.flow and not model.follows_lines and model.default_steps == (20,)
    made = model.make(["a red cat", "a blue dog"], [5, 6], 3)
    stock = SanaPipeline.from_pretrained(tmp_path / "teacher")
    stock.set_progress_bar_config(disable=True)
    wanted = stock("a blue dog", num_inference_steps=3, guidance_scale=4.5, height=32, width=32, generator=torch.Generator().manual_seed(6),
                   use_resolution_binning=False, complex_human_instruction=None, max_sequence_length=32, output_type="np").images[0]
    assert np.abs(made[1].astype(float) - 255 * wanted).max() <= 1.01
    check_steps(model, (3, 20))
    with pytest.raises(ValueError, match="follows no lines"):
        model.make(["a cat"], [0], 3, np.zeros((1, 32, 32), np.uint8))


def test_step_counts_without_published_times_are_refused_before_any_work(model):
    with pytest.raises(ValueError, match="1, 2 and 4"):
        check_steps(model, (1, 3))
    with pytest.raises(ValueError, match="different whole numbers"):
        check_steps(model, (1, 1))


# ---- the whole command ------------------------------------------------------------------------------------------


def command(folder, inputs, out, *more):
    return parse(["--model", str(folder), "--data", str(SAMPLE), "--count", "5", "--steps", "1,2", "--features", "own", "--evaluator", str(folder),
                  "--geneval", str(inputs / "evaluation_metadata.jsonl"), "--samples", "2", "--mjhq", str(inputs / "meta_data.json"), "--limit", "4",
                  "--runs", "1", "--out", str(out), "--cache", str(out / "cache"), *more])


def test_one_command_leaves_one_table_and_one_sheet_of_everything(folder, inputs, written, tmp_path):
    report = evaluate(command(folder, inputs, tmp_path, "--reference", str(written / "mjhq")))
    flat = json.loads((tmp_path / "report.json").read_text())
    wanted = [f"{measure}_{column}" for measure in ("fid_own", "kid_own", "clip_own", "line_f1", "sharpness_ratio") for column in ("1step", "2step", "off", "vae")]
    wanted += ["clip_own_real", "clip_own_shuffled", "clip_own_top1_1step", "kid_own_real", "psnr_db_vae", "latency_ms_1step", "images_per_s_2step",
               "mjhq_fid_own_1step", "mjhq_kid_own_2step"]
    assert all(np.isfinite(flat[key]) for key in wanted)
    assert flat["clip_own_top1_chance"] == 1 / 5
    assert flat["device"] == "cpu" and flat["precision"] == "fp32" and flat["count"] == 5
    assert not any(key.startswith(("fid_1", "kid_1", "clip_1", "geneval_1")) for key in flat)  # no standard name on a number that is none
    table = (tmp_path / "report.md").read_text()
    assert "no FID of any paper" in table and "NOT comparable with CLIP scores" in table and "official evaluate_images.py" in table
    assert "| fid_own | " in table and "| latency_ms | " in table
    sheet = Image.open(tmp_path / "contact_sheet.png")
    assert sheet.width // 132 == 2 * 6 and sheet.height // 132 == (5 + 3 + 2) // 2  # data, tasks and categories of the four prompts
    assert len(report.rows) == 5 + 3 + 2

    results = tmp_path / "geneval" / "1step" / "results.jsonl"  # the scorer comes, and the command is given again
    results.write_text(official_results(results.parent, lambda index, n: n == 0))
    before = {name: data for name, data in contents(tmp_path).items() if name.startswith(("geneval/", "mjhq/"))}
    flat = evaluate(command(folder, inputs, tmp_path, "--reference", str(written / "mjhq"))).flat()
    assert flat["geneval_1step"] == 0.5 and flat["geneval_single_object_1step"] == 0.5 and "geneval_2step" not in flat
    assert {name: data for name, data in contents(tmp_path).items() if name.startswith(("geneval/", "mjhq/"))} == before


def test_a_folder_without_controlnet_and_without_training_split_is_evaluated_as_far_as_it_goes(tmp_path):
    folder = build_small_folder(tmp_path / "plain", controlnet=False)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"picture {i}")
    args = parse(["--model", str(folder), "--data", str(pictures), "--steps", "1", "--features", "own", "--evaluator", str(folder), "--runs", "1",
                  "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    flat = evaluate(args).flat()
    assert np.isfinite(flat["fid_own_1step"]) and flat["count"] == 3
    assert "line_f1_1step" not in flat and "fid_own_off" not in flat and "clip_own_1step" not in flat
    assert "kid_own_real" not in flat and any("too few for FID" in note for note in flat["notes"]) and any("very pictures that the made ones answer to" in note for note in flat["notes"])
    assert any("No caption score" in note and "at least 32" in note for note in flat["notes"])


def test_nothing_to_evaluate_is_said_at_once(capsys):
    with pytest.raises(SystemExit):
        parse(["--model", "x"])
    assert "give --data, --geneval or --mjhq" in capsys.readouterr().err
