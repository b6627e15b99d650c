"""Does the picture show what the words say? The CLIP score where a CLIP folder is at hand, else a score of the project's own.

The own score: a linear map from the picture features (features.py) to the sentence embedding of the caption, fitted by ridge regression
on training pictures in closed form; the score is 100 times the cosine of what the map makes of a picture and of what stands in the prompt.
It knows what the training split knows and no more: read it between its own ceiling (real pictures) and floor (real pictures, other captions).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics.multimodal.clip_score import CLIPScore
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, CLIPModel, CLIPProcessor

from sana_app.model.text import TextSettings, encode_text
from training.batches import weights_hash
from training.data.cache import Pixels, digest, once
from training.evaluation.features import EVALUATOR, Features, device

RIDGE = 1.0           # penalty per training picture, on standardised features: flat between 0.3 and 3 for 150 to 3000 pictures
FIT_COUNT = 3000      # training pictures used at most; retrieval rises with them: 0.26 at 150, 0.40 at 600, 0.52 at 3000
CANDIDATES = 16       # captions a picture is to find its own among: chance is 1 / 16
BATCH = 64


@dataclass(frozen=True)
class Linear:
    """y = (x - mean) / std @ weight + centre; x [N, D] picture features, y [N, E] sentence embeddings."""

    mean: torch.Tensor     # [D]
    std: torch.Tensor      # [D]
    weight: torch.Tensor   # [D, E]
    centre: torch.Tensor   # [E], mean sentence embedding: both sides of the cosine are taken relative to it

    def cosines(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Every picture against every caption, [N, D] and [M, E] -> [N, M] in [-1, 1]."""
        guess = ((x - self.mean) / self.std) @ self.weight
        return F.normalize(guess, dim=1) @ F.normalize(y - self.centre, dim=1).T


def fit_linear(x: torch.Tensor, y: torch.Tensor, ridge: float = RIDGE) -> Linear:
    """weight = (XᵀX + ridge·N·I)⁻¹ XᵀY, X standardised, Y centred; x [N, D], y [N, E]."""
    mean, std, centre = x.mean(0), x.std(0) + 1e-6, y.mean(0)
    X, Y = ((x - mean) / std).double(), (y - centre).double()
    weight = torch.linalg.solve(X.T @ X + ridge * len(X) * torch.eye(X.shape[1], dtype=X.dtype), X.T @ Y)
    return Linear(mean, std, weight.float(), centre)


@dataclass(frozen=True)
class Sentences:
    """Mean token state of the evaluator's text encoder, unit length: how all-MiniLM-L6-v2 embeds a sentence."""

    encode: Callable[[list[str]], torch.Tensor]
    identity: str


def load_sentences(evaluator: Path = EVALUATOR) -> Sentences:
    tokenizer = AutoTokenizer.from_pretrained(evaluator / "tokenizer", local_files_only=True)
    encoder = AutoModel.from_pretrained(evaluator / "text_encoder", local_files_only=True, dtype=torch.float32).to(device()).eval()
    settings = TextSettings.of_folder(evaluator, encoder)

    def encode(prompts: list[str]) -> torch.Tensor:
        rows = []
        for start in range(0, len(prompts), BATCH):
            found = encode_text(tokenizer, encoder, prompts[start:start + BATCH], settings)
            mask = found.mask[..., None].float()
            rows.append(F.normalize((found.embeds * mask).sum(1) / mask.sum(1), dim=1).cpu())
        return torch.cat(rows)
    return Sentences(encode, weights_hash(encoder))


def fit_rows(train: Pixels, held_out: np.ndarray) -> np.ndarray:
    """At most FIT_COUNT plain training pictures, evenly spread, none of which is among the held-out ones (in a folder of loose
    pictures every split is the whole). Empty when nothing is left."""
    seen = {picture.tobytes() for picture in held_out}
    rows = np.array([i for i, about in enumerate(train.meta) if not about.get("toned") and train.captions[i][0]], dtype=int)
    rows = rows[np.linspace(0, len(rows) - 1, min(FIT_COUNT + len(held_out), len(rows))).astype(int)] if len(rows) else rows
    return np.array([i for i in rows if np.asarray(train.images[i]).tobytes() not in seen], dtype=int)[:FIT_COUNT]


def fit_on(train: Pixels, held_out: np.ndarray, features: Features, sentences: Sentences, cache: Path) -> Linear:
    """The map fitted on a training split; features and embeddings are computed once and kept in `cache`."""
    rows = fit_rows(train, held_out)
    if len(rows) < 32:
        raise ValueError(f"{len(rows)} training pictures that are not evaluated too: wanted at least 32 to fit the own caption score on")

    def build(folder: Path) -> None:
        starts = tqdm(range(0, len(rows), BATCH), desc="features of training pictures", mininterval=5)
        x = torch.cat([features(train.images[rows[i:i + BATCH]]) for i in starts])
        np.save(folder / "pictures.npy", x.numpy())
        np.save(folder / "sentences.npy", sentences.encode([train.captions[i][0] for i in rows]).numpy())
    folder = once(cache / f"match-{digest(train.hash, features.identity, sentences.identity, digest(*map(str, rows)))}", build)
    return fit_linear(*(torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("pictures", "sentences")))


def retrieval(cosines: torch.Tensor, prompts: list[str], seed: int = 0) -> float:
    """Share of pictures nearer to their own caption than to CANDIDATES - 1 others of the set, drawn anew for each; [N, N] -> 0..1."""
    rng, hits = np.random.default_rng(seed), 0
    for i, prompt in enumerate(prompts):
        others = [j for j in rng.permutation(len(prompts)) if prompts[j] != prompt][:CANDIDATES - 1]
        hits += bool((cosines[i, i] > cosines[i, others]).all())
    return hits / len(prompts)


def own_numbers(linear: Linear, features: torch.Tensor, texts: torch.Tensor, prompts: list[str]) -> dict[str, float]:
    """Mean score (100 × cosine) and retrieval of pictures [N, D] with their own captions [N, E]."""
    cosines = linear.cosines(features, texts)
    return {"clip_own": 100 * float(cosines.diag().mean()), "clip_own_top1": retrieval(cosines, prompts)}


# ---- the standard ------------------------------------------------------------------------------------------------


class TensorCLIP(CLIPModel):
    """A CLIPModel whose feature calls return tensors, which torchmetrics expects and transformers 5 no longer does."""

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        return super().get_image_features(pixel_values, **kwargs).pooler_output

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        return super().get_text_features(input_ids, attention_mask, **kwargs).pooler_output


def clip_folder(name: str | None) -> str | None:
    """The folder given; ValueError when it holds no CLIP. Without one, openai/clip-vit-large-patch14 if the hub's cache has it, else None."""
    if name is not None and not (Path(name) / "config.json").is_file():
        raise ValueError(f"no CLIP model at {name}: wanted a folder with config.json, weights, tokenizer and preprocessor_config.json")
    if name is not None:
        return name
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache("openai/clip-vit-large-patch14", "config.json")
    weights = try_to_load_from_cache("openai/clip-vit-large-patch14", "model.safetensors")
    return str(Path(config).parent) if isinstance(config, str) and isinstance(weights, str) else None


def load_clip(folder: str) -> CLIPScore:
    """torchmetrics' CLIPScore = max(100 × cosine, 0). Long captions are cut by the tokenizer, which keeps the end token that CLIP reads its
    sentence from; torchmetrics' own cutting loses it."""
    model = TensorCLIP.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device()).eval()
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)

    def process(text: list[str] | None = None, images: list[torch.Tensor] | None = None, **kwargs) -> dict:
        if text is None:
            return processor(images=images, return_tensors="pt")
        return processor(text=text, truncation=True, max_length=model.config.text_config.max_position_embeddings, padding=True, return_tensors="pt")
    return CLIPScore(model_name_or_path=lambda: (model, process)).to(device())


@torch.no_grad()
def clip_score(metric: CLIPScore, images: list[np.ndarray] | np.ndarray, prompts: list[str]) -> float:
    """Mean over pictures uint8 [H, W, 3] and their prompts."""
    metric.reset()
    for start in range(0, len(prompts), BATCH):
        rows = [torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device()) for image in images[start:start + BATCH]]
        metric.update(rows, prompts[start:start + BATCH])
    return float(metric.compute())
