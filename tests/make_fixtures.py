#!/usr/bin/env python3
"""Make the committed fixtures: tiny random models and what PyTorch computes from them.

    python tests/make_fixtures.py [OUT_DIR]    (default tests/fixtures; needs tests/setup_venv.sh)

The truth is transformers' GPTNeoXForCausalLM and, for BTLM, btlm_torch.py beside this file. Weights
are drawn at random (fixed seeds), rounded to the dtype they are stored in, and everything is then
computed from the rounded values in double precision (but the rotary tables in fp32, as transformers
always does). The script also computes everything in fp32 and prints how far that is from the truth:
the tests' tolerances are to be reasoned from these distances.

Per case two container files (the layout is described in dpo.h):

NAME.model.bin (kind 1): config, tensors under their Hugging Face names, and a tokenizer that is
there to be complete: id 0 is the end of text, ids from 1 are the bytes from 32 on; the last three
rows of the vocabulary belong to no token.

NAME.expect.bin (kind 5):
    tokens           u32 [T]      one sequence
    logits           f32 [T, V]   its logits at every position
    batch/...                     a batch (below): language modelling (empty prompt, scored from
                                  token 1), a pair, and three branches, of which the first has one
                                  token (the model's own choice) and the second is scored from its
                                  token 2 on
    batch/logp       f64 [n]      per branch: sum over scored tokens of log p(token | all before it)
    batch/n_scored   u32 [n]      how many those are
    batch/greedy     u32 [n]      1 if each of them is the argmax
    batch/coef       f32 [n]      random signed coefficients
    grad/<tensor>    f32          gradient of sum over branches of coef * logp, in the shape and
                                  layout in which the tensor is stored; a tied head's two uses are
                                  summed; slopes have none
    dpo/...                       a batch of pairs, chosen first, for ten steps of DPO (sigmoid
                                  loss, mean over the pairs; the reference is the initial model)
    dpo/settings     f64 [4]      beta, learning rate, max_grad_norm (0: no clipping), weight decay;
                                  AdamW, betas 0.9 0.999, eps 1e-8, constant rate. Tensors of two
                                  dimensions decay. The blocks' matrices (not their biases) learn
                                  at mup_width_scale times the rate.
    dpo/loss         f64 [10]     before each update
    dpo/rewards      f64 [10, n]  beta * (logp - reference logp) per branch, before each update
    dpo/grad_norm    f64 [10]     global norm before clipping
    dpo/logp         f64 [n]      after the tenth update
  and in some cases
    sft/...                       a batch of one branch each, for ten steps of SFT: minus the sum of
                                  all logp, over the number of all scored tokens
    sft/settings     f64 [4]      learning rate, max_grad_norm, alpha, eps; RMSprop, no momentum
    sft/loss, sft/grad_norm  f64 [10]

A batch of prompts with their branches, under a prefix P:
    P/prompts        u32 [examples]   number of tokens of each prompt (may be 0)
    P/examples       u32 [n, 3]       per branch, in order: its example, its first scored token (0:
                                      the branch's first), its number of tokens
    P/tokens         u32              per example: the prompt's tokens, then each branch's
A branch's logp comes from a pass of its own over prompt + branch.

losses.expect.bin (kind 5), the loss functions with autograd's derivatives:
    losses/rows      f64 [n, 7]   logp of chosen and rejected under the policy, the same under the
                                  reference, tokens of chosen and rejected, beta
    losses/<name>    f64 [n, 3]   the row's own loss, its derivatives by the policy's logp of chosen
                                  and of rejected; <name>: sigmoid, sigmoid_smooth (label smoothing
                                  0.1), ipo (logp per token), ipo_sum, hinge
"""
import json
import math
import os
import sys

import numpy as np
import torch
from torch.nn import functional as F

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [TESTS, os.path.dirname(TESTS)]
os.environ["HF_HUB_OFFLINE"] = "1"
from btlm_torch import BTLM, alibi_slopes                               # noqa: E402
from convert import write_container                                     # noqa: E402
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM              # noqa: E402

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PLAIN, LINEAR, CONV1D = 0, 1, 2
STEPS = 10

NEOX = dict(num_hidden_layers=2, max_position_embeddings=32, rotary_pct=0.25, rotary_emb_base=10000,
            hidden_act="gelu", use_parallel_residual=True, attention_bias=True,
            tie_word_embeddings=False, layer_norm_eps=1e-5, bos_token_id=0, eos_token_id=0)
BTLM_ = dict(n_layer=2, n_positions=32, layer_norm_epsilon=1e-5)


def case(name, seed, config, dtype="f32", norm_dtype=None, stored_slopes=False, lr=2e-3, clip=0.0,
         decay=0.0, beta=0.1, sft=None):
    """stored_slopes: the checkpoint carries slopes (not quite the usual ones, so that using them
    shows); sft: None or (learning rate, max_grad_norm).

    AdamW divides by the gradient's own size, so that an element whose gradient is rounding noise
    takes a full step all the same, and a ReLU may fall on either side of its corner. With most
    seeds ten steps in fp32 stay within 1e-5 of the truth, with some not: hence the seeds."""
    return dict(name=name, seed=seed, config=config, dtype=dtype, norm_dtype=norm_dtype or dtype,
                stored_slopes=stored_slopes, lr=lr, clip=clip, decay=decay, beta=beta, sft=sft)


CASES = [
    case("neox_parallel", 2001, {**NEOX,
         "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 47,
         "intermediate_size": 45}, sft=(2e-4, 0.0)),
    case("neox_sequential", 1001, {**NEOX,
         "hidden_size": 30, "num_attention_heads": 3, "vocab_size": 43,
         "intermediate_size": 41, "rotary_pct": 1.0, "rotary_emb_base": 500,
         "hidden_act": "gelu_new", "use_parallel_residual": False}, clip=0.5),
    case("neox_tied", 1002, {**NEOX,
         "hidden_size": 20, "num_attention_heads": 2, "vocab_size": 41,
         "intermediate_size": 37, "rotary_pct": 0.4, "hidden_act": "quick_gelu",
         "attention_bias": False, "tie_word_embeddings": True, "layer_norm_eps": 1e-2}, decay=0.5),
    case("neox_f16", 1003, {**NEOX,
         "hidden_size": 12, "num_attention_heads": 1, "vocab_size": 49,
         "intermediate_size": 29, "rotary_pct": 0.5, "hidden_act": "gelu_fast",
         "use_parallel_residual": False}, dtype="f16", clip=0.3),
    case("neox_bf16", 1004, {**NEOX,
         "hidden_size": 28, "num_attention_heads": 4, "vocab_size": 45,
         "intermediate_size": 33, "rotary_pct": 0.6, "hidden_act": "silu"}, dtype="bf16",
         norm_dtype="f32", lr=1e-3, beta=0.3),
    case("btlm_alibi_swiglu", 1005, {**BTLM_,
         "n_embd": 24, "n_head": 3, "vocab_size": 51, "n_inner": 31,
         "activation_function": "swiglu", "position_embedding_type": "alibi",
         "mup_embeddings_scale": 5.5, "mup_output_alpha": 3.1, "mup_width_scale": 0.25,
         "mup_scale_qk_dot_by_d": True}, lr=4e-3, clip=0.4, sft=(4e-4, 0.8)),
    case("btlm_stored_slopes", 1006, {**BTLM_,
         "n_embd": 27, "n_head": 9, "vocab_size": 44, "n_inner": 25,
         "activation_function": "swiglu", "position_embedding_type": "alibi",
         "mup_embeddings_scale": 2.5, "mup_output_alpha": 1.5, "mup_width_scale": 0.5},
         dtype="bf16", stored_slopes=True, clip=0.5),
    case("btlm_learned_gelu", 1007, {**BTLM_,
         "n_embd": 20, "n_head": 5, "vocab_size": 46,
         "activation_function": "gelu", "position_embedding_type": "learned",
         "mup_embeddings_scale": 4.0, "mup_scale_qk_dot_by_d": True}, decay=0.5),
    case("btlm_alibi_scaled", 2003, {**BTLM_,
         "n_embd": 16, "n_head": 2, "vocab_size": 60, "n_inner": 23,
         "activation_function": "relu", "position_embedding_type": "alibi",
         "scale_attn_weights": False, "alibi_scaling": {"type": "linear", "factor": 2.5},
         "layer_norm_epsilon": 1e-2}, lr=1e-3, clip=0.3),
    case("btlm_untied", 1009, {**BTLM_,
         "n_embd": 14, "n_head": 7, "vocab_size": 42, "n_inner": 27,
         "activation_function": "gelu_new", "position_embedding_type": "learned",
         "mup_embeddings_scale": 1.5, "mup_output_alpha": 1.3, "mup_width_scale": 0.8,
         "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}, dtype="f16"),
]


# --- models --------------------------------------------------------------------------------------

class Truth:
    """A model under the names that its tensors have in files."""

    def __init__(self, case, dtype, tensors=None):
        self.case, self.neox = case, "hidden_size" in case["config"]
        if self.neox:
            config = GPTNeoXConfig(**case["config"])
            config._attn_implementation = "sdpa"        # the eager one computes its softmax in fp32
            self.module = GPTNeoXForCausalLM(config).float()
        else:
            self.module = BTLM(case["config"])
        own = self.state()
        if tensors is not None:
            with torch.no_grad():
                for name, value in tensors.items():
                    own[name].copy_(value)
        self.module.to(dtype)

    def file_name(self, name):
        return "embed_out.weight" if name == "lm_head.weight" and self.neox else name

    def state(self):
        tied = self.case["config"].get("tie_word_embeddings", not self.neox)
        return {self.file_name(name): value for name, value in self.module.state_dict().items()
                if not (tied and name == "lm_head.weight")}

    def parameters(self):
        return {self.file_name(name): p for name, p in self.module.named_parameters()}

    def logits(self, tokens):
        tokens = torch.tensor(tokens)
        return self.module(tokens[None]).logits[0] if self.neox else self.module(tokens)


def random_tensors(case, rng):
    """Noise in which every switch shows: attention far from uniform, logits of about unit size,
    norms and biases that matter. Returns the values, rounded to the stored dtypes, and those."""
    tensors, dtypes = {}, {}
    for name, like in Truth(case, torch.float32).state().items():
        shape, noise = tuple(like.shape), torch.tensor(rng.standard_normal(tuple(like.shape)))
        norm = any(word in name for word in ("layernorm", "layer_norm", ".ln_"))
        if name.endswith("relative_pe.slopes"):
            if not case["stored_slopes"]:
                continue
            odd = torch.arange(shape[0]).view(shape) % 2
            value = torch.tensor(alibi_slopes(shape[0])).view(shape) * (1 + 0.25 * odd)
        elif name.endswith(".bias"):
            value = 0.25 * noise
        elif norm:
            value = 1 + 0.3 * noise
        elif "embed_in" in name or "wte" in name or "wpe" in name:
            value = 0.3 * noise
        elif "embed_out" in name or "lm_head" in name:
            value = 1.2 / math.sqrt(shape[1]) * noise
        else:
            fan_in = shape[1] if "gpt_neox" in name else shape[0]
            gain = 2.0 if "c_attn" in name or "query_key_value" in name else 1.2
            value = gain / math.sqrt(fan_in) * noise
        dtypes[name] = case["norm_dtype"] if norm else case["dtype"]
        tensors[name] = value.to(DTYPES[dtypes[name]]).float()
    return tensors, dtypes


def canonical_config(case):
    """Hugging Face's keys, said in dpo.h's."""
    c = case["config"]
    if "hidden_size" in c:
        head = c["hidden_size"] // c["num_attention_heads"]
        return dict(
            arch="gpt_neox", vocab_size=c["vocab_size"],
            context_length=c["max_position_embeddings"], d_model=c["hidden_size"],
            n_layers=c["num_hidden_layers"], n_heads=c["num_attention_heads"],
            d_ff=c["intermediate_size"], position="rotary",
            rotary_dims=int(head * c["rotary_pct"]), rotary_base=float(c["rotary_emb_base"]),
            activation=c["hidden_act"], parallel_residual=c["use_parallel_residual"],
            attention_bias=c["attention_bias"], tied_head=c["tie_word_embeddings"],
            norm_epsilon=c["layer_norm_eps"], embedding_scale=1.0, logit_scale=1.0,
            attention_scale=head ** -0.5, attention_scale_by_layer=False, alibi_factor=1.0,
            mup_width_scale=1.0, bos_id=0, eos_id=0)
    c = {**BTLM(c).c}
    head = c["n_embd"] // c["n_head"]
    attention_scale = 1.0 / head if c["mup_scale_qk_dot_by_d"] else head ** -0.5
    return dict(
        arch="btlm", vocab_size=c["vocab_size"], context_length=c["n_positions"],
        d_model=c["n_embd"], n_layers=c["n_layer"], n_heads=c["n_head"],
        d_ff=c["n_inner"] or 4 * c["n_embd"], position=c["position_embedding_type"],
        rotary_dims=0, rotary_base=10000.0, activation=c["activation_function"],
        parallel_residual=False, attention_bias=True, tied_head=c["tie_word_embeddings"],
        norm_epsilon=c["layer_norm_epsilon"], embedding_scale=c["mup_embeddings_scale"],
        logit_scale=c["mup_output_alpha"] * c["mup_width_scale"],
        attention_scale=attention_scale if c["scale_attn_weights"] else 1.0,
        attention_scale_by_layer=c["scale_attn_by_inverse_layer_idx"],
        alibi_factor=(c["alibi_scaling"] or {}).get("factor", 1.0),
        mup_width_scale=c["mup_width_scale"], bos_id=0, eos_id=0)


# --- files ---------------------------------------------------------------------------------------

def entry(name, array, dtype, layout=PLAIN):
    array = np.ascontiguousarray(array, dtype={"f32": "<f4", "f64": "<f8", "u32": "<u4"}[dtype])
    return name, dtype, array.shape, layout, array.tobytes()


def layout_of(name, shape):
    if len(shape) < 2 or any(word in name for word in ("embed_in", "wte", "wpe", "slopes")):
        return PLAIN
    return CONV1D if ".h." in name else LINEAR


def model_entries(case, tensors, dtypes):
    config = json.dumps(canonical_config(case)).encode()
    yield "config", "u8", (len(config),), PLAIN, config
    for name, value in tensors.items():
        data = value.to(DTYPES[dtypes[name]]).contiguous().view(torch.uint8).numpy().tobytes()
        yield name, dtypes[name], tuple(value.shape), layout_of(name, value.shape), data
    n = case["config"]["vocab_size"] - 3
    info = json.dumps({"n_tokens": n, "nfc": False, "unicode": "14.0.0"}).encode()
    end_of_text = b"<|endoftext|>"
    byte_ids = [i - 31 if 32 <= i < 32 + n - 1 else 0xFFFFFFFF for i in range(256)]
    yield "tokenizer/info", "u8", (len(info),), PLAIN, info
    yield entry("tokenizer/token_ends", len(end_of_text) + np.arange(n), "u32")
    token_bytes = end_of_text + bytes(range(32, 32 + n - 1))
    yield "tokenizer/token_bytes", "u8", (len(token_bytes),), PLAIN, token_bytes
    yield entry("tokenizer/byte_ids", byte_ids, "u32")
    yield entry("tokenizer/added", [[0, 1]], "u32")


def batch_entries(prefix, batch):
    examples = [(i, first, len(branch)) for i, (_, branches) in enumerate(batch)
                for branch, first in branches]
    tokens = [t for prompt, branches in batch for t in sum((b for b, _ in branches), prompt)]
    yield entry(prefix + "/prompts", [len(prompt) for prompt, _ in batch], "u32")
    yield entry(prefix + "/examples", examples, "u32")
    yield entry(prefix + "/tokens", tokens, "u32")


# --- what is to be expected ----------------------------------------------------------------------

def score(model, batch):
    """Per branch: logp (a tensor), number of scored tokens, whether all were the argmax."""
    logps, counts, greedy = [], [], []
    for prompt, branches in batch:
        for branch, first in branches:
            at = torch.arange(len(prompt) + first, len(prompt) + len(branch))
            tokens = torch.tensor(prompt + branch)
            rows = model.logits(prompt + branch)[at - 1]
            logps.append(torch.log_softmax(rows, -1)[torch.arange(len(at)), tokens[at]].sum())
            counts.append(len(at))
            greedy.append(int(bool((rows.argmax(-1) == tokens[at]).all())))
    return torch.stack(logps), counts, greedy


def groups(model, lr, decay):
    width_scale = canonical_config(model.case)["mup_width_scale"]
    out = []
    for name, p in model.parameters().items():
        matrix = p.dim() == 2
        rate = lr * (width_scale if matrix and ".h." in name else 1.0)
        out.append(dict(params=[p], lr=rate, weight_decay=decay if matrix else 0.0))
    return out


def train(model, optimizer, loss_of, clip):
    """Ten steps; what loss_of() returns beside the loss, and the gradients' norms."""
    parameters, log, norms = list(model.parameters().values()), [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, metrics = loss_of()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf).item())
        optimizer.step()
        log.append((loss.item(), metrics))
    return [loss for loss, _ in log], [metrics for _, metrics in log], norms


def expect(case, tensors, inputs, dtype):
    """name -> array, all in the given precision."""
    out = {}
    model = Truth(case, dtype, tensors)
    out["logits"] = model.logits(inputs["tokens"]).detach().double().numpy()
    logp, out["batch/n_scored"], out["batch/greedy"] = score(model, inputs["batch"])
    (logp * torch.tensor(inputs["coef"]).to(dtype)).sum().backward()
    out["batch/logp"] = logp.detach().double().numpy()
    for name, p in model.parameters().items():
        out["grad/" + name] = p.grad.double().numpy()

    model = Truth(case, dtype, tensors)
    beta = case["beta"]
    with torch.no_grad():
        reference = score(model, inputs["dpo"])[0]

    def dpo_loss():
        rewards = beta * (score(model, inputs["dpo"])[0] - reference)
        loss = -F.logsigmoid(rewards[0::2] - rewards[1::2]).mean()
        return loss, rewards.detach().double().numpy()

    optimizer = torch.optim.AdamW(groups(model, case["lr"], case["decay"]))
    out["dpo/loss"], out["dpo/rewards"], out["dpo/grad_norm"] = train(
        model, optimizer, dpo_loss, case["clip"])
    out["dpo/logp"] = score(model, inputs["dpo"])[0].detach().double().numpy()

    if case["sft"]:
        model = Truth(case, dtype, tensors)

        def sft_loss():
            logp, counts, _ = score(model, inputs["sft"])
            return -logp.sum() / sum(counts), None

        optimizer = torch.optim.RMSprop(groups(model, case["sft"][0], 0.0), alpha=0.99, eps=1e-8)
        out["sft/loss"], _, out["sft/grad_norm"] = train(
            model, optimizer, sft_loss, case["sft"][1])
    return {name: np.asarray(value) for name, value in out.items()}


def make_inputs(case, tensors, rng):
    vocab = case["config"]["vocab_size"]

    def some(n):
        return [int(t) for t in rng.randint(0, vocab, n)]

    prompt = some(7)
    with torch.no_grad():
        last = Truth(case, torch.float64, tensors).logits(prompt)[-1]
    top = torch.topk(last, 2)
    assert top.values[0] - top.values[1] > 1e-3, "the argmax hangs on a rounding: change the seed"
    tokens = some(10) + [vocab - 1]
    tokens[5] = tokens[2]                               # the same token at two places
    return dict(
        tokens=tokens,
        batch=[([], [(some(9), 1)]),
               (some(5), [(some(4), 0), (some(6), 0)]),
               (prompt, [([int(top.indices[0])], 0), (some(5), 2), (some(3), 0)])],
        coef=rng.uniform(-1.5, 1.5, 6).astype(np.float32),
        dpo=[(some(4), [(some(3), 0), (some(5), 0)]),
             (some(1), [(some(5), 0), (some(2), 0)]),
             (some(6), [(some(4), 0), (some(4), 0)])],
        sft=[([], [(some(8), 1)]), (some(3), [(some(5), 0)]), (some(6), [(some(2), 0)])])


def expect_entries(case, inputs, truth):
    yield entry("tokens", inputs["tokens"], "u32")
    yield entry("logits", truth["logits"], "f32")
    yield from batch_entries("batch", inputs["batch"])
    yield entry("batch/logp", truth["batch/logp"], "f64")
    yield entry("batch/n_scored", truth["batch/n_scored"], "u32")
    yield entry("batch/greedy", truth["batch/greedy"], "u32")
    yield entry("batch/coef", inputs["coef"], "f32")
    for name, value in truth.items():
        if name.startswith("grad/"):
            yield entry(name, value, "f32", layout_of(name[len("grad/"):], value.shape))
    yield from batch_entries("dpo", inputs["dpo"])
    settings = [case["beta"], case["lr"], case["clip"], case["decay"]]
    yield entry("dpo/settings", settings, "f64")
    for name in ("dpo/loss", "dpo/rewards", "dpo/grad_norm", "dpo/logp"):
        yield entry(name, truth[name], "f64")
    if case["sft"]:
        yield from batch_entries("sft", inputs["sft"])
        yield entry("sft/settings", [*case["sft"], 0.99, 1e-8], "f64")
        yield entry("sft/loss", truth["sft/loss"], "f64")
        yield entry("sft/grad_norm", truth["sft/grad_norm"], "f64")


def loss_entries(rng):
    rows = []
    for beta in (0.05, 0.1, 0.5, 1.0):
        for _ in range(6):
            logps = -rng.uniform(1, 200, 4)
            rows.append([*logps, rng.randint(1, 60), rng.randint(1, 60), beta])
        rows.append([-20.0, -30.0, -20.0, -30.0, 7, 9, beta])           # policy and reference agree
        rows.append([-20.0, -30.0, -20.0 - 1.01 / beta, -30.0, 7, 9, beta])    # past hinge's corner
        rows.append([-20.0, -30.0, -20.0 - 0.51 / beta, -30.0, 1, 1, beta])    # near IPO's minimum
        for margin in (40.0, 1000.0, -40.0, -1000.0):
            rows.append([-1500.0 + margin, -1500.0, -1400.0, -1400.0, 11, 13, beta])
    rows.append([-20.0, -30.0, -22.0, -30.0, 7, 9, 0.5])                       # on that corner
    rows = torch.tensor(rows, dtype=torch.float64)

    def smooth(z, epsilon):
        return -(1 - epsilon) * F.logsigmoid(z) - epsilon * F.logsigmoid(-z)

    def value(name, chosen, rejected):
        ref_chosen, ref_rejected, n_chosen, n_rejected, beta = rows[:, 2:].T
        log_ratio, ref_log_ratio = chosen - rejected, ref_chosen - ref_rejected
        h = log_ratio - ref_log_ratio
        per_token = (chosen - ref_chosen) / n_chosen - (rejected - ref_rejected) / n_rejected
        return {"sigmoid": -F.logsigmoid(beta * h), "sigmoid_smooth": smooth(beta * h, 0.1),
                "ipo": (per_token - 1 / (2 * beta)) ** 2, "ipo_sum": (h - 1 / (2 * beta)) ** 2,
                "hinge": torch.relu(1 - beta * h)}[name]

    yield entry("losses/rows", rows.numpy(), "f64")
    for name in ("sigmoid", "sigmoid_smooth", "ipo", "ipo_sum", "hinge"):
        chosen, rejected = (rows[:, i].clone().requires_grad_() for i in (0, 1))
        loss = value(name, chosen, rejected)
        loss.sum().backward()
        table = torch.stack([loss.detach(), chosen.grad, rejected.grad], dim=1)
        assert bool(torch.isfinite(table).all())
        yield entry("losses/" + name, table.numpy(), "f64")


# --- all of it -----------------------------------------------------------------------------------

def distances(truth, single):
    """How far fp32 is from the truth: logits and gradients relative to each tensor's largest value,
    log-probabilities and the training runs' losses and rewards in nats, norms relative."""
    def apart(name, relative):
        largest = np.abs(truth[name]).max() if relative else 1.0
        return float(np.abs(truth[name] - single[name]).max() / largest)

    grads = max(apart(name, True) for name in truth if name.startswith("grad/"))
    columns = [apart("logits", True), apart("batch/logp", False), grads, apart("dpo/loss", False),
               apart("dpo/rewards", False), apart("dpo/grad_norm", True), apart("dpo/logp", False)]
    if "sft/loss" in truth:
        columns += [apart("sft/loss", False), apart("sft/grad_norm", True)]
    return columns


def course(name, truth, kind, clip):
    loss, norm = truth[kind + "/loss"], truth[kind + "/grad_norm"]
    return "%-19s %s loss %.4f .. %.4f, norm %.2f .. %.2f, clipped at %g" % (
        name, kind, loss[0], loss[-1], norm.min(), norm.max(), clip or math.inf)


def main():
    out_dir = sys.argv[1] if len(sys.argv) > 1 else os.path.join(TESTS, "fixtures")
    os.makedirs(out_dir, exist_ok=True)
    torch.set_num_threads(1)
    print("fp32 against fp64:   logits     logp    grads dpo loss  rewards     norm   logp10 "
          "sft loss     norm")
    shown = []
    for c in CASES:
        rng = np.random.RandomState(c["seed"])      # the one stream that numpy promises to keep
        tensors, dtypes = random_tensors(c, rng)
        inputs = make_inputs(c, tensors, rng)
        truth = expect(c, tensors, inputs, torch.float64)
        single = expect(c, tensors, inputs, torch.float32)
        path = os.path.join(out_dir, c["name"])
        write_container(path + ".model.bin", 1, model_entries(c, tensors, dtypes))
        write_container(path + ".expect.bin", 5, expect_entries(c, inputs, truth))
        print("%-19s" % c["name"], " ".join("%8.1e" % x for x in distances(truth, single)))
        shown.append(course(c["name"], truth, "dpo", c["clip"]))
        if c["sft"]:
            shown.append(course(c["name"], truth, "sft", c["sft"][1]))
    write_container(os.path.join(out_dir, "losses.expect.bin"), 5,
                    loss_entries(np.random.RandomState(1)))
    print("\nten steps:", *shown, sep="\n")
    total = sum(os.path.getsize(os.path.join(out_dir, name)) for name in os.listdir(out_dir))
    print("\n%d bytes in %s" % (total, out_dir))


if __name__ == "__main__":
    main()
