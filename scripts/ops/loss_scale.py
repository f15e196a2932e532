"""The factor on a float16 loss, as torch.amp.GradScaler has it."""

import torch


class LossScale:
    """Factor on a float16 loss (1710.03740): halved on overflow, doubled after 2000 good steps."""

    def __init__(self, dtype, device):
        self.active = dtype == torch.float16
        self.value = torch.tensor(2.0**16 if self.active else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, skip):
        if self.active:
            torch._amp_update_scale_(self.value, self.good_steps, skip, 2.0, 0.5, 2000)

    def tensors(self):
        return {"value": self.value, "good_steps": self.good_steps}
