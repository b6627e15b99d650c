"""Evaluates a model folder: distances to real pictures, caption score, speed, GenEval, MJHQ-30K; one table, one contact sheet.

    python -m training.evaluation --model assets/models/emoji --data runs/data/emoji-128
    python -m training.evaluation --model FOLDER --geneval evaluation_metadata.jsonl --mjhq meta_data.json --reference mjhq30k_imgs

The same command goes on where it was stopped, and reads the scorer's results once they are there.
"""

from __future__ import annotations

import sana_app  # noqa: F401  (repairs torchvision before diffusers is imported)

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import torch

from training import metrics
from training.autoencoder import psnr_db
from training.data.cache import Pixels, pixel_cache
from training.evaluate import Pictures, choose, hardware, line_numbers, model_hash, to_tensor
from training.evaluation import geneval, mjhq
from training.evaluation.distances import fid, kid
from training.evaluation.features import EVALUATOR, Features, load_features
from training.evaluation.match import CANDIDATES, clip_folder, clip_score, fit_on, load_clip, load_sentences, own_numbers
from training.evaluation.models import Model, check_steps, load_model, picture_seed, speed
from training.evaluation.report import Report, data_rows, steps_title


def columns_of(model: Model, pictures: Pictures, steps: tuple[int, ...], seed: int) -> dict[str, np.ndarray]:
    """The pictures to judge: every step count (with the lines, where the model follows them), without lines, autoencoder only."""
    seeds = [picture_seed(seed, "data", i) for i in range(len(pictures.prompts))]
    inks = pictures.inks if model.follows_lines else None
    columns = {f"{n}step": model.make(pictures.prompts, seeds, n, inks) for n in steps}
    if model.follows_lines:
        columns["off"] = model.make(pictures.prompts, seeds, min(steps))
    return columns | {"vae": model.through_vae(pictures.images)}


def picture_numbers(report: Report, model: Model, pictures: Pictures, columns: dict[str, np.ndarray]) -> None:
    """Lines, sharpness, reconstruction: the formulas of training.evaluate."""
    cv2.setNumThreads(1)
    found = line_numbers(pictures, columns) if model.follows_lines else {
        f"sharpness_ratio_{name}": metrics.sharpness_ratio(made, pictures.images) for name, made in columns.items()}
    for key, value in found.items():
        measure, column = key.rsplit("_", 1)
        report.put(column, {measure: value})
    report.put("vae", {"psnr_db": float(psnr_db(to_tensor(columns["vae"]), to_tensor(pictures.images)).mean())})


def caption_numbers(report: Report, args: argparse.Namespace, pictures: Pictures, columns: dict[str, np.ndarray], rows: dict[str, torch.Tensor],
                    features: Features, size_px: int) -> None:
    """CLIP score where a CLIP is at hand, else the own one: of every column, of the real pictures, and of those with other captions."""
    prompts, shuffled = pictures.prompts, list(np.roll(pictures.prompts, 1))
    folder = clip_folder(args.clip)
    if folder is not None:
        clip = load_clip(folder)
        for column, images in (columns | {"real": pictures.images}).items():
            report.put(column, {"clip": clip_score(clip, images, prompts)})
        report.put("shuffled", {"clip": clip_score(clip, pictures.images, shuffled)})
        report.about["caption_score"] = f"CLIP {Path(folder).name}, {clip.model.config.projection_dim} channels"
        return
    try:
        train = pixel_cache(args.data, "train", size_px, args.cache)
        sentences = load_sentences(args.evaluator)
        linear = fit_on(train, pictures.images, features, sentences, args.cache)
    except ValueError as error:
        report.notes.append(f"No caption score: there is no CLIP folder (--clip), and none of the project's own can be fitted: {error}")
        return
    texts = sentences.encode(prompts)
    for column, x in rows.items():
        report.put(column, own_numbers(linear, x, texts, prompts))
    report.put("shuffled", own_numbers(linear, rows["real"], sentences.encode(shuffled), shuffled))
    report.put("chance", {"clip_own_top1": 1 / min(CANDIDATES, len(set(prompts)))})
    report.about["caption_score"] = ("own: linear map from own picture features to sentence embeddings "
                                     f"(weights {sentences.identity}), fitted on the training split")
    report.notes.append("Caption score: the project's own, no CLIP was at hand. It compares only within this project, on the same data.")


def distance_numbers(report: Report, rows: dict[str, torch.Tensor], others: torch.Tensor | None, suffix: str) -> None:
    """FID of every column to the real pictures of the same prompts, as MJHQ-30K takes it; KID to `others`, real pictures that are not
    evaluated (without enough of them, None, to the same as FID).

    Measured on 64 pictures: to others, FID puts blurred pictures before real ones, for it is mostly the covariance that so few pictures
    leave open, and theirs is smaller. KID is unbiased only between sets that are drawn apart: to the same prompts it falls below 0.
    """
    real = rows["real"]
    for column, x in rows.items():
        if column != "real":
            report.put(column, {f"fid{suffix}": fid(real, x)})
        if column != "real" or others is not None:
            report.put(column, {f"kid{suffix}": kid(real if others is None else others, x)})
    if others is None:
        report.notes.append("KID is taken to the very pictures that the made ones answer to, as the split has no others: too low, even below 0.")
    if len(real) <= real.shape[1]:
        report.notes.append(f"{len(real)} pictures are too few for FID in {real.shape[1]} features: compare it only between runs on these very pictures.")
    report.about["kid_reference_count"] = len(real if others is None else others)


def evaluate_data(report: Report, args: argparse.Namespace, model: Model, features: Features) -> None:
    """Held-out pictures of a data folder: everything that needs real pictures beside the made ones."""
    pixels: Pixels = pixel_cache(args.data, args.split, model.size_px, args.cache)
    chosen = choose(pixels, 3 * args.count, args.seed)  # it begins with the choice of `count`; the rest is the reference
    pictures = chosen.some(list(range(min(args.count, len(chosen.prompts)))))
    count = len(pictures.prompts)
    columns = columns_of(model, pictures, args.steps, args.seed)
    picture_numbers(report, model, pictures, columns)

    rows = {"real": features(pictures.images)} | {column: features(images) for column, images in columns.items()}
    distance_numbers(report, rows, features(chosen.images[count:]) if len(chosen.prompts) >= 2 * count else None, features.suffix)
    own = features if features.suffix == "_own" else load_features("own", evaluator=args.evaluator)
    if own is not features:
        rows = {column: own(images) for column, images in ({"real": pictures.images} | columns).items()}
    caption_numbers(report, args, pictures, columns, rows, own, model.size_px)

    inks = pictures.inks if model.follows_lines else None
    for n in args.steps:
        report.put(f"{n}step", speed(model, pictures.prompts, inks, n, args.runs))
    report.about |= {"split": args.split, "count": count, "data_hash": pixels.hash}
    titles = {f"{n}step": steps_title(n) for n in args.steps} | {"off": "no lines", "vae": "autoencoder"}
    drawn = {"lines": np.repeat(255 - pictures.inks[..., None], 3, 3)} if model.follows_lines else {}
    for row in data_rows(drawn | {titles[name]: made for name, made in columns.items()} | {"real": pictures.images},
                         6 * bool(args.geneval) + 10 * bool(args.mjhq)):
        report.show(row)


def evaluate_geneval(report: Report, args: argparse.Namespace, model: Model, identity: dict) -> None:
    """Pictures for the official scorer, and its results where they are."""
    metadata, sheet = geneval.read_metadata(args.geneval, args.limit), {}
    for n in args.steps:
        folder = args.out / "geneval" / f"{n}step"
        geneval.write_pictures(model, identity, metadata, folder, n, args.samples, args.seed)
        sheet[steps_title(n)] = geneval.first_of_each_task(metadata, folder)
        if (folder / geneval.RESULTS).is_file():
            report.put(f"{n}step", geneval.read_results(folder / geneval.RESULTS, metadata, args.samples))
        else:
            report.notes.append(f"GenEval, {steps_title(n)}: {len(metadata)} prompts are drawn; score {folder} with the official evaluate_images.py "
                                f"--outfile {folder / geneval.RESULTS}, then give this command again.")
    report.about["geneval_prompts"] = len(metadata)
    for i in range(len(next(iter(sheet.values())))):
        report.show({title: pictures[i] for title, pictures in sheet.items()})


def evaluate_mjhq(report: Report, args: argparse.Namespace, model: Model, identity: dict, features: Features) -> None:
    """MJHQ-30K pictures, and their distance to the reference folder where it is given."""
    metadata = mjhq.read_metadata(args.mjhq, args.limit)
    reference = mjhq.picture_paths(args.reference, metadata) if args.reference else None
    firsts = list({row["category"]: i for i, row in reversed(list(enumerate(metadata.values())))}.values())
    sheet = {"real": [mjhq.load(reference[i]) for i in firsts]} if reference else {}
    clip = load_clip(folder) if (folder := clip_folder(args.clip)) else None
    for n in args.steps:
        folder = args.out / "mjhq" / f"{n}step"
        mjhq.write_pictures(model, identity, metadata, folder, n, args.seed)
        made = mjhq.picture_paths(folder, metadata)
        sheet[steps_title(n)] = [mjhq.load(made[i]) for i in firsts]
        if reference:
            rows = mjhq.folder_features(made, features), mjhq.folder_features(reference, features, args.cache)
            report.put(f"{n}step", mjhq.compare(*rows, metadata, features.suffix))
        if clip is not None:
            prompts = [row["prompt"] for row in metadata.values()]
            parts = [slice(i, i + 64) for i in range(0, len(made), 64)]
            scores = [(clip_score(clip, [mjhq.load(p) for p in made[part]], prompts[part]), len(made[part])) for part in parts]
            report.put(f"{n}step", {"mjhq_clip": sum(s * k for s, k in scores) / len(made)})
    report.about["mjhq_prompts"] = len(metadata)
    if not reference:
        report.notes.append("MJHQ-30K: the pictures are written; give --reference FOLDER (mjhq30k_imgs) for FID.")
    for i in range(len(firsts)):
        report.show({title: pictures[i] for title, pictures in sheet.items()})


def evaluate(args: argparse.Namespace) -> Report:
    """All that was asked for. ValueError names what is wrong with the input."""
    model = load_model(args.model, args.precision)
    args.steps = args.steps or model.default_steps
    check_steps(model, args.steps)
    features = load_features(args.features, args.inception, args.evaluator)
    identity = {"model": model_hash(Path(model.source)) if Path(model.source).is_dir() else model.source, "precision": args.precision}
    report = Report(about={"model": model.name, "model_hash": identity["model"], "features": features.about, "features_hash": features.identity})
    if features.suffix == "_unpublished":
        report.notes.append("The Inception weights are not the published ones: fid_unpublished and kid_unpublished compare with no paper's figures.")
    if features.suffix == "_own":
        report.notes.append("FID and KID are measured in the project's own features (fid_own, kid_own): they are no FID of any paper. "
                            "A model that shares the evaluator's autoencoder is judged by its own encoder, and so more kindly than a stranger.")
    if args.data:
        evaluate_data(report, args, model, features)
    if args.geneval:
        evaluate_geneval(report, args, model, identity)
    if args.mjhq:
        evaluate_mjhq(report, args, model, identity, features)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else hardware()
    report.about |= {"steps": list(args.steps), "size_px": model.size_px, "seed": args.seed, "precision": args.precision, "device": str(model.pipe.device),
                     "hardware": where, "python": platform.python_version(), **{name: version(name) for name in ("torch", "diffusers", "torchmetrics")}}
    report.write(args.out)
    return report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.evaluation", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="model folder (Sprint, with or without controlnet/; SanaPipeline), or a name the page knows")
    parser.add_argument("--data", type=Path, help="folder of shards, or of NAME.png + NAME.txt: real pictures to compare with")
    parser.add_argument("--split", default="val", help="which shards (default: %(default)s)")
    parser.add_argument("--count", type=int, default=128, help="pictures of the data (default: %(default)s)")
    parser.add_argument("--steps", type=lambda text: tuple(int(n) for n in text.split(",")), help="default: 1,2,4; 20 for a flow teacher")
    parser.add_argument("--features", choices=("auto", "own", "inception"), default="auto",
                        help="for FID and KID; auto = Inception if its weights are on the disk, else own")
    parser.add_argument("--inception", type=Path, help="the Inception weight file")
    parser.add_argument("--clip", help="folder of a CLIP model (published CLIP scores: openai/clip-vit-large-patch14)")
    parser.add_argument("--evaluator", type=Path, default=EVALUATOR, help="model folder whose autoencoder and text encoder are the own evaluator")
    parser.add_argument("--geneval", type=Path, help="GenEval's evaluation_metadata.jsonl")
    parser.add_argument("--samples", type=int, default=4, help="GenEval pictures a prompt (default: %(default)s)")
    parser.add_argument("--mjhq", type=Path, help="MJHQ-30K's meta_data.json")
    parser.add_argument("--reference", type=Path, help="folder of the MJHQ-30K pictures, CATEGORY/ID.jpg")
    parser.add_argument("--limit", type=int, help="only so many prompts of GenEval and MJHQ-30K, to try things out")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=12, help="timed pictures (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: runs/evaluation/NAME")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    args = parser.parse_args(argv)
    if not (args.data or args.geneval or args.mjhq):
        parser.error("nothing to evaluate on: give --data, --geneval or --mjhq")
    if args.count < 2 or args.runs < 1 or args.samples < 1 or (args.limit is not None and args.limit < 1):
        parser.error("wanted --count of at least 2, --runs, --samples and --limit of at least 1")
    args.out = args.out or Path("runs/evaluation") / Path(args.model).name
    return args


def main() -> None:
    args = parse()
    try:
        report = evaluate(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(report.markdown())


if __name__ == "__main__":
    main()
