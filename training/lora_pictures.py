"""The pictures of a LoRA: the user's own with their captions, and pictures of the class that the model drew before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from sana_app.model.network import TrigFlowTeacher
from training.batches import Batch
from training.config import Config
from training.data.cache import digest, once, source_hash
from training.data.shards import encode_png
from training.data.sources import PICTURES, split_name
from training.loop import Draws, autocast, device
from training.sampling import sample_student, sample_teacher

CLASS_STEPS = {"flow": 20, "sprint": 2}  # sampling steps of a class picture


def captioned(source: str, caption: str, cache: Path, setting: str) -> str:
    """The folder `source`, or, if pictures in it have no caption file, a copy in `cache` where they have `caption`.

    Shards carry their captions and are left as they are. ValueError names `setting` where a caption is missing and none given.
    """
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.tar")):
        return source  # what is wrong with it is said by the reader, in its words
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    keys = {p: split_name(p.relative_to(folder).as_posix()) for p in files}
    described = {key for key, ext in keys.values() if ext in (".txt", ".json")}
    bare = [p for p, (key, ext) in keys.items() if ext in PICTURES and key not in described]
    if not bare:
        return source
    if not caption:
        raise ValueError(f"{len(bare)} pictures in {source} have no caption ({bare[0].name} for one): put {bare[0].stem}.txt beside it, "
                         f"or give all of them one with a word of its own: --set {setting}=\"a photo of sks dog\"")

    def build(target: Path) -> None:
        for path in files:
            copy = target / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            if path in bare:
                (target / f"{keys[path][0]}.txt").write_text(caption + "\n", encoding="utf-8")
    return str(once(cache / f"captioned-{digest(source_hash(folder, 'all'), caption)}", build))


def prompt_batch(prompts: list[str], encode: Callable, latent: tuple[int, int, int]) -> Batch:
    """A batch without pictures for `prompts`: x0 and cond are zeros [B, *latent]."""
    states, mask = encode([*prompts, ""])
    states, mask, count = states.float(), mask.float(), len(prompts)
    zeros = torch.zeros(count, *latent, device=device())
    null = lambda a: a[-1:].expand(count, *a.shape[1:])
    return Batch(zeros, zeros, states[:-1], mask[:-1], null(states), null(mask), None, prompts)


@torch.no_grad()
def draw_class(network: TrigFlowTeacher, prompt: str, count: int, encode: Callable, latent: tuple[int, int, int],
               decode: Callable[[torch.Tensor], torch.Tensor], config: Config, key: str, cache: Path) -> str:
    """A folder with `count` pictures of `prompt` drawn by `network` as it is before the training (DreamBooth,
    arXiv 2208.12242, §3.2). Picture i depends on (seed, i) alone. `key` names the weights; `decode`: latents -> [-1, 1]."""
    w = config.guidance[len(config.guidance) // 2]
    sprint = network.transformer.config.guidance_embeds
    alone = TrigFlowTeacher(network.transformer)  # from the words alone, also where there is a ControlNet

    def build(folder: Path) -> None:
        print(f"drawing {count} pictures of {prompt!r} before the training")
        one = prompt_batch([prompt], encode, latent)
        for i in range(count):
            draws = Draws(config.seed + 1, i)
            noises = [draws.normal(1, *latent) for _ in range(CLASS_STEPS["sprint"] if sprint else 1)]
            with autocast(config):
                x0 = sample_student(alone, one, noises, w) if sprint else sample_teacher(alone, one, noises[0], CLASS_STEPS["flow"], w)
            pixels = (decode(x0)[0].float() * 127.5 + 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
            (folder / f"{i:04d}.png").write_bytes(encode_png(pixels))
            (folder / f"{i:04d}.txt").write_text(prompt + "\n", encoding="utf-8")
    return str(once(cache / f"class-{digest(prompt, str(count), str(latent), str(config.seed), str(w), key)}", build))
