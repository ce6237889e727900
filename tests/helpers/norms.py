"""QK norm and RoPE as the stock models compute them, an fp64 oracle, and checks against both."""

from dataclasses import dataclass

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import MochiRMSNorm, RMSNorm
from testing import assert_within_budget
from torch import Tensor

from longreel.kernels.norm_rope import norm_rope

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6


@dataclass(frozen=True)
class NormCase:
    """A family's queries: batch 2, views of one projection of q, k and v."""

    family: str
    dtype: torch.dtype = FP32
    tokens: int = 13
    video: int = 13  # tokens that are rotated
    text: int = 0  # tokens that follow, of another projection and norm
    heads: int = 3
    head_dim: int = 16
    affine: bool = True

    @property
    def options(self) -> dict:
        return {
            "eps": EPS,
            "across_heads": self.family == "wan",
            "round_before_weight": self.family == "hunyuan",
        }

    def make(self, device="cpu") -> dict[str, Tensor | None]:
        """The tensors of `norm_rope` by name, tables as the stock models lay them out."""

        def projected(tokens: int) -> Tensor:
            std = torch.rand(2, tokens, 1, 1, 1, device=device) * 4
            shape = (2, tokens, 3, self.heads, self.head_dim)
            return (torch.randn(shape, device=device) * std).to(self.dtype)[:, :, 1]

        def weight() -> Tensor:
            size = self.head_dim * (self.heads if self.family == "wan" else 1)
            return (1 + 0.3 * torch.randn(size, device=device)).to(self.dtype)

        per_head = (self.heads,) if self.family == "mochi" else ()
        angles = 50 * torch.randn(self.video, *per_head, self.head_dim // 2, device=device)
        angles = angles.to(torch.promote_types(self.dtype, FP32))
        cos, sin = angles.cos(), angles.sin()
        if self.family != "mochi":  # each value twice, for a pair
            cos, sin = (t.repeat_interleave(2, dim=-1)[..., 0::2] for t in (cos, sin))
        return {
            "x": projected(self.tokens),
            "weight": weight() if self.affine else None,
            "cos": cos,
            "sin": sin,
            "text": projected(self.text) if self.text else None,
            "text_weight": weight() if self.text and self.affine else None,
        }


def stock(case: NormCase, x, weight, cos, sin, text, text_weight) -> Tensor:
    """The modules and the arithmetic of the family's processor in diffusers."""
    x = _stock_norm(case, x, weight)
    video, rest = x[:, : case.video], x[:, case.video :]
    if case.family == "hunyuan":
        tables = tuple(t.repeat_interleave(2, dim=-1) for t in (cos, sin))
        video = apply_rotary_emb(video, tables, sequence_dim=1)
    elif case.family == "mochi":  # `apply_rotary_emb` inside of MochiAttnProcessor2_0
        even, odd = video[..., 0::2].float(), video[..., 1::2].float()
        turned = (even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)
        video = torch.stack(turned, dim=-1).flatten(-2)
    else:  # inside of WanAttnProcessor
        first, second = video.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.empty_like(video)
        turned[..., 0::2] = first * cos[:, None] - second * sin[:, None]
        turned[..., 1::2] = first * sin[:, None] + second * cos[:, None]
        video = turned.type_as(video)
    parts = [video, rest]
    if text is not None:
        parts.append(_stock_norm(case, text, text_weight))
    return torch.cat(parts, dim=1)


def _stock_norm(case: NormCase, x: Tensor, weight: Tensor | None) -> Tensor:
    if case.family == "wan":
        x = x.flatten(2)
    cls = {"hunyuan": RMSNorm, "mochi": MochiRMSNorm, "wan": torch.nn.RMSNorm}[case.family]
    norm = cls(x.shape[-1], eps=EPS, elementwise_affine=weight is not None).to(x)
    if weight is not None:
        norm.weight.data.copy_(weight)
        norm.requires_grad_(False)
    x = norm(x)
    return x.unflatten(2, (case.heads, -1)) if case.family == "wan" else x


def exact(case: NormCase, x, weight, cos, sin, text, text_weight) -> Tensor:
    """The formulas in fp64, with rotations as complex products."""

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        flat = x.flatten(2) if case.family == "wan" else x
        flat = flat / (flat.square().sum(-1, keepdim=True) / flat.shape[-1] + EPS).sqrt()
        return (flat if weight is None else flat * weight.double()).view(x.shape)

    x = normed(x, weight)
    turns = torch.complex(cos.double(), sin.double())
    turns = turns if turns.ndim == 3 else turns[:, None]
    pairs = torch.view_as_complex(x[:, : case.video].unflatten(-1, (-1, 2)).contiguous())
    parts = [torch.view_as_real(pairs * turns).flatten(-2), x[:, case.video :]]
    if text is not None:
        parts.append(normed(text, text_weight))
    return torch.cat(parts, dim=1)


def check_norm_rope(case: NormCase, backend: str, device="cpu") -> None:
    """Within a rounding of the stock modules, and within twice their error, with gradients."""
    inputs = case.make(device)
    total = case.tokens + case.text
    grad = torch.randn(2, total, case.heads, case.head_dim, device=device).to(case.dtype)
    leaves = ("x", "text") if case.text else ("x",)

    def run(compute, dtype: torch.dtype) -> dict[str, Tensor]:
        own = dict(inputs)
        for name in leaves:
            # Views again, with the strides of a projection's part.
            wide = own[name].new_zeros(*own[name].shape[:2], 3, *own[name].shape[2:]).to(dtype)
            view = wide[:, :, 1].copy_(own[name]).detach()
            own[name] = view.requires_grad_()
        out = compute(**own)
        grads = torch.autograd.grad(out, [own[name] for name in leaves], grad.to(dtype))
        return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))

    got = run(lambda **own: norm_rope(**own, **case.options, backend=backend), case.dtype)
    same = run(lambda **own: stock(case, **own), case.dtype)
    oracle = run(lambda **own: exact(case, **own), torch.float64)
    assert got["out"].is_contiguous() and got["out"].dtype == case.dtype
    for name, expected in oracle.items():
        assert_within_budget(name, got[name], same[name], expected)
    if backend == "reference" and device == "cpu":
        assert torch.equal(got["out"], same["out"])
    # Where a last bit of the mean square tips a rounding over, it may tip those after it too; a
    # normed pair's reaches both of its rotated channels.
    pairs = same["out"].double().unflatten(-1, (-1, 2))
    step = torch.finfo(case.dtype).eps * pairs.norm(dim=-1, keepdim=True)
    difference = (got["out"].double().unflatten(-1, (-1, 2)) - pairs).abs()
    assert (difference <= 3 * step).all(), (difference / step).max()
    if case.dtype != FP32:
        assert (difference > 0).double().mean() < 0.01


NORM_CASES = {
    "hunyuan, one stream": NormCase("hunyuan", BF16, tokens=17, video=13),
    "hunyuan, two streams": NormCase("hunyuan", BF16, text=5),
    "hunyuan, fp32": NormCase("hunyuan", tokens=17, video=13),
    "hunyuan, no weight": NormCase("hunyuan", BF16, text=5, affine=False),
    "mochi": NormCase("mochi", BF16, text=5, head_dim=32),
    "mochi, fp16": NormCase("mochi", FP16, text=1, head_dim=32),
    "wan": NormCase("wan", BF16),
    "wan, fp16": NormCase("wan", FP16, heads=2, head_dim=32),
    "wan, fp32, one head": NormCase("wan", heads=1),
    "one token": NormCase("hunyuan", BF16, tokens=1, video=1, text=1, heads=1),
    "one rotated": NormCase("hunyuan", BF16, video=1),
    "full width": NormCase("hunyuan", BF16, text=3, heads=5, head_dim=128),
}
