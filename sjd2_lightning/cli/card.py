"""The card beside exported weights: what they are, how to use them, how to share them."""

from __future__ import annotations

from sjd2_lightning.config.runs import TrainConfig


def model_card(config: TrainConfig, steps: int, attribution: str) -> str:
    """README.md of an export, as the hub shows it.

    Args:
        config: the training.
        steps: steps of the optimizer that were taken.
        attribution: licence line of the pictures; "" where none is known.
    """
    model, noise = config.model, config.noise
    height, width = model.image_size
    base = model.random_name or (model.hub_id or model.path)
    taught = (
        "with noisy codes, for Speculative Jacobi-Denoising Decoding (SJD2)" if noise.enabled else "plainly"
    )
    lines = [
        "---",
        "library_name: sjd2_lightning",
        "pipeline_tag: text-to-image",
        "tags: [sjd2, autoregressive]",
        "---",
        f"# {base}, fine-tuned",
        "",
        f"Fine-tuned {taught}: {steps} steps of {config.data.batch_size} pictures a device, of "
        f"`{config.data.data_dir}`.",
        f"Images of {width} x {height} pixels. What was measured lies in the run's folder, not here.",
        "",
        "```python",
        "from sjd2_lightning import Pipeline",
        "",
        f'pipeline = Pipeline.load("{config.export_dir}")  # or OWNER/NAME, once it is on the hub',
        'drawn = pipeline("a prompt", seed=7)',
        'drawn.images[0].save("picture.png")',
        "```",
        "",
        f"To share it: `hf upload OWNER/NAME {config.export_dir}`.",
        "",
        f"Licence: that of the base, {base}, holds for these weights too.",
    ]
    if attribution:
        lines.append(f"Pictures: {attribution}")
    return "\n".join(lines) + "\n"
