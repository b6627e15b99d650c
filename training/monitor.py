"""Watches the latents: their mean and std against a reference stored at the start, with an alarm when they leave its band.

A denoiser fits one distribution of latents. An autoencoder exchanged between two runs, a wrong scaling factor, or samples that
drift away show here, as numbers, long before they show in a picture. In a preview it takes one line:

    numbers |= monitor.check(folder, held_out, latents, config.latent_band)

All latents are unit-variance ones (scaling_factor applied).
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import torch

from training.batches import Batch, Corpus
from training.checkpoint import write_atomic
from training.distributed import is_main
from training.loop import autocast, device

log = logging.getLogger(__name__)
FILE = "latents.json"
MAX_PICTURES = 1024  # of which the reference is made
FLOOR = 0.05         # the band's least half width, in reference std: what nobody can see is no alarm


def statistics(latents: torch.Tensor) -> dict[str, list[float] | int]:
    """Per channel: mean and std over all pictures and places, and the spread over pictures of what they are means of.

    latents [N, C, h, w]. With p_i = mean of picture i and u_i = its mean square distance from the channel's mean, `mean_spread`
    = std(p_i) and `std_spread` = std(u_i) / (2 std): over n pictures the mean's standard error is mean_spread/√n, that of the
    std is std_spread/√n (delta method).
    """
    x = latents.detach().float().cpu().flatten(2)                                   # [N, C, h·w]
    mean = x.mean(dim=(0, 2))
    u = (x - mean[:, None]).square().mean(dim=2)                                    # [N, C]
    std = u.mean(dim=0).sqrt().clamp_min(1e-6)
    spread = lambda a: a.std(dim=0, correction=0)
    return {"pictures": len(x), "mean": mean.tolist(), "std": std.tolist(), "mean_spread": spread(x.mean(dim=2)).tolist(),
            "std_spread": (spread(u) / (2 * std)).tolist()}


def compare(reference: dict, latents: torch.Tensor, band: float) -> dict[str, float]:
    """mean, std: of all latents; drift: 1 = the edge of the band; alarm: 1 beyond it; channel: the one furthest off.

    Root mean square over the channels of (mean - reference)/std and of log(std/reference), each against `band` standard
    errors of n pictures, at least FLOOR. latents [n, C, h, w].
    """
    wanted = {k: torch.tensor(reference[k]) for k in ("mean", "std", "mean_spread", "std_spread")}
    if latents.shape[1] != len(wanted["mean"]):
        raise ValueError(f"latents have {latents.shape[1]} channels, the stored reference {len(wanted['mean'])}: another autoencoder was put "
                         f"in place; use another --out, or delete {FILE} of this stage to start a new reference")
    found = statistics(latents)
    finite = bool(torch.isfinite(latents).all())
    rms = lambda a: float(a.square().mean().sqrt())
    half = lambda spread: max(FLOOR, band * rms(spread / wanted["std"]) / math.sqrt(len(latents)))
    off_mean = (torch.tensor(found["mean"]) - wanted["mean"]) / wanted["std"] / half(wanted["mean_spread"])
    off_std = torch.log(torch.tensor(found["std"]) / wanted["std"]) / half(wanted["std_spread"])
    drift = max(rms(off_mean), rms(off_std)) if finite else math.inf
    return {"mean": float(latents.float().mean()), "std": float(latents.float().std()), "drift": drift, "alarm": float(not drift <= 1),
            "channel": float((off_mean.square() + off_std.square()).argmax())}


def reference(folder: Path, latents: np.ndarray | torch.Tensor) -> dict:
    """The reference in FOLDER/latents.json; made of `latents` [N, C, h, w] and written if there is none."""
    path = folder / FILE
    if path.exists():
        return json.loads(path.read_text())
    rows = np.linspace(0, len(latents) - 1, min(len(latents), MAX_PICTURES)).astype(int)
    found = statistics(torch.as_tensor(np.asarray(latents[rows], dtype=np.float32)))
    if is_main():
        _store(path, found)
    return found


def _store(path: Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(json.dumps(found, indent=1).encode()))


def alarm(where: str, found: dict[str, float], about: str) -> None:
    """Says, once a check, what left the band and what that usually is."""
    log.warning("ALARM %s: %s latents left the reference band: drift %.2f (1 = its edge), mean %.3f, std %.3f, furthest channel %d. %s",
                where, about, found["drift"], found["mean"], found["std"], int(found["channel"]),
                "The autoencoder or its scaling_factor is not the one this run began with." if about == "encoded" else
                "The samples came apart from the data: lower the learning rate, or go back to the checkpoint before.")


@torch.no_grad()
def encode(corpus: Corpus, batch: Batch) -> torch.Tensor:
    """The batch's pictures through the autoencoder as it is now, `encode_batch` at once -> unit-variance latents [B, C, h, w]."""
    parts = torch.from_numpy(corpus.pixels.images[batch.rows]).split(corpus.config.encode_batch)
    with autocast(corpus.config):
        latents = [corpus.vae.encode(part.to(device()).permute(0, 3, 1, 2).float() / 127.5 - 1, return_dict=False)[0].float() for part in parts]
    return torch.cat(latents) * corpus.vae.config.scaling_factor


def check(folder: Path, corpus: Corpus, samples: torch.Tensor | None = None, band: float = 4.0, count: int = 16) -> dict[str, float]:
    """Numbers for a preview: `count` fixed pictures encoded anew, and the preview's `samples`, against the reference.

    The reference (FOLDER/latents.json) is made of the corpus' latents at the first check of a run, and stays. Encoded latents
    must never leave the band. Samples come from outside, as training begins: theirs is an alarm once they have been inside, told when
    they leave and not again before they are back: a one-step student may rightly end at the band's edge. No alarm stops a run.
    """
    stored = reference(folder, corpus.latents.images)
    found = {f"latent_{k}": v for k, v in compare(stored, encode(corpus, corpus.fixed(count)), band).items()}
    if found["latent_alarm"]:
        alarm(folder.name, {k.removeprefix("latent_"): v for k, v in found.items()}, "encoded")
    if samples is not None:
        drawn = compare(stored, samples, band)
        inside, were_inside = not drawn["alarm"], stored.get("samples_were_inside", False)
        if not were_inside:
            drawn["alarm"] = 0.0
        elif not inside and not stored.get("samples_left", False):
            alarm(folder.name, drawn, "sampled")
        known = stored | {"samples_were_inside": were_inside or inside, "samples_left": were_inside and not inside}
        if known != stored and is_main():
            _store(folder / FILE, known)
        found |= {f"sample_{k}": v for k, v in drawn.items()}
    return {k: v for k, v in found.items() if not k.endswith("_channel")}
