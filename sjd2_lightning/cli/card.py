"""The card beside exported weights, README.md as the hub shows it: what they are, how to use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sjd2_lightning.config.runs import TrainConfig

_KEPT = (
    "What was trained is an adapter that acts on noisy tokens alone, so the images are those of the base by "
    "the same seeds, in fewer passes."
)


@dataclass(frozen=True)
class Card:
    """What a training knows of the weights that it made.

    Attributes:
        base: what they were trained from: a release's name on the hub, or a folder's.
        base_hub_id: its name on the hub; None where it has none.
        family: adapter of the model.
        image_size: height and width of its images in pixels.
        is_noisy: whether training showed noisy codes.
        steps: steps of the optimizer.
        data: name of the data set.
        attribution: licence line of the pictures; "" where none is known.
        recipe: keys of train.py that made the weights, with their values.
        noisy_only: whether the base's weights are as they were, under an adapter that acts on noisy tokens.
    """

    base: str
    base_hub_id: str | None
    family: str
    image_size: tuple[int, int]
    is_noisy: bool
    steps: int
    data: str
    attribution: str
    recipe: dict[str, str] = field(default_factory=dict)
    noisy_only: bool = False

    @classmethod
    def of(cls, config: TrainConfig, steps: int, attribution: str, noisy_only: bool = False) -> Card:
        """The card of a training that ends.

        Args:
            config: the training.
            steps: steps of the optimizer that were taken.
            attribution: licence line of the pictures; "" where none is known.
            noisy_only: whether the model's adapter acts on noisy tokens alone.
        """
        model, trainer = config.model, config.trainer
        recipe = {
            "data.batch_size": config.data.batch_size,
            "trainer.devices": trainer.devices,
            "trainer.num_nodes": trainer.num_nodes,
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
            "trainer.precision": trainer.precision,
            "optimizer.lr": config.optimizer.lr,
            "model.peft": model.peft,
            **({} if model.peft is None else {"model.lora.noisy_only": model.lora.noisy_only}),
            "model.dtype": model.dtype,
            "seed": config.seed,
        }
        is_release = not model.random_name and model.hub_id is not None
        return cls(
            model.random_name or model.hub_id or model.path,
            model.hub_id if is_release else None,
            model.family,
            model.image_size,
            config.noise.enabled,
            steps,
            Path(config.data.data_dir).name,
            attribution,
            {key: str(value) for key, value in recipe.items()},
            noisy_only,
        )

    def text(self, place: str, measured: str = "", licence: str = "", is_adapter: bool = False) -> str:
        """README.md.

        Args:
            place: folder of the weights, or their name on the hub.
            measured: Markdown of what was measured; "" says that nothing was.
            licence: identifier of a licence, as the hub knows them; "" says that the base's holds.
            is_adapter: whether an adapter lies there, and not whole weights.
        """
        height, width = self.image_size
        noisy = "with noisy codes, for Speculative Jacobi-Denoising Decoding (SJD2)"
        recipe = [f"- `{key}={value}`" for key, value in self.recipe.items()]
        held = f"Licence: that of the base, {self.base}, holds for these weights too."
        lines = [
            *self._front_matter(licence, is_adapter),
            f"# {self.base}, fine-tuned",
            "",
            f"Fine-tuned {noisy if self.is_noisy else 'plainly'}: {self.steps} steps on `{self.data}`.",
            f"Images of {width} x {height} pixels{'; a low-rank adapter' if is_adapter else ''}.",
            *([_KEPT] if self.noisy_only else []),
            "",
            "```python",
            "from sjd2_lightning import Pipeline",
            "",
            f'pipeline = Pipeline.load("{place}")',
            'drawn = pipeline("a prompt", seed=7)',
            'drawn.images[0].save("picture.png")',
            "```",
            "",
            "`settings.json` holds the size, the sampling and the noise of training: "
            f"`sjd2 evaluate weights={place}` and the model of this family, `model=`, need nothing else.",
            "",
            "## What was measured",
            "",
            measured or "Nothing yet: `sjd2 evaluate` measures, and `sjd2 publish --report` puts it here.",
            "",
            "## How it was made",
            "",
            f"From {self.base}, by `sjd2 train` with",
            "",
            *recipe,
            "",
            f"{held}{f' These are given under {licence}.' if licence else ''}",
            *([f"Pictures: {self.attribution}"] if self.attribution else []),
        ]
        return "\n".join(lines) + "\n"

    def _front_matter(self, licence: str, is_adapter: bool) -> list[str]:
        base = [f"base_model: {self.base_hub_id}"] if self.base_hub_id else []
        kind = ["base_model_relation: adapter" if is_adapter else "base_model_relation: finetune"]
        return [
            "---",
            "library_name: sjd2_lightning",
            "pipeline_tag: text-to-image",
            f"tags: [sjd2, autoregressive, {self.family}]",
            *([f"license: {licence}"] if licence else []),
            *([*base, *kind] if base else []),
            "---",
        ]
