"""TrigFlowScheduler: the deterministic ODE sampler of TrigFlow networks, in the form of a diffusers scheduler.

It samples and evaluates a teacher in TrigFlow form. It is neither a learning-rate schedule nor the source of
training times (those are trigflow.t_from_normal). The few-step student uses the stock SCMScheduler, which adds
fresh noise between steps; both take the same calls, so either fits the pipeline.
"""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from sana_app.model import trigflow


@dataclass
class TrigFlowSchedulerOutput(BaseOutput):
    """prev_sample: x_u, the input of the next step; pred_original_sample: the x0 that this step points to."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class TrigFlowScheduler(SchedulerMixin, ConfigMixin):
    """x_u = cos(t-u) x_t - sin(t-u) sigma_data F, over angles that fall from pi/2 to 0."""

    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, prediction_type: str = "trigflow", sigma_data: float = 0.5):
        if prediction_type != "trigflow":
            raise ValueError(f"prediction_type is {prediction_type!r}, wanted 'trigflow'")
        self.init_noise_sigma = 1.0  # the pipeline multiplies by sigma_data itself, as the stock one does
        self.num_inference_steps: int | None = None
        self.timesteps = torch.tensor(trigflow.ode_timesteps(num_train_timesteps))
        self.step_index: int | None = None
        self.begin_index: int | None = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        timesteps: list[float] | Tensor | None = None,
        device: str | torch.device | None = None,
        max_timesteps: float | None = trigflow.T_MAX,
        intermediate_timesteps: float | None = None,
    ) -> None:
        """num_inference_steps + 1 angles: the given list, [max, intermediate, 0] or evenly spaced from max to 0.

        A max past pi/2 (the 1.57080 that the stock pipeline passes) is taken as pi/2.
        """
        if timesteps is not None:
            times = torch.as_tensor(timesteps, dtype=torch.float64)
            if num_inference_steps not in (None, len(times) - 1):
                raise ValueError(f"{len(times)} timesteps for {num_inference_steps} steps: wanted one more than steps")
            if len(times) < 2 or not (times.diff() < 0).all() or times[0] > trigflow.T_MAX or times[-1] < 0:
                raise ValueError(f"timesteps {times.tolist()}: wanted falling angles within [0, pi/2]")
        elif num_inference_steps is None or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, wanted at least 1, or a list of timesteps")
        else:
            largest = min(trigflow.T_MAX if max_timesteps is None else max_timesteps, trigflow.T_MAX)
            if intermediate_timesteps is None:
                times = torch.linspace(largest, 0, num_inference_steps + 1, dtype=torch.float64)
            elif num_inference_steps == 2:
                times = torch.tensor([largest, intermediate_timesteps, 0], dtype=torch.float64)
            else:
                raise ValueError(f"intermediate_timesteps needs 2 steps, got {num_inference_steps}")
        self.timesteps = times.to(device, torch.float32)
        self.num_inference_steps = len(times) - 1
        self.step_index = self.begin_index = None

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t for x0 and noise of std sigma_data, both [B, C, h, w], at angles [B]."""
        return trigflow.interpolate(original_samples, noise, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> TrigFlowSchedulerOutput | tuple[Tensor, Tensor]:
        """model_output is sigma_data * F, as for SCMScheduler; the generator is accepted and not used."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if self.step_index is None:
            t = torch.as_tensor(timestep, device=self.timesteps.device).flatten()[0]
            nearest = (self.timesteps - t).abs().argmin().item()
            self.step_index = nearest if self.begin_index is None else self.begin_index
        t, u = self.timesteps[self.step_index], self.timesteps[self.step_index + 1]
        self.step_index += 1
        prev_sample = trigflow.ode_step(sample, model_output, t, u, sigma_data=1.0)
        x0 = trigflow.clean_from_F(sample, model_output, t, sigma_data=1.0)
        if not return_dict:
            return prev_sample, x0
        return TrigFlowSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
