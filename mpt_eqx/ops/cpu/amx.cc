// Products of a weight's rows with many vectors of bfloat16, by Intel's tiles: sixteen rows times sixteen vectors, 32
// columns at a time.
//
// Numbers of the weight become bfloat16: those of 8 bits exactly, those of 4 bits scaled and rounded. A sum runs over the
// columns in their order, in float32, whatever the other vectors are, and however many.

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernel.h"
#include "simd.h"

namespace {

constexpr int kSide = 16, kColumns = 32;  // of a tile of sums; of the weight's numbers in a tile
constexpr int kTogether = 2;              // tiles of rows, and of vectors, that are multiplied with one another

struct alignas(64) Tiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16];
  uint8_t rows[16];
  Tiles() {
    for (int i = 0; i < 16; i++) {
      column_bytes[i] = i < 8 ? 64 : 0;
      rows[i] = i < 8 ? kSide : 0;
    }
  }
};

inline void store_rounded(uint16_t* to, Floats numbers) {
  const __m256bh half = _mm512_cvtneps_pbh(bits<__m512>(numbers));
  std::memcpy(to, &half, sizeof(half));
}

// A row of the weight: 32 columns after the other, each 32 rows apart from the next.
void place_row(const GemmArgs& p, int64_t row, uint16_t* to) {
  constexpr int64_t kApart = kSide * kTogether * kColumns;
  if (p.kind == Kind::kBFloat16) {
    const uint16_t* w = static_cast<const uint16_t*>(p.weight) + row * p.in;
    for (int64_t i = 0; i < p.in; i += kColumns, to += kApart) std::memcpy(to, w + i, 2 * kColumns);
    return;
  }
  if (p.kind == Kind::kInt8) {
    const uint8_t* w = static_cast<const uint8_t*>(p.weight) + row * p.in;
    for (int64_t i = 0; i < p.in; i += kColumns, to += kApart) {
      store_rounded(to, Int8::read(w, i));
      store_rounded(to + kLanes, Int8::read(w, i + kLanes));
    }
    return;
  }
  const int64_t groups = p.in / kColumns;
  const uint8_t* w = static_cast<const uint8_t*>(p.weight) + row * groups * 16;
  const uint16_t* scales = static_cast<const uint16_t*>(p.scale) + row * groups;
  for (int64_t g = 0; g < groups; g++, to += kApart) {
    const float scale = bits<float>(static_cast<uint32_t>(scales[g]) << 16);
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + g * 16)), low = _mm_set1_epi8(15);
    const __m128i halves[] = {_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low)};
    for (int half = 0; half < 2; half++) {
      const Bytes numbers = bits<Bytes>(_mm_sub_epi8(halves[half], _mm_set1_epi8(8)));
      store_rounded(to + kLanes * half, __builtin_convertvector(widened(numbers), Floats) * scale);
    }
  }
}

// Sixteen lines of sixteen numbers become its columns.
inline void transpose(const void* from, __m512 to[kSide]) {
  __m512 a[kSide];
  for (int i = 0; i < kSide; i++) a[i] = _mm512_loadu_ps(static_cast<const float*>(from) + i * kSide);
  for (int i = 0; i < kSide; i += 2) {
    to[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    to[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < kSide; i += 4) {
    for (int j = 0; j < 2; j++) {
      const __m512d x = _mm512_castps_pd(to[i + j]), y = _mm512_castps_pd(to[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  for (int i = 0; i < 4; i++) {
    const __m512 low[] = {_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd)};
    const __m512 high[] = {_mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88),
                           _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd)};
    to[i] = _mm512_shuffle_f32x4(low[0], high[0], 0x88);
    to[i + 4] = _mm512_shuffle_f32x4(low[1], high[1], 0x88);
    to[i + 8] = _mm512_shuffle_f32x4(low[0], high[0], 0xdd);
    to[i + 12] = _mm512_shuffle_f32x4(low[1], high[1], 0xdd);
  }
}

// Sixteen vectors from `vector` on: of each two columns the pairs of all vectors, as a tile has them.
void pack_panel(const GemmArgs& p, int64_t vector, float* to) {
  const int64_t lanes = std::clamp<int64_t>(p.vectors - vector, 0, kSide);
  const uint16_t* from = static_cast<const uint16_t*>(p.x) + vector * p.in;
  for (int64_t at = 0; at < p.in; at += kColumns, to += kSide * kSide) {
    alignas(64) uint16_t block[kSide][kColumns] = {};
    for (int64_t v = 0; v < lanes; v++) std::memcpy(block[v], from + v * p.in + at, sizeof(block[v]));
    __m512 columns[kSide];
    transpose(block, columns);
    std::memcpy(to, columns, sizeof(columns));
  }
}

// Sums of 32 rows and 32 vectors over all columns, a tile after the other.
inline void multiply(const uint16_t* w, const float* x, int64_t panel, int64_t in, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t at = 0; at < in; at += kColumns, w += 2 * kSide * kColumns, x += kSide * kSide) {
    _tile_loadd(4, w, 64);
    _tile_loadd(5, w + kSide * kColumns, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, x + panel, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

}  // namespace

// Panels of sixteen vectors from `first` up to `last`; there is an even number of them.
extern "C" void pack_amx(const GemmArgs& p, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; panel++) pack_panel(p, panel * kSide, p.panels + panel * p.in / 2 * kSide);
}

// Rows from `first` up to `last`, 32 at a time, for which there is a buffer.
extern "C" void gemm_amx(const GemmArgs& p, int64_t first, int64_t last, float* buffer) {
  const Tiles tiles;
  _tile_loadconfig(&tiles);
  const int64_t panel = p.in / 2 * kSide;
  constexpr int64_t kStep = kSide * kTogether;
  uint16_t* const w = reinterpret_cast<uint16_t*>(buffer);
  for (int64_t row = first; row < last; row += kStep) {
    for (int64_t r = 0; r < kStep; r++) place_row(p, row + r, w + r * kColumns);
    for (int64_t vector = 0; vector < p.vectors; vector += kStep) {
      alignas(64) float sums[kTogether][kTogether][kSide * kSide];
      multiply(w, p.panels + vector / kSide * panel, panel, p.in, sums[0][0]);
      for (int i = 0; i < kTogether * kTogether; i++) {
        const int64_t here = vector + i / kTogether * kSide, from = row + i % kTogether * kSide;
        __m512 of_vectors[kSide];
        transpose(sums[i / kTogether][i % kTogether], of_vectors);
        for (int64_t v = 0; v < std::min<int64_t>(kSide, p.vectors - here); v++) {
          __m512 y = of_vectors[v];
          if (p.kind == Kind::kInt8) y = _mm512_mul_ps(y, _mm512_loadu_ps(static_cast<const float*>(p.scale) + from));
          _mm512_storeu_ps(p.y + (here + v) * p.out + from, y);
        }
      }
    }
  }
  _tile_release();
}
