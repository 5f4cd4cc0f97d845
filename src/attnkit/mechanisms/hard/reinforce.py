"""What REINFORCE needs of a drawn choice, its log-probability and the entropy, and the loss made of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnkit import shapes


def log_prob_and_entropy(scores: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of ``choice`` ``(b, h, m)`` under the softmax of scores ``(b, h, m, n)``, and its entropy.

    Hidden keys have a score of -inf; a row that sees nothing has 0 and 0, and no gradient.
    """
    empty = scores.detach().amax(-1) == -torch.inf
    logs = scores.masked_fill(empty[..., None], 0.0).log_softmax(-1)
    # 0 log 0 is 0, be the 0 that of a hidden key or an underflow.
    entropy = -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(-1)
    log_prob = logs.gather(-1, choice[..., None])[..., 0]
    return log_prob.masked_fill(empty, 0.0), entropy.masked_fill(empty, 0.0)


class ReinforceLoss(nn.Module):
    """The loss whose gradient is the REINFORCE estimate for drawn choices: add it to the loss of the task.

    ``-mean over the batch of [weight * (reward - baseline) * sum log_prob + entropy_weight * sum entropy]``, in which
    neither reward nor baseline has a gradient. The baseline is that of the calls before; in training mode it then
    becomes ``decay * baseline + (1 - decay) * mean reward``. It starts at 0 and is saved with the module.

    Source: Xu et al. 2015, arXiv 1502.03044.
    """

    baseline: Tensor

    def __init__(self, *, weight: float = 1.0, entropy_weight: float = 0.002, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"ReinforceLoss: decay is {decay}, expected 0 <= decay < 1")
        self.weight, self.entropy_weight, self.decay = weight, entropy_weight, decay
        self.register_buffer("baseline", torch.zeros(()))

    def forward(self, reward: Tensor, log_prob: Tensor, entropy: Tensor) -> Tensor:
        """The loss, a number.

        Parameters
        ----------
        reward: (b,), what a whole sequence earned, such as its log-likelihood, or (b, m), what each choice led to: the
            sum of all rewards from its step on.
        log_prob, entropy: (b, h, m), as ``hard_attention(..., kind="sample", return_log_prob=True)`` gives; those of
            several layers joined along ``h``.
        """
        where = "ReinforceLoss"
        shapes.check(where, log_prob=(log_prob, "b h m"), entropy=(entropy, "b h m"))
        pattern = "b m" if isinstance(reward, Tensor) and reward.dim() == 2 else "b"
        shapes.check(where, log_prob=(log_prob, "b h m"), reward=(reward, pattern))
        reward = reward.detach().to(log_prob.dtype)
        advantage = (reward - self.baseline).reshape(len(reward), 1, -1)
        if self.training:
            self.baseline.lerp_(reward.mean().to(self.baseline.dtype), 1 - self.decay)
        gain = self.weight * advantage * log_prob + self.entropy_weight * entropy
        return -gain.flatten(1).sum(1).mean()
