"""Layers of a trunk called in turn do what the model's own forward does, bit for bit."""

import pytest
import torch

from sjd2_lightning.masks import Visible
from sjd2_lightning.models.backbone import Trunk
from sjd2_lightning.models.registry import FAMILIES, build_shrunken
from sjd2_lightning.models.trunk import EagerTrunk


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.inference_mode()
def test_layers_in_turn_are_the_forward_of_the_model(family):
    backbone = build_shrunken(family, seed=1).eval()
    width = backbone.embed_tokens(torch.tensor([0])).shape[-1]
    embeddings = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(2))
    columns, first = torch.arange(9).expand(2, 9), torch.tensor([0, 2])
    num_axes = len(getattr(backbone.layout(64, 64), "axes", ()) or ())
    found = []
    for trunk in (EagerTrunk(backbone), Trunk(backbone, compiled=False)):
        cache = backbone.new_cache(2, 16)
        hidden = []
        for part in (slice(0, 5), slice(5, 9)):
            visible = Visible(first, columns[:, part] + 1, columns[:, part], columns[:, part], None)
            cache.place(columns[:, part], part.stop)
            positions = (columns[:, part] - first[:, None]).clamp_min(0)
            if num_axes:
                positions = positions.expand(num_axes, -1, -1)
            hidden.append(trunk.run(embeddings[:, part], positions, visible, cache))
        found.append(torch.cat(hidden, 1))
    assert found[0].equal(found[1])
    assert found[0].std() > 0
