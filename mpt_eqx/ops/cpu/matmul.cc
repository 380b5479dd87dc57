// Products of a weight's rows with a few vectors. Compiled once for each instruction set.
//
// Every sum runs in the same order whatever the number of vectors: sixteen partial sums over the columns modulo sixteen,
// then their total. A row of a batch is therefore the same to the last bit in any batch.

#include <type_traits>

#include "kernel.h"
#include "simd.h"

namespace {

// kRows rows, `apart` from one another, times kVectors vectors of x. What is left over after the last sixteen columns is
// added at the end.
template <typename Weight, int kRows, int kVectors>
inline void tile(const MatmulArgs& p, int64_t row, int64_t apart, int64_t vector) {
  const int64_t whole = p.in / kLanes * kLanes;
  const uint8_t* w[kRows];
  for (int r = 0; r < kRows; r++) {
    w[r] = static_cast<const uint8_t*>(p.weight) + (row + r * apart) * p.in * Weight::kBytes;
  }
  const float* x = p.x + vector * p.in;
  Floats sums[kRows][kVectors] = {};
  for (int64_t at = 0; at < whole; at += kLanes) {
    Floats numbers[kRows];
    for (int r = 0; r < kRows; r++) {
      numbers[r] = Weight::read(w[r], at);
    }
    for (int v = 0; v < kVectors; v++) {
      Floats column = load<Floats>(x + v * p.in + at);
      for (int r = 0; r < kRows; r++) sums[r][v] += numbers[r] * column;
    }
  }
  for (int r = 0; r < kRows; r++) {
    if (whole < p.in) {
      uint8_t rest[kLanes * 4] = {};
      std::memcpy(rest, w[r] + whole * Weight::kBytes, (p.in - whole) * Weight::kBytes);
      Floats numbers = Weight::read(rest, 0);
      for (int v = 0; v < kVectors; v++) {
        Floats column = {};
        std::memcpy(&column, x + v * p.in + whole, (p.in - whole) * sizeof(float));
        sums[r][v] += numbers * column;
      }
    }
    const float scale = p.scale ? static_cast<const float*>(p.scale)[row + r * apart] : 1.0f;
    for (int v = 0; v < kVectors; v++) p.y[(vector + v) * p.out + row + r * apart] = total(sums[r][v]) * scale;
  }
}

// The same for 4 bits, where each group of 32 columns has a scale of its own.
struct Int4 {};

template <int kRows, int kVectors>
inline void tile4(const MatmulArgs& p, int64_t row, int64_t apart, int64_t vector) {
  const int64_t groups = p.in / 32;
  const uint8_t* w = static_cast<const uint8_t*>(p.weight) + row * groups * 16;
  const uint16_t* scales = static_cast<const uint16_t*>(p.scale) + row * groups;
  const float* x = p.x + vector * p.in;
  Floats sums[kRows][kVectors] = {};
  for (int64_t g = 0; g < groups; g++) {
    Floats low[kRows], high[kRows];
    float scale[kRows];
    for (int r = 0; r < kRows; r++) {
      const Words pairs = bits<Words>(widened(load<Bytes>(w + (r * apart * groups + g) * 16)));
      // The last bits of 2^23 are a number of their own, so that no conversion is needed.
      low[r] = bits<Floats>((pairs & 15) | 0x4b000000u) - (0x1p23f + 8);
      high[r] = bits<Floats>(((pairs >> 4) & 15) | 0x4b000000u) - (0x1p23f + 8);
      scale[r] = bits<float>(static_cast<uint32_t>(scales[r * apart * groups + g]) << 16);
    }
    for (int v = 0; v < kVectors; v++) {
      const Floats first = load<Floats>(x + v * p.in + g * 32);
      const Floats second = load<Floats>(x + v * p.in + g * 32 + 16);
      for (int r = 0; r < kRows; r++) sums[r][v] += (low[r] * first + high[r] * second) * scale[r];
    }
  }
  for (int r = 0; r < kRows; r++) {
    for (int v = 0; v < kVectors; v++) p.y[(vector + v) * p.out + row + r * apart] = total(sums[r][v]);
  }
}

template <typename Weight, int kRows, int kVectors>
inline void any_tile(const MatmulArgs& p, int64_t row, int64_t apart, int64_t vector) {
  if constexpr (std::is_same_v<Weight, Int4>) {
    tile4<kRows, kVectors>(p, row, apart, vector);
  } else {
    tile<Weight, kRows, kVectors>(p, row, apart, vector);
  }
}

// A share is read as four streams, each of one row after the other: the processor's prefetchers follow streams across
// rows, and lose what jumps with every tile, which halves the speed of short rows.
template <typename Weight, int kVectors>
void vectors(const MatmulArgs& p, int64_t first, int64_t last, int64_t vector) {
  constexpr int kRows = 4;
  const int64_t apart = (last - first) / kRows;
  for (int64_t row = first; row < first + apart; row++) any_tile<Weight, kRows, kVectors>(p, row, apart, vector);
  for (int64_t row = first + kRows * apart; row < last; row++) any_tile<Weight, 1, kVectors>(p, row, 1, vector);
}

template <typename Weight>
void run(const MatmulArgs& p, int64_t first, int64_t last) {
  int64_t vector = 0;
  for (; vector + 4 <= p.vectors; vector += 4) vectors<Weight, 4>(p, first, last, vector);
  switch (p.vectors - vector) {
    case 3: return vectors<Weight, 3>(p, first, last, vector);
    case 2: return vectors<Weight, 2>(p, first, last, vector);
    case 1: return vectors<Weight, 1>(p, first, last, vector);
  }
}

}  // namespace

extern "C" void MPT_EQX_NAME(matmul)(const MatmulArgs& p, int64_t first, int64_t last) {
  switch (p.kind) {
    case Kind::kFloat32: return run<Float32>(p, first, last);
    case Kind::kBFloat16: return run<BFloat16>(p, first, last);
    case Kind::kFloat16: return run<Float16>(p, first, last);
    case Kind::kInt8: return run<Int8>(p, first, last);
    case Kind::kInt4: return run<Int4>(p, first, last);
  }
}
