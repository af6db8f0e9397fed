#!/usr/bin/env python3
"""Break the numbers of dpo.h in many places, one at a time: the numerics tests must notice each.

    python3 tests/mutate.py [WORD]      (make mutate; WORD: only functions with it in their names)

A mutant is dpo.h with one piece of one function replaced: a sign flipped, a term or a factor dropped,
a sum that should add made to overwrite, the wrong one of two alike. One that survives test_fixtures,
test_gradients, test_invariants and test_modes means that a formula could be wrong without anybody
noticing. A piece that the function does not have exactly once is an error, so the list has to follow
the code. What changes nothing but speed or the last bit has no place here. Mutants marked PAIRED are
tried where the CPU has dot products of bf16, those marked AMX where it has products of bf16 tiles,
those marked ROUND or UNROUND where it has AVX-512's rounding to bf16 or has not; elsewhere they are
counted as left out.

All mutants are compiled at once, as copies of their functions beside the original; the environment's
DPO_MUTANT says which copy is called. To be noticed is a failed check, a crash or a hang.
"""
import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import tempfile

# The quickest first.
TESTS = ["test_fixtures", "test_gradients", "test_invariants", "test_modes"]
HANGS = 40          # seconds of processor time, many times what a test takes
# Tests write their files where it takes no time, if there is such a place.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
CHOICE = """#include <stdlib.h>
static int dpoi_mutant;
__attribute__((constructor)) static void dpoi_choose_mutant(void)
{
    dpoi_mutant = atoi(getenv("DPO_MUTANT"));
}
"""

# Given the compiler's macros: whether a mutant of products of bf16 is in what this CPU runs.
def PAIRED(macros): return ROUND(macros) or "__ARM_FEATURE_BF16_VECTOR_ARITHMETIC" in macros
def AMX(macros): return not macros.isdisjoint(("__AMX_BF16__", "__AMXBF16__"))
def ROUND(macros): return "__AVX512BF16__" in macros
def UNROUND(macros): return not ROUND(macros)


# function: pieces and what becomes of them
MUTANTS = {
    # ---- 2 ground
    "dpoi_sum": [
        ("lane[j] += x[i + j]", "lane[j] -= x[i + j]"),
        ("lane[i - whole] += x[i]", "lane[i - whole] = x[i]"),
    ],
    "dpoi_dot_centred": [
        ("lane[j] += x[i + j] * (y[i + j] - mean)", "lane[j] += x[i + j] * y[i + j]"),
        ("lane[j] += x[i + j] * (y[i + j] - mean)", "lane[j] -= x[i + j] * (y[i + j] - mean)"),
        ("lane[i - whole] += x[i] * (y[i] - mean)", "lane[i - whole] += x[i] * (y[i] + mean)"),
        ("lane[i - whole] += x[i] * (y[i] - mean)", ""),
    ],
    "dpoi_max": [
        ("lane[j] = DPOI_MAX(lane[j], x[i + j])", "lane[j] = DPOI_MIN(lane[j], x[i + j])"),
        ("lane[i - whole] = DPOI_MAX(lane[i - whole], x[i])", ""),
        ("lane[0] = DPOI_MAX(lane[0], lane[j])", ""),
    ],

    "dpoi_exp": [
        ("x < -104.0f ? -104.0f : x", "x"),
        ("x > 89.0f ? 89.0f : x", "x"),
        ("1.0f + dpoi_exp_parts", "1.0f - dpoi_exp_parts"),
    ],
    "dpoi_exp_parts": [
        ("r + whole * 2.12194440e-4f", "r"),
        ("r + r * r * p", "r + r * r"),
    ],
    "dpoi_tanh": [
        ("(scale - 1.0f)", "(scale + 1.0f)"),
        ("e_minus_1 + 2.0f", "e_minus_1 + 1.0f"),
        ("x < -10.0f ? -10.0f : x", "x"),
    ],
    "dpoi_sigmoid": [
        ("(x < 0.0f ? e : 1.0f)", "e"),
        ("(x < 0.0f ? e : 1.0f)", "1.0f"),
    ],
    "dpoi_erf": [
        ("x < 0.0f ? -far : far", "far"),
        ("a < 1.0f ? x + x * q : far", "far"),
        ("a < 1.0f ? x + x * q : far", "x + x * q"),
    ],
    "dpoi_bf16": [
        ("0x7fff + (bits >> 16 & 1)", "0x8000"),
        ("0x7fff + (bits >> 16 & 1)", "0x7fff"),
        ("0x7fff + (bits >> 16 & 1)", "0"),
        ("bits | 0x400000", "bits"),
        ("(bits & 0x7fffffff) > 0x7f800000", "0"),
    ],
    "dpoi_bf16_stochastic": [
        ("bits + chance", "bits + 0x8000"),
        ("bits + chance", "bits"),
        (">> 48", ">> 49"),
        ("(bits & 0x7f800000) == 0x7f800000", "0"),
        ("bits | 0x400000", "bits"),
        ("index * 0x9e3779b97f4a7c15u", "0"),
    ],
    "dpoi_dot_bf16": [
        ("lane[j] += x[i + j]", "lane[j] -= x[i + j]"),
        ("lane[i - whole] += x[i]", "lane[i - whole] = x[i]"),
    ],

    # ---- 3 matmul
    "dpoi_tile_part": [
        ("sum[i][j] + a[i] * b_vec[j]", "sum[i][j] - a[i] * b_vec[j]"),
        ("if (add) sum[i][j] += *c_vec;", ""),
        ("if (bias) sum[i][j] += ((const dpoi_vec_at *)bias)[j];", ""),
        ("((const dpoi_vec_at *)bias)[j]", "((const dpoi_vec_at *)bias)[0]"),
    ],
    "dpoi_amx_tile": [
        ("dpbf16ps(2, 5, 6)", "dpbf16ps(2, 5, 7)", AMX),
        ("_tile_loadd(7, b + DPOI_LINE, ROW)", "_tile_loadd(7, b, ROW)", AMX),
        ("if (!two) continue;", "continue;", AMX),
        ("_tile_stored(2, sum + BELOW, ROW)", "_tile_stored(2, sum + BELOW + ROW / 4, ROW)", AMX),
    ],
    "dpoi_amx_copy": [
        ("if (add) x += *c_vec;", "", AMX),
        ("if (bias) x += ((const dpoi_vec_at *)bias)[j];", "", AMX),
    ],
    "dpoi_count_units": [
        ("dpoi_divide_up(k, 2 * DPOI_LINE)", "k / (2 * DPOI_LINE)", AMX),
        ("dpoi_divide_up(k, 2)", "k / 2", PAIRED),
    ],
    "dpoi_turn_units": [
        ("copy + u * DPOI_TILE_ROWS + i", "copy + u * DPOI_TILE_ROWS", AMX),
    ],
    "dpoi_transpose_4x4": [
        ("DPOI_SHUFFLE(a, b, 0, 4, 1, 5)", "DPOI_SHUFFLE(b, a, 0, 4, 1, 5)"),
        ("DPOI_SHUFFLE(a, b, 2, 6, 3, 7)", "DPOI_SHUFFLE(a, b, 0, 4, 1, 5)"),
    ],
    "dpoi_pack": [
        ("DPOI_MIN(r, rows - 4)", "r - r % 8"),
        ("dpoi_divide_up(k, per_unit)", "k / per_unit", PAIRED),
        ("whole && units < room", "0", AMX),
        ("u % DPOI_LINE == DPOI_LINE - 1 || u == units - 1", "u % DPOI_LINE == DPOI_LINE - 1", AMX),
        ("per_unit == 2 && l + 1 < k", "per_unit == 2", PAIRED),
        ("if (n_whole < n)", "if (0)", PAIRED),
        ("NULL, per_unit, DPOI_LINE", "NULL, 1, DPOI_LINE", PAIRED),
        ("next ? next + i * item : NULL", "next", PAIRED),
        ("in + whole * item", "in"),
    ],
    "dpoi_float_bits": [
        ("(uint32_t)dpoi_bf16(value) << 16", "(memcpy(&bits, &value, 4), bits & 0xffff0000u)",
         UNROUND),
    ],
    "dpoi_round_pairs": [
        ("cvtne2ps_pbh(second, first)", "cvtne2ps_pbh(first, second)", ROUND),
        ("8, 24, 9, 25", "8, 24, 25, 9", ROUND),
        ("if (y) second", "second", ROUND),
        ("mask_storeu_epi32(out + i, units,", "mask_storeu_epi32(out + i, 0xffff,", ROUND),
    ],
    "dpoi_units_run": [
        ("bits >> 16 |", "bits |", PAIRED),
        ("(y ?", "(0 ?", PAIRED),
    ],
    "dpoi_tile_copy": [
        ("add ? c[i * ldc + j] + x : x", "x"),
        ("add ? c[i * ldc + j] + x : x", "c[i * ldc + j] + x"),
        ("if (bias) x += bias[j];", ""),
        ("x += bias[j]", "x += bias[0]"),
    ],
    "dpoi_tile_clipped": [
        ("rows > DPOI_TILE_ROWS", "0", AMX),
    ],
    "dpoi_multiply_strip": [
        ("accumulate || l > 0", "accumulate"),
        ("l == 0 || l < k", "l < k"),
        ("bias && l == 0 ? bias + j : NULL", "l == 0 ? bias : NULL"),
        ("bias && l == 0 ? bias + j : NULL", "bias ? bias + j : NULL"),
        ("dpoi_submatrix(b_columns, 0, l)", "b_columns"),
        ("dpoi_submatrix(a, i, l)", "dpoi_submatrix(a, i, 0)"),
        ("dpoi_submatrix(a, i, l)", "dpoi_submatrix(a, 0, l)"),
        ("c + (i + r) * ldc + j", "c + i * ldc + j"),
        ("a_panels + r / DPOI_TILE_ROWS * a_stride", "a_panels"),
        ("b_panel += dpoi_panel_floats(DPOI_TILE_COLS, units)", "b_panel += 0"),
    ],
    "dpoi_matmul_serial": [
        ("dpoi_submatrix(b_columns, j, 0)", "b_columns"),
        ("accumulate, as", "0, as"),
    ],
    "dpoi_cut": [
        ("size_t s = first", "size_t s = 1"),
    ],
    "dpoi_matmul_bias": [
        ("dpoi_submatrix(a, i, 0)", "a"),
        ("dpoi_submatrix(b_columns, j, 0)", "b_columns"),
        ("bias ? bias + j : NULL", "bias"),
        ("bias ? bias + j : NULL", "NULL"),
    ],

    # ---- 4 layers
    "dpoi_add_column_sums": [
        ("db[c] += dy[r * C + c]", "db[c] -= dy[r * C + c]"),
        ("db[c] += dy[r * C + c]", "db[c] = dy[r * C + c]"),
    ],
    "dpoi_add": [
        ("a[i] + b[i]", "a[i] - b[i]"),
        ("a[i] + b[i]", "a[i]"),
        ("a[i] + b[i]", "b[i]"),
    ],
    "dpoi_embedding_forward": [
        ("yr[c] *= scale", ""),
        ("yr[c] += dpoi_weight_at", "yr[c] -= dpoi_weight_at"),
        ("yr[c] += dpoi_weight_at", "yr[c] = dpoi_weight_at"),
    ],
    "dpoi_embedding_backward": [
        ("dE[token[r] * C + c] += scale * dy", "dE[token[r] * C + c] -= scale * dy"),
        ("dE[token[r] * C + c] += scale * dy", "dE[token[r] * C + c] += dy"),
        ("dE[token[r] * C + c] += scale * dy", "dE[token[r] * C + c] = scale * dy"),
        ("dP[position[r] * C + c] += scale * dy", "dP[position[r] * C + c] -= scale * dy"),
        ("dP[position[r] * C + c] += scale * dy", "dP[position[r] * C + c] += dy"),
        ("dP[position[r] * C + c] += scale * dy", "dP[position[r] * C + c] = scale * dy"),
    ],
    "dpoi_norm_forward": [
        ("yr[c] = xr[c] - mean", "yr[c] = xr[c]"),
        ("yr[c] = xr[c] - mean", "yr[c] = xr[c] + mean"),
        ("dpoi_dot(yr, yr, C)", "dpoi_dot(xr, xr, C)"),
        (" + epsilon)", ")"),
        ("/ (float)C + epsilon", "/ (float)(C - 1) + epsilon"),
        ("yr[c] * rstd * w[c] + b[c]", "yr[c] * w[c] + b[c]"),
        ("yr[c] * rstd * w[c] + b[c]", "yr[c] * rstd + b[c]"),
        ("yr[c] * rstd * w[c] + b[c]", "yr[c] * rstd * w[c]"),
        ("yr[c] * rstd * w[c] + b[c]", "yr[c] * rstd * w[c] - b[c]"),
        ("stats[2 * r] = mean", "stats[2 * r] = 0.0f"),
        ("stats[2 * r + 1] = rstd", "stats[2 * r + 1] = 1.0f"),
    ],
    "dpoi_norm_backward": [
        ("(x[r * C + c] - stats[2 * r]) * stats[2 * r + 1]", "x[r * C + c] * stats[2 * r + 1]"),
        ("(x[r * C + c] - stats[2 * r]) * stats[2 * r + 1]", "(x[r * C + c] - stats[2 * r])"),
        ("dw[c] += dy[r * C + c] * xhat", "dw[c] -= dy[r * C + c] * xhat"),
        ("dw[c] += dy[r * C + c] * xhat", "dw[c] += dy[r * C + c]"),
        ("dw[c] += dy[r * C + c] * xhat", "dw[c] = dy[r * C + c] * xhat"),
        ("db[c] += dy[r * C + c]", "db[c] -= dy[r * C + c]"),
        ("db[c] += dy[r * C + c]", "db[c] = dy[r * C + c]"),
        ("dyr[c] *= w[c]", ""),
        ("rstd * dpoi_dot_centred(dyr, xr, mean, C)", "dpoi_dot_centred(dyr, xr, mean, C)"),
        ("dpoi_dot_centred(dyr, xr, mean, C)", "dpoi_dot(dyr, xr, C)"),
        ("dxr[c] += rstd *", "dxr[c] -= rstd *"),
        ("dxr[c] += rstd *", "dxr[c] = rstd *"),
        ("dxr[c] += rstd *", "dxr[c] +="),
        ("dyr[c] - mean_dxhat", "dyr[c]"),
        ("dyr[c] - mean_dxhat", "dyr[c] + mean_dxhat"),
        (" - xhat * mean_product", ""),
        (" - xhat * mean_product", " + xhat * mean_product"),
        (" - xhat * mean_product", " - mean_product"),
    ],
    "dpoi_linear_forward": [
        ("b ? b->data : NULL", "NULL"),
        ("accumulate, W->dtype)", "0, W->dtype)"),
        ("W->dtype)", "DPO_F32)"),
    ],
    "dpoi_linear_backward": [
        ("out, accumulate, W->dtype)", "out, 0, W->dtype)"),
        ("if (b && b->grad) dpoi_add_column_sums(context, b->grad, dy, R, out);", ""),
        ("dpoi_add_column_sums(context, b->grad, dy, R, out)", "dpoi_add_column_sums(context, b->grad, dy, R - 1, out)"),
    ],
    "dpoi_add_product": [
        ("k, 1,", "k, 0,"),
        ("(float *)W->grad + first * columns", "(float *)W->grad"),
        ("dpoi_bf16_to_float(grad[i]) + context->piece[i]", "context->piece[i]"),
        ("place + i)", "i)"),
        ("(first + start) * columns", "start * columns"),
        ("dpoi_submatrix(a, start, 0)", "a"),
        ("dpo_random_u64(context->noise, W->offset, 0)", "0"),
    ],
    "dpoi_rotary_table": [
        ("1.0f / powf", "powf"),
        ("(float)(2 * i)", "(float)i"),
        ("(float)cos(", "(float)sin("),
        ("(float)sin(", "-(float)sin("),
    ],
    "dpoi_rotary": [
        ("a * cosine[i] - b * turn", "a * cosine[i] + b * turn"),
        ("a * cosine[i] - b * turn", "a * cosine[i]"),
        ("a * cosine[i] - b * turn", "a - b * turn"),
        ("b * cosine[i] + a * turn", "b * cosine[i] - a * turn"),
        ("b * cosine[i] + a * turn", "b * cosine[i] + turn"),
        ("direction * sine[i]", "sine[i]"),
        ("h < 2 * heads.H", "h < heads.H"),
        ("(h < heads.H ? 0 : heads.key)", "(h < heads.H ? 0 : heads.value)"),
    ],
    "dpoi_strip_product": [
        ("span->n_prefix, strip->D, 0", "0, strip->D, 0"),
        ("s + span->n_prefix", "s"),
    ],
    "dpoi_strip_gather": [
        ("span->n_prefix, 0, strip->as", "0, 0, strip->as"),
        ("strip->own, 1", "strip->own, 0"),
    ],
    "dpoi_strip_scatter": [
        ("span->n_prefix, strip->D, strip->n, 1", "span->n_prefix, strip->D, strip->n, 0"),
        ("strip->n, 1, strip->as);\n}", "strip->n, 0, strip->as);\n}"),
    ],
    "dpoi_strip_scale": [
        ("s[j] * scale - slope", "s[j] - slope"),
        ("s[j] * scale - slope", "s[j] * scale + slope"),
        ("- slope * (float)(last - j)", ""),
        ("(float)(last - j)", "(float)(last - j) * scale"),
    ],
    "dpoi_softmax": [
        ("dpoi_exp(s[j] - most)", "dpoi_exp(s[j] + most)"),
        ("s[j] /= sum", ""),
        ("most + logf(sum)", "most"),
        ("most + logf(sum)", "logf(sum)"),
        ("most + logf(sum)", "most - logf(sum)"),
    ],
    "dpoi_attention_forward": [
        ("attention->slopes ? attention->slopes[h] : 0.0f", "attention->slopes ? attention->slopes[0] : 0.0f"),
        ("span->n_prefix + q0 + i + 1", "span->n_prefix + q0 + strip.n"),
        ("span->n_prefix + q0 + i + 1", "q0 + i + 1"),
        ("p[j] = 0.0f", ""),
        ("s, head + heads.value", "s, head + heads.key"),
        ("row, head + heads.key", "row, head + heads.value"),
    ],
    "dpoi_attention_backward": [
        ("attention->slopes ? attention->slopes[h] : 0.0f", "0.0f"),
        ("dpoi_exp(pi[j] - log_sum)", "dpoi_exp(pi[j] + log_sum)"),
        ("attention->scale * pi[j] * (dsi[j] - inner[i])", "pi[j] * (dsi[j] - inner[i])"),
        ("attention->scale * pi[j] * (dsi[j] - inner[i])", "attention->scale * (dsi[j] - inner[i])"),
        ("attention->scale * pi[j] * (dsi[j] - inner[i])", "-attention->scale * pi[j] * (dsi[j] - inner[i])"),
        ("dsi[j] - inner[i]", "dsi[j]"),
        ("dsi[j] - inner[i]", "dsi[j] + inner[i]"),
        ("pi[j] = dsi[j] = 0.0f", "pi[j] = 0.0f"),
        ("pi[j] = dsi[j] = 0.0f", "dsi[j] = 0.0f"),
        ("memset(drow + heads.key, 0, D * sizeof *drow);", ""),
        ("memset(drow + heads.value, 0, D * sizeof *drow);", ""),
        ("dhead + heads.key, ds, q, row", "dhead + heads.key, p, q, row"),
        ("dhead + heads.value, p, dys, C", "dhead + heads.value, ds, dys, C"),
        ("y + (strip.first + i) * C + h * D, D", "y + strip.first * C + h * D, D"),
    ],
    "dpoi_activation": [
        ("0.5f * (1.0f + dpoi_erf", "(1.0f + dpoi_erf"),
        ("0.5f * (1.0f + dpoi_erf", "0.5f * (1.0f - dpoi_erf"),
        ("dpoi_erf(x * 0.70710678f)", "dpoi_erf(x)"),
        ("x * 0.39894228f * dpoi_exp(-0.5f * x * x)", "0"),
        ("x * 0.39894228f * dpoi_exp", "0.39894228f * dpoi_exp"),
        ("phi + x", "phi - x"),
        ("dpoi_exp(-0.5f * x * x)", "dpoi_exp(-x * x)"),
        ("return x * phi", "return phi"),
        ("x + 0.044715f * x * x * x", "x"),
        ("x + 0.044715f * x * x * x", "x - 0.044715f * x * x * x"),
        ("0.7978845608f * (x", "(x"),
        ("*slope = 0.5f * (1.0f + t) +", "*slope = 0.5f * (1.0f - t) +"),
        ("*slope = 0.5f * (1.0f + t) +", "*slope = 0.5f * (1.0f + t) -"),
        ("(1.0f - t * t)", "(1.0f + t * t)"),
        ("(1.0f - t * t)", "1.0f"),
        ("3.0f * 0.044715f * x * x", "0.044715f * x * x"),
        ("return 0.5f * x * (1.0f + t)", "return 0.5f * x * (1.0f - t)"),
        ("? 1.702f : 1.0f", "? 1.0f : 1.0f"),
        ("? 1.702f : 1.0f", "? 1.702f : 1.702f"),
        ("s + a * x * s * (1.0f - s)", "s + x * s * (1.0f - s)"),
        ("s + a * x * s * (1.0f - s)", "s - a * x * s * (1.0f - s)"),
        ("s + a * x * s * (1.0f - s)", "s"),
        ("return x * s", "return s"),
        ("x > 0.0f ? 1.0f : 0.0f", "1.0f"),
        ("x > 0.0f ? 1.0f : 0.0f", "x < 0.0f ? 1.0f : 0.0f"),
        ("x > 0.0f ? x : 0.0f", "x"),
        ("x > 0.0f ? x : 0.0f", "x < 0.0f ? x : 0.0f"),
    ],
    "dpoi_activation_forward": [
        ("gate + i", "gate"),
    ],
    "dpoi_activation_backward": [
        (" gate + i", " gate"),
        ("dgate + i", "dgate"),
    ],
    "dpoi_activation_run": [
        ("x[i] * dpoi_activation(", "x[i] + dpoi_activation("),
        ("dpoi_activation(gate[i], &slope, DPO_SILU)", "dpoi_activation(x[i], &slope, DPO_SILU)"),
    ],
    "dpoi_activation_run_back": [
        ("dy[i] * x[i] * slope", "dy[i] * slope"),
        ("dy[i] * x[i] * slope", "-dy[i] * x[i] * slope"),
        ("dy[i] * x[i] * slope", "dy[i] * x[i] * value"),
        ("kind == DPO_SWIGLU ? value : slope", "slope"),
        ("kind == DPO_SWIGLU ? value : slope", "value"),
        ("dx[i] = dy[i] *", "dx[i] = -dy[i] *"),
    ],

    # ---- 5 head and losses
    "dpoi_head_forward": [
        ("dpoi_exp(scale * l[v] - shift)", "dpoi_exp(l[v] - shift)"),
        ("target_logit[t] = scale * l", "target_logit[t] = l"),
        ("chunk_most = scale * largest", "chunk_most = largest"),
        ("dpoi_submatrix(dpoi_weight(W), 0, v0)", "dpoi_weight(W)"),
        ("chunk_most > most[s]", "chunk_most < most[s]"),
        ("log_sum[s] * smaller", "log_sum[s]"),
        ("exp((double)most[s] - chunk_most)", "exp(chunk_most - (double)most[s])"),
        ("log_sum[s] * smaller", "0.0"),
        ("mean[s * C + c] *= (float)smaller", "mean[s * C + c] *= 1.0f"),
        ("mean[s * C + c] /= sum", ""),
        ("v0 > 0, W->dtype", "0, W->dtype"),
        ("(uint32_t)(v0 + v)", "(uint32_t)v"),
        ("dpoi_exp(scale * l[v] - shift)", "dpoi_exp(scale * l[v])"),
        ("log_sum[s] += dpoi_sum(l, n)", "log_sum[s] = dpoi_sum(l, n)"),
        ("most[s] + log(log_sum[s])", "log(log_sum[s])"),
        ("most[s] + log(log_sum[s])", "most[s] - log(log_sum[s])"),
        ("most[s] + log(log_sum[s])", "most[s]"),
    ],
    "dpoi_head_backward": [
        ("total += dlogp", "total = dlogp"),
        ("total += dlogp", "total -= dlogp"),
        ("-(float)(scale * total)", "(float)(scale * total)"),
        ("-(float)(scale * total)", "-(float)total"),
        ("dpoi_exp(scale * l[v] - shift)", "dpoi_exp(l[v] - shift)"),
        ("dpoi_exp(scale * l[v] - shift)", "dpoi_exp(scale * l[v])"),
        ("+= (float)(scale * dlogp[targets[t].branch])", "-= (float)(scale * dlogp[targets[t].branch])"),
        ("+= (float)(scale * dlogp[targets[t].branch])", "+= (float)dlogp[targets[t].branch]"),
        ("+= (float)(scale * dlogp[targets[t].branch])", "= (float)(scale * dlogp[targets[t].branch])"),
        ("S, C, n, v0 > 0,", "S, C, n, 0,"),
        ("W, v0, dpoi_transposed(", "W, 0, dpoi_transposed("),
    ],
    "dpoi_head_backward_frozen": [
        ("total += dlogp", "total = dlogp"),
        ("-(float)(scale * total)", "(float)(scale * total)"),
        ("-(float)(scale * total)", "-(float)total"),
        ("(float)(scale * dlogp[targets[t].branch])", "(float)dlogp[targets[t].branch]"),
        ("row[c] += share", "row[c] = share"),
    ],
    "dpoi_softplus": [
        ("x + log1p(exp(-x))", "log1p(exp(-x))"),
        ("x + log1p(exp(-x))", "x - log1p(exp(-x))"),
        (": log1p(exp(x))", ": log1p(exp(-x))"),
        (": log1p(exp(x))", ": exp(x)"),
    ],
    "dpoi_logistic": [
        ("1 / (1 + exp(-x))", "1 / (1 + exp(x))"),
        ("1 / (1 + exp(-x))", "1"),
        ("exp(x) / (1 + exp(x))", "exp(x)"),
    ],
    "dpo_pair_loss": [
        ("scores[0].logp - reference[0]", "scores[0].logp"),
        ("scores[0].logp - reference[0]", "scores[0].logp + reference[0]"),
        ("scores[1].logp - reference[1]", "scores[1].logp"),
        ("ratio[0] * weight[0] + ratio[1] * weight[1]", "ratio[0] * weight[0]"),
        ("ratio[0] * weight[0] + ratio[1] * weight[1]", "-ratio[0] * weight[0] - ratio[1] * weight[1]"),
        ("z = beta * h", "z = h"),
        ("{ 1.0, -1.0 }", "{ 1.0, 1.0 }"),
        ("{ 1.0, -1.0 }", "{ -1.0, 1.0 }"),
        ("(1 - eps) * dpoi_softplus(-z) +", "dpoi_softplus(-z) +"),
        ("(1 - eps) * dpoi_softplus(-z)", "(1 - eps) * dpoi_softplus(z)"),
        (" + eps * dpoi_softplus(z)", ""),
        (" + eps * dpoi_softplus(z)", " - eps * dpoi_softplus(z)"),
        ("beta * (eps - dpoi_logistic(-z))", "eps - dpoi_logistic(-z)"),
        ("beta * (eps - dpoi_logistic(-z))", "beta * (-dpoi_logistic(-z))"),
        ("beta * (eps - dpoi_logistic(-z))", "beta * (eps - dpoi_logistic(z))"),
        ("beta * (eps - dpoi_logistic(-z))", "beta * (eps + dpoi_logistic(-z))"),
        ("weight[k] /= (double)scores[k].n_scored", ""),
        ("weight[k] /= (double)scores[k].n_scored", "weight[k] /= (double)scores[0].n_scored"),
        ("ratio[0] * weight[0] + ratio[1] * weight[1]", "ratio[0] * weight[0] - ratio[1] * weight[1]"),
        ("h - 1 / (2 * beta)", "h"),
        ("h - 1 / (2 * beta)", "h + 1 / (2 * beta)"),
        ("h - 1 / (2 * beta)", "h - 1 / beta"),
        ("error * error", "fabs(error)"),
        ("2 * error", "error"),
        ("2 * error", "-2 * error"),
        ("z < 1 ? 1 - z : 0.0", "1 - z"),
        ("z < 1 ? 1 - z : 0.0", "z < 1 ? 1 + z : 0.0"),
        ("z < 1 ? -beta : 0.0", "-beta"),
        ("z < 1 ? -beta : 0.0", "z < 1 ? beta : 0.0"),
        ("z < 1 ? -beta : 0.0", "z < 1 ? -1 : 0.0"),
        ("dh * weight[k]", "dh"),
        ("beta * ratio[k]", "ratio[k]"),
        ("beta * ratio[k]", "-beta * ratio[k]"),
    ],
    "dpo_mean_error": [
        ("members[i].value - *mean", "members[i].value"),
        ("squares += difference * difference", "squares += difference"),
        ("(double)n_groups / (double)(n_groups - 1)", "1.0"),
        ("{ examples[i].group, values[i] }", "{ i, values[i] }"),
    ],
    "dpo_metrics_compute": [
        ("hits[i] = margin > 0", "hits[i] = margin >= 0"),
        ("pair.reward[0] - pair.reward[1]", "pair.reward[1] - pair.reward[0]"),
        ("metrics->loss += pair.loss / (double)n", "metrics->loss += pair.loss"),
        ("metrics->margin += margin / (double)n", "metrics->margin -= margin / (double)n"),
        ("metrics->ties += margin == 0", "metrics->ties += margin >= 0"),
        ("metrics->reward[k] += pair.reward[k]", "metrics->reward[k] += pair.reward[0]"),
        ("metrics->logp[k] += scores[2 * i + k].logp", "metrics->logp[k] += scores[2 * i].logp"),
    ],

    # ---- 6 model
    "dpoi_model_reserve": [
        (" / (float)config->alibi_factor", ""),
    ],
    "dpoi_add_rows": [
        ("(uint32_t)(n_prefix + i)", "(uint32_t)i"),
    ],
    "dpoi_lay_out": [
        ("w->keeps = keep", "w->keeps = 1"),
        ("if (example->branches[b].first_scored == 0)", ""),
        ("DPOI_MAX(branch->first_scored, (size_t)1)", "(size_t)1"),
        ("prompt, example->n_prompt)", "prompt, 0)"),
        ("first + i - 1, branch->tokens[i], w->n_branches + b", "first + i - 1, branch->tokens[i], w->n_branches"),
        ("w->R - 1, example->branches[b].tokens[0], w->n_branches + b",
         "w->R - 1, example->branches[0].tokens[0], w->n_branches + b"),
    ],
    "dpoi_activations_of": [
        ("config->parallel_residual || !keep ? x", "!keep ? x"),
        ("shares ? 0 : layer * R", "0"),
        ("? layer * R : 0;", "? 0 : 0;"),
        ("shares ? x : x + R * C", "x"),
    ],
    "dpoi_slab_move": [
        ("{ a->qkv, 3 * C }, { a->attended, C }", "{ a->attended, C }, { a->attended, C }"),
        ("{ a->qkv, 3 * C }", "{ a->qkv, 2 * C }"),
        ("a->gate ? F : 0", "0"),
        ("a->middle == a->x ? 0 : C", "0"),
        ("R * (layer * width + before)", "R * before"),
        ("layer * width + before", "layer * width"),
        ("DPOI_MIN(end, (size_t)1)", "0"),
        ("if (p < first) continue;", ""),
    ],
    "dpoi_lora_scale": [
        ("sqrt((double)lora->r)", "(double)lora->r"),
        ("lora->alpha /", "1 /"),
        ("lora->rslora ? sqrt((double)lora->r) : (double)lora->r", "(double)1"),
        ("lora->rslora ?", "!lora->rslora ?"),
    ],
    "dpoi_is_target": [
        ("weight[path - n - 1] == '.'", "1"),
        ("n == path ||", ""),
        ("n <= path", "n < path"),
        ("(name[n] == ',')", "0"),
    ],
    "dpoi_check_targets": [
        ("strcmp(one, \"all-linear\")", "1"),
        ("!n || !found", "!n"),
        ("!n || !found", "!found && n"),
    ],
    "dpoi_add_adapters": [
        ("lora->r, dpoi_linear_in(W)", "lora->r, dpoi_linear_out(W)"),
        ("dpoi_number_trainable(model);", ""),
        ("lora->r > DPOI_MAX_RANK", "0"),
        ("lora->alpha > 0 &&", ""),
        ("lora->dropout < 1", "1"),
    ],
    "dpoi_tensor_set": [
        ("if (tensor->master)", "if (0)"),
    ],
    "dpoi_place_weights": [
        ("frozen && entry && entry->dtype == tensor->dtype", "0"),
        ("frozen && entry && entry->dtype == tensor->dtype", "frozen && entry"),
        ("frozen && entry && entry->dtype == tensor->dtype", "entry && entry->dtype == tensor->dtype"),
        ("!frozen;", "1;"),
        ("!model->options.stochastic &&", ""),
        ("storage.masters += bytes;", "storage.masters += 4;"),
        ("storage.state += dpoi_aligned(bytes)", "storage.state += dpoi_aligned(bytes) / 2"),
    ],
    "dpo_memory_plan": [
        ("dpoi_piece_size(&model)", "0"),
        ("storage.params + storage.masters", "storage.params"),
        ("dpoi_place_gradients(&model)", "model.n_trainable * 4"),
        ("options->model.frozen ? options->file->bytes : storage.largest", "storage.largest"),
    ],
    "dpoi_drop": [
        ("1 / (1 - dropout)", "1"),
        ("1 / (1 - dropout)", "(1 - dropout)"),
        ("dropout * 0x1p32", "(1 - dropout) * 0x1p32"),
        ("y[i] + kept : kept", "kept : kept"),
        ("chance >= least", "chance < least"),
        ("context->noise, A->offset, 0", "context->noise, 0, 0"),
        ("context->noise, A->offset, 0", "0, A->offset, 0"),
        ("i * 0x9e3779b97f4a7c15u", "i / 2 * 0x9e3779b97f4a7c15u"),
    ],
    "dpoi_lora_down": [
        ("w->u[i] *= scale", ""),
        ("&& w->keeps", ""),
        ("x = w->dropped;", ""),
    ],
    "dpoi_project": [
        ("NULL, R, 1)", "NULL, R, 0)"),
        ("if (!W->lora_a) return;", "return;"),
    ],
    "dpoi_adapter_backward": [
        ("w->du[i] *= scale", ""),
        ("w->du, in, A, NULL, R, 1)", "w->du, in, A, NULL, R, 0)"),
        ("dropout, R * A->shape[1], 1)", "dropout, R * A->shape[1], 0)"),
        ("w->du, in, A", "w->du, x, A"),
        ("if (in == x || !dx)", "if (1)"),
        ("w->u, W->lora_b", "w->du, W->lora_b"),
        ("in == x ? dx : NULL", "dx"),
    ],
    "dpoi_trains": [
        ("w->grad || w->lora_a", "w->grad"),
    ],
    "dpoi_heads_of": [
        ("{ H, D, D, C, 2 * C }", "{ H, D, D, 2 * C, C }"),
        ("{ H, D, 3 * D, D, 2 * D }", "{ H, D, 3 * D, 2 * D, D }"),
    ],
    "dpoi_attention_of": [
        ("scale /= (double)(layer + 1)", ""),
        ("scale /= (double)(layer + 1)", "scale *= (double)(layer + 1)"),
        ("if (config->attention_scale_by_layer)", ""),
    ],
    "dpoi_block_forward": [
        ("block->norm1_b->data", "block->norm2_b->data"),
        ("block->norm2_w->data", "block->norm1_w->data"),
        ("a->middle, a->x, w->branch", "a->middle, w->branch, w->branch"),
        ("a->middle, block->norm2_w->data", "a->x, block->norm2_w->data"),
        ("config->parallel_residual); //", "0); //"),
        ("a->out, a->middle, w->branch", "a->out, a->x, w->branch"),
        ("1.0f, R", "-1.0f, R"),
        ("w->normed, block->gate_w, block->gate_b", "w->normed, block->up_w, block->up_b"),
    ],
    "dpoi_mlp_backward": [
        ("w->dx, w->activated, block->down_w", "w->dx, a->up, block->down_w"),
        ("w->dactivated, w->normed, block->up_w", "w->dactivated, a->middle, block->up_w"),
        ("                              1);", "                              0);"),
        ("w->stats, a->middle, block->norm2_w->data, R", "w->stats, a->x, block->norm2_w->data, R"),
        ("w->stats, a->middle, block->norm2_w->data, R", "w->stats, a->middle, block->norm2_b->data, R"),
        ("dnormed, w->dgate, w->normed", "dnormed, w->dactivated, w->normed"),
        ("below || dpoi_trains(block->norm2_w, block->norm2_b)", "dpoi_trains(block->norm2_w, block->norm2_b)"),
        ("dpoi_trains(block->gate_w, block->gate_b)", "0"),
        ("dpoi_trains(block->up_w, block->up_b) ||", ""),
    ],
    "dpoi_heads_backward": [
        ("-1.0f, R", "1.0f, R"),
        ("if (w->rotary)", "if (0)"),
        ("w->dqkv, w->normed, block->qkv_w", "w->dqkv, a->x, block->qkv_w"),
        ("w->stats, a->x, block->norm1_w->data, R", "w->stats, a->x, block->norm2_w->data, R"),
        ("block->norm1_w->grad, block->norm1_b->grad", "block->norm2_w->grad, block->norm1_b->grad"),
    ],
    "dpoi_block_backward": [
        ("if (!parallel) dpoi_mlp_backward", "if (0) dpoi_mlp_backward"),
        ("if (parallel) dpoi_mlp_backward", "if (0) dpoi_mlp_backward"),
        ("w->dx, a.attended, block->out_w", "w->dx, a.x, block->out_w"),
        ("a.out = w->branch;", ""),
        ("dpoi_block_forward(model, layer, &a, NULL);", ""),
        ("&a, 0, 6, 1)", "&a, 0, 5, 1)"),
        ("&a, 0, 6, 1)", "&a, 1, 6, 1)"),
        ("heads || dpoi_trains(block->out_w, block->out_b)", "heads"),
        ("norm || dpoi_trains(block->qkv_w, block->qkv_b)", "norm"),
        ("&a, attention)", "&a, below)"),
    ],
    "dpoi_blocks_forward": [
        ("&a, 0, 1, 0)", "&a, 0, 0, 0)"),
        ("&a, 1, 6, 0)", "&a, 0, 6, 0)"),
        ("&a, 1, 6, 0)", "&a, 1, 5, 0)"),
        ("(float)config->embedding_scale", "1.0f"),
        ("weights->positions, (float)", "NULL, (float)"),
    ],
    "dpoi_lowest_trained": [
        ("part = block->norm1_w", "part = block->out_w"),
        ("size_t l = 0;", "size_t l = 1;"),
        ("part <= block->down_b", "part < block->down_w"),
        ("part <= block->down_b", "part <= block->up_b"),
    ],
    "dpo_forward": [
        ("(float)config->logit_scale", "1.0f"),
        ("score->logp += w->target_logit[t]", "score->logp = w->target_logit[t]"),
        ("score->logp += w->target_logit[t]", "score->logp -= w->target_logit[t]"),
        ("- w->log_sum[target->scored]", ""),
        ("- w->log_sum[target->scored]", "+ w->log_sum[target->scored]"),
        ("score->n_scored++", ""),
        ("score->greedy &=", "score->greedy ="),
        ("== target->token", "!= target->token"),
        ("if (keep) model->passes++;", ""),
        ("DPOI_STREAM_PASS, model->passes)", "DPOI_STREAM_PASS, 0)"),
    ],
    "dpo_backward": [
        ("embeds ? 0 : dpoi_lowest_trained(model)", "0"),
        ("embeds || l > lowest", "1"),
        ("memset(w->dx, 0, w->R * C * sizeof *w->dx);", ""),
        ("memset(w->dnormed, 0, w->S * C * sizeof *w->dnormed);", ""),
        ("weights->head, (float)config->logit_scale, w->targets", "weights->head, 1.0f, w->targets"),
        ("(float)config->logit_scale, w->targets, w->first_target, w->S)",
         "1.0f, w->targets, w->first_target, w->S)"),
        ("(float)config->embedding_scale", "1.0f"),
        ("weights->positions ? weights->positions->grad : NULL", "NULL"),
        ("w->head_in, weights->norm_w->data", "w->head_in, weights->norm_b->data"),
        ("weights->norm_w->grad, weights->norm_b->grad", "NULL, weights->norm_b->grad"),
        ("model->context->noise = dpo_random_u64(model->noise_seed, DPOI_STREAM_PASS, model->passes);", ""),
        ("embeds || l > lowest", "0"),
        ("embeds || l > lowest", "embeds"),
    ],
    "dpoi_zero": [
        ("memset(piece + streamed, 0, count - streamed);", ""),
    ],
    "dpo_model_zero_grad": [
        ("dpoi_zero(model->context, model->grads, model->grad_bytes);", ""),
    ],
    "dpo_score_examples": [
        ("scores += examples[e].n_branches", "scores++"),
    ],
    "dpo_logits": [
        ("logits[i] *= (float)config->logit_scale", ""),
    ],

    # ---- 7 optimizer
    "dpo_grad_norm": [
        ("total += squares[p]", "total = squares[p]"),
        ("*norm = sqrt(total)", "*norm = total"),
        ("(double)g[i] * g[i]", "fabs((double)g[i])"),
        ("sum += lane[j]", "sum = lane[j]"),
    ],
    "dpo_clip_scale": [
        ("norm + 1e-6", "norm"),
        ("max_norm / (norm + 1e-6)", "1 / (norm + 1e-6)"),
        ("max_norm > 0 && scale < 1", "max_norm > 0"),
        ("max_norm > 0 && scale < 1", "scale < 1"),
    ],
    "dpo_optimizer_init": [
        ("kind == DPO_ADAMW ? 0.999 : 0.99", "0.999"),
    ],
    "dpo_optimizer_step": [
        ("++optimizer->step", "(optimizer->step++)"),
        ("1 - pow(optimizer->beta1, t)", "1"),
        ("1 - pow(optimizer->beta2, t)", "1"),
        ("1 - pow(optimizer->beta2, t)", "1 - pow(optimizer->beta1, t)"),
        ("rest1 = (float)(1 - optimizer->beta1)", "rest1 = 1"),
        ("rest2 = (float)(1 - optimizer->beta2)", "rest2 = 1"),
        ("learning_rate * tensor->lr_scale", "learning_rate"),
        ("tensor->decays ? lr * optimizer->weight_decay : 0.0", "lr * optimizer->weight_decay"),
        ("tensor->decays ? lr * optimizer->weight_decay : 0.0", "0.0"),
        ("tensor->decays ? lr * optimizer->weight_decay : 0.0", "tensor->decays ? optimizer->weight_decay : 0.0"),
        ("lr / correction1 : lr", "lr : lr"),
        (".scale = (float)scale", ".scale = 1"),
    ],
    "dpoi_update": [
        ("m[i] = rule.b1 * m[i] + rule.rest1 * g", "m[i] = rule.rest1 * g"),
        ("m[i] = rule.b1 * m[i] + rule.rest1 * g", "m[i] = m[i] + rule.rest1 * g"),
        ("m[i] = rule.b1 * m[i] + rule.rest1 * g", "m[i] = rule.b1 * m[i] - rule.rest1 * g"),
        ("rule.keep * p[i] - rule.rate * m[i] /", "p[i] - rule.rate * m[i] /"),
        ("rule.keep * p[i] - rule.rate * m[i] /", "rule.keep * p[i] + rule.rate * m[i] /"),
        ("rule.keep * p[i] - rule.rate * m[i] /", "rule.keep * p[i] - rule.rate * g /"),
        ("sqrtf(v[i]) / rule.root2 + rule.epsilon", "sqrtf(v[i]) / rule.root2"),
        ("sqrtf(v[i]) / rule.root2 + rule.epsilon", "sqrtf(v[i]) + rule.epsilon"),
        ("sqrtf(v[i]) / rule.root2 + rule.epsilon", "v[i] / rule.root2 + rule.epsilon"),
        ("sqrtf(v[i]) / rule.root2 + rule.epsilon", "(sqrtf(v[i]) + rule.epsilon) / rule.root2"),
        ("rule.keep * p[i] - rule.rate * g /", "p[i] - rule.rate * g /"),
        ("rule.keep * p[i] - rule.rate * g /", "rule.keep * p[i] + rule.rate * g /"),
        ("(sqrtf(v[i]) + rule.epsilon)", "sqrtf(v[i])"),
        ("(sqrtf(v[i]) + rule.epsilon)", "sqrtf(v[i] + rule.epsilon)"),
    ],
    "dpoi_update_tensor": [
        ("dpoi_bf16_stochastic(p[i], key, first + i)", "dpoi_bf16(p[i])"),
        ("key, first + i)", "key, 0)"),
        ("optimizer->v + at", "optimizer->v + first"),
        ("optimizer->m + at", "optimizer->m + first"),
        ("else if (tensor->master) dpoi_narrow(half, DPO_BF16, p, n);", ""),
        ("tensor->master ? tensor->master + first : copy", "copy"),
        ("DPOI_STREAM_UPDATE, optimizer->step", "DPOI_STREAM_UPDATE, 0"),
    ],
    "dpo_schedule_factor": [
        ("((double)step + 1) / ((double)warmup + 1)", "((double)step + 1) / (double)warmup"),
        ("((double)step + 1) / ((double)warmup + 1)", "(double)step / ((double)warmup + 1)"),
        ("(double)(step - warmup) / (double)(steps - warmup)", "(double)(step - warmup) / (double)steps"),
        ("(double)(step - warmup) / (double)(steps - warmup)", "(double)step / (double)(steps - warmup)"),
        ("1.0 - progress", "1.0 + progress"),
        ("0.5 * (1.0 + cos", "0.5 * (1.0 - cos"),
        ("0.5 * (1.0 + cos", "(1.0 + cos"),
        ("DPOI_MIN(1.0, ", "(0, "),
    ],

    # ---- 8 files: numbers on their way in
    "dpoi_half_to_float": [
        ("(half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0", "0"),
        ("(uint32_t)(half & 0x8000) << 16", "0"),
        ("0x1p112f", "0x1p111f"),
    ],
    "dpoi_alibi_slopes": [
        ("-8.0 *", "8.0 *"),
        ("-4.0 *", "-8.0 *"),
        ("2 * (h - n) + 1", "2 * (h - n)"),
        ("(double)(h + 1)", "(double)h"),
    ],
    "dpoi_fill_tensor": [
        ("x[i] += scale * product", "x[i] -= scale * product"),
        ("x[i] += scale * product", "x[i] += product"),
        ("dpoi_tensor_get(W, first * columns,", "dpoi_tensor_get(W, 0,"),
    ],
    "dpo_lora_init": [
        ("1 / sqrt((double)tensor->shape[1]) : 0.0", "1 / sqrt((double)tensor->shape[1]) : 0.01"),
        ("1 / sqrt((double)tensor->shape[1])", "1 / sqrt((double)tensor->shape[0])"),
        ("2 * dpo_random_uniform(seed, k, i) - 1", "dpo_random_uniform(seed, k, i)"),
    ],
    "dpoi_lora_add": [
        ("!model->options.frozen ||", ""),
        ("model->lora.r ||", ""),
        ("|| model->workspace", ""),
    ],
    "dpo_lora_load": [
        ("dpo_lora_check_base(context, &lora, path, model->identity)", "0"),
        ("model->adapter_identity = file.identity;", ";"),
    ],
    "dpoi_match_entries": [
        ("return first ? dpoi_fail", "continue; return first ? dpoi_fail"),
    ],
    "dpoi_field_read": [
        ("number == floor(number)", "1"),
        ("*(int *)at = number != 0", "*(int *)at = 0"),
    ],
    "dpo_lora_save": [
        ("keep ? base_path :", "0 ? base_path :"),
    ],
    "dpo_state_load": [
        ("optimizer->step = numbers[1];", ""),
        ("model->passes = numbers[2];", ""),
        ("if (model->tensors[i].master)", "if (0)"),
    ],
    "dpoi_state_check": [
        ("!memcmp(file->entries[n - 2].data, &run, sizeof run)", "1"),
        ("i <= n + 1", "i <= n"),
        ("strcmp(found, name)", "0"),
        ("file->entries[i].dtype != entries[i].dtype ||", ""),
        ("file->entries[i].bytes != entries[i].bytes", "0"),
    ],
    "dpoi_state_entries": [
        ("if (optimizer->m)", "if (0)"),
        ("tensor->master ? dpoi_tensor_entry", "0 ? dpoi_tensor_entry"),
    ],

    # ---- 10 generation
    "dpoi_cache_store": [
        ("heads.head_stride + heads.value", "heads.head_stride + heads.key"),
    ],
    "dpoi_linear_row": [
        ("y[o] += x[i] * dpoi", "y[o] -= x[i] * dpoi"),
        ("if (b) y[o] += dpoi_weight_at(b, o);", ""),
        ("if (!accumulate) y[o] = 0.0f;", "y[o] = 0.0f;"),
    ],
    "dpoi_attention_row": [
        ("p[j] * kv", "kv"),
        ("n = cache->n + 1", "n = cache->n"),
        ("attention->slopes ? attention->slopes[h] : 0.0f", "0.0f"),
    ],
    "dpoi_next_logits": [
        ("cache->logits[v] *= (float)config->logit_scale", ""),
    ],
    "dpoi_prefill": [
        ("(n - 1) * model->config.d_model", "0"),
    ],
    "dpoi_step": [
        ("(uint32_t)cache->n", "0"),
        ("cache->n++", ""),
    ],
    "dpoi_choose": [
        ("logits[v] > logits[best]", "logits[v] < logits[best]"),
        (" / sampling->temperature", ""),
        ("point -= choices[i].p", "point += choices[i].p"),
        ("sampling->top_p * mass", "sampling->top_p"),
        ("sampling->top_k ? DPOI_MIN(sampling->top_k, V) : V", "V"),
        ("n = i + 1", "n = i"),
        ("mass = total = 0.0", "mass = 0.0"),
    ],
}


def find_function(source, name):
    """The extent of a function's definition, by its braces."""
    for match in re.finditer(r"^(?:static|DPO_API|DPOI_\w+)\b[^;{}]*?\b%s\(" % re.escape(name), source, re.M):
        start = source.index("{", match.start())
        if ";" in source[match.end():start]:
            continue                                    # a declaration
        depth = 0
        for brace in re.finditer(r"[{}]", source[start:]):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                return match.start(), start + brace.end()
    return None


def make_mutants(source, word, macros):
    """The mutants' descriptions, dpo.h with all of them, what is wrong with the list, and how many are
    left out: those marked PAIRED, AMX and the like depend on the compiler's `macros`."""
    mutants, errors, additions, left_out = [], [], [], 0
    for name, pairs in MUTANTS.items():
        if word not in name:
            continue
        extent = find_function(source, name)
        if not extent:
            errors.append("dpo.h has no function %s" % name)
            continue
        function, copies, choice = source[extent[0]:extent[1]], "", name
        for piece, instead, *wanted in pairs:
            what = "%s: %s  ->  %s" % (name, piece, instead or "nothing")
            body = function.index("{")
            if function.count(piece, body) != 1:
                errors.append("%s: found %d times, not once" % (what, function.count(piece, body)))
            elif wanted and not wanted[0](macros):
                left_out += 1
            else:
                mutants.append(what)
                copy = "%s__%d" % (name, len(mutants))
                head = re.sub(r"\b%s\b" % name, copy, function[:body])
                copies += "\n%s%s" % (head, function[body:].replace(piece, instead))
                choice = "dpoi_mutant == %d ? %s : %s" % (len(mutants), copy, choice)
        # Within its own macro a name stands for itself: the function as it is.
        additions.append((extent[1], "%s\n#define %s (%s)\n" % (copies, name, choice)))
    for place, text in sorted(additions, reverse=True):
        source = source[:place] + text + source[place:]
    # A function that is chosen while the program runs cannot be inlined always.
    source = source.replace("__attribute__((always_inline))", "")
    return mutants, CHOICE + source, errors, left_out


def compiler():
    """The Makefile's compiler and CPU."""
    try:
        with open("build/flags") as flags:
            words = flags.read().split()
    except OSError:
        words = ["cc"]
    cpu = [word for word in words if re.match("-m(arch|cpu)=", word)]
    # What -O3 takes longer than -O1 to compile, the tests save several times.
    return [words[0], "-std=gnu11", "-O3", "-w", "-ffp-contract=fast", "-fno-math-errno",
            "-fno-trapping-math", "-DCHECK_ONE_FAILURE", "-DDPO_STATIC"] + cpu


def macros_of(command):
    text = subprocess.run(command + ["-dM", "-E", "-xc", os.devnull], capture_output=True,
                          text=True).stdout
    return set(re.findall(r"#define (\w+)", text))


def passes(program, mutant):
    """A program that stops for another reason than a check, a crash or a hang stops everything."""
    with tempfile.TemporaryDirectory(prefix="dpo-mutant-", dir=MEMORY) as place:
        done = subprocess.run(["sh", "-c", f'ulimit -S -t {HANGS}; exec "$0"', program],
                              capture_output=True, text=True, errors="replace",
                              env=dict(os.environ, DPO_MUTANT=str(mutant), CHECK_TMPDIR=place))
    if done.returncode == -signal.SIGKILL or done.returncode > 0 and "FAILED: " not in done.stdout:
        raise RuntimeError("%s, mutant %d: exit status %d without a failed check" %
                           (program, mutant, done.returncode))
    return done.returncode == 0


def main():
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    with open("dpo.h") as header:
        source = header.read()
    command = compiler()
    mutants, text, errors, left_out = make_mutants(
        source, sys.argv[1] if len(sys.argv) > 1 else "", macros_of(command))
    if left_out:
        print("%d mutants of products of bf16 left out: not on this CPU" % left_out)
    for error in errors:
        print("error:", error)
    with tempfile.TemporaryDirectory(prefix="dpo-mutants-") as directory, \
            concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        header = os.path.join(directory, "mutants.h")
        with open(header, "w") as out:
            out.write(text)
        programs = [os.path.join(directory, test) for test in TESTS]
        built = list(pool.map(lambda test, program: subprocess.run(
            command + ['-DCHECK_HEADER="%s"' % header, "tests/%s.c" % test, "-o", program, "-lm"],
            capture_output=True, text=True), TESTS, programs))
        if any(result.returncode for result in built):
            print(*[result.stderr[:2000] for result in built], "the mutants do not compile", sep="\n")
            return 1
        if not all(pool.map(passes, programs, [0] * len(programs))):
            print("the tests fail on dpo.h as it is, so mutants would say nothing")
            return 1
        # After the quickest test those that noticed something last: neighbours are alike.
        quickest, *others = programs
        last_noticed = dict.fromkeys(others, 0)

        def noticed_by_any(mutant):
            for program in [quickest] + sorted(others, key=lambda other: -last_noticed[other]):
                if not passes(program, mutant):
                    last_noticed[program] = mutant
                    return True
            return False

        noticed = 0
        for i, seen in enumerate(pool.map(noticed_by_any, range(1, len(mutants) + 1))):
            noticed += seen
            if not seen:
                errors.append(mutants[i])
                print("survives:", mutants[i], flush=True)
            if (i + 1) % 50 == 0:
                print("%d of %d tried" % (i + 1, len(mutants)), flush=True)
    print("%d passed, %d failed" % (noticed, len(errors)))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
