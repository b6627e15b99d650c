"""What pictures are compared by: Inception's features where its weights are at hand, else the shipped autoencoder's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC

from sana_app.model.folder import read_json
from training.batches import weights_hash

EVALUATOR = Path(__file__).parents[2] / "assets" / "models" / "emoji"
BATCH = 16
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity publishes it
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_PX = 299


@dataclass(frozen=True)
class Features:
    """`compute`: uint8 [B, 3, S, S] -> float [B, D]. `suffix` stands in the name of every number made with them."""

    compute: Callable[[torch.Tensor], torch.Tensor]
    size_px: int
    suffix: str     # "" = the published Inception; "_own" = comparable within this project only; "_unpublished" = another Inception
    identity: str   # hash of the weights
    about: str      # one sentence for the report

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Pictures uint8 [H, W, 3] of any sizes -> features [N, D] on the CPU."""
        rows = [resized(image, self.size_px) for image in images]
        return torch.cat([self.compute(torch.stack(rows[i:i + BATCH])).float().cpu() for i in range(0, len(rows), BATCH)])


def resized(image: np.ndarray, size: int) -> torch.Tensor:
    """uint8 [H, W, 3] -> uint8 [3, size, size]: bicubic, antialiased when it shrinks (as clean-fid wants it), the whole picture."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if x.shape[1:] == (size, size):
        return x
    x = F.interpolate(x[None].float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False)[0]
    return x.clamp(0, 255).round().byte()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- the project's own -------------------------------------------------------------------------------------------


def scales(encoder: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What a DC-AE encoder knows of x [B, 3, S, S] in [-1, 1]: its last state at each resolution but the finest, then the latent."""
    states: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda _module, _inputs, state: states.append(state)) for block in encoder.down_blocks]
    try:
        latent = encoder(x)
    finally:
        for handle in handles:
            handle.remove()
    last = {state.shape[-1]: state for state in states}  # a later state of the same resolution takes the place of the earlier
    return [last[width] for width in sorted(last, reverse=True)][1:] + [latent]


def pooled(states: list[torch.Tensor]) -> torch.Tensor:
    """Mean and standard deviation of every channel over the picture: [B, C, h, w] each -> [B, 2·sum C]."""
    return torch.cat([part for s in states for part in (s.mean(dim=(2, 3)), s.std(dim=(2, 3)))], dim=1)


def own_features(evaluator: Path = EVALUATOR) -> Features:
    """Of the autoencoder of a model folder, by default the shipped one: 960 numbers, at the size the model was trained for."""
    vae = AutoencoderDC.from_pretrained(evaluator / "vae", torch_dtype=torch.float32, use_safetensors=True, local_files_only=True)
    encoder, name = vae.encoder.to(device()).eval(), weights_hash(vae.encoder)
    size = read_json(evaluator / "transformer" / "config.json")["sample_size"] * vae.spatial_compression_ratio

    def compute(x: torch.Tensor) -> torch.Tensor:
        return pooled(scales(encoder, x.to(device()).float() / 127.5 - 1))
    return Features(compute, size, "_own", name, f"channel means and deviations in the autoencoder's encoder of {evaluator.name} (weights {name}), "
                    f"at {size} px: own features, numbers compare only with others of this project made with the same weights, pictures and count")


# ---- the standard ------------------------------------------------------------------------------------------------


def inception_weights(given: Path | None, fetch: bool) -> Path | None:
    """The weight file: the one given, or torch.hub's copy of it, fetched on request. None when it is not at hand."""
    if given is not None:
        if not given.is_file():
            raise ValueError(f"no Inception weights at {given}: wanted {INCEPTION_FILE}, as torch-fidelity publishes it")
        return given
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file() and fetch:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # no network, another file than expected
            raise ValueError(f"the Inception weights cannot be fetched ({error}): bring {INCEPTION_FILE} by hand and give --inception FILE, "
                             "or use --features own") from error
    return path if path.is_file() else None


def inception_features(path: Path) -> Features:
    """The 2048 numbers FID is defined by. The file is read with weights_only=True first: torch-fidelity's own reading would run a pickle."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        torch.load(path, map_location="cpu", weights_only=True)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device())
    except Exception as error:  # a pickle with code, a truncated zip, tensors that do not fit
        raise ValueError(f"{path} holds no Inception weights that can be read safely ({str(error)[:200]}): wanted {INCEPTION_FILE}") from error
    name = hashlib.sha256(path.read_bytes()).hexdigest()
    suffix, weights = ("", "the published weights") if name == INCEPTION_SHA256 else ("_unpublished", f"NOT the published weights (SHA-256 {name[:16]})")
    about = f"Inception-v3 pool features, {weights}, pictures resized bicubic, antialiased"
    return Features(lambda x: network(x.to(device())), INCEPTION_PX, suffix, name[:16], about)


def load_features(kind: str, inception: Path | None = None, evaluator: Path = EVALUATOR) -> Features:
    """kind: "own"; "inception" (fetched if need be); "auto" = Inception if torch-fidelity and its weights are on the disk, else own."""
    if kind == "own":
        return own_features(evaluator)
    try:
        import torch_fidelity  # noqa: F401  (torchmetrics needs it for Inception)
    except ImportError as error:
        if kind == "inception" or inception is not None:
            raise ValueError("Inception features need torch-fidelity: pip install --no-deps torch-fidelity==0.4.0") from error
        return own_features(evaluator)
    path = inception_weights(inception, fetch=kind == "inception")
    return own_features(evaluator) if path is None else inception_features(path)
