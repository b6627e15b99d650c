"""Where a distillation starts: the frozen flow teacher and the one-step student, each with or without a ControlNet.

    student_controlnet  student_base  base           what is distilled
    true                true          ""             transformer and ControlNet of OUT/controlnet together (the small chain)
    true                false         Sprint folder  a ControlNet teacher (flow_teacher, or OUT/controlnet) onto that finished student
    false               true          teacher folder the text-to-image teacher alone (base, or OUT/teacher): SANA-Sprint itself
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from diffusers import ModelMixin, SCMScheduler

from sana_app.model.attention import use_explicit_softmax
from sana_app.model.controlnet import SanaSprintControlNetModel
from sana_app.model.convert import sprint_from_teacher
from sana_app.model.folder import read_json
from sana_app.model.network import TrigFlowTeacher
from training.base import frozen_dtype, load_part, load_transformer, save_folder, with_base
from training.conditions import check_condition, write_condition
from training.config import Config
from training.loop import device

SHARED_KEYS = ("in_channels", "caption_channels", "patch_size", "num_attention_heads", "attention_head_dim")


def is_sprint(folder: Path) -> bool:
    return bool(read_json(folder / "transformer" / "config.json").get("guidance_embeds"))


def find_folders(config: Config, out: Path) -> tuple[Path, Path | None]:
    """(flow teacher's folder, finished Sprint folder or None). ValueError says which of them is missing."""
    base = Path(with_base(config, out).base) if config.base else None
    sprint = base if base is not None and is_sprint(base) else None
    previous = "controlnet" if config.student_controlnet else "teacher"
    teacher = Path(config.flow_teacher) if config.flow_teacher else base if base is not None and sprint is None else out / previous
    for part in ("transformer", "controlnet")[:1 + config.student_controlnet]:
        if not (teacher / part / "config.json").is_file():
            raise ValueError(f"no flow teacher with {part}/ at {teacher}: run the {previous} stage first, or set flow_teacher to a folder with one")
    if is_sprint(teacher):
        raise ValueError(f"the flow teacher at {teacher} embeds the guidance scale: it is a Sprint model already")
    if sprint is None and not config.student_base:
        raise ValueError("student_base=false trains a ControlNet on a finished student: set base to a Sprint model folder")
    return teacher, sprint


def with_folders(config: Config, out: Path) -> Config:
    """`config` with `vae` and `text_encoder` of the Sprint folder, or of the teacher's. ValueError where its condition is not the teacher's."""
    teacher, sprint = find_folders(config, out)
    if config.student_controlnet:
        check_condition(teacher / "controlnet", config.condition)
    return with_base(dataclasses.replace(config, base=str(sprint or teacher)), out)


def trained_part(config: Config, student: TrigFlowTeacher, average: torch.nn.Module | None = None) -> torch.nn.Module:
    """What of `student` is trained: all of it, or its ControlNet alone; with the `average` of that, the whole student that it makes."""
    if average is None:
        return student if config.student_base else student.controlnet
    return average if config.student_base else TrigFlowTeacher(student.transformer, average)


def start_pair(config: Config, out: Path) -> tuple[TrigFlowTeacher, TrigFlowTeacher]:
    """(frozen teacher, student). The student starts as the Sprint folder's transformer, else as the teacher in Sprint form; its
    ControlNet as the teacher's in Sprint form, which only teachers with times in [0, 1] have, else as a fresh copy of the student."""
    teacher_at, sprint_at = find_folders(config, out)
    teacher = TrigFlowTeacher(load_transformer(teacher_at))
    if config.student_controlnet:
        teacher.controlnet = load_part(teacher_at / "controlnet", SanaSprintControlNetModel)
    transformer = load_transformer(sprint_at) if sprint_at else sprint_from_teacher(teacher.transformer)
    other = [f"{k} {transformer.config[k]}, not {teacher.transformer.config[k]}" for k in SHARED_KEYS if transformer.config[k] != teacher.transformer.config[k]]
    if other:
        raise ValueError(f"the student at {sprint_at} is of another shape than its teacher at {teacher_at}: {'; '.join(other)}")
    student = TrigFlowTeacher(transformer)
    if config.student_controlnet:
        if 1000 * teacher.controlnet.config.timestep_scale == 1:
            student.controlnet = sprint_from_teacher(teacher.controlnet)
        else:
            student.controlnet = SanaSprintControlNetModel.from_transformer(transformer, teacher.controlnet.config.num_layers)
            print(f"the ControlNet at {teacher_at} is of base SANA, whose times are 0..1000: the student's starts as a copy of the student's first "
                  "blocks with its zero layers at zero, not from its weights. A ControlNet trained on a teacher gives it a better start")
    student.requires_grad_(True)
    student.transformer.requires_grad_(config.student_base)
    return teacher.to(frozen_dtype(config)).requires_grad_(False).eval(), student


def weak_teacher(config: Config, out: Path) -> TrigFlowTeacher | None:
    """The frozen weak teacher of autoguidance, which the ControlNet stage left in weak/ beside its result; None without autoguidance."""
    if not config.autoguidance:
        return None
    teacher_at = find_folders(config, out)[0]
    folder = teacher_at / "weak"
    if not (folder / "controlnet" / "config.json").is_file():
        raise ValueError(f"autoguidance={config.autoguidance:g} wants a weak teacher at {folder}: run the controlnet stage with controlnet_weak_share "
                         "above 0, or put an earlier, weaker transformer/ and controlnet/ there")
    transformer_at = folder if (folder / "transformer" / "config.json").is_file() else teacher_at  # it was frozen beneath its ControlNet
    pair = TrigFlowTeacher(load_transformer(transformer_at), load_part(folder / "controlnet", SanaSprintControlNetModel))
    use_explicit_softmax(pair)
    return pair.to(device(), frozen_dtype(config)).requires_grad_(False).eval()


def trained_networks(config: Config, student: TrigFlowTeacher) -> dict[str, ModelMixin]:
    return ({"transformer": student.transformer} if config.student_base else {}) | ({"controlnet": student.controlnet} if student.controlnet is not None else {})


def save_jump(config: Config, out: Path, average: TrigFlowTeacher) -> None:
    """Writes OUT/jump: what the jump stage trained."""
    save_folder(out / "jump", trained_networks(config, average))
    if config.student_controlnet:
        write_condition(out / "jump" / "controlnet", config.condition)


def load_jump(config: Config, out: Path, student: TrigFlowTeacher) -> None:
    """Puts the weights of OUT/jump into `student`, where the recipe has a jump stage. ValueError where that has not been run."""
    for name, network in trained_networks(config, student).items() if config.jump_paths else ():
        if not (out / "jump" / name / "config.json").is_file():
            raise ValueError(f"no {name} at {out / 'jump'}: run the jump stage first, or set jump_paths=0 to start as the teacher")
        if name == "controlnet":
            check_condition(out / "jump" / name, config.condition)
        network.load_state_dict(load_part(out / "jump" / name, type(network)).state_dict())


def save_student(config: Config, out: Path, average: TrigFlowTeacher) -> None:
    """Writes OUT/student: what was trained, beside the other parts of the Sprint folder or of the teacher's: if that is a whole model
    folder, so is this, for the app and for the stock SanaSprintPipeline."""
    teacher_at, sprint_at = find_folders(config, out)
    networks, index = trained_networks(config, average), {}
    if sprint_at is None and (teacher_at / "model_index.json").exists():
        networks["scheduler"] = SCMScheduler()
        index = {"_class_name": "SanaSprintPipeline", "scheduler": ["diffusers", "SCMScheduler"]}
    save_folder(out / "student", networks, sprint_at or teacher_at, drop=("controlnet",), index=index)
    if config.student_controlnet:
        write_condition(out / "student" / "controlnet", config.condition)
