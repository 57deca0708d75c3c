"""Losses on logits.

Shapes: B images, K classes or experts. Labels are classes (B,), or, of mixed images, the share of
each class (B, K).
"""

import torch.nn.functional as F
from torch import Tensor

from moe.routing import at_least_float32

TINY = 1e-12  # keeps the ratio of equal logits finite


def kl_per_image(p_BK: Tensor, q_BK: Tensor) -> Tensor:
    """``KL(softmax p || softmax q)`` in nats, (B,) from logits (B, K) or (B, L, K).

    Computed in log space in float32 or better, so that it stays finite where probabilities
    underflow. Several layers' scores (B, L, K) are averaged over L.
    """
    log_p = F.log_softmax(p_BK.float() if p_BK.element_size() < 4 else p_BK, -1)
    log_q = F.log_softmax(q_BK.float() if q_BK.element_size() < 4 else q_BK, -1)
    per_row = (log_p.exp() * (log_p - log_q)).sum(-1)
    return per_row.flatten(1).mean(1) if per_row.dim() > 1 else per_row


def kl(p_BK: Tensor, q_BK: Tensor) -> Tensor:
    """Mean over the batch of ``kl_per_image``."""
    return kl_per_image(p_BK, q_BK).mean()


def cross_entropy_per_image(logits_BK: Tensor, y_B: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats, (B,); for (B, L, K) the mean over L, every layer with target y.

    ``smoothing`` is the part of a label that is spread evenly over all K classes (Szegedy et al.,
    CVPR 2016, arXiv:1512.00567, section 7); of logits (B, K) only.
    """
    if logits_BK.dim() == 2:
        if y_B.is_floating_point():  # shares (B, K) lose digits in bf16
            logits_BK = at_least_float32(logits_BK)
            y_B = y_B.to(logits_BK.dtype)
        return F.cross_entropy(logits_BK, y_B, reduction="none", label_smoothing=smoothing)
    y_BL = y_B[:, None].expand(logits_BK.shape[:2]) if y_B.dim() == 1 else y_B
    return F.cross_entropy(logits_BK.movedim(2, 1), y_BL, reduction="none").mean(1)


def dominant(y_B: Tensor) -> Tensor:
    """Classes (B,) of labels: of shares (B, K) the largest, ties to the lowest class."""
    return y_B.argmax(1) if y_B.is_floating_point() else y_B


def margin_per_image(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """``max_{k != y} z_k - z_y``, (B,): positive where the image is misclassified.

    The loss of Carlini and Wagner, S&P 2017 (arXiv:1608.04644), eq. 6 without its constant.
    """
    own_B = logits_BK.gather(1, y_B[:, None]).squeeze(1)
    others_BK = logits_BK.scatter(1, y_B[:, None], float("-inf"))
    return others_BK.amax(1) - own_B


def dlr_per_image(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Difference of logits ratio ``(max_{k != y} z_k - z_y) / (z_(1) - z_(3))``, (B,).

    ``z_(1) >= z_(2) >= ...`` are the sorted logits: the margin in units that no scale of the
    logits changes (Croce and Hein, ICML 2020, arXiv:2003.01690, eq. 6). Two classes have no third
    logit: then it is the margin.
    """
    margin_B = margin_per_image(logits_BK, y_B)
    if logits_BK.shape[1] < 3:
        return margin_B
    top_B3 = logits_BK.topk(3).values
    return margin_B / (top_B3[:, 0] - top_B3[:, 2] + TINY)


def dlr_targeted_per_image(logits_BK: Tensor, y_B: Tensor, target_B: Tensor) -> Tensor:
    """``(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)``, (B,), positive where t is ahead of y.

    Croce and Hein, ICML 2020 (arXiv:2003.01690), eq. 7. With fewer than four classes it is the
    numerator: a denominator of three logits makes the ratio -1 wherever t is last and y first,
    and an attack stands still.
    """
    lead_B = (logits_BK.gather(1, target_B[:, None]) - logits_BK.gather(1, y_B[:, None])).squeeze(1)
    if logits_BK.shape[1] < 4:
        return lead_B
    top_B4 = logits_BK.topk(4).values
    return lead_B / (top_B4[:, 0] - (top_B4[:, 2] + top_B4[:, 3]) / 2 + TINY)
