// What the two calls compute, and the functions that do a share of it, one for each instruction set.

#pragma once

#include <cstdint>

enum class Kind : int32_t { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };

// y[v, o] = scale · Σ weight[o, i] x[v, i].
struct MatmulArgs {
  Kind kind;
  const void* weight;  // [out, in], in 4 bits two columns in a byte as mpt_eqx/ops/quantized.py has them
  const void* scale;   // in 8 bits float32 [out], in 4 bits bfloat16 [out, in / 32], else null
  const float* x;      // [vectors, in]
  float* y;            // [vectors, out]
  int64_t out, in, vectors;
};

// The same for many vectors.
struct GemmArgs {
  Kind kind;
  Kind x_kind;  // a floating type
  const void* weight;
  const void* scale;
  const void* x;
  float* panels;  // [vectors / 16, in, 16], made of x
  float* y;
  int64_t out, in, vectors;
};

constexpr int64_t kGemmRows = 48;    // most rows of a share
constexpr int64_t kGemmBlock = 256;  // columns that are widened at a time

// Attention of some queries in each of `groups` heads to the keys of a cache, from max(position − window, 0) to
// position. As in mpt_eqx/ops/attention.py, scores are rounded to the type of the cache before the bias, and weights
// before they meet the values. A query at no place of the cache, 0 ≤ position < capacity and 0 ≤ layer < layers, gets
// NaN.
struct AttentionArgs {
  Kind kind;              // of keys and values, and of what is rounded
  const float* q;         // [rows, heads, groups, queries, size]
  const void* k;          // [rows, layers, heads, capacity, size]
  const void* v;          // likewise
  const float* slopes;    // [heads, groups], of ALiBi; zero for none
  const int32_t* layer;     // [rows], which of the layers is read
  const int32_t* position;  // [rows, queries]
  float* y;               // as q
  int64_t layers, heads, groups, queries, capacity, size, window;
  float scale;
};

// Queries that are computed together, of the groups · queries of one head of keys: their scores stay in the
// second-level cache, and each key is widened once for all of them.
constexpr int64_t kTile = 32;

// Computes the rows of y from `first` up to `last`; of AttentionArgs, a row stands for one
// tile, of the ⌈groups · queries / kTile⌉ of one head of keys of one row.
using MatmulFunction = void(const MatmulArgs&, int64_t first, int64_t last);
// `pack` makes panels from `first` up to `last`, all of which `gemm` needs; it has for itself a buffer of
// kGemmRows · (kGemmBlock + 16 + vectors), rounded up to 16 vectors.
using PackFunction = void(const GemmArgs&, int64_t first, int64_t last);
using GemmFunction = void(const GemmArgs&, int64_t first, int64_t last, float* buffer);
using AttentionFunction = void(const AttentionArgs&, int64_t first, int64_t last);
extern "C" MatmulFunction matmul_default, matmul_v3, matmul_v4;
extern "C" PackFunction pack_default, pack_v3, pack_v4;
extern "C" GemmFunction gemm_default, gemm_v3, gemm_v4;
// The same for vectors of bfloat16, by 32 rows and 32 columns at a time: panels hold half as many floats and are an even
// number, and the buffer is of 16 · in.
constexpr int64_t kTileRows = 32;
extern "C" PackFunction pack_amx;
extern "C" GemmFunction gemm_amx;
extern "C" AttentionFunction attention_default, attention_v3, attention_v4;
