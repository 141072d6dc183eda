"""Recipes of networks beside the backbone; here are their sizes, which need no framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from sjd2_lightning.data.sources.arithmetic import ProblemSource
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.policy import PolicySizes
from sjd2_lightning.models.tarflow import FlowSizes
from sjd2_lightning.models.thinker import ThinkerSizes, ThoughtSettings
from sjd2_lightning.run.values import Count, Natural, Share, Within, wrong_values

Width = Annotated[int, Within(1, 2**16)]
Part = Annotated[float, Within(0, 1, without="most")]  # a share that leaves something


@dataclass(frozen=True)
class TokenizerRecipe:
    """Sizes of the image tokenizer; the group `tokenizer` of the configuration.

    Attributes:
        num_codes: size of the codebook.
        num_grounds: number of its codes that are colours of the ground.
        side: side of the square that a code covers, in pixels.
    """

    num_codes: Annotated[int, Within(2, 2**20)] = 2048
    num_grounds: Annotated[int, Within(1, 2**20)] = 256
    side: Annotated[int, Within(1, 64)] = 8

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        if self.num_grounds >= self.num_codes:
            found.append(f"num_grounds={self.num_grounds}: must be less than num_codes={self.num_codes}")
        return found


@dataclass(frozen=True)
class ClipRecipe:
    """Sizes of the small CLIP and its regularisation; the group `clip` of the configuration.

    Attributes:
        text_dir: folder of the text tokenizer (PreTrainedTokenizerFast with end, padding, unknown token).
        name: name of the scorer in metrics.
        patch_size: side of a patch in pixels.
        vision_width, vision_layers: size of the image transformer.
        text_width, text_layers: size of the text transformer.
        head_width: width of an attention head, in both.
        embed_dim: size of the common embedding.
        context_length: number of text tokens, the end token included.
        patch_dropout: share of patches a training image loses; it regularises and saves their time.
        text_dropout: share of tokens a training caption loses to the unknown token, so that no single word
            can be learnt by heart.
        warmup_share: share of all steps in which the learning rate rises before its cosine fall.
    """

    text_dir: str = "weights/tiny/text"
    name: str = "TinySceneCLIP"
    patch_size: Width = 16
    vision_width: Width = 128
    vision_layers: Annotated[int, Within(1, 1000)] = 4
    text_width: Width = 128
    text_layers: Annotated[int, Within(1, 1000)] = 2
    head_width: Width = 32
    embed_dim: Width = 128
    context_length: Width = 32
    patch_dropout: Part = 0.5
    text_dropout: Part = 0.2
    warmup_share: Part = 0.05

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        found += [
            f"{name}={getattr(self, name)}: must be a multiple of head_width={self.head_width}"
            for name in ("vision_width", "text_width")
            if self.head_width > 0 and getattr(self, name) % self.head_width
        ]
        return found


@dataclass(frozen=True)
class FlowRecipe:
    """How a TarFlow is trained; the group `tarflow` of the configuration.

    Attributes:
        sizes: sizes of the flow and noise of its pixels.
        clip_dir: folder of the CLIP whose text vectors are its prompts.
        prompt_dropout: share of training prompts that are replaced by the mean vector, for guidance.
        warmup_share: share of all steps in which the learning rate rises before its cosine fall.
    """

    sizes: FlowSizes = field(default_factory=FlowSizes)
    clip_dir: str = "weights/tiny/clip"
    prompt_dropout: Share = 0.1
    warmup_share: Part = 0.05

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        return [*wrong_values(self), *(f"sizes.{line}" for line in self.sizes.problems())]


Weight = Annotated[float, Within(0, 1000)]


@dataclass(frozen=True)
class ThoughtRecipe:
    """How a language model learns to think in latents; the group `pccot` of the configuration.

    Attributes:
        model: the language model.
        thoughts: latents, passes, projection and answer prompt.
        source: problems to learn from.
        teacher_loss: weight of the cross-entropy of explicit steps and answer.
        answer_loss: weight of the cross-entropy of the answer behind latents.
        distillation_loss: weight of the distance of hidden states to the teacher's, in front of the answer.
        step_loss: weight of the cross-entropy of the steps' results at the latents, one token a latent: ours,
            after SIM-CoT (arXiv 2509.20317); 0 leaves the published losses.
        teacher_steps: first training steps, in which explicit steps alone are learnt; 0 for a model that can.
        lora: sizes of an adapter that is trained in place of the language model; None trains all of it.
        warmup_share: share of the steps in which the learning rate rises before its cosine fall.
        num_held_out: held-out problems that validation has answered.
        answer_tokens: tokens of an answer at most, when it is generated.
        chain_tokens: tokens of an explicit chain, answer included, at most.
    """

    model: ThinkerSizes = field(default_factory=ThinkerSizes)
    thoughts: ThoughtSettings = field(default_factory=ThoughtSettings)
    source: ProblemSource = field(default_factory=ProblemSource)
    teacher_loss: Weight = 1.0
    answer_loss: Weight = 1.0
    distillation_loss: Weight = 1.0
    step_loss: Weight = 0.0
    teacher_steps: Natural = 0
    lora: LoraSettings | None = None
    warmup_share: Part = 0.03
    num_held_out: Count = 1000
    answer_tokens: Count = 8
    chain_tokens: Count = 128

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = [f"model.{line}" for line in self.model.problems()]
        found += [f"thoughts.{line}" for line in self.thoughts.problems()]
        found += [f"source.{line}" for line in self.source.problems()]
        found += [] if self.lora is None else [f"lora.{line}" for line in self.lora.problems()]
        return [*wrong_values(self), *found]


@dataclass(frozen=True)
class ChunkRecipe:
    """How a policy of actions is trained; the group `ceed` of the configuration.

    Attributes:
        sizes: sizes of the policy.
        num_demonstrations: demonstrations that it learns from.
        data_seed: which demonstrations.
        teacher: folder of the policy to start from, whose trajectories are followed; None starts from random
            weights.
        max_distance: largest mean distance in bins at which a teacher's chunk replaces the demonstration's;
            the number of bins takes all of the teacher's, -1 none.
        consistency: weight of the consistency loss; 0 is none.
        label_weight: omega, weight of the cross-entropy of labels.
        warmup_share: share of all steps in which the learning rate rises before its cosine fall.
    """

    sizes: PolicySizes = field(default_factory=PolicySizes)
    num_demonstrations: Count = 600
    data_seed: Natural = 0
    teacher: str | None = None
    max_distance: Annotated[float, Within(-1)] = -1
    consistency: Annotated[float, Within(0, 1e6)] = 0.0
    label_weight: Annotated[float, Within(0, 1e6)] = 1.0
    warmup_share: Part = 0.05

    @property
    def needs_teacher(self) -> bool:
        """Whether labels or losses come from a teacher's decodings."""
        return self.max_distance >= 0 or self.consistency > 0

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = [*wrong_values(self), *(f"sizes.{line}" for line in self.sizes.problems())]
        if self.teacher is None and self.needs_teacher:
            asks = "consistency" if self.consistency > 0 else "max_distance"
            found.append(
                f"{asks}={getattr(self, asks):g}: needs a teacher, and teacher=null; train one by "
                "experiment=ceed_teacher, and name its folder"
            )
        if self.teacher is not None and not (Path(self.teacher) / "policy.json").is_file():
            found.append(
                f"teacher={self.teacher}: there is no policy.json; run `sjd2 train experiment=ceed_teacher` "
                "first, with the same seed"
            )
        if self.consistency == 0 and self.label_weight == 0:
            found.append("label_weight=0: without consistency nothing would be learnt; set one above 0")
        return found
