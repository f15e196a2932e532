"""Group Relative Policy Optimization as formulas: advantages, weights, the clipped loss, pass@k.

P prompts have G answers each, a group (arXiv 2402.03300). A reward that is nan is that of an answer
which cannot be judged: it has no part in its group's mean, and its tokens weigh nothing.
"""

import math

import torch
from torch import Tensor

EPSILON = 1e-4  # added to the standard deviation of a group

########################################
#              Advantages              #
########################################


def centered(rewards_PG: Tensor) -> Tensor:
    """Rewards minus the mean of their group, (P, G): Dr. GRPO, arXiv 2503.20783; 0 for nan.

    Where all rewards of a group are equal these are zeros, whatever rounding does to their mean.
    """
    scored = ~rewards_PG.isnan()
    known = rewards_PG.nan_to_num()
    count = scored.sum(1, keepdim=True).clamp(min=1)
    difference = known - known.sum(1, keepdim=True) / count
    return difference.masked_fill(~scored | ~has_signal(rewards_PG)[:, None], 0)


def over_group_sd(rewards_PG: Tensor) -> Tensor:
    """`centered` over the unbiased standard deviation of the group, arXiv 2402.03300."""
    difference = centered(rewards_PG)
    degrees = (~rewards_PG.isnan()).sum(1, keepdim=True) - 1
    sd = (difference.square().sum(1, keepdim=True) / degrees.clamp(min=1)).sqrt()
    return difference / (sd + EPSILON)


ADVANTAGES = {"group": over_group_sd, "centered": centered}


def has_signal(rewards_PG: Tensor) -> Tensor:
    """(P,) whether a group has two different rewards: else nothing is learned from it."""
    highest = rewards_PG.nan_to_num(-math.inf).amax(1)
    lowest = rewards_PG.nan_to_num(math.inf).amin(1)
    return highest > lowest


########################################
#                Losses                #
########################################

# The weight (P, G) of each token of an answer in the loss of a step, from the numbers of tokens
# (P, G), 0 for answers that have no part, and the most tokens of an answer. These are sums over the
# whole step, so that neither micro-batches nor ranks change a gradient.


def mean_over_tokens(lengths_PG: Tensor, most: int) -> Tensor:
    """One over all tokens of the step: DAPO, arXiv 2503.14476."""
    return over(has_part(lengths_PG), lengths_PG.sum())


def mean_over_answers(lengths_PG: Tensor, most: int) -> Tensor:
    """The mean over answers of the mean over their tokens: GRPO, arXiv 2402.03300."""
    return over(over(1.0, lengths_PG), has_part(lengths_PG).sum())


def mean_over_groups(lengths_PG: Tensor, most: int) -> Tensor:
    """The mean over groups of the mean over their tokens: TRL's bnpo, where a micro-batch is a
    group."""
    of_groups = lengths_PG.sum(1, keepdim=True)
    return over(over(has_part(lengths_PG), of_groups), has_part(of_groups).sum())


def over_most_tokens(lengths_PG: Tensor, most: int) -> Tensor:
    """One over the answers and the most tokens one could have: Dr. GRPO, arXiv 2503.20783."""
    return over(has_part(lengths_PG), has_part(lengths_PG).sum() * most)


LOSSES = {
    "dapo": mean_over_tokens,
    "grpo": mean_over_answers,
    "dr_grpo": over_most_tokens,
    "bnpo": mean_over_groups,
}


def has_part(lengths: Tensor) -> Tensor:
    """1 for what has tokens that count, else 0, in float64."""
    return (lengths > 0).double()


def over(numerator: float | Tensor, counts: Tensor) -> Tensor:
    """numerator / counts in float64, 0 where the count is 0."""
    return torch.where(counts > 0, numerator / counts.double().clamp(min=1), 0.0)


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """The clipped loss of each token, and whether it was clipped, (n,) each; arXiv 1707.06347.

    logp is of the policy that learns, old_logp of the one that drew the token; the ratio of their
    probabilities counts between 1 - low and 1 + high where it would gain by leaving this range.
    """
    ratio = (logp - old_logp).exp()
    plain = ratio * advantage
    clipped = ratio.clamp(1 - low, 1 + high) * advantage
    return -torch.minimum(plain, clipped), clipped < plain


def kl_estimate(logp: Tensor, start_logp: Tensor) -> Tensor:
    """Of each token (n,) an estimate of the divergence from the policy of the start, 0 or more.

    Its mean over tokens that the policy draws is the KL divergence: joschu.net/blog/kl-approx, k3.
    """
    log_ratio = start_logp - logp
    return log_ratio.exp() - log_ratio - 1


########################################
#               Figures                #
########################################


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k of the samples is right, without bias; arXiv 2107.03374."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def wilson(rate: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of Wilson of a rate that was found among n; (nan, nan) for none."""
    if n == 0:
        return math.nan, math.nan
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
