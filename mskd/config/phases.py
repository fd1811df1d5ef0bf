"""Phases: what a model is trained on, one after the other. Each objective is a class, each of its terms a field.

phase = MinillmPhase(steps=100, mix_alpha=0.1)          # or OBJECTIVES["minillm"]

Every number is finite and has bounds: beyond them the arithmetic overflows, or the number is a slip of the hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Union, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

MOST = 10**9  # of steps, rows, seconds, ...


def _number(given: Any) -> Any:
    if isinstance(given, bool):  # Python, and so pydantic, takes true for 1
        raise PydanticCustomError("number", "a number is needed, not true or false")
    return given


Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]
Count = Annotated[Whole, Field(ge=1, le=MOST)]  # of steps or rows, and of sequences at most
Sequences = Annotated[Whole, Field(ge=1, le=2**20)]  # of a step or a round, which are lists in memory
Tokens = Annotated[Whole, Field(ge=1, le=2**20)]  # of one sequence; more than any model has positions
Epochs = Annotated[Real, Field(gt=0, le=1e6)]
Share = Annotated[Real, Field(ge=0, le=1)]
TopP = Annotated[Real, Field(gt=0, le=1)]
TopK = Annotated[Whole, Field(ge=0, le=MOST, description="0: off")]
Temperature = Annotated[Real, Field(ge=1e-3, le=1e3)]  # logits are divided by it
Rate = Annotated[Real, Field(gt=0, le=1)]  # of learning
Weight = Annotated[Real, Field(ge=0, le=1e6)]  # of a term of the loss
Moment = Annotated[Real, Field(ge=0, lt=1)]  # what a moment of AdamW keeps at each step

Keep = Literal["last", "best"]
LATER = ("teacher_responses", "adaptive_share", "replay")  # fields that came when there were nodes already


class Frozen(BaseModel):
    """A part of the configuration: checked once, then never changed. No number is inf or NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class PhaseBase(Frozen):
    """Fields that every phase has. Sequences are counted over all processes."""

    steps: Count | None = Field(None, description="optimizer steps; with epochs, whichever comes first; 0: no limit")
    epochs: Epochs | None = Field(None, description="passes over the training prompts; 0: no limit")
    batch_size: Sequences = Field(8, description="sequences in one optimizer step")
    micro_batch_size: Count = Field(8, description="sequences at most in one forward of one process")
    lr: Rate = Field(1e-4, description="learning rate at its highest")
    warmup_steps: Whole = Field(0, ge=0, le=MOST, description="steps in which the learning rate rises from 0")
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="of the learning rate after that")
    weight_decay: Real = Field(1e-6, ge=0, le=1e3, description="of AdamW")
    betas: tuple[Moment, Moment] = Field((0.9, 0.95), description="of AdamW")
    eps: Real = Field(1e-8, ge=1e-30, le=1, description="of AdamW; a float32 must hold it")
    grad_clip: Real = Field(1.0, gt=0, le=1e9, description="greatest norm of a step's gradient; 1e9: as good as off")
    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", description="adamw_8bit: bitsandbytes' 8-bit states")
    keep: Keep = Field("last", description="the weights of the last step, or the best by validation")
    eval_every: Count | None = Field(None, description="steps between validations; needed by keep = 'best'")

    @field_validator("steps", "epochs", mode="before")
    @classmethod
    def _no_limit(cls, given: Any) -> Any:
        return None if given == 0 and not isinstance(given, bool) else given  # TOML has no null

    @model_validator(mode="after")
    def _has_an_end(self) -> PhaseBase:
        if self.steps is None and self.epochs is None:
            raise ValueError("a phase needs steps or epochs; give at least one of them")
        if self.keep == "best" and self.eval_every is None:
            raise ValueError("keep = 'best' needs eval_every, the number of steps between validations")
        return self

    @property
    def needs_responses(self) -> bool:
        """Whether the phase trains or validates on responses of the data."""
        return True

    def identity(self) -> dict[str, Any]:
        """What a node's hash covers. A field that came later is left out while it is off: old nodes stay valid."""
        return {k: v for k, v in self.model_dump().items() if k not in LATER or v is not None}


class TeacherResponses(Frozen):
    """How the teacher answers the training prompts: once, before the phase begins. top_k = 1 is greedy decoding.

    A response that reaches max_new_tokens has no end token.
    """

    max_new_tokens: Tokens = Field(256, description="of a response")
    temperature: Temperature = Field(1.0, description="of the sampling")
    top_p: TopP = Field(1.0, description="sample from the likeliest tokens that have this probability together")
    top_k: TopK = Field(0, description="sample from so many likeliest tokens; 1: greedy, 0: off")
    batch_size: Count = Field(32, description="sequences decoded together by one process")
    data_share: Real = Field(0.0, ge=0, lt=1, description="share of the prompts that keep the data's response")


class SftPhase(PhaseBase):
    """Cross-entropy on the responses of the data."""

    objective: Literal["sft"] = "sft"


class KdPhase(PhaseBase):
    """(1 - kd_ratio) CE + kd_ratio T^2 KL(teacher || student) at temperature T (Hinton et al. 2015).

    On the responses of the data, or with `teacher_responses` on the teacher's.
    """

    objective: Literal["kd"] = "kd"
    kd_ratio: Share = Field(1.0, description="share of the KL term; the rest is cross-entropy")
    temperature: Temperature = Field(1.0, description="of both models in the KL term")
    teacher_responses: TeacherResponses | None = Field(
        None, description="train on responses of the teacher in place of the data's"
    )

    @property
    def needs_responses(self) -> bool:
        return _needs_data(self.teacher_responses, self.eval_every)


class SeqkdPhase(PhaseBase):
    """Cross-entropy on the teacher's responses to the training prompts: sequence-level distillation.

    Kim and Rush, EMNLP 2016, who take the teacher's best answer by beam search; here it is sampled, or with
    teacher_responses.top_k = 1 decoded greedily. Validation is on the data's responses.
    """

    objective: Literal["seqkd"] = "seqkd"
    teacher_responses: TeacherResponses = Field(TeacherResponses(), description="how the teacher answers")

    @property
    def needs_responses(self) -> bool:
        return _needs_data(self.teacher_responses, self.eval_every)


def _needs_data(teacher: TeacherResponses | None, eval_every: int | None) -> bool:
    return teacher is None or teacher.data_share > 0 or eval_every is not None


class OnPolicyPhase(PhaseBase):
    """Fields of the phases that train on the student's own samples, drawn anew each round."""

    rollouts: Sequences | None = Field(
        None, description="sequences of one round, over all processes; default: batch_size, a round each step"
    )
    rollout_batch_size: Count = Field(32, description="sequences decoded together by one process")
    max_new_tokens: Tokens = Field(256, description="of a sampled response")
    top_p: TopP = Field(1.0, description="sample from the likeliest tokens that have this probability together")
    top_k: TopK = Field(0, description="sample from so many likeliest tokens; 0: off")

    @model_validator(mode="after")
    def _whole_batches(self) -> OnPolicyPhase:
        if self.per_round % self.batch_size:
            raise ValueError(f"rollouts ({self.rollouts}) must be a multiple of batch_size ({self.batch_size})")
        return self

    @property
    def per_round(self) -> int:
        """Sequences of one round."""
        return self.rollouts or self.batch_size


class AdaptiveShare(Frozen):
    """The student's share rises when the validation loss has risen: by `step`, up to 1, and never falls.

    It rises after a validation whose loss is at least the reference + `margin`; that loss is then the reference, before
    it is the loss at the phase's start. The loss is the cross-entropy of the data's validation responses, in nats a
    token. Rule and numbers are those of the code released with DistiLLM, which starts at a share of 0 and validates
    once an epoch.
    """

    step: Real = Field(0.1, gt=0, le=1)
    margin: Real = Field(0.1, ge=0, le=1e3, description="nats a token")


class Replay(Frozen):
    """Responses of the student are trained on again: the newest `capacity` ones of all processes, with their prompts.

    Until there are that many, the student answers every time; then with probability `fresh`, after t of the phase's T
    steps: decreasing 1 - t / T, constant 1 / 2, increasing t / T. Else a response of the buffer is taken, each at most
    once a round. As in the code released with DistiLLM (its default: decreasing), whose buffer is one a process.
    """

    capacity: Count = Field(1000, description="sequences")
    fresh: Literal["decreasing", "constant", "increasing"] = Field(
        "decreasing", description="how the share of new responses goes through the phase"
    )


class MixedPhase(OnPolicyPhase):
    """Fields of gkd and distillm: a divergence per token, on responses of the student among those of the data.

    Each sequence of a round is the student's with probability student_share, else the data's, or with
    `teacher_responses` the teacher's. (The papers draw so for a whole batch: the same in the mean, with more variance.)
    No gradient goes through the sampling. The loss is the mean over the tokens of a batch; no factor T^2.
    """

    student_share: Share = Field(
        0.5, description="share of the student's own responses in a round; with adaptive_share at the start"
    )
    adaptive_share: AdaptiveShare | None = Field(
        None, description="raise the student's share when the validation loss has risen"
    )
    replay: Replay | None = Field(None, description="train on the student's earlier responses again")
    sampling_temperature: Temperature = Field(1.0, description="of the student while it samples")
    temperature: Temperature = Field(1.0, description="of both models in the divergence")
    teacher_responses: TeacherResponses | None = Field(
        None, description="responses of the teacher in place of the data's, where the student does not answer"
    )

    @model_validator(mode="after")
    def _adapts_between_rounds(self) -> MixedPhase:
        if self.adaptive_share is not None and self.eval_every is None:
            raise ValueError("adaptive_share needs eval_every, the number of steps between validations")
        if self.adaptive_share is not None and self.eval_every and self.eval_every % self.steps_per_round:
            raise ValueError(
                f"adaptive_share changes between rounds of {self.steps_per_round} steps (rollouts / batch_size); "
                f"eval_every ({self.eval_every}) must be a multiple of that"
            )
        if self.replay is not None and self.replay.capacity < self.per_round:
            raise ValueError(
                f"replay.capacity ({self.replay.capacity}) must be at least the {self.per_round} sequences of a round"
            )
        return self

    @property
    def needs_responses(self) -> bool:
        return self.eval_every is not None or (self.student_share < 1 and _needs_data(self.teacher_responses, None))

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps of one round."""
        return self.per_round // self.batch_size


class GkdPhase(MixedPhase):
    """Generalised JSD(beta), m = beta p + (1 - beta) q: beta KL(p || m) + (1 - beta) KL(q || m); p teacher, q student.

    GKD, Agarwal et al., ICLR 2024. At its ends JSD(beta) is 0; as in the paper beta = 0 stands for the forward KL(p ||
    q), the limit of JSD(beta) / beta, and beta = 1 for the reverse KL(q || p), that of JSD(beta) / (1 - beta). The
    metrics then bear those names.
    """

    objective: Literal["gkd"] = "gkd"
    beta: Share = Field(0.5, description="0: forward KL, 1: reverse KL")

    @property
    def kind(self) -> tuple[str, float | None]:
        """The divergence by its name in mskd_kernels, and its number."""
        ends: dict[float, tuple[str, float | None]] = {0.0: ("forward_kl", None), 1.0: ("reverse_kl", None)}
        return ends.get(self.beta, ("jsd", self.beta))


class DistillmPhase(MixedPhase):
    """Skew KL(p || s p + (1 - s) q) or skew reverse KL(q || (1 - s) p + s q), s = skew; p teacher, q student.

    DistiLLM, Ko et al., ICML 2024. Its adaptive off-policy part is here too, off by default: a share of the student's
    responses that starts low and rises when the validation loss rises (`student_share = 0.0`, `adaptive_share = {}`),
    and a replay buffer (`replay = {}`). The idea is the paper's; rule, step, margin, capacity and schedules are those
    of the code released with it (jongwooko/distillm, finetune.py), read on 2026-11-22. What differs: whose response it
    is, is drawn for each sequence, there for a process's whole batch; the buffer is one for all processes, so that
    their number changes no sequence; and where a round has several steps, both hold for the round.
    """

    objective: Literal["distillm"] = "distillm"
    divergence: Literal["skew_kl", "skew_reverse_kl"] = Field("skew_kl", description="which of the two is the loss")
    skew: Real = Field(0.1, gt=0, lt=1, description="s in them")
    lm_weight: Weight = Field(1.0, description="weight of the plain-text term; off where data.text is not given")
    kd_ratio: ClassVar[float] = 0.0  # the plain-text term is cross-entropy alone

    @property
    def kind(self) -> tuple[str, float | None]:
        """The divergence by its name in mskd_kernels, and its number."""
        return self.divergence, self.skew


Mixed = GkdPhase | DistillmPhase

# Each named term of the objective is a field; a preset is only a set of values.
PRESETS: dict[str, dict[str, Any]] = {
    # MiniLLM as its paper states it (Gu et al., ICLR 2024), with the return of the last token defined as 0.
    "minillm": dict(
        gamma=1.0, include_current=False, whiten=False, reward_scaling=1.0, reward_clip=0.0,
        weight_single_step=True, clip_weighted_ratio=True, kd_ratio=0.0,
    ),
    # What the released code (microsoft/LMOps, minillm) does instead; see MinillmPhase for the two things left out.
    "lmops": dict(
        gamma=0.95, include_current=True, whiten=True, reward_scaling=0.5, reward_clip=100.0,
        weight_single_step=False, clip_weighted_ratio=True, kd_ratio=0.5,
    ),
}  # fmt: skip


class MinillmPhase(OnPolicyPhase):
    """Reverse KL on the student's own (teacher-mixed) samples. A round: `rollouts` samples, `ppo_epochs` over them.

    The preset lmops is the released code's choices but for two, which depend on its micro-batches: it whitens each of
    them alone, padding included, with n - 1, where ours whitens the round's tokens; and it averages their means, where
    ours is the mean over a step's tokens (cosine of the gradients 0.98 and 0.994).
    """

    objective: Literal["minillm", "lmops"] = "minillm"
    steps: Count | None = Field(5000, description="optimizer steps; with epochs, whichever comes first; 0: no limit")
    epochs: Epochs | None = Field(10, description="passes over the training prompts; 0: no limit")
    batch_size: Sequences = Field(64, description="sequences in one optimizer step")
    lr: Rate = Field(5e-6, description="learning rate at its highest")
    warmup_steps: Whole = Field(100, ge=0, le=MOST, description="steps in which the learning rate rises from 0")
    # sampling
    rollouts: Sequences = Field(256, description="sequences sampled in one round, over all processes")
    mix_alpha: Real = Field(0.2, ge=0, lt=1, description="share of the teacher in the sampling mixture")
    temperature: Temperature = Field(1.0, description="of the sampling")
    # optimisation
    ppo_epochs: Whole = Field(4, ge=1, le=1000, description="passes over the samples of a round")
    clip: Real = Field(0.2, gt=0, lt=1, description="the ratio to the sampling policy is clipped to 1 +- it")
    # returns
    gamma: Share = Field(description="discount of later rewards in a token's return")
    include_current: bool = Field(description="whether a token's return holds its own reward")
    whiten: bool = Field(description="whether advantages get mean 0 and variance 1 over a round")
    reward_scaling: Real = Field(ge=1e-6, le=1e6, description="rewards are divided by it")
    reward_clip: Real = Field(ge=0, le=1e6, description="rewards are clipped to +- it; 0: off")
    # loss
    weight_single_step: bool = Field(
        description="importance weight on the single-step term; only adds variance, so false is recommended"
    )
    clip_weighted_ratio: bool = Field(description="clip ratio times weight, or the ratio alone")
    lm_weight: Weight = Field(1.0, description="weight of the plain-text term; off where data.text is not given")
    kd_ratio: Share = Field(description="share of soft cross-entropy in the plain-text term")
    keep_by: Literal["reverse_kl", "rouge_l"] = Field("reverse_kl", description="what keep = 'best' goes by")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            return {**PRESETS.get(str(given.get("objective", "minillm")), {}), **given}
        return given

    @model_serializer(mode="wrap")
    def _limits(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        lifted = {name: 0 for name in ("steps", "epochs") if getattr(self, name) is None}
        return plain(self) | lifted  # left out, they would be read back as the defaults

    @property
    def needs_responses(self) -> bool:
        return False


Phase = Annotated[
    Union[SftPhase, KdPhase, SeqkdPhase, GkdPhase, DistillmPhase, MinillmPhase], Field(discriminator="objective")
]
# Every objective by name, with its phase: the one list of them.
OBJECTIVES: dict[str, type[PhaseBase]] = {
    name: phase
    for phase in get_args(get_args(Phase)[0])
    for name in get_args(phase.model_fields["objective"].annotation)
}


def resolve_steps(phase: PhaseBase, items: int) -> int:
    """Optimizer steps of a phase on `items` training prompts: `steps` or `epochs`, whichever comes first."""
    limits = [] if phase.steps is None else [phase.steps]
    if phase.epochs is not None:
        trained = items * phase.epochs
        if isinstance(phase, MinillmPhase):
            trained *= phase.ppo_epochs
        limits.append(max(1, math.floor(trained / phase.batch_size)))
    return min(limits)
