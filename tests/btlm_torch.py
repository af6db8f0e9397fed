"""BTLM in plain PyTorch: the truth that dpo.h's BTLM is tested against.

Written from the published facts about the architecture, not from dpo.h and not from anybody's
class: whatever dpo.h misunderstands, this file should not misunderstand in the same way. It is
checked in its turn against logits and gradients that others' implementations gave.

    y = x + attn(ln_1(x));  x = y + mlp(ln_2(y))    a pre-norm GPT-2 block, with these switches:

    position_embedding_type    "alibi": scores get -slope[head] * distance; "learned": a table, wpe
    alibi_scaling              {"factor": f}: slopes / f; {"train_seq_len": n}: slopes / max(1, T/n)
    activation_function        "swiglu": c_fc(x) * silu(c_fc2(x)); or an ordinary act(c_fc(x))
    mup_embeddings_scale       multiplies the embeddings' sum
    mup_output_alpha, mup_width_scale      their product multiplies the logits
    scale_attn_weights, mup_scale_qk_dot_by_d      q.k is divided by sqrt(D), by D, or by nothing
    scale_attn_by_inverse_layer_idx        and by the block's number, counted from 1
    tie_word_embeddings        the head is wte (the default), or lm_head.weight

Parameters carry the Hugging Face names and shapes; the projections are Conv1D: weight [in, out].
The slopes are a buffer, `transformer.relative_pe.slopes` [H, 1]: a checkpoint that has them
overrides the computed ones. Any floating dtype the module is cast to; no dropout, batch size 1.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

DEFAULTS = dict(
    n_positions=1024, n_embd=768, n_layer=12, n_head=12, n_inner=None, vocab_size=50257,
    activation_function="gelu_new", layer_norm_epsilon=1e-5, position_embedding_type="learned",
    mup_width_scale=1.0, mup_embeddings_scale=1.0, mup_output_alpha=1.0,
    mup_scale_qk_dot_by_d=False, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
    alibi_scaling=None, tie_word_embeddings=True)


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": tanh_gelu,
    "gelu_fast": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * torch.sigmoid(x),
    "relu": lambda x: torch.clamp(x, min=0),
}
ACTIVATIONS.update(gelu_python=ACTIVATIONS["gelu"], gelu_pytorch_tanh=tanh_gelu,
                   swish=ACTIVATIONS["silu"])


def alibi_slopes(n_heads):
    """A geometric series for a power of two; else that of the power below, filled up with every
    other slope of the power above. Computed in double."""
    def series(n):
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    below = 2 ** int(math.log2(n_heads))
    return series(below) + series(2 * below)[0::2][:n_heads - below]


class Conv1D(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Slopes(nn.Module):
    def __init__(self, n_heads):
        super().__init__()
        self.register_buffer("slopes", torch.tensor(alibi_slopes(n_heads)).view(n_heads, 1))


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.heads, size = c["n_head"], c["n_embd"] // c["n_head"]
        self.divisor = 1.0
        if c["scale_attn_weights"]:
            self.divisor = size if c["mup_scale_qk_dot_by_d"] else math.sqrt(size)
        if c["scale_attn_by_inverse_layer_idx"]:
            self.divisor *= layer + 1
        self.c_attn = Conv1D(c["n_embd"], 3 * c["n_embd"])
        self.c_proj = Conv1D(c["n_embd"], c["n_embd"])

    def forward(self, x, bias):
        """x [T, C]; bias [H, T, T], minus infinity above the diagonal."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(0, 1)       # [H, T, D]
                   for y in self.c_attn(x).chunk(3, dim=-1))
        p = torch.softmax(q @ k.transpose(1, 2) / self.divisor + bias, dim=-1)
        return self.c_proj((p @ v).transpose(0, 1).flatten(1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        inner = c["n_inner"] or 4 * c["n_embd"]
        self.act = ACTIVATIONS.get(c["activation_function"])        # None: swiglu
        self.c_fc = Conv1D(c["n_embd"], inner)
        if c["activation_function"] == "swiglu":
            self.c_fc2 = Conv1D(c["n_embd"], inner)
        self.c_proj = Conv1D(inner, c["n_embd"])

    def forward(self, x):
        h = self.c_fc(x)
        return self.c_proj(self.act(h) if self.act else h * F.silu(self.c_fc2(x)))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c["n_embd"], eps=c["layer_norm_epsilon"])
        self.attn = Attention(c, layer)
        self.ln_2 = nn.LayerNorm(c["n_embd"], eps=c["layer_norm_epsilon"])
        self.mlp = MLP(c)

    def forward(self, x, bias):
        x = x + self.attn(self.ln_1(x), bias)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.wte = nn.Embedding(c["vocab_size"], c["n_embd"])
        if c["position_embedding_type"] == "learned":
            self.wpe = nn.Embedding(c["n_positions"], c["n_embd"])
        else:
            self.relative_pe = Slopes(c["n_head"])
        self.h = nn.ModuleList(Block(c, i) for i in range(c["n_layer"]))
        self.ln_f = nn.LayerNorm(c["n_embd"], eps=c["layer_norm_epsilon"])

    def attention_bias(self, T, like):
        at = torch.arange(T, device=like.device)
        distance = (at[:, None] - at[None, :]).to(like.dtype)                # query - key
        bias = torch.zeros_like(distance).masked_fill(distance < 0, -math.inf)
        if self.c["position_embedding_type"] == "learned":
            return bias.expand(self.c["n_head"], T, T)
        scaling = self.c["alibi_scaling"] or {}
        factor = scaling.get("factor", 1.0)
        if "train_seq_len" in scaling:
            factor = max(1.0, T / scaling["train_seq_len"])
        return bias - (self.relative_pe.slopes / factor)[:, :, None] * distance.abs()

    def forward(self, tokens):
        x = self.wte(tokens)
        if self.c["position_embedding_type"] == "learned":
            x = x + self.wpe.weight[:len(tokens)]
        x = x * self.c["mup_embeddings_scale"]
        bias = self.attention_bias(len(tokens), x)
        for block in self.h:
            x = block(x, bias)
        return self.ln_f(x)


class BTLM(nn.Module):
    def __init__(self, config):
        """config: keys as in Hugging Face's config.json; absent ones get their defaults."""
        super().__init__()
        c = {**DEFAULTS, **{k: v for k, v in config.items() if k in DEFAULTS}}
        if c["activation_function"] not in (*ACTIVATIONS, "swiglu"):
            raise ValueError("unknown activation_function " + repr(c["activation_function"]))
        if c["position_embedding_type"] not in ("alibi", "learned"):
            raise ValueError("unknown position type " + repr(c["position_embedding_type"]))
        self.c = c
        self.transformer = Transformer(c)
        if not c["tie_word_embeddings"]:
            self.lm_head = nn.Linear(c["n_embd"], c["vocab_size"], bias=False)

    def forward(self, tokens):
        """tokens: integer [T]; returns the logits [T, V]."""
        head = self.transformer.wte if self.c["tie_word_embeddings"] else self.lm_head
        scale = self.c["mup_output_alpha"] * self.c["mup_width_scale"]
        return self.transformer(tokens) @ head.weight.T * scale

    def load(self, tensors):
        """tensors: name -> tensor, as in a checkpoint. What must be there is, and nothing else."""
        tensors = dict(tensors)
        if self.c["tie_word_embeddings"]:
            tensors.pop("lm_head.weight", None)
        if self.c["position_embedding_type"] == "alibi":
            computed = self.transformer.relative_pe.slopes
            tensors.setdefault("transformer.relative_pe.slopes", computed)
        self.load_state_dict(tensors)
        return self
