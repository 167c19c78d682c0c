"""A new objective: in each module, images of one class come together (InfoPro's contrastive loss, Wang et al., ICLR 2021).

    LocalTrainer(model, objective=Contrastive(), decoder=Projection)

The loss compares the samples of a part with one another, so it is not the same in parts: leave micro_batch at None.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.objectives import Objective


class Projection(nn.Module):
    def __init__(self, source, target, reconstruction, normalize_target):
        super().__init__()
        self.source, self.target = source, target
        self.layers = nn.Sequential(nn.Linear(source.channels, 128), nn.ReLU(), nn.Linear(128, 128))

    def forward(self, h: Tensor) -> Tensor:
        return F.normalize(self.layers(self.source.to_grid(h).mean(dim=(1, 2))).float(), dim=1)


class Contrastive(Objective):
    name = "supervised contrastive"

    def default_weights(self, modules):
        return (1.0,) * (modules - 1), (0.1,) * (modules - 1)  # the classifier only watches

    def target(self, first, image, embedded):
        return embedded  # any but None: the module gets a projection

    def regularizer(self, decoder, features, images, labels):
        z, itself = decoder(features.output), torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        similar = (z @ z.T / 0.07).masked_fill(itself, -1e9).log_softmax(dim=1)
        same = (labels[:, None] == labels[None, :]) & ~itself
        return -((similar * same).sum(dim=1) / same.sum(dim=1).clamp(min=1)).mean()
