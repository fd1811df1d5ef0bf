"""Facts of model families, data sets and GPUs, known without a download or a GPU.

    shape_of("openai-community/gpt2-xl").parameters      # 1557611200
    nearest(family("gpt2"), 440e6).hub                   # the size nearest by ratio

Shapes are those of the models' config.json; a test builds each on the meta device and compares the parameters.
L layers, H hidden, V vocabulary.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mskd.config import ConfigError


@dataclass(frozen=True)
class Shape:
    """What the cost of a model follows from. per_layer and outside: parameters of one layer, and of all but the layers
    (embeddings, positions, final norm, an untied head), tied ones counted once."""

    hub: str
    layers: int
    hidden: int
    vocabulary: int
    kv_width: int  # KV heads x head size: numbers of one key (or value) of one layer and token
    attention_width: int  # heads x head size
    per_layer: int
    outside: int

    @property
    def parameters(self) -> int:
        return self.layers * self.per_layer + self.outside

    def cut_to(self, layers: int | None) -> Shape:
        """The same model with so many of its layers; None: all."""
        return self if layers is None else replace(self, layers=layers)


def _gpt2(hub: str, layers: int, hidden: int) -> Shape:
    own = 12 * hidden**2 + 13 * hidden
    return Shape(hub, layers, hidden, 50257, hidden, hidden, own, (50257 + 1024 + 2) * hidden)


def _opt(hub: str, layers: int, hidden: int, embedding: int | None = None) -> Shape:
    """embedding: where it is narrower than hidden, there are projections to and from it, and no final norm."""
    own = 12 * hidden**2 + 13 * hidden
    ends = 2 * hidden if embedding is None else 2 * embedding * hidden
    outside = 50272 * (embedding or hidden) + 2050 * hidden + ends
    return Shape(hub, layers, hidden, 50272, hidden, hidden, own, outside)


def _pythia(hub: str, layers: int, hidden: int, vocabulary: int = 50304) -> Shape:
    own = 12 * hidden**2 + 13 * hidden
    return Shape(hub, layers, hidden, vocabulary, hidden, hidden, own, 2 * vocabulary * hidden + 2 * hidden)


def _llama(
    hub: str,
    layers: int,
    hidden: int,
    inner: int,
    heads: tuple[int, int],
    vocabulary: int,
    *,
    tied: bool,
    qkv_bias: bool = False,
    head_size: int | None = None,
) -> Shape:
    """Llama and Qwen2: gated MLP of width `inner`, RMS norms; heads: of queries, of keys and values."""
    size = head_size or hidden // heads[0]
    queries, keys = heads[0] * size, heads[1] * size
    own = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    own += queries + 2 * keys if qkv_bias else 0
    outside = (1 if tied else 2) * vocabulary * hidden + hidden
    return Shape(hub, layers, hidden, vocabulary, keys, queries, own, outside)


def _qwen(size: str, layers: int, hidden: int, inner: int, heads: tuple[int, int]) -> Shape:
    small = hidden < 3000  # up to 3B: tied, and a vocabulary padded less
    vocabulary = 151936 if small else 152064
    return _llama(f"Qwen/Qwen2.5-{size}", layers, hidden, inner, heads, vocabulary, tied=small, qkv_bias=True)


FAMILIES: dict[str, tuple[Shape, ...]] = {  # small to big
    "gpt2": (
        _gpt2("openai-community/gpt2", 12, 768),
        _gpt2("openai-community/gpt2-medium", 24, 1024),
        _gpt2("openai-community/gpt2-large", 36, 1280),
        _gpt2("openai-community/gpt2-xl", 48, 1600),
    ),
    "opt": (
        _opt("facebook/opt-125m", 12, 768),
        _opt("facebook/opt-350m", 24, 1024, 512),
        _opt("facebook/opt-1.3b", 24, 2048),
        _opt("facebook/opt-2.7b", 32, 2560),
        _opt("facebook/opt-6.7b", 32, 4096),
        _opt("facebook/opt-13b", 40, 5120),
        _opt("facebook/opt-30b", 48, 7168),
        _opt("facebook/opt-66b", 64, 9216),
    ),
    "pythia": (
        _pythia("EleutherAI/pythia-70m", 6, 512),
        _pythia("EleutherAI/pythia-160m", 12, 768),
        _pythia("EleutherAI/pythia-410m", 24, 1024),
        _pythia("EleutherAI/pythia-1b", 16, 2048),
        _pythia("EleutherAI/pythia-1.4b", 24, 2048),
        _pythia("EleutherAI/pythia-2.8b", 32, 2560),
        _pythia("EleutherAI/pythia-6.9b", 32, 4096, 50432),
        _pythia("EleutherAI/pythia-12b", 36, 5120, 50688),
    ),
    "qwen2.5": (
        _qwen("0.5B", 24, 896, 4864, (14, 2)),
        _qwen("1.5B", 28, 1536, 8960, (12, 2)),
        _qwen("3B", 36, 2048, 11008, (16, 2)),
        _qwen("7B", 28, 3584, 18944, (28, 4)),
        _qwen("14B", 48, 5120, 13824, (40, 8)),
        _qwen("32B", 64, 5120, 27648, (40, 8)),
        _qwen("72B", 80, 8192, 29568, (64, 8)),
    ),
    "llama3": (
        _llama("meta-llama/Llama-3.2-1B", 16, 2048, 8192, (32, 8), 128256, tied=True),
        _llama("meta-llama/Llama-3.2-3B", 28, 3072, 8192, (24, 8), 128256, tied=True, head_size=128),
        _llama("meta-llama/Llama-3.1-8B", 32, 4096, 14336, (32, 8), 128256, tied=False),
        _llama("meta-llama/Llama-3.1-70B", 80, 8192, 28672, (64, 8), 128256, tied=False),
        _llama("meta-llama/Llama-3.1-405B", 126, 16384, 53248, (128, 8), 128256, tied=False),
    ),
    "smollm2": (
        _llama("HuggingFaceTB/SmolLM2-135M", 30, 576, 1536, (9, 3), 49152, tied=True),
        _llama("HuggingFaceTB/SmolLM2-360M", 32, 960, 2560, (15, 5), 49152, tied=True),
        _llama("HuggingFaceTB/SmolLM2-1.7B", 24, 2048, 8192, (32, 32), 49152, tied=True),
    ),
}
SHORT = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M"}  # mskd's known names
MINILLM = {  # sizes in the names of MiniLLM's published checkpoints, whose shapes are the public models'
    "gpt2-1.5b": "openai-community/gpt2-xl",
    "gpt2-760m": "openai-community/gpt2-large",
    "gpt2-340m": "openai-community/gpt2-medium",
    "gpt2-120m": "openai-community/gpt2",
    **{f"opt-{size}": f"facebook/opt-{size}" for size in ("1.3b", "2.7b", "6.7b", "13b")},
}
VARIANTS = ("-instruct", "-deduped", "-v0")  # of a hub id, that leave the shape as it is


@dataclass(frozen=True)
class GpuFacts:
    """Dense 16-bit tensor-core peak in FLOP/s and memory bandwidth in bytes/s, as the maker's data sheets have them."""

    name: str
    peak: float
    bandwidth: float
    memory_gb: int


GPUS = (  # SXM boards
    GpuFacts("V100", 125e12, 0.9e12, 16),
    GpuFacts("A100", 312e12, 2.039e12, 80),
    GpuFacts("H100", 989e12, 3.35e12, 80),
    GpuFacts("H200", 989e12, 4.8e12, 141),
)

# Rows of a data set on the hub; of the demo's 300 its 50 test rows are never trained on.
ROWS = {"databricks/databricks-dolly-15k": 15011, "demo": 250}


def shape_of(source: str) -> Shape | None:
    """The shape of a hub id or known name, of its instruct and revised variants too; None for one not in the table."""
    name = SHORT.get(source, source).lower()
    if name.startswith("minillm/"):
        name = next((hub for end, hub in MINILLM.items() if name.endswith(end)), name).lower()
    name = name if "/" in name else f"/{name}"
    for variant in VARIANTS:
        name = name.removesuffix(variant)
    name = name.replace("/meta-llama-3.1", "/llama-3.1")
    found = [s for sizes in FAMILIES.values() for s in sizes if s.hub.lower().endswith(name)]
    return found[0] if len(found) == 1 else None


def family(name: str) -> tuple[Shape, ...]:
    """The sizes of a family, small to big. Raises ConfigError."""
    if name.lower() not in FAMILIES:
        near = difflib.get_close_matches(name.lower(), FAMILIES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"family {name!r} is not known{hint}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name.lower()]


def family_of(shape: Shape) -> str:
    """The family that a shape of the table belongs to. Raises ConfigError."""
    for name, sizes in FAMILIES.items():
        if any(s.hub == shape.hub for s in sizes):
            return name
    raise ConfigError(f"{shape.hub} is of no known family; known: {', '.join(FAMILIES)}")


def nearest(shapes: Sequence[Shape], parameters: float) -> Shape:
    """The shape whose size is nearest by ratio."""
    return min(shapes, key=lambda s: abs(math.log(s.parameters / parameters)))


def short(parameters: float) -> str:
    """A size in words: 1558M, 6.66B."""
    return f"{parameters / 1e9:.3g}B" if parameters >= 2e9 else f"{parameters / 1e6:.0f}M"
