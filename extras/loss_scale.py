"""The factor of the loss in float16, in which small gradients would be rounded to zero.
It keeps float16 training as good as bfloat16's on GPUs that lack bfloat16, such as a Tesla T4.
Without it: loss.backward(), which is all that bfloat16 and float32 need.
"""

import math

import torch
from tqdm import tqdm


class LossScale:
    """The loss is multiplied by `value` before the backward pass, and the gradients are divided by
    it after it. float16 knows no number between 0 and 6e-8, and none above 65,504.

    The rule is that of torch.amp.GradScaler: begin with 2^16, halve it where a gradient is not
    finite, double it after 2,000 steps in a row that were. A step with a gradient that is not
    finite is computed again, down to a value of 1. In other dtypes the value is 1, for good."""

    FIRST = 2.0**16
    STEPS_TO_DOUBLE = 2000

    def __init__(self, model, dtype):
        self.is_used = dtype == torch.float16
        self.value = self.FIRST if self.is_used else 1.0
        self.good_steps = 0  # in a row, at this value
        if self.is_used:
            # DLS compares the gradients of the norms. In float16 they would be rounded to zero
            # when they are divided by the value.
            for layer in model.model.layers:
                layer.input_layernorm.float()
                layer.post_attention_layernorm.float()

    @torch.no_grad()
    def unscale(self, model, loss, step):
        """Divide the gradients by the value. Returns False where the gradients of step `step` have
        to be computed again: they are gone then, and the value is half of what it was."""
        if not self.is_used or not math.isfinite(loss):  # the loss itself does not depend on it
            return True
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        largest = torch.stack([gradient.abs().max() for gradient in gradients]).max()
        if not largest.isfinite() and self.value > 1:
            self.value /= 2
            self.good_steps = 0
            model.zero_grad(set_to_none=True)
            tqdm.write(
                f"step {step:5}  a gradient was too large for float16: again, with the loss times "
                f"{self.value:,.0f}"
            )
            return False
        for gradient in gradients:
            gradient.div_(self.value)
        self.good_steps += 1
        if self.good_steps == self.STEPS_TO_DOUBLE:
            self.value *= 2
            self.good_steps = 0
        return True
