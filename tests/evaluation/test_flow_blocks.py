"""Figures of blocks, by hand; and the fastest schedule."""

import torch

from sjd2_lightning.evaluation.flow_blocks import block_figures, fastest_schedules
from sjd2_lightning.fixed_point import Schedule
from sjd2_lightning.models.tarflow import TarFlow
from tests.models.test_tarflow import SIZES, flow, some


def test_a_block_that_does_nothing_is_at_its_end_after_one_pass():
    pixels, text = some(4)
    first = block_figures(TarFlow(SIZES), pixels, text)[0]
    assert first.one_pass == first.igm_given == first.igm_zero == first.crm == 0


def test_errors_of_two_pictures_cancel_in_the_papers_metric_and_not_in_the_residual():
    pixels, text = some(4)
    found = block_figures(flow(), pixels, text)
    assert [own.block for own in found] == [0, 1, 2]
    assert all(0 < own.igm_given < own.one_pass for own in found)
    model = flow()
    block = model.blocks[0]
    x = model.patches(pixels)
    scale, _ = block.scale_and_shift(0, x[:, :-1], text)
    spread = torch.linalg.svdvals((torch.exp(-scale) * x[:, 1:]).mean(0))[0]
    w_s, w_u = block.out.weight.chunk(2)
    wanted = spread * torch.linalg.svdvals(w_s)[0] + torch.linalg.svdvals(w_u)[0]
    torch.testing.assert_close(torch.tensor(found[0].crm), wanted.detach())


def test_the_fastest_schedule_of_each_block_is_one_of_those_given():
    model, (_, text) = flow(), some()
    z = torch.randn(2, 16, 12)
    schedules = {"ar": Schedule(window=1), "jacobi": Schedule()}
    found = fastest_schedules(model, z, text, schedules, repeats=1)
    assert len(found) == 3
    assert set(found) <= set(schedules)
