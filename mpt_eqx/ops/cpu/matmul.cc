// Products of a weight's rows with a few vectors. Compiled once for each instruction set.
//
// Every sum runs in the same order whatever the number of vectors: sixteen partial sums over the columns modulo sixteen,
// then their total. A row of a batch is therefore the same to the last bit in any batch.

#include <type_traits>

#include "kernel.h"
#include "simd.h"

namespace {

// Sixteen numbers, and what they are multiplied with, in registers: GCC keeps wider vectors in memory.
constexpr int kPieces = sizeof(Floats) / sizeof(Register), kWidth = kLanes / kPieces;

template <typename Weight>
inline void read_pieces(const uint8_t* row, int64_t at, Register to[kPieces]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  for (int i = 0; i < kPieces; i++) {
    const uint8_t* from = row + (at + i * kWidth) * Weight::kBytes;
    if constexpr (std::is_same_v<Weight, Float32>) {
      to[i] = load<Register>(from);
    } else if constexpr (std::is_same_v<Weight, BFloat16>) {
      to[i] = bits<Register>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16));
    } else if constexpr (std::is_same_v<Weight, Float16>) {
      to[i] = _mm256_cvtph_ps(load<__m128i>(from));
    } else {
      to[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
    }
  }
#else
  const Floats numbers = Weight::read(row, at);
  std::memcpy(to, &numbers, sizeof(numbers));
#endif
}

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
  Register sums[kRows][kVectors] = {};
  for (int64_t at = 0; at < whole; at += kLanes) {
    Register numbers[kRows][kPieces];
    for (int r = 0; r < kRows; r++) read_pieces<Weight>(w[r], at, numbers[r]);
    for (int i = 0; i < kPieces; i++) {
      for (int v = 0; v < kVectors; v++) {
        const Register columns = load<Register>(x + v * p.in + at + i * kWidth);
        for (int r = 0; r < kRows; r++) sums[r][v] += numbers[r][i] * columns;
      }
    }
  }
  for (int r = 0; r < kRows; r++) {
    if (whole < p.in) {
      uint8_t rest[kLanes * 4] = {};
      std::memcpy(rest, w[r] + whole * Weight::kBytes, (p.in - whole) * Weight::kBytes);
      Register numbers[kPieces];
      read_pieces<Weight>(rest, 0, numbers);
      for (int v = 0; v < kVectors; v++) {
        float columns[kLanes] = {};
        std::memcpy(columns, x + v * p.in + whole, (p.in - whole) * sizeof(float));
        for (int i = 0; i < kPieces; i++) sums[r][v] += numbers[i] * load<Register>(columns + i * kWidth);
      }
    }
    const float scale = p.scale ? static_cast<const float*>(p.scale)[row + r * apart] : 1.0f;
    for (int v = 0; v < kVectors; v++) p.y[(vector + v) * p.out + row + r * apart] = total(sums[r][v]) * scale;
  }
}

// The same for 4 bits, where each group of 32 columns has a scale of its own.
struct Int4 {};

// The 32 numbers of a group.
constexpr int kParts = 32 * sizeof(float) / sizeof(Register);

inline void widen_group(const uint8_t* from, Register to[kParts]) {
#if defined(__AVX512F__)
  const Words pairs = bits<Words>(widened(load<Bytes>(from)));
  // The last bits of 2^23 are a number of their own, so that no conversion is needed.
  to[0] = bits<Floats>((pairs & 15) | 0x4b000000u) - (0x1p23f + 8);
  to[1] = bits<Floats>(((pairs >> 4) & 15) | 0x4b000000u) - (0x1p23f + 8);
#elif defined(__AVX2__)
  // The last bits of 2^23 are a number of their own, so that no conversion is needed.
  const __m256i lower = _mm256_set1_epi32(15), one = _mm256_set1_epi32(0x4b000000);
  const Register eight = Register{} + (0x1p23f + 8);
  for (int i = 0; i < 2; i++) {
    const __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i)));
    to[i] = bits<Register>(_mm256_or_si256(_mm256_and_si256(pairs, lower), one)) - eight;
    to[i + 2] = bits<Register>(_mm256_or_si256(_mm256_srli_epi32(pairs, 4), one)) - eight;
  }
#else
  float numbers[32];
  for (int i = 0; i < 16; i++) {
    numbers[i] = static_cast<float>((from[i] & 15) - 8);
    numbers[i + 16] = static_cast<float>((from[i] >> 4) - 8);
  }
  std::memcpy(to, numbers, sizeof(numbers));
#endif
}

template <int kRows, int kVectors>
inline void tile4(const MatmulArgs& p, int64_t row, int64_t apart, int64_t vector) {
  const int64_t groups = p.in / 32;
  const uint8_t* w = static_cast<const uint8_t*>(p.weight) + row * groups * 16;
  const uint16_t* scales = static_cast<const uint16_t*>(p.scale) + row * groups;
  const float* x = p.x + vector * p.in;
  Register sums[kRows][kVectors] = {};
  for (int64_t g = 0; g < groups; g++) {
    for (int r = 0; r < kRows; r++) {
      Register numbers[kParts];
      widen_group(w + (r * apart * groups + g) * 16, numbers);
      const float scale = bits<float>(static_cast<uint32_t>(scales[r * apart * groups + g]) << 16);
      for (int v = 0; v < kVectors; v++) {
        const float* columns = x + v * p.in + g * 32;
        Register part = numbers[0] * load<Register>(columns);
        for (int i = 1; i < kParts; i++) part += numbers[i] * load<Register>(columns + i * (32 / kParts));
        sums[r][v] += part * scale;
      }
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

// A share is read as several streams, each of one row after the other: the processor's prefetchers follow streams across
// rows, and lose what jumps with every tile, which halves the speed of short rows.
template <typename Weight, int kVectors>
void vectors(const MatmulArgs& p, int64_t first, int64_t last, int64_t vector) {
  // So many that sums stay in sixteen registers.
  constexpr int kRows = kVectors > 2 && sizeof(Register) < sizeof(Floats) ? 2 : 4;
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
