"""A flow-matching teacher (or its ControlNet) becomes the starting point of a Sprint student."""

import logging
from typing import TypeVar

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from sana_app.model.controlnet import like
from sana_app.model.network import TrigFlowTeacher

__all__ = ["TrigFlowTeacher", "sprint_from_teacher"]
logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=ModelMixin)

TEACHER_TIME, SPRINT_TIME = "time_embed.emb.timestep_embedder.", "time_embed.timestep_embedder."
ADDED = ("time_embed.guidance_embedder.", ".norm_q.", ".norm_k.")


def sprint_from_teacher(teacher: Model, guidance_embeds_scale: float = 0.1) -> Model:
    """Sprint form of a SanaTransformer2DModel or a SanaSprintControlNetModel, all weights of the teacher copied.

    Added, and named in the log: the guidance embedder, and q/k norms (at 1) if the teacher has none. The guidance
    embedder's last layer starts at zero, so that at first the student is its teacher for every guidance scale; the
    first layer does not, because two zero layers in a row have zero gradients for ever.
    """
    # without the marks of defaulted keys (_use_default_values): from_config would put the defaults back over ours
    config = {k: v for k, v in teacher.config.items() if not k.startswith("_")}
    if config["guidance_embeds"]:
        raise ValueError("the model already embeds guidance: it is a Sprint model, not a teacher")
    if 1000 * config["timestep_scale"] != 1:
        raise ValueError(
            f"the teacher's timestep_scale is {config['timestep_scale']}, wanted 0.001: a Sprint model sees times in "
            "[0, 1], and weights trained on 0..1000 do not; fine-tune the teacher with timestep_scale=0.001 first"
        )
    config |= dict(
        guidance_embeds=True, guidance_embeds_scale=guidance_embeds_scale,
        qk_norm=config["qk_norm"] or "rms_norm_across_heads",
    )  # fmt: skip
    student = like(type(teacher).from_config(config), teacher)

    weights = {k.replace(TEACHER_TIME, SPRINT_TIME): v for k, v in teacher.state_dict().items()}
    result = student.load_state_dict(weights, strict=False)
    unexplained = [k for k in result.missing_keys if not any(part in k for part in ADDED)] + result.unexpected_keys
    assert not unexplained, f"no place for, or no weights for, {unexplained}"
    nn.init.zeros_(student.time_embed.guidance_embedder.linear_2.weight)
    nn.init.zeros_(student.time_embed.guidance_embedder.linear_2.bias)
    logger.warning("new weights in the student, not in the teacher: %s", ", ".join(result.missing_keys))
    return student
