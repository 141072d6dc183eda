"""What a training says: a table without what is the baseline's or the clock's, and no advertisements."""

import logging

from sjd2_lightning.cli.train import shown_metrics
from sjd2_lightning.cli.trainer import quiet_lightning


def test_the_table_leaves_out_the_baseline_and_the_clock():
    metrics = {
        "train/loss": 1.0,
        "start/val/nfe": 1.0,
        "val/nfe": 1.0,
        "val/nfe_ar": 1.0,
        "val/clip_score": 1.0,
        "val/clip_score_ar": 1.0,
        "val/clip_score_minus_ar": 1.0,
        "val/speedup": 1.0,
        "val/speedup_ar": 1.0,
        "val/seconds_per_image": 1.0,
    }
    shown = ["train/loss", "val/clip_score", "val/clip_score_minus_ar", "val/nfe"]
    assert shown_metrics(metrics) == shown


def test_lightning_s_lines_come_without_its_advertisements(caplog):
    quiet_lightning()
    quiet_lightning()  # of the next run of a sweep
    source = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, logger=source.name):
        source.info("💡 Tip: For seamless cloud logging, try installing [litlogger]")
        source.info("`Trainer(limit_val_batches=1)` was configured so 1 batch will be used.")
        source.info("`Trainer.fit` stopped: `max_steps=4` reached.")
    assert [record.getMessage() for record in caplog.records] == [
        "`Trainer.fit` stopped: `max_steps=4` reached."
    ]
