"""Rank, steps and learning rate of a LoRA from the number of pictures, each with its reason and each overridable."""

from __future__ import annotations

from dataclasses import replace

from training.config import Config

CLASS_PICTURES = 100  # the default of diffusers' train_dreambooth_lora_sana.py


def suggested(pictures: int, batch: int, alternating: bool) -> dict[str, tuple[float, str]]:
    """Field -> (value, reason) for so many pictures.

    The anchor is diffusers' SANA example (examples/dreambooth/README_sana.md and train_dreambooth_lora_sana.py): 5 pictures
    of a dog, 500 steps of 1 picture with 4 accumulated, rank 4, learning rate 1e-4: every picture is seen 400 times.
    """
    seen = min(max(400 * pictures, 800), 16000)
    steps = -(-seen // batch) * (2 if alternating else 1)
    rank = next((r for r, most in ((4, 5), (8, 15), (16, 50)) if pictures <= most), 32)
    turns = ", every other one of them the discriminator's" if alternating else ""
    return {"lora_rank": (rank, "4 for one subject in up to 5 pictures (diffusers' default), 8 up to 15, 16 up to 50, 32 above: more to tell apart needs more room"),
            "lora_steps": (steps, f"each picture about {seen / max(1, pictures):.0f} times, as in diffusers' SANA example (500 steps of 4 for 5 pictures), "
                                  f"between 800 and 16,000 in all; {batch} a step{turns}"),
            "lora_lr": (1e-4, "the default of diffusers' SANA script, for any rank")}


def settled(config: Config, pictures: int, alternating: bool) -> Config:
    """The config with every 0 of lora_* replaced by the suggestion; prints each number with its reason."""
    print(f"lora: {pictures} pictures")
    found = {}
    for key, (value, reason) in suggested(pictures, config.lora_batch, alternating).items():
        given = getattr(config, key)
        found[key] = given or value
        print(f"  {key} = {found[key]:g} " + (f"(given; suggested: {value:g})" if given else f"(suggested: {reason}; override with --set {key}=…)"))
    alpha = config.lora_alpha or float(found["lora_rank"])
    print(f"  lora_alpha = {alpha:g} (" + ("given" if config.lora_alpha else "= the rank, so that the scale alpha/rank is 1 in every reader") + ")")
    return replace(config, lora_alpha=alpha, **found)
