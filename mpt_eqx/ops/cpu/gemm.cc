// Products of a weight's rows with many vectors. Compiled once for each instruction set.
//
// Vectors stand side by side in panels of sixteen, a column of x after the other. A block of a few rows and kBlock columns
// of the weight is widened once, and each of its numbers then meets all panels. A sum runs over the columns of a block in
// their order, and over the blocks in theirs, whatever stands in the other lanes: it is the same to the last bit for any
// number of vectors.

#include <algorithm>
#include <type_traits>

#include "kernel.h"
#include "simd.h"

namespace {

// Rows of the weight whose sums, for kPanels panels, fill the registers there are.
#if defined(__AVX512F__)
constexpr int kRows = 12, kPanels = 2;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kRows = 6, kPanels = 1;
#else
constexpr int kRows = 3, kPanels = 1;
#endif
constexpr int kRegisters = sizeof(Floats) / sizeof(Register);
static_assert(kGemmRows % kRows == 0);

// Columns `at` to `at + count` of a row, in float32.
template <typename Number>
inline void widen_row(const uint8_t* row, int64_t at, int64_t count, float* __restrict to) {
  row += at * Number::kBytes;
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<Number, Float16>) {
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * i))));
    }
  }
#endif
  for (; i < count; i++) to[i] = Number::one(row + Number::kBytes * i);
}

// Sixteen lines of sixteen numbers become its columns, four by four.
inline void transpose(const float* from, float* to) {
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < kLanes; j += 4) {
      const Quarter a = load<Quarter>(from + i * kLanes + j), b = load<Quarter>(from + (i + 1) * kLanes + j);
      const Quarter c = load<Quarter>(from + (i + 2) * kLanes + j), d = load<Quarter>(from + (i + 3) * kLanes + j);
      const Quarter ab = MPT_EQX_SHUFFLE(a, b, 0, 4, 1, 5), cd = MPT_EQX_SHUFFLE(c, d, 0, 4, 1, 5);
      const Quarter ba = MPT_EQX_SHUFFLE(a, b, 2, 6, 3, 7), dc = MPT_EQX_SHUFFLE(c, d, 2, 6, 3, 7);
      const Quarter columns[] = {MPT_EQX_SHUFFLE(ab, cd, 0, 1, 4, 5), MPT_EQX_SHUFFLE(ab, cd, 2, 3, 6, 7),
                                 MPT_EQX_SHUFFLE(ba, dc, 0, 1, 4, 5), MPT_EQX_SHUFFLE(ba, dc, 2, 3, 6, 7)};
      for (int n = 0; n < 4; n++) std::memcpy(to + (j + n) * kLanes + i, &columns[n], sizeof(Quarter));
    }
  }
}

// Sixteen columns of sixteen vectors from `vector` on become sixteen lines of a panel.
template <typename Number>
inline void pack_block(const GemmArgs& p, int64_t vector, int64_t at, float* to) {
  const int64_t count = std::min<int64_t>(p.in - at, kLanes), lanes = std::min<int64_t>(p.vectors - vector, kLanes);
  float numbers[kLanes][kLanes] = {};
  for (int v = 0; v < lanes; v++) {
    const uint8_t* row = static_cast<const uint8_t*>(p.x) + (vector + v) * p.in * Number::kBytes;
    widen_row<Number>(row, at, count, numbers[v]);
  }
  if (count == kLanes) return transpose(numbers[0], to);
  float lines[kLanes * kLanes];
  transpose(numbers[0], lines);
  std::memcpy(to, lines, count * kLanes * sizeof(float));
}

template <typename Number>
void pack(const GemmArgs& p, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; panel++) {
    float* to = p.panels + panel * p.in * kLanes;
    for (int64_t at = 0; at < p.in; at += kLanes) pack_block<Number>(p, panel * kLanes, at, to + at * kLanes);
  }
}

template <typename Weight>
inline void widen(const GemmArgs& p, int64_t row, int64_t at, int64_t count, float* to) {
  const uint8_t* w = static_cast<const uint8_t*>(p.weight) + row * p.in * Weight::kBytes;
  widen_row<Weight>(w, at, count, to);
}

// A number of 4 bits times its scale of 8 is exact in float32.
struct Int4 {};

template <>
inline void widen<Int4>(const GemmArgs& p, int64_t row, int64_t at, int64_t count, float* to) {
  const int64_t groups = p.in / 32;
  const uint8_t* w = static_cast<const uint8_t*>(p.weight) + row * groups * 16;
  const uint16_t* scales = static_cast<const uint16_t*>(p.scale) + row * groups;
  for (int64_t g = at / 32; g < (at + count) / 32; g++, to += 32) {
    const float scale = bits<float>(static_cast<uint32_t>(scales[g]) << 16);
    uint8_t pairs[16];
    std::memcpy(pairs, w + g * 16, sizeof(pairs));
#pragma GCC unroll 1
    for (int i = 0; i < 16; i++) to[i] = static_cast<float>((pairs[i] & 15) - 8) * scale;
#pragma GCC unroll 1
    for (int i = 0; i < 16; i++) to[i + 16] = static_cast<float>((pairs[i] >> 4) - 8) * scale;
  }
}

// Adds the products of kRows rows of a block, kBlock apart, with `panels` panels to sums that lie `apart` from row to row.
template <int panels>
inline void multiply(const float* w, const float* const x[], int64_t count, float* sums, int64_t apart, bool first) {
  Register found[kRows][panels][kRegisters] = {};
  for (int64_t i = 0; i < count; i++) {
    Register columns[panels][kRegisters];
    for (int n = 0; n < panels; n++) {
      for (int j = 0; j < kRegisters; j++) {
        columns[n][j] = load<Register>(x[n] + i * kLanes + j * (kLanes / kRegisters));
      }
    }
    for (int r = 0; r < kRows; r++) {
      const float number = w[r * kGemmBlock + i];
      for (int n = 0; n < panels; n++) {
        for (int j = 0; j < kRegisters; j++) found[r][n][j] += columns[n][j] * number;
      }
    }
  }
  for (int r = 0; r < kRows; r++) {
    for (int n = 0; n < panels; n++) {
      for (int j = 0; j < kRegisters; j++) {
        float* to = sums + r * apart + n * kLanes + j * (kLanes / kRegisters);
        const Register all = first ? found[r][n][j] : load<Register>(to) + found[r][n][j];
        std::memcpy(to, &all, sizeof(all));
      }
    }
  }
}

template <typename Weight>
void run(const GemmArgs& p, int64_t first, int64_t last, float* buffer) {
  const int64_t panels = (p.vectors + kLanes - 1) / kLanes, apart = panels * kLanes + kLanes;  // more than needed, since rows that lie a power of 2 apart share cache lines
  float* const sums = buffer + kGemmRows * kGemmBlock;
  const int64_t rows = last - first, padded = (rows + kRows - 1) / kRows * kRows;
  for (int64_t at = 0; at < p.in; at += kGemmBlock) {
    const int64_t count = std::min<int64_t>(p.in - at, kGemmBlock);
    for (int64_t r = 0; r < padded; r++) {
      if (r < rows) {
        widen<Weight>(p, first + r, at, count, buffer + r * kGemmBlock);
      } else {
        std::memset(buffer + r * kGemmBlock, 0, count * sizeof(float));
      }
    }
    int64_t panel = 0;
    for (; panel + kPanels <= panels; panel += kPanels) {
      const float* x[kPanels];
      for (int n = 0; n < kPanels; n++) x[n] = p.panels + ((panel + n) * p.in + at) * kLanes;
      for (int64_t r = 0; r < padded; r += kRows) {
        multiply<kPanels>(buffer + r * kGemmBlock, x, count, sums + r * apart + panel * kLanes, apart, at == 0);
      }
    }
    for (; panel < panels; panel++) {
      const float* x[] = {p.panels + (panel * p.in + at) * kLanes};
      for (int64_t r = 0; r < padded; r += kRows) {
        multiply<1>(buffer + r * kGemmBlock, x, count, sums + r * apart + panel * kLanes, apart, at == 0);
      }
    }
  }
  for (int64_t vector = 0; vector < p.vectors; vector += kLanes) {
    const int64_t lanes = std::min<int64_t>(p.vectors - vector, kLanes);
    for (int64_t r = 0; r < rows; r += kLanes) {
      float numbers[kLanes][kLanes] = {}, lines[kLanes * kLanes];
      const int64_t count = std::min<int64_t>(rows - r, kLanes);
      for (int64_t i = 0; i < count; i++) {
        const float scale = p.kind == Kind::kInt8 ? static_cast<const float*>(p.scale)[first + r + i] : 1.0f;
        for (int v = 0; v < kLanes; v++) numbers[i][v] = sums[(r + i) * apart + vector + v] * scale;
      }
      transpose(numbers[0], lines);
      for (int64_t v = 0; v < lanes; v++) {
        std::memcpy(p.y + (vector + v) * p.out + first + r, lines + v * kLanes, count * sizeof(float));
      }
    }
  }
}

}  // namespace

extern "C" void MPT_EQX_NAME(pack)(const GemmArgs& p, int64_t first, int64_t last) {
  switch (p.x_kind) {
    case Kind::kFloat32: return pack<Float32>(p, first, last);
    case Kind::kBFloat16: return pack<BFloat16>(p, first, last);
    case Kind::kFloat16: return pack<Float16>(p, first, last);
    default: return;
  }
}

extern "C" void MPT_EQX_NAME(gemm)(const GemmArgs& p, int64_t first, int64_t last, float* buffer) {
  switch (p.kind) {
    case Kind::kFloat32: return run<Float32>(p, first, last, buffer);
    case Kind::kBFloat16: return run<BFloat16>(p, first, last, buffer);
    case Kind::kFloat16: return run<Float16>(p, first, last, buffer);
    case Kind::kInt8: return run<Int8>(p, first, last, buffer);
    case Kind::kInt4: return run<Int4>(p, first, last, buffer);
  }
}
