"""Segmentation scores the slow way: one image, one object, one slot at a time. Reference for the values and for the clock"""
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score


def loop_scores(true: torch.Tensor, pred: torch.Tensor, n_slots: int) -> dict[str, float]:
    "FG-ARI, ARI, mIoU, mBO (averaged over objects) of label maps `(b,h,w)`"
    fg, everywhere, matched, best = [], [], [], []
    for t, p in zip(true, pred):
        t, p = t.flatten(), p.flatten()
        if (t > 0).any(): fg.append(adjusted_rand_score(t[t > 0].numpy(), p[t > 0].numpy()))
        everywhere.append(adjusted_rand_score(t.numpy(), p.numpy()))
        objects = [i for i in range(1, int(t.max()) + 1) if (t == i).any()]
        overlap = np.zeros((len(objects), n_slots))
        for row, i in enumerate(objects):
            for j in range(n_slots):
                a, b = t == i, p == j
                overlap[row, j] = (a & b).sum() / (a | b).sum().clamp(min=1)
        rows, columns = linear_sum_assignment(overlap, maximize=True)
        iou = np.zeros(len(objects))
        iou[rows] = overlap[rows, columns]
        matched.extend(iou)
        best.extend(overlap.max(1) if objects else [])
    return dict(fg_ari=np.mean(fg), ari=np.mean(everywhere), miou=np.mean(matched), mbo=np.mean(best))
