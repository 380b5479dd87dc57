// What one product is of: y[v, o] = scale · Σ weight[o, i] x[v, i].

#pragma once

#include <cstdint>

enum class Kind { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };

struct Rows {
  Kind kind;
  const void* weight;  // [out, in], in 4 bits two columns in a byte as mpt_eqx/model/quantized.py has them
  const void* scale;   // in 8 bits float32 [out], in 4 bits bfloat16 [out, in / 32], else null
  const float* x;      // [vectors, in]
  float* y;            // [vectors, out]
  int64_t out, in, vectors;
};

// Computes the rows from `first` up to `last` of y; one for each instruction set.
using RowsFunction = void(const Rows&, int64_t first, int64_t last);
extern "C" RowsFunction rows_default, rows_v3, rows_v4;
