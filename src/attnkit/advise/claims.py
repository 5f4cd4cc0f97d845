"""Often-repeated claims about attention, each beside the number that this package's arithmetic gives for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from attnkit.advise.families import read_config
from attnkit.advise.hardware import find
from attnkit.advise.model import Mixer, Model
from attnkit.advise.words import size
from attnkit.costs import Band, softmax
from attnkit.spec import Sizes

VERDICTS = {"R": "right", "W": "wrong", "M": "misleading", "U": "not checkable here"}
K128 = 131072


@dataclass(frozen=True)
class Claim:
    """One claim: which article makes it, what it says, the verdict, and the check in words with its numbers."""

    number: int
    article: str
    says: str
    verdict: str
    check: Callable[[], str]

    @property
    def verdicts(self) -> str:
        """The verdict in words."""
        return " / ".join(VERDICTS[letter] for letter in self.verdict.split("/"))


def _scores(n: int, itemsize: int = 2) -> int:
    """Bytes of the table of scores of one head of one layer."""
    return n * n * itemsize


def _heads(model: Model, groups: int) -> Model:
    return model.map(lambda mixer, i: replace(mixer, groups=groups))


def _latent(model: Model) -> Model:
    options = (("latent", 512), ("rotary", 64))
    return model.map(lambda m, i: Mixer("mla", m.heads, 1, m.key_size + 64, m.value_size, options))


def _expanded(model: Model) -> int:
    """Bytes of a token if all heads kept keys and values as wide as its values, as plain attention does."""
    (mixer,) = model.mixers
    wide = Mixer("softmax", mixer.heads, mixer.heads, mixer.value_size, mixer.value_size)
    return replace(model, layers=tuple(replace(layer, mixers=(wide,)) for layer in model.layers)).token_bytes()


def _saved(part: float, whole: float) -> str:
    return f"{1 - part / whole:.1%} less"


def _sizes() -> tuple[Model, Model]:
    """Llama-2-7B with its 32 KV heads, and with 8."""
    whole = read_config("llama-2-7b")
    return whole, _heads(whole, 8)


def _c1() -> str:
    causal = Band().visible_pairs(K128, K128) * 2
    return f"{size(_scores(K128))} for one head of one layer of one sequence in fp16, {size(causal)} of it causal"


def _c2() -> str:
    small, large = read_config("llama-3-8b"), read_config("llama-3-70b")
    pairs = [(model.token_bytes(), _heads(model, h).token_bytes()) for model, h in ((small, 32), (large, 64))]
    return "; ".join(f"{_saved(*pair)} ({pair[0]:,} bytes a token for {pair[1]:,})" for pair in pairs)


def _c4() -> str:
    v3 = read_config("deepseek-v3")
    grouped = 2 * 8 * 128 * 2 * len(v3.layers)
    cache, plain = v3.token_bytes(), _expanded(v3)
    return (
        f"DeepSeek-V3 keeps {cache:,} bytes a token: {_saved(cache, plain)} than as many full heads ({plain:,}), "
        f"{_saved(cache, grouped)} than 8 KV heads of 128 ({grouped:,})"
    )


def _c5() -> str:
    large, small = read_config("llama-3-70b"), read_config("llama-2-7b")
    cache = _latent(large).state_bytes(K128)
    middle = 13e9 * 2
    more = large.weight_bytes + cache
    return (
        f"70B of weights are {size(large.weight_bytes)} and a latent cache at 128k {size(cache)}: {more / middle:.1f} "
        f"times the {size(middle)} of weights of 13B; 7B with full heads needs {size(small.state_bytes(K128))} of cache"
    )


def _c6() -> str:
    full, grouped = _sizes()
    bytes_of = [size(model.state_bytes(8192)) for model in (full, grouped)]
    return f"the cache of 8,192 tokens is {bytes_of[0]} with 32 heads and {bytes_of[1]} with 8"


def _c7() -> str:
    full, grouped = _sizes()
    return (
        f"8 to 5 is {8 / 5:.1f} times the requests; the cache alone goes from {size(full.state_bytes(8192))} to "
        f"{size(grouped.state_bytes(8192))}, {full.token_bytes() / grouped.token_bytes():.0f} times where it bounds"
    )


def _c8() -> str:
    n, d = 4096, 64
    return f"memory goes from n x n to n: at n {n:,} a table of scores is {n // d} times the output, and more beyond"


def _c12() -> str:
    layer = Sizes(h=32, g=32, m=8192, n=8192, d=128, e=128)
    twice = replace(layer, m=16384, n=16384)
    flops = softmax(twice, mask=Band()).flops / softmax(layer, mask=Band()).flops
    cache = softmax(twice).state_bytes(16384) / softmax(layer).state_bytes(8192)
    return f"operations of attention grow {flops:.1f} times, its scores 4 times, the cache {cache:.0f} times"


def _c13() -> str:
    width = 4096
    token = 4 * width  # operations of attention a token and a key, for as many heads as fill the width
    rest = 8 * width**2 + 16 * width**2
    return f"attention itself is as much as all maps at {rest // token:,} tokens for a width of {width:,}, not at 512"


def _c14() -> str:
    model, machine = read_config("llama-3-8b"), find("h100-sxm")
    from attnkit.advise.roofline import decode, prefill

    step, prompt = decode(model, machine, 8192, 1), prefill(model, machine, 8192)
    return f"on an H100, Llama-3-8B at 8k: a step is bound by {step.bound}, a prompt by {prompt.bound}"


def _c18() -> str:
    n, w = K128, 4096
    pairs = Band(w).visible_pairs(n, n)
    return f"{pairs:,} pairs at 128k with a window of {w:,}, {pairs / n:.0f} a token"


def _c20() -> str:
    rows = (("smollm2-135m", "0.1B"), ("llama-3-8b", "8B"), ("deepseek-v3", "671B"))
    shown = ", ".join(f"{name} {read_config(model).token_bytes():,} bytes a token" for model, name in rows)
    return f"sizes do not decide, bytes do ({shown}); a model of 0.1B has grouped heads and one of 16B a latent"


def _c25() -> str:
    h = 32
    return f"with as many pseudo-heads as heads, P = H = {h}: {h * h:,} patterns a head, {h**3:,} in all: cubic"


def _c27() -> str:
    from attnkit.costs import delta

    one, two = (delta(Sizes(h=16, g=16, m=n, n=n, d=128, e=128)).flops for n in (8192, 16384))
    return f"twice the tokens take {two / one:.1f} times the operations, and the state stays as it is"


def _c33() -> str:
    return f"its three levels are 1 + 1/4 + 1/16 = {1 + 1 / 4 + 1 / 16} of full attention"


def _c37() -> str:
    machine = find("h100-sxm")
    balance = machine.rate("bfloat16") / machine.bandwidth
    cost = softmax(Sizes(h=32, g=8, m=1, n=8192, d=128, e=128), itemsize=2)
    return f"{cost.flops / cost.bytes:.1f} operations a byte with 4 queries a KV head, where an H100 has {balance:.0f}"


def _c38() -> str:
    return "NSA and MLA change weights, and so are trained; windows with sinks, int8 and pages are a switch here"


def _said(text: str) -> Callable[[], str]:
    return lambda: text


CLAIMS = (
    Claim(1, "S1", "A full attention matrix of 128k needs over 16 GB in fp16.", "M", _c1),
    Claim(2, "S1", "GQA cuts the KV cache by 30 to 40 % (Llama 3, Mistral 7B).", "W", _c2),
    Claim(3, "S1", "MLA was introduced in DeepSeek-V3.", "W", _said("DeepSeek-V2, May 2024, arXiv 2405.04434")),
    Claim(4, "S1", "MLA takes about 40 % less memory.", "M", _c4),
    Claim(5, "S1", "MLA lets 70B serve 128k on hardware reserved for 13B.", "W/M", _c5),
    Claim(6, "S1", "From MHA to GQA, a 7B goes from 8 GB to 5 GB a request at 8,192 tokens.", "M", _c6),
    Claim(7, "S1", "That is enough to double serving throughput.", "M", _c7),
    Claim(8, "S1", "FlashAttention gives 3 to 5 times the throughput and up to 20 times less memory.", "R/M", _c8),
    Claim(
        9,
        "S1",
        "FlashAttention's output is mathematically identical.",
        "M",
        _said("the same function, summed in another order: results differ in rounding, not bit by bit equal"),
    ),
    Claim(
        10,
        "S1",
        "Standard attention writes V back once more.",
        "W",
        _said("it writes scores, reads them, writes weights, reads them and V, and writes the output"),
    ),
    Claim(
        11,
        "S1",
        "Attention takes O(n^2) time and memory.",
        "M",
        lambda: f"time yes; memory only where scores are kept: {size(_scores(8192))} a head at 8k, none by tiles",
    ),
    Claim(12, "S1", "Twice the context takes four times the memory and compute.", "R", _c12),
    Claim(13, "S1", "Attention is more than half of inference beyond 512 tokens.", "M", _c13),
    Claim(14, "S1", "The bottleneck at scale is always the cache and bandwidth, not operations.", "M", _c14),
    Claim(
        15,
        "S1",
        "A = softmax(QK^T / sqrt(d)) V is the matrix of scores.",
        "W",
        _said("that is the output; the weights are the softmax alone"),
    ),
    Claim(
        16,
        "S1",
        "MiniMax-01 has sparse or sliding-window attention.",
        "W",
        lambda: f"its layers are {read_config('minimax-01').shape}: linear attention 7 to 1",
    ),
    Claim(
        17,
        "S1",
        "PaTH adds path-based positional memory.",
        "M",
        _said("a multiplicative position encoding that depends on the data, in place of rotary"),
    ),
    Claim(18, "S1", "Sliding windows cost O(n w).", "R", _c18),
    Claim(
        19,
        "S1",
        "attn_implementation=flash_attention_2 needs fp16 or bf16.",
        "R",
        _said("so it does; attnkit's own kernels take float32 as well"),
    ),
    Claim(20, "S1", "MHA below 7B, GQA from 7B to 30B, MLA from 30B on.", "M", _c20),
    Claim(21, "S1", "Many heads consistently beat one.", "U", _said("generally observed, and no arithmetic")),
    Claim(22, "S1", "Stars, and numbers of consultancies.", "U", _said("not about attention")),
    Claim(
        23,
        "S2",
        "In cross-attention queries come from the encoder, keys and values from the decoder.",
        "W",
        _said("the other way round: queries from the decoder, keys and values from the encoder"),
    ),
    Claim(
        24,
        "S2",
        "CASTLE lets tokens attend to future tokens.",
        "M",
        _said("keys of past tokens take in tokens up to the current one; nothing later is seen"),
    ),
    Claim(25, "S2", "IHA's patterns grow with the square of the heads.", "M", _c25),
    Claim(26, "S2", "Each pseudo-head of IHA combines all heads.", "R", _said("so it is defined")),
    Claim(27, "S2", "Linear attention goes from O(n^2) to O(n).", "R", _c27),
    Claim(
        28,
        "S2, S4",
        "MQA shares one set of keys and values, GQA is between, MLA is from DeepSeek-V2.",
        "R",
        lambda: ", ".join(
            f"{g} KV heads {_heads(read_config('llama-2-7b'), g).token_bytes():,} bytes a token" for g in (32, 8, 1)
        ),
    ),
    Claim(29, "S3", "sparsity=0.1 is the sparsity.", "W", _said("it is the part that is kept; the sparsity is 0.9")),
    Claim(30, "S3", "The sparse snippet reduces complexity.", "W", _said("it computes all n x n scores, then a top-k")),
    Claim(
        31,
        "S3",
        "The linear snippet is linear.",
        "W",
        _said("it builds an n x n matrix, and computes another function"),
    ),
    Claim(
        32,
        "S3",
        "Hierarchical attention was developed at DeepMind.",
        "U/W",
        _said("HAN is from CMU and Microsoft Research, H-Transformer-1D from Google Research"),
    ),
    Claim(33, "S3", "The hierarchical snippet is for efficiency.", "M", _c33),
    Claim(
        34,
        "S4",
        "N tokens interact N x N times; causally token k sees 1 to k.",
        "R",
        lambda: f"{Band().visible_pairs(1000, 1000):,} pairs of 1,000 tokens, causally",
    ),
    Claim(35, "S4", "DeepSeek-V2 introduced MLA, R1 made it popular.", "R", _said("arXiv 2405.04434, May 2024")),
    Claim(
        36,
        "S4",
        "FlashAttention is execution, MLA architecture.",
        "R",
        _said("one is a backend here and the other a mechanism, which is the same distinction"),
    ),
    Claim(37, "S4", "Decoding is often bound by memory bandwidth.", "R", _c37),
    Claim(38, "S0", "NSA and MLA are training techniques, the others training-free.", "R", _c38),
)


def table() -> str:
    """All claims as a Markdown table."""
    rows = [
        f"| {claim.number} | {claim.article} | {claim.says} | {claim.verdicts} | {claim.check()} |" for claim in CLAIMS
    ]
    return "\n".join(["| | article | claim | | what the arithmetic says |", "|---|---|---|---|---|", *rows]) + "\n"
