"""diffusers' schedulers with steps that are faster or more exact; each class replaces the one of the same name.

diffusers computes the weights of a multistep solver with dozens of one-element tensors a step, which takes longer than
the step itself. Here they are plain numbers; the rest of the algorithm stays diffusers'.

s noise level sigma (noise over signal), h a step in -log s, m predicted clean latents, e predicted noise
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from ldm.process import PARAMETRISATIONS, alpha_at


def _span(start: float, end: float) -> float:
    """The step h from one noise level to another."""
    return math.log(start / end) if end else math.inf


class _Levels:
    """A mix-in that keeps the noise levels of a run as plain numbers."""

    levels: list[float]
    sigmas: Tensor

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        super().set_timesteps(*arguments, **options)  # type: ignore[misc]
        self.levels = self.sigmas.tolist()


class DPMSolverMultistepScheduler(_Levels, diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver++ and its SDE variant (Lu et al. 2022, arXiv 2211.01095), up to the third order.

    diffusers' third-order SDE step has a wrong sign: the weight of the second difference is 1 too small, does not
    vanish with the step size, and the error grows with the number of steps.
    """

    def dpm_solver_first_order_update(self, model_output: Tensor, *, sample: Tensor, noise: Tensor | None) -> Tensor:
        return self._update([model_output], sample, noise)

    def multistep_dpm_solver_second_order_update(
        self, model_output_list: list[Tensor], *, sample: Tensor, noise: Tensor | None
    ) -> Tensor:
        return self._update(model_output_list[-2:], sample, noise)

    def multistep_dpm_solver_third_order_update(
        self, model_output_list: list[Tensor], *, sample: Tensor, noise: Tensor | None
    ) -> Tensor:
        return self._update(model_output_list[-3:], sample, noise)

    def _update(self, m: list[Tensor], sample: Tensor, noise: Tensor | None) -> Tensor:
        """The clean latents as a polynomial of -log s through the last predictions, integrated over the step."""
        i = self.step_index
        start, end = self.levels[i], self.levels[i + 1]
        if start == end:  # a run that ends at the lowest trained level may repeat that level
            return sample
        h = _span(start, end)
        k = h if noise is None else 2 * h  # where new noise is added, the old noise decays twice as fast
        gain = -math.expm1(-k)
        x = (alpha_at(end) / alpha_at(start) * math.exp(-k) * sample).add(m[-1], alpha=alpha_at(end) * gain)
        if len(m) > 1:
            h1 = _span(self.levels[i - 1], start)
            slope = (m[-1] - m[-2]) * (h / h1)
            if len(m) > 2:
                h2 = _span(self.levels[i - 2], self.levels[i - 1])
                bend = slope.sub(m[-2] - m[-3], alpha=h / h2) * (h / (h1 + h2))
                slope = slope.add(bend, alpha=h1 / h)
                x = x.add(bend, alpha=alpha_at(end) * ((gain - k) / k**2 + 0.5))
            midpoint = len(m) == 2 and self.config.solver_type == "midpoint"
            x = x.add(slope, alpha=alpha_at(end) * (gain / 2 if midpoint else 1 - gain / k))
        return x if noise is None else x.add(noise, alpha=end * alpha_at(end) * math.sqrt(gain))


class DPMSolverSinglestepScheduler(_Levels, diffusers.DPMSolverSinglestepScheduler):
    """DPM-Solver++ with an intermediate step, whose noise, in the SDE variant, is part of the noise of the whole step.

    In diffusers the two are independent: the intermediate latents lie on another path than the step's result, and the
    order is one instead of two.
    """

    noise: Tensor  # of the intermediate step

    def dpm_solver_first_order_update(self, model_output: Tensor, *, sample: Tensor, noise: Tensor | None) -> Tensor:
        if noise is not None:
            self.noise = noise
        return super().dpm_solver_first_order_update(model_output, sample=sample, noise=noise)

    def singlestep_dpm_solver_second_order_update(
        self, model_output_list: list[Tensor], *, sample: Tensor, noise: Tensor | None
    ) -> Tensor:
        if noise is not None:
            start, middle, end = self.levels[self.step_index - 1 : self.step_index + 2]
            share = (end / middle) ** 2 * math.expm1(-2 * _span(start, middle)) / math.expm1(-2 * _span(start, end))
            noise = math.sqrt(share) * self.noise + math.sqrt(1 - share) * noise
        return super().singlestep_dpm_solver_second_order_update(model_output_list, sample=sample, noise=noise)


class UniPCMultistepScheduler(_Levels, diffusers.UniPCMultistepScheduler):
    """UniPC (Zhao et al. 2023, arXiv 2302.04867): a predictor, and a corrector that uses the next prediction."""

    def multistep_uni_p_bh_update(self, model_output: Tensor, *, sample: Tensor, order: int) -> Tensor:
        if self.solver_p or not self.predict_x0:
            return super().multistep_uni_p_bh_update(model_output, sample=sample, order=order)
        return self._update(self.step_index, sample, order, None)

    def multistep_uni_c_bh_update(
        self, this_model_output: Tensor, *, last_sample: Tensor, this_sample: Tensor, order: int
    ) -> Tensor:
        if not self.predict_x0:
            return super().multistep_uni_c_bh_update(
                this_model_output, last_sample=last_sample, this_sample=this_sample, order=order
            )
        return self._update(self.step_index - 1, last_sample, order, this_model_output)

    def _update(self, i: int, sample: Tensor, order: int, new: Tensor | None) -> Tensor:
        """From level i to the next; with `new`, the prediction at the next level, the corrected step."""
        start, end = self.levels[i], self.levels[i + 1]
        if start == end:  # the lowest trained level, repeated
            return sample
        h = _span(start, end)
        points = [-_span(self.levels[i - j], start) / h for j in range(1, order)]
        others = self.model_outputs[-2 : -1 - order : -1]  # the predictions at these points
        if new is not None:
            points, others = [*points, 1.0], [*others, new]
        change = math.expm1(-h)
        scale = -h if self.config.solver_type == "bh1" else change
        shares = _unipc_shares(points, h, scale)
        weights = [-alpha_at(end) * scale * share / point for share, point in zip(shares, points, strict=True)]
        x = end * alpha_at(end) / (start * alpha_at(start)) * sample
        x = x.add(self.model_outputs[-1], alpha=-alpha_at(end) * change - sum(weights))
        for other, weight in zip(others, weights, strict=True):
            x = x.add(other, alpha=weight)
        return x.to(sample.dtype)


def _unipc_shares(points: list[float], h: float, scale: float) -> list[float]:
    """Weights of the slopes to the predictions at `points`, in steps h from the start."""
    if len(points) < 2:
        return [0.5] * len(points)  # the paper's choice, which keeps the order
    shares, phi, factorial = [], math.expm1(-h) / -h - 1, 1
    for n in range(1, len(points) + 1):
        shares.append(phi * factorial / scale)
        factorial *= n + 1
        phi = phi / -h - 1 / factorial
    # the weights solve a Vandermonde system of the points (Björck and Pereyra 1970)
    last = len(points) - 1
    for k in range(last):
        for j in range(last, k, -1):
            shares[j] -= points[k] * shares[j - 1]
    for k in range(last - 1, -1, -1):
        for j in range(k + 1, last + 1):
            shares[j] /= points[j] - points[j - k - 1]
        for j in range(k, last):
            shares[j] -= shares[j + 1]
    return shares


class DEISMultistepScheduler(_Levels, diffusers.DEISMultistepScheduler):
    """DEIS (Zhang and Chen 2022, arXiv 2204.13902), with polynomials in log ρ = log s, up to the third order.

    With "karras", "exponential" or "beta" levels, diffusers' last step has length 0; here it goes to noise level 0.
    """

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        super().set_timesteps(*arguments, **options)
        if self.levels[-1] == self.levels[-2]:
            self.sigmas[-1] = self.levels[-1] = 0.0

    def deis_first_order_update(self, model_output: Tensor, *, sample: Tensor) -> Tensor:
        return self._update([model_output], sample)

    def multistep_deis_second_order_update(self, model_output_list: list[Tensor], *, sample: Tensor) -> Tensor:
        return self._update(model_output_list[-2:], sample)

    def multistep_deis_third_order_update(self, model_output_list: list[Tensor], *, sample: Tensor) -> Tensor:
        return self._update(model_output_list[-3:], sample)

    def _update(self, e: list[Tensor], sample: Tensor) -> Tensor:
        """The noise as a polynomial of log s through the last predictions, integrated over s."""
        i = self.step_index
        start, end = self.levels[i], self.levels[i + 1]
        if not end:
            e = e[-1:]  # log 0 is infinite: the last step is of first order
        v = -_span(start, end)
        total = (end - start) * e[-1]  # the integral of v^n e^v from 0 is `moment`, times the level at the start
        if len(e) > 1:
            h1 = _span(self.levels[i - 1], start)
            moment = v * end - (end - start)
            slope = (e[-1] - e[-2]) / -h1
            total = total + moment * slope
            if len(e) > 2:
                h2 = _span(self.levels[i - 2], self.levels[i - 1])
                bend = (slope - (e[-2] - e[-3]) / -h2) / -(h1 + h2)
                total = total + (v**2 * end - 2 * moment - h1 * moment) * bend
        return alpha_at(end) * (sample / alpha_at(start) + total)


class LMSDiscreteScheduler(_Levels, diffusers.LMSDiscreteScheduler):
    """Linear multistep (Adams-Bashforth in s).

    Its weights are integrals of polynomials of degree 3 at most, for which two Gauss points are exact; diffusers'
    adaptive quadrature takes 2 ms a step.
    """

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        s = self.levels
        middle, half = (s[t + 1] + s[t]) / 2, (s[t + 1] - s[t]) / 2
        total = 0.0
        for point in (middle - half / math.sqrt(3), middle + half / math.sqrt(3)):
            product = 1.0
            for k in range(order):
                if k != current_order:
                    product *= (point - s[t - k]) / (s[t - current_order] - s[t - k])
            total += product
        return total * half


class _Interpolated:
    """A mix-in that finds the timestep of a noise level by bisection.

    diffusers compares the level with all levels of training, for a thousand of them when a scheduler is made.
    """

    def _sigma_to_t(self, sigma: Any, log_sigmas: Any) -> Any:
        return np.interp(math.log(max(float(sigma), 1e-10)), log_sigmas, np.arange(len(log_sigmas)))


class KDPM2DiscreteScheduler(_Interpolated, diffusers.KDPM2DiscreteScheduler):
    """DPM-Solver-2 in its second-order form of Karras et al. 2022 (arXiv 2206.00364), algorithm 2."""


class KDPM2AncestralDiscreteScheduler(_Interpolated, diffusers.KDPM2AncestralDiscreteScheduler):
    """The same with ancestral steps."""


class _Following:
    """A mix-in whose steps end at the timestep where the next one begins.

    In diffusers, steps of DDIM and PNDM end train_steps // steps timesteps earlier, where the model is called next only
    with "leading" spacing; with others the error does not vanish with more steps.
    """

    config: Any
    timesteps: Tensor
    num_inference_steps: int | Fraction | None
    following: dict[int, int]  # timestep -> the next one; -1: the clean latents

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None
    ) -> None:
        super().set_timesteps(num_inference_steps if timesteps is None else len(timesteps), device=device)  # type: ignore[misc]
        if timesteps is not None:
            self.timesteps = torch.tensor(timesteps, device=device)
        times = list(dict.fromkeys(self.timesteps.tolist()))
        self.following = dict(zip(times, [*times[1:], -1], strict=True))

    def set_length(self, timestep: int) -> None:
        """Set diffusers' number of steps so that its step length is that of the step from this timestep."""
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, timestep - self.following[timestep])


class DDIMScheduler(_Following, diffusers.DDIMScheduler):
    """DDIM (Song et al. 2020, arXiv 2010.02502)."""

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        generator: Any = None,
        **options: Any,
    ) -> Any:
        self.set_length(int(timestep))
        return super().step(model_output, timestep, sample, eta=eta, generator=generator, **options)


class PNDMScheduler(_Following, diffusers.PNDMScheduler):
    """PLMS (Liu et al. 2022, arXiv 2202.09778), which takes its first step twice.

    It averages the predicted noise of several steps. diffusers averages the model's predictions and converts the
    average to noise, which with v-prediction is of the first order only.
    """

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        bar = float(self.alphas_cumprod[timestep])
        parametrisation = PARAMETRISATIONS[self.config.prediction_type]
        model_output = parametrisation.to_noise(model_output, sample, bar**0.5, (1 - bar) ** 0.5)
        start = int(timestep)
        if self.counter == 1:
            start = next(before for before, after in self.following.items() if after == start)
        self.set_length(start)
        return super().step(model_output, timestep, sample, **options)

    def _get_prev_sample(self, sample: Tensor, timestep: Any, prev_timestep: Any, model_output: Tensor) -> Tensor:
        """A step of DDIM with `model_output`, predicted noise."""
        bar = float(self.alphas_cumprod[timestep])
        end = float(self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else self.final_alpha_cumprod)
        latents = (sample - (1 - bar) ** 0.5 * model_output) / bar**0.5
        return end**0.5 * latents + (1 - end) ** 0.5 * model_output
