"""Sequences in slots: the batch stays full, and the teacher decodes only where it must.

    batch = Slots(decoders, prompts, u, ends=(2,), slots=32, mix_alpha=0.2, top_p=1.0, top_k=0)
    while batch.unfinished:
        batch.step()                             # draws one token for each sequence that need not wait
    tokens, logprobs = batch.responses()[0]      # in the order of the prompts

The slot of a finished sequence goes to the next prompt, longest prompts first. What a sequence draws depends on its own
random numbers alone: not on the number of slots, not on who shares the batch, not on when it was refilled.

The lazy teacher. Without truncation a token of the mixture alpha p + (1 - alpha) q is the teacher's with probability
alpha, else the student's. That choice is drawn first, from the sequence's own number u: u < alpha says the teacher's,
and u / alpha (else (u - alpha) / (1 - alpha)), again uniform, draws the token. A sequence whose token is the teacher's
waits while the others go on; once enough of them wait, the teacher processes for each all tokens since its last call.
With truncation the mixture itself is cut, which takes both distributions: then both models decode every token.

n sequences, T response positions, V vocabulary, b rows of one draw.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mskd.sampling.decode import Decoder, Span
from mskd.sampling.draw import draw, logprobs_of

LOOK_EVERY = {"cpu": 1, "cuda": 8}  # steps between looks at what has finished: on a GPU each waits for it
WAITING = 0.5  # share of the sequences that may wait for the teacher; measured on a CPU, see docs/log.md

Response = tuple[Tensor, Tensor]  # of one sequence: tokens [t], log-probabilities [2 or 3, t]


@dataclass(eq=False)
class _Row:
    """One sequence that is being sampled."""

    index: int  # of its prompt
    slot: int
    prompt: int  # tokens
    length: int  # tokens so far, the prompt's included
    fed: list[int]  # tokens that each model has processed
    logits: Tensor | None = None  # the student's [V], while it waits for the teacher
    ended: bool = False


class Slots:
    """One call of `sample`: which sequences are where, their tokens and log-probabilities.

    decoders: the student's, and the teacher's where it decodes, opened for `slots` slots. u [n, T] float64, CPU: the
    random numbers of the sequences. ends: the tokens of which each ends a sequence.
    """

    def __init__(
        self,
        decoders: Sequence[Decoder],
        prompts: Sequence[Sequence[int]],
        u: Tensor,
        *,
        ends: Collection[int],
        slots: int,
        mix_alpha: float,
        top_p: float,
        top_k: int,
        lazy: bool = True,
    ) -> None:
        (n, self.limit), device = u.shape, decoders[0].device
        self.decoders, self.prompts, self.ends, self.device = decoders, prompts, frozenset(ends), device
        self.alpha, self.top_p, self.top_k = mix_alpha, top_p, top_k
        self.lazy = lazy and len(decoders) > 1 and top_p == 1 and top_k == 0
        self.teachers = (u < mix_alpha).numpy()  # [n, T]: whose token it is
        self.u = u.to(device)
        # The batch that needs the most memory comes first.
        self.queue = deque(sorted(range(n), key=lambda i: (-len(prompts[i]), i)))
        longest = max((len(p) for p in prompts), default=0)
        tokens = [[*p, *[0] * (longest - len(p))] for p in prompts]  # what lies behind a sequence is never read
        self.tokens = torch.tensor(tokens, dtype=torch.int64).view(n, longest).to(device)
        self.tokens = torch.nn.functional.pad(self.tokens, (0, self.limit))
        kinds = 2 if self.lazy else len(decoders) + 1
        self.logprobs = torch.zeros(kinds, n, self.limit, dtype=torch.float64, device=device)
        self.lengths = [self.limit] * n
        self.rows: list[_Row] = []  # in the order of their slots
        self.free = list(range(slots))
        self.recent: list[tuple[list[tuple[_Row, int]], Tensor]] = []  # tokens drawn since the last look
        self.steps = 0

    @property
    def unfinished(self) -> bool:
        return bool(self.rows or self.queue)

    def step(self) -> None:
        """Fill the free slots, and draw a token for every sequence that need not wait."""
        self._refill()
        if self.lazy:
            self._step_lazily()
        else:
            student = self._advance(0, self.rows)
            teacher = self._advance(1, self.rows) if len(self.decoders) > 1 else None
            u, alpha = self._numbers(self.rows), self.alpha
            token, *logprobs = draw(student, teacher, u, mix_alpha=alpha, top_p=self.top_p, top_k=self.top_k)
            self._record(self.rows, token, [x for x in logprobs if x is not None])
        self.steps += 1
        if self.steps % LOOK_EVERY.get(self.device.type, 1) == 0:
            self._look()
        self._release()

    def responses(self) -> list[Response]:
        """Of every prompt: tokens [t], the end token included, and log-probabilities [kinds, t], on the CPU.

        Kinds: the student's, then of the distribution that was drawn from (the lazy mixture: of the model whose token
        it is), then the teacher's where it decoded every token.
        """
        self._look()
        starts = [len(p) for p in self.prompts]
        tokens, logprobs = self.tokens.cpu(), self.logprobs.cpu()
        return [
            (tokens[i, start : start + t], logprobs[:, i, :t])
            for i, (start, t) in enumerate(zip(starts, self.lengths, strict=True))
        ]

    # -- slots

    def _refill(self) -> None:
        while self.free and self.queue:
            index = self.queue.popleft()
            prompt = len(self.prompts[index])
            self.rows.append(_Row(index, self.free.pop(0), prompt, prompt, [0] * len(self.decoders)))
        self.rows.sort(key=lambda row: row.slot)

    def _look(self) -> None:
        """Find the end tokens among the recent ones; on a GPU this waits for it."""
        if not self.recent:
            return
        places = [place for part, _ in self.recent for place in part]
        for (row, end), token in zip(places, torch.cat([t for _, t in self.recent]).tolist(), strict=True):
            if token in self.ends and not row.ended:
                row.ended = True
                self.lengths[row.index] = end - row.prompt
        self.recent = []

    def _release(self) -> None:
        done = [row for row in self.rows if row.ended or row.length - row.prompt == self.limit]
        if not done:
            return
        self.rows = [row for row in self.rows if row not in done]
        self.free = sorted(self.free + [row.slot for row in done])
        while not self.queue and self.rows and self.free[0] < self.rows[-1].slot:  # attention runs up to the last slot
            row = self.rows[-1]
            source, row.slot = row.slot, self.free[0]
            for decoder, fed in zip(self.decoders, row.fed, strict=True):
                decoder.move(source, row.slot, fed)
            self.free = sorted([*self.free[1:], source])
            self.rows.sort(key=lambda row: row.slot)

    # -- one step

    def _advance(self, model: int, rows: Sequence[_Row]) -> Tensor:
        """The next-token logits [b, V] of a model, which now has processed all tokens of the rows."""
        spans = [Span(row.slot, row.index, row.fed[model], row.length) for row in rows]
        for row in rows:
            row.fed[model] = row.length
        return self.decoders[model].advance(self.tokens, spans).to(self.device)

    def _places(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        """(sequences [b], response positions [b]) of the rows' next tokens."""
        places = torch.tensor([[row.index for row in rows], [row.length - row.prompt for row in rows]])
        index, t = places.to(self.device)
        return index, t

    def _numbers(self, rows: Sequence[_Row]) -> Tensor:
        return self.u[self._places(rows)]

    def _record(self, rows: Sequence[_Row], token: Tensor, logprobs: list[Tensor]) -> None:
        index, t = self._places(rows)
        self.tokens[index, torch.tensor([row.length for row in rows]).to(self.device)] = token
        self.logprobs[:, index, t] = torch.stack(logprobs)
        for row in rows:
            row.length += 1
        self.recent.append(([(row, row.length) for row in rows], token))

    # -- the lazy teacher

    def _step_lazily(self) -> None:
        going = [row for row in self.rows if row.logits is None]
        if going:
            self._go_on(going)
        waiting = [row for row in self.rows if row.logits is not None]
        if waiting and (not going or len(waiting) >= WAITING * len(self.rows)):
            self._teach(waiting)

    def _go_on(self, rows: list[_Row]) -> None:
        """Draw the student's tokens of the rows whose next token is its; the others begin to wait."""
        logits = self._advance(0, rows)
        own = []
        for i, row in enumerate(rows):
            if self.teachers[row.index, row.length - row.prompt]:
                row.logits = logits[i].clone()
            else:
                own.append(i)
        if own:
            u = (self._numbers(rows) - self.alpha) / (1 - self.alpha)
            token, old, drawn, _ = draw(logits, None, u, mix_alpha=0.0, top_p=1.0, top_k=0)
            self._record([rows[i] for i in own], token[own], [old[own], drawn[own]])

    def _teach(self, rows: list[_Row]) -> None:
        """Draw the teacher's tokens of the rows that wait for them."""
        logits, u = self._advance(1, rows), self._numbers(rows) / self.alpha
        token, drawn, *_ = draw(logits, None, u, mix_alpha=0.0, top_p=1.0, top_k=0)
        old = logprobs_of(torch.stack([row.logits for row in rows if row.logits is not None]), token)
        self._record(rows, token, [old, drawn])
        for row in rows:
            row.logits = None
