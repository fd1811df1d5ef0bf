"""What a run will cost, from shapes alone: training FLOPs, hours on named machines, peak memory, disk.

    budget = Budget(config, shapes_of(config))
    for hop in budget.hops:
        print(hop.key, hop.flops, hop.memory, hours(hop, GPUS[1]))

Lengths are the greatest that the configuration allows, so figures are upper bounds: a prompt of P =
data.max_prompt_tokens and a response of R = max_new_tokens, or of the data's up to data.max_tokens - P.

FLOPs, one multiply-add being 2; L layers, H hidden, A heads x head size, V vocabulary, W parameters of the L layers:
    forward(P, R) = 2 W (P + R) + 2 L A (P + R)(P + R + 1) + 2 V H R
(attention is causal: token t sees t keys, 4 A FLOPs a key and layer; the head sees the R response tokens only).
Training on a sequence is 3 forwards of the student (4 with gradient checkpointing). Of the frozen teacher:
    sft     -                                   kd, gkd, distillm   1 forward a sequence trained on
    seqkd   1 forward a response, decoded once  minillm, lmops      per sampled sequence 1 forward to sample the mixture
                                                                    and 1 to score, and its head 2 V H R a further epoch
A sequence that the student samples is 1 forward of it more. Decoding is also held against the bytes that it must read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mskd.config import Config, ConfigError
from mskd.config.phases import DistillmPhase, GkdPhase, KdPhase, MinillmPhase, OnPolicyPhase, Phase, SeqkdPhase
from mskd.config.problems import local_path
from mskd.plan import sizes
from mskd.plan.sizes import GpuFacts, Shape

UTILISATION = 0.35  # assumed share of a GPU's dense 16-bit peak, of training and scoring
BANDWIDTH_SHARE = 0.5  # assumed share of a GPU's memory bandwidth, of decoding
BYTES = {"int8": 1, "llm_int8": 1, "fp16": 2, "bf16": 2, "fp32": 4}  # of a weight of a teacher's layers
RESULTS = Path(__file__).parents[2] / "bench" / "results"  # in a checkout; a wheel has none
# Cases of bench.train_step (bench/shapes.py): the row's name begins so; source, layers of teacher and of student.
MEASURED = {
    "SmolLM2 30 > 22 > 16 layers, hop 2": ("smollm2-135m", 22, 16),
    "SmolLM2 30 > 22 > 16 layers, hop 1": ("smollm2-135m", 30, 22),
    "GPT-2 1.5B > 760M > 120M, hop 1": ("gpt2-xl", 48, None),
}


@dataclass(frozen=True)
class Work:
    """Work to do: FLOPs beside decoding, FLOPs of decoding, and bytes of weights and caches that decoding reads."""

    training: float = 0.0
    decoding: float = 0.0
    decoded_bytes: float = 0.0

    @property
    def flops(self) -> float:
        return self.training + self.decoding

    def __add__(self, other: Work) -> Work:
        return Work(
            self.training + other.training, self.decoding + other.decoding, self.decoded_bytes + other.decoded_bytes
        )


@dataclass(frozen=True)
class Hop:
    """One trained node: its work and steps (None where they are not known beforehand), peak bytes on the device."""

    key: str
    parameters: int
    work: Work | None
    memory: int
    steps: int | None


def forward(shape: Shape, prompt: int, response: int) -> float:
    """FLOPs of one forward of a sequence, logits at its `response` tokens only."""
    tokens = prompt + response
    attention = 2 * shape.layers * shape.attention_width * tokens * (tokens + 1)
    return 2.0 * shape.layers * shape.per_layer * tokens + attention + head(shape, response)


def head(shape: Shape, tokens: int) -> float:
    """FLOPs of the logits of so many tokens."""
    return 2.0 * shape.vocabulary * shape.hidden * tokens


def num_steps(phase: Phase, rows: int | None) -> int | None:
    """Optimizer steps of a phase as the loop counts them; rows: training prompts, None where that is not known."""
    if phase.epochs is None or rows is None:
        return phase.steps
    trained = rows * phase.epochs * (phase.ppo_epochs if isinstance(phase, MinillmPhase) else 1)
    by_epochs = max(1, math.floor(trained / phase.batch_size))
    return by_epochs if phase.steps is None else min(phase.steps, by_epochs)


class Budget:
    """The cost of a configuration. shapes: of its models by name; a hop with a model that is not there is in `unknown`.

    rows: training prompts of the data, None where that is not known.
    """

    def __init__(self, config: Config, shapes: Mapping[str, Shape], rows: int | None = None) -> None:
        self.config, self.shapes, self.rows = config, shapes, rows
        self.hops: list[Hop] = []
        self.unknown: list[str] = []
        keys = dict.fromkeys(p[: i + 1] for p in config.chain.paths for i in range(1, len(p)))
        for name in dict.fromkeys(name for path in config.chain.paths for name in path):
            if config.models[name].prepare:
                self._add((name,), config.models[name].prepare)
        for key in keys:
            self._add(key, config.hop_phases(key[-2], key[-1]))

    def _add(self, key: tuple[str, ...], phases: tuple[Phase, ...]) -> None:
        shown = " > ".join(key)
        if any(name not in self.shapes for name in key[-2:]):
            self.unknown.append(shown)
            return
        student = self.shapes[key[-1]]
        teacher = self.shapes[key[-2]] if len(key) > 1 else None
        precision = self.config.models[key[-2]].precision if teacher else "int8"
        steps = [num_steps(p, self.rows) for p in phases]
        known = [n for n in steps if n is not None]
        work = None
        if len(known) == len(steps):
            parts = [self._work(p, n, student, teacher, precision) for p, n in zip(phases, known, strict=True)]
            work = sum(parts, Work())
        memory = max(self._memory(p, student, teacher, precision) for p in phases)
        self.hops.append(Hop(shown, student.parameters, work, memory, sum(known) if work else None))

    def lengths(self, phase: Phase) -> tuple[int, int]:
        """Tokens of prompt and response, the greatest that the configuration allows."""
        data = self.config.data
        prompt = min(data.max_prompt_tokens, data.max_tokens - 1)
        if isinstance(phase, MinillmPhase):
            return prompt, phase.max_new_tokens
        return prompt, data.max_tokens - prompt

    def _work(self, phase: Phase, steps: int, student: Shape, teacher: Shape | None, precision: str) -> Work:
        """The work of one phase, by the formula at the top of this file."""
        prompt, response = self.lengths(phase)
        trained = steps * phase.batch_size
        passes = 4 if self.config.train.gradient_checkpointing else 3
        work = Work(passes * trained * forward(student, prompt, response))
        if teacher is None:
            return work
        if isinstance(phase, MinillmPhase):
            sampled = math.ceil(trained / (phase.rollouts * phase.ppo_epochs)) * phase.rollouts
            mixed = [(student, 2.0)] + ([(teacher, float(BYTES[precision]))] if phase.mix_alpha else [])
            work += self._decode(mixed, sampled, phase.rollout_batch_size, prompt, response)
            work += Work(sampled * forward(teacher, prompt, response))
            return work + Work(max(0, trained - sampled) * head(teacher, response)) + self._text(phase, steps, student)
        if isinstance(phase, KdPhase | GkdPhase | DistillmPhase):
            work += Work(trained * forward(teacher, prompt, response))
        answers = getattr(phase, "teacher_responses", None)
        own = phase.student_share if isinstance(phase, GkdPhase | DistillmPhase) else 0.0
        if isinstance(phase, GkdPhase | DistillmPhase):
            most = own if phase.adaptive_share is None else 1.0  # a bound: rounds may repeat responses of a buffer
            new = phase.max_new_tokens
            work += self._decode([(student, 2.0)], trained * most, phase.rollout_batch_size, prompt, new)
        if answers is not None:
            count = min(trained * (1 - own), self.rows or trained) * (1 - answers.data_share)
            new = answers.max_new_tokens
            work += self._decode([(teacher, float(BYTES[precision]))], count, answers.batch_size, prompt, new)
        return work

    def _text(self, phase: MinillmPhase, steps: int, student: Shape) -> Work:
        """The plain-text term: one more block of data.max_tokens for every sequence of a step."""
        if self.config.data.text is None or not phase.lm_weight:
            return Work()
        return Work(3 * steps * phase.batch_size * forward(student, 0, self.config.data.max_tokens))

    def _decode(
        self, decoders: list[tuple[Shape, float]], sequences: float, together: int, prompt: int, response: int
    ) -> Work:
        """Sampling: a forward a sequence of every decoder, whose weights are read once a token of `together` ones."""
        flops = sequences * sum(forward(s, prompt, response) for s, _ in decoders)
        batches = math.ceil(sequences / together)
        weights = sum(s.layers * s.per_layer * each + 2.0 * s.vocabulary * s.hidden for s, each in decoders)
        keys = sum(_cache(s, prompt + response / 2) for s, _ in decoders) * together
        return Work(0.0, flops, batches * response * (weights + keys))

    def _memory(self, phase: Phase, student: Shape, teacher: Shape | None, precision: str) -> int:
        """Peak bytes of one device, an estimate: all that is held at once, in training or in sampling.

        Held: the teacher's layers in its precision, its embeddings in 16 bits; the student's fp32 weights, gradients
        and AdamW states (16 bytes a parameter; 10 with 8-bit states). In training the loss's chunk and activations,
        34 bytes a token, layer and hidden unit (Korthikanti et al. 2022, without attention scores), or with
        checkpointing 2 and one whole layer; in sampling the student's 16-bit copy and the KV caches, 16 bits.
        """
        c = self.config
        prompt, response = self.lengths(phase)
        held = student.parameters * (16.0 if phase.optimizer == "adamw" else 10.0)
        if teacher is not None:
            held += teacher.layers * teacher.per_layer * BYTES[precision] + 2 * teacher.outside
        tokens = phase.micro_batch_size * (prompt + response)
        wide = tokens * student.hidden
        checkpointed = wide * (2 * student.layers + 34)
        training = checkpointed if c.train.gradient_checkpointing else 34.0 * wide * student.layers
        training += c.train.loss_chunk_mb * 2**20
        sampling = 0.0
        if isinstance(phase, OnPolicyPhase):
            decoders = [student, teacher] if isinstance(phase, MinillmPhase) and teacher else [student]
            cache = sum(_cache(s, prompt + phase.max_new_tokens) for s in decoders)
            sampling = 2.0 * student.parameters + phase.rollout_batch_size * cache
        answers = phase.teacher_responses if isinstance(phase, SeqkdPhase | KdPhase) else None
        if answers is not None and teacher is not None:
            sampling = max(sampling, answers.batch_size * _cache(teacher, prompt + answers.max_new_tokens))
        return int(held + max(training, sampling))

    @property
    def work(self) -> Work | None:
        """All hops together; None where a part is not known."""
        parts = [h.work for h in self.hops]
        known = [w for w in parts if w is not None]
        return None if self.unknown or len(known) < len(parts) else sum(known, Work())

    @property
    def disk(self) -> int | None:
        """Bytes under OUT at most: fp32 weights of every model cut and after every phase, and one state with AdamW's.

        Students of a 16-bit checkpoint are saved in 16 bits, and so take half of that.
        """
        used = {name for path in self.config.chain.paths for name in path}
        if self.unknown or used - set(self.shapes):
            return None
        cut = sum(self.shapes[n].parameters for n in used if self.config.models[n].layers is not None)
        hops = {(*p[: i + 1],) for p in self.config.chain.paths for i in range(1, len(p))}
        after = sum(self.shapes[k[-1]].parameters * len(self.config.hop_phases(k[-2], k[-1])) for k in hops)
        after += sum(self.shapes[n].parameters * len(self.config.models[n].prepare) for n in used)
        return 4 * (cut + after) + 12 * max((h.parameters for h in self.hops), default=0)


def _cache(shape: Shape, tokens: float) -> float:
    """Bytes of a KV cache of one sequence in 16 bits."""
    return 4.0 * shape.layers * shape.kv_width * tokens


def hours(work: Work, gpu: GpuFacts) -> float:
    """Projected hours on one GPU: FLOPs at UTILISATION of its peak; decoding at least its bytes at BANDWIDTH_SHARE."""
    rate = gpu.peak * UTILISATION
    decoding = max(work.decoding / rate, work.decoded_bytes / (gpu.bandwidth * BANDWIDTH_SHARE))
    return (work.training / rate + decoding) / 3600


def measured(folder: Path = RESULTS) -> dict[str, float]:
    """FLOP/s by machine, from rows of bench.train_step under `folder`: the FLOPs of this file's formula / seconds.

    The mean lengths of the row stand for its sequences. Rows of unknown shapes, and of other trainers, are left out.
    """
    rates: dict[str, list[float]] = {}
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        stored = json.loads(file.read_text(encoding="utf-8"))
        for row in stored.get("rows", []):
            work = _benched(row) if row.get("benchmark") == "train_step" and row.get("provider") == "mskd" else None
            run = stored.get("runs", {}).get(row.get("run"), {})
            if work is not None:
                name = str(run.get("name", file.stem)) + (
                    f", {run['cores']} cores" if run.get("device") == "cpu" else ""
                )
                rates.setdefault(name, []).append(work / (row["ms_p50"] / 1000))
    return {name: sum(found) / len(found) for name, found in rates.items()}


def _benched(row: Mapping[str, object]) -> float | None:
    """FLOPs of one round of a row of bench.train_step: "..., hop 2, phase: 8 rollouts, batch 8, 4 epochs"."""
    title = str(row.get("shape", ""))
    case = next((c for t, c in MEASURED.items() if title.startswith(t)), None)
    shape = sizes.shape_of(case[0]) if case else None
    numbers = [int(word) for word in title.rpartition(":")[2].replace(",", " ").split() if word.isdigit()]
    bounds, tokens = row.get("prompt_tokens_from_to"), row.get("answer_tokens")
    if (
        case is None
        or shape is None
        or len(numbers) != 3
        or not isinstance(bounds, list)
        or not isinstance(tokens, int)
    ):
        return None
    teacher, student = shape.cut_to(case[1]), shape.cut_to(case[2])
    rollouts, _, epochs = numbers
    prompt, response = sum(bounds) // 2, tokens // rollouts
    student_passes = (1 + 3 * epochs) * forward(student, prompt, response)
    teacher_passes = 2 * forward(teacher, prompt, response) + (epochs - 1) * head(teacher, response)
    return rollouts * (student_passes + teacher_passes)


def shapes_of(config: Config) -> dict[str, Shape]:
    """The shapes of a configuration's models: from the table, or from config.json where a folder exists.

    Nothing is fetched; a model whose size is not known is left out. Raises ConfigError where a model is to be cut to
    more layers than there are, or is bigger than its teacher.
    """
    shapes: dict[str, Shape] = {}
    for name in config.models:
        shape = _shape(config, name)
        if shape is not None:
            shapes[name] = shape
    for path in config.chain.paths:
        for above, below in zip(path, path[1:], strict=False):
            if above in shapes and below in shapes and shapes[below].parameters > shapes[above].parameters:
                raise ConfigError(
                    f"{below!r} ({shapes[below].parameters:,} parameters) is bigger than its teacher {above!r} "
                    f"({shapes[above].parameters:,}); a path goes from big to small"
                )
    return shapes


def _shape(config: Config, name: str) -> Shape | None:
    model = config.models[name]
    origin = _shape(config, model.from_) if model.from_ else source_shape(str(model.source))
    if origin is not None and model.layers is not None and model.layers > origin.layers:
        raise ConfigError(
            f"model {name!r} wants {model.layers} layers, but {model.from_ or model.source} has {origin.layers}; "
            f"give at most {origin.layers}"
        )
    return origin.cut_to(model.layers) if origin else None


def source_shape(source: str) -> Shape | None:
    """The shape of a model by its source: a folder's config.json, or the table; None where neither knows it."""
    folder = local_path(source, "the model")
    if not folder.is_dir():
        return sizes.shape_of(source)
    from mskd.models import size_of

    size = size_of(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hidden = int(config.get("hidden_size") or config["n_embd"])
    heads = int(config.get("num_attention_heads") or config["n_head"])
    head_size = int(config.get("head_dim") or hidden // heads)
    keys = int(config.get("num_key_value_heads") or heads) * head_size
    outside = size.parameters - size.layers * size.per_layer
    vocabulary = int(config["vocab_size"])
    return Shape(source, size.layers, hidden, vocabulary, keys, heads * head_size, size.per_layer, outside)


def num_rows(config: Config) -> int | None:
    """Training prompts of the data, from a local .jsonl or a known data set, before rows are dropped; None: unknown."""
    data = config.data
    path = local_path(data.source, "data.source")
    if path.suffix == ".jsonl" and path.is_file():
        with path.open("rb") as lines:
            count = sum(1 for line in lines if line.strip())
    elif data.source in sizes.ROWS:
        count = sizes.ROWS[data.source]
    else:
        return None
    count = min(count, data.limit or count)
    if data.source == "demo":
        return max(1, count - data.validation)
    drawn = data.test if isinstance(data.test, int) else min(500, max(1, count // 10)) if data.test is None else 0
    return max(1, count - drawn - data.validation)
