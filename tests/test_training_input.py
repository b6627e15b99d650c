"""What people get wrong when they start a training: each is told what came and what was wanted, before any work."""

import json
import re
from pathlib import Path

import pytest
from layouts import build_small_folder, tiny_vae

from training.__main__ import run_stage
from training.base import report_changes
from training.batches import Corpus
from training.config import Config, load_config
from training.text import load_text_encoder

SAMPLE = Path(__file__).parent.parent / "assets" / "sample"


@pytest.mark.parametrize("bad, said", [("precision=fp16", "wanted bf16 or fp32"), ("teacher_batch=0", "wanted 1 or more"), ("finetune_steps=-1", "wanted 0 or more"),
                                       ("bsae=x", "did you mean base?"), ("teacher_steps=ten", "--set teacher_steps: 'ten'"),
                                       ("guidance=", "guidance: wanted at least one value"), ("guidance=4,nan", "guidance=nan: wanted a finite"),
                                       ("teacher_lr=nan", "teacher_lr=nan: wanted a finite"), ("student_lr=-1", "student_lr=-1.0: wanted 0 or more"),
                                       ("lr_norms=inf", "lr_norms=inf: wanted a finite"), ("caption_dropout=-1", "caption_dropout=-1.0: wanted 0 to 1"),
                                       ("ema=1.5", "ema=1.5: wanted 0 to 1"), ("jump_path_steps=0", "jump_path_steps=0: wanted 1 or more"), ("seed=-1", "seed=-1: wanted 0"),
                                       ("teacher_clip=0", "teacher_clip=0.0: wanted more than 0"),
                                       ("optimizer=adamww", "optimizer='adamww': wanted adamw, adamw8bit or came"), ("tracker=tensorbord", "tracker='tensorbord': wanted")])
def test_a_value_no_run_can_have_is_named(bad, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load_config("tiny-cpu", [bad])


@pytest.mark.parametrize("good", ["tracker=wandb", "tracker=none", "save_minutes=inf", "teacher_clip=inf", "ema=0", "swap_lr=0", "lr_final=1"])
def test_an_unusual_value_that_a_run_can_have_is_taken(good):
    load_config("tiny-cpu", [good])


def test_a_batch_that_cannot_be_shared_is_refused_before_the_data_are_read(tmp_path):
    config = load_config("tiny-cpu", ["micro_batches=7", "data=nowhere"])
    for stage in ("autoencoder", "teacher", "controlnet", "jump", "student", "lora", "finetune"):
        with pytest.raises(ValueError, match="cannot be shared evenly by 1 processes with micro_batches=7"):
            run_stage(stage, config, tmp_path, False)
    assert not list(tmp_path.iterdir())
    run_stage("jump", load_config("tiny-cpu", ["micro_batches=7", "jump_paths=0"]), tmp_path, False)  # there is no such stage


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_small_folder(tmp_path_factory.mktemp("input") / "model")


def test_a_text_encoder_that_is_cut_short_is_named(model, tmp_path):
    load_text_encoder(str(model), 32)
    weights = next((model / "text_encoder").glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(ValueError, match="text_encoder is damaged or cut short"):
            load_text_encoder(str(model), 32)
    finally:
        weights.write_bytes(whole)


def test_a_size_the_autoencoder_cannot_divide_is_named(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="size_px=70: wanted a multiple of 8"):
        Corpus(Config(data=str(SAMPLE), vae=str(tmp_path / "vae"), size_px=70, precision="fp32"), tmp_path, "train")


def loose_folder(folder: Path) -> Path:
    """Two pictures of the sample, with captions."""
    from training.data.shards import encode_png, read_samples

    folder.mkdir()
    for sample, _ in zip(read_samples(SAMPLE, "val"), range(2)):
        (folder / f"{sample.key}.png").write_bytes(encode_png(sample.image))
        (folder / f"{sample.key}.txt").write_text(sample.captions[0])
    return folder


def test_validation_on_training_pictures_is_said_and_a_held_out_split_is_not(model, tmp_path, capsys):
    said = "has no held-out part"
    for data, wanted in ((loose_folder(tmp_path / "mine"), True), (SAMPLE, False)):
        Corpus(Config(data=str(data), vae=str(model / "vae"), text_encoder=str(model), size_px=32, precision="fp32"), tmp_path / "out", "val")
        assert (said in capsys.readouterr().out) == wanted


def test_a_dry_run_prints_what_a_base_lacks_and_writes_nothing(tmp_path, capsys):
    report = {"added": ["attn1.norm_q.weight"]}
    report_changes(report, "base", tmp_path / "teacher", dry_run=True)
    assert "attn1.norm_q.weight" in capsys.readouterr().out and not (tmp_path / "teacher").exists()
    report_changes(report, "base", tmp_path / "teacher")
    assert json.loads((tmp_path / "teacher" / "base.json").read_text()) == {"base": "base", **report}
