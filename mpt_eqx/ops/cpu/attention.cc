// Attention of some queries to a cache. Compiled once for each instruction set.
//
// Every sum has one order, whatever the queries beside it: a score adds up sixteen columns at a time, a row of the
// result one key after another, from the first that its query sees to the last. How many queries and keys share the
// registers is therefore a matter of speed alone.

#include <algorithm>
#include <limits>
#include <memory>

#include "kernel.h"
#include "simd.h"

namespace {

// A register of this instruction set, how many make sixteen numbers, and how many sums stay in registers.
#if defined(__AVX512F__)
typedef Floats Register;
constexpr int kQueriesTogether = 4, kRowsTogether = 8;
#elif defined(__AVX__)
typedef Half Register;
constexpr int kQueriesTogether = 3, kRowsTogether = 4;
#else
typedef Quarter Register;
constexpr int kQueriesTogether = 2, kRowsTogether = 2;
#endif
typedef uint32_t Bits __attribute__((vector_size(sizeof(Register))));
constexpr int kWidth = sizeof(Register) / sizeof(float), kParts = kLanes / kWidth, kKeysTogether = 4;
constexpr float kLowest = -3.40282347e38f, kInfinity = std::numeric_limits<float>::infinity();

// e^x for x ≤ 0, to about two units in the last place; less than the smallest normal number is zero.
// 2^n · e^r with |r| ≤ ln 2 / 2, where e^r is its Taylor series up to r^7.
inline Register exponential(Register x) {
  const Register clipped = x > -87.0f ? x : Register{} - 87.0f;
  const Register shifted = clipped * 1.44269504f + 0x1.8p23f;  // rounds to whole numbers
  const Register n = shifted - 0x1.8p23f;
  const Register r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  Register sum = r * (1.0f / 5040) + 1.0f / 720;
  for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + factor;
  const Register power = bits<Register>((bits<Bits>(shifted) << 23) + 0x3f800000u);
  const Bits there = (Bits)(x > -87.0f);
  return bits<Register>(bits<Bits>(sum * power) & there);
}

// Rounds to the type that the reference keeps its numbers in.
template <typename Number>
inline Register rounded(Register x);

template <>
inline Register rounded<Float32>(Register x) {
  return x;
}

template <>
inline Register rounded<BFloat16>(Register x) {
  const Bits word = bits<Bits>(x);
  const Bits even = (word + 0x7fff + ((word >> 16) & 1)) & 0xffff0000u;
  const Bits number = (Bits)(x == x);
  return bits<Register>((even & number) | (word & ~number));
}

template <>
inline Register rounded<Float16>(Register x) {
#if defined(__AVX512F__)
  return bits<Register>(_mm512_cvtph_ps(_mm512_cvtps_ph(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT)));
#elif defined(__F16C__)
  return bits<Register>(_mm256_cvtph_ps(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT)));
#else
  for (int i = 0; i < kWidth; i++) x[i] = static_cast<float>(static_cast<_Float16>(x[i]));
  return x;
#endif
}

template <typename Number>
inline Floats columns(const uint8_t* row, int64_t at, int64_t size) {
  if (at + kLanes <= size) return Number::read(row, at);
  uint8_t rest[kLanes * 4] = {};
  std::memcpy(rest, row + at * Number::kBytes, (size - at) * Number::kBytes);
  return Number::read(rest, 0);
}

// As `folded` to a quarter of the sixteen numbers of all parts.
inline Quarter quarter_of(const Register (&parts)[kParts]) {
  if constexpr (kParts == 1) return folded<Quarter>(folded<Half>(bits<Floats>(parts[0])));
  if constexpr (kParts == 2) return folded<Quarter>(bits<Half>(parts[0] + parts[kParts - 1]));
  if constexpr (kParts == 4) {
    return bits<Quarter>((parts[0] + parts[kParts / 2]) + (parts[kParts / 4] + parts[kParts - 1]));
  }
}

// The sums (a₀ + a₂) + (a₁ + a₃), of a and so on.
inline Quarter totals(Quarter a, Quarter b, Quarter c, Quarter d) {
  typedef int32_t Places __attribute__((vector_size(sizeof(Quarter))));
  const Places low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  const Quarter ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  const Quarter cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, high);
  return __builtin_shuffle(ab, cd, Places{0, 1, 4, 5}) + __builtin_shuffle(ab, cd, Places{2, 3, 6, 7});
}

// q · k for some queries and four keys.
template <int kQueries>
inline void products(const float* q, const float* k, int64_t width, float* scores, int64_t stride) {
  Register sums[kQueries][kKeysTogether][kParts];
  for (int part = 0; part < kParts; part++) {
    Register some[kQueries][kKeysTogether];
    for (int j = 0; j < kQueries; j++) std::fill_n(some[j], kKeysTogether, Register{});
    for (int64_t at = part * kWidth; at < width; at += kLanes) {
      Register numbers[kKeysTogether];
      for (int i = 0; i < kKeysTogether; i++) numbers[i] = load<Register>(k + i * width + at);
      for (int j = 0; j < kQueries; j++) {
        const Register query = load<Register>(q + j * width + at);
        for (int i = 0; i < kKeysTogether; i++) some[j][i] += query * numbers[i];
      }
    }
    for (int j = 0; j < kQueries; j++) {
      for (int i = 0; i < kKeysTogether; i++) sums[j][i][part] = some[j][i];
    }
  }
  for (int j = 0; j < kQueries; j++) {
    const Quarter found = totals(quarter_of(sums[j][0]), quarter_of(sums[j][1]), quarter_of(sums[j][2]),
                                 quarter_of(sums[j][3]));
    std::memcpy(scores + j * stride, &found, sizeof(found));
  }
}

// The same for more keys, rounded up to a multiple of four.
template <int kQueries>
inline void products_with(const float* q, const float* k, int64_t keys, int64_t width, float* scores, int64_t stride) {
  for (int64_t key = 0; key < keys; key += kKeysTogether) {
    products<kQueries>(q, k + key * width, width, scores + key, stride);
  }
}

// Adds weight · v to some rows of the result, for some columns of each.
template <int kRows, int kColumns>
inline void add(const float* weights, int64_t stride, const float* v, int64_t keys, int64_t width, float* y) {
  constexpr int kRegisters = kColumns * kParts;
  Register mixed[kRows][kRegisters];
  for (int j = 0; j < kRows; j++) {
    for (int i = 0; i < kRegisters; i++) mixed[j][i] = load<Register>(y + j * width + i * kWidth);
  }
  for (int64_t key = 0; key < keys; key++) {
    Register values[kRegisters];
    for (int i = 0; i < kRegisters; i++) values[i] = load<Register>(v + key * width + i * kWidth);
    for (int j = 0; j < kRows; j++) {
      for (int i = 0; i < kRegisters; i++) mixed[j][i] += values[i] * weights[j * stride + key];
    }
  }
  for (int j = 0; j < kRows; j++) {
    for (int i = 0; i < kRegisters; i++) std::memcpy(y + j * width + i * kWidth, &mixed[j][i], sizeof(Register));
  }
}

template <int kRows, int kColumns>
inline void add_all(const float* weights, int64_t stride, const float* v, int64_t keys, int64_t width, float* y) {
  int64_t at = 0;
  if (keys <= 0) return;
  for (; at + kColumns * kLanes <= width; at += kColumns * kLanes) {
    add<kRows, kColumns>(weights, stride, v + at, keys, width, y + at);
  }
  for (; at < width; at += kLanes) add<kRows, 1>(weights, stride, v + at, keys, width, y + at);
}

// Makes weights of the scores q · k of one query and as many keys, the last of which is at its own place. What stands
// beyond them, up to sixteen numbers, may be anything, and becomes zero.
template <typename Number>
void softmax(float* scores, int64_t keys, float scale, float slope) {
  const int64_t padded = (keys + kLanes - 1) / kLanes * kLanes;
  Register largest = Register{} + kLowest, places;
  for (int i = 0; i < kWidth; i++) places[i] = static_cast<float>(i - (keys - 1));
  for (int64_t at = 0; at < padded; at += kWidth) {
    const Register distance = places + static_cast<float>(at);
    Register score = rounded<Number>(rounded<Number>(load<Register>(&scores[at])) * scale) + slope * distance;
    score = distance <= 0 ? score : Register{} + kLowest;
    std::memcpy(&scores[at], &score, sizeof(score));
    largest = largest > score ? largest : score;
  }
  float maximum = kLowest;
  for (int i = 0; i < kWidth; i++) maximum = std::max(maximum, largest[i]);

  Register sums[kParts];
  std::fill_n(sums, kParts, Register{});
  for (int64_t at = 0; at < padded; at += kLanes) {
    for (int part = 0; part < kParts; part++) {
      float* here = &scores[at + part * kWidth];
      const Register score = load<Register>(here);
      // NaN for NaN, which comparisons have passed over, and for +∞; −∞ has no weight.
      const Register wrong = score < kInfinity ? Register{} : score - score;
      Register weight = exponential(score - maximum) + wrong;
      weight = places + static_cast<float>(at + part * kWidth) <= 0 ? weight : Register{};
      std::memcpy(here, &weight, sizeof(weight));
      sums[part] += weight;
    }
  }
  const Quarter quarter = quarter_of(sums);
  const float sum = (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
  for (int64_t at = 0; at < padded; at += kWidth) {
    const Register weight = rounded<Number>(load<Register>(&scores[at]) / sum);
    std::memcpy(&scores[at], &weight, sizeof(weight));
  }
}

// Copies rows as float32, each filled up with zeros to whole vectors.
template <typename Number>
void widen(const void* from, int64_t rows, int64_t size, int64_t width, float* to) {
  for (int64_t row = 0; row < rows; row++) {
    const uint8_t* numbers = static_cast<const uint8_t*>(from) + row * size * Number::kBytes;
    for (int64_t at = 0; at < size; at += kLanes) {
      const Floats wide = columns<Number>(numbers, at, size);
      std::memcpy(to + row * width + at, &wide, sizeof(wide));
    }
  }
}

constexpr int64_t kBlock = 64;  // keys that are read at a time: as float32 they stay in the first-level cache

template <typename Number>
void tile(const AttentionArgs& p, int64_t number) {
  const int64_t queries = p.groups * p.queries, tiles = (queries + kTile - 1) / kTile;
  const int64_t head = number / tiles, start = number % tiles * kTile, count = std::min(kTile, queries - start);
  const int64_t row = head / p.heads, layer = p.layer[row];
  // What each query sees; nothing, if it has no place.
  int64_t first[kTile], last[kTile], begin = p.capacity, end = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t position = p.position[row * p.queries + (start + i) % p.queries];
    first[i] = last[i] = 0;
    if (position < 0 || position >= p.capacity || layer < 0 || layer >= p.layers) continue;
    first[i] = p.window < 0 ? 0 : std::max<int64_t>(position - p.window, 0);
    last[i] = position + 1;
    begin = std::min(begin, first[i]);
    end = std::max(end, last[i]);
  }
  float* y = p.y + (head * queries + start) * p.size;
  std::fill_n(y, count * p.size, std::numeric_limits<float>::quiet_NaN());
  if (begin >= end) return;

  const int64_t width = (p.size + kLanes - 1) / kLanes * kLanes, stride = end - begin + kLanes;
  const std::unique_ptr<float[]> scratch(new float[(2 * count + kBlock + kKeysTogether) * width + count * stride]);
  float *const q = scratch.get(), *const mixed = q + count * width, *const block = mixed + count * width;
  float *const scores = block + (kBlock + kKeysTogether) * width;  // products are made of a few rows beyond a block
  widen<Float32>(p.q + (head * queries + start) * p.size, count, p.size, width, q);
  std::fill_n(mixed, count * width, 0.0f);
  const int64_t row_bytes = p.size * Number::kBytes;
  const int64_t keys = ((row * p.layers + layer) * p.heads + head % p.heads) * p.capacity;
  const auto* k = static_cast<const uint8_t*>(p.k) + keys * row_bytes;
  const auto* v = static_cast<const uint8_t*>(p.v) + keys * row_bytes;

  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = std::min(from + kBlock, end);
    widen<Number>(k + from * row_bytes, to - from, p.size, width, block);
    for (int64_t i = 0; i < count;) {
      const int64_t together = i + kQueriesTogether <= count ? kQueriesTogether : i + 2 <= count ? 2 : 1;
      const int64_t low = std::max(from, *std::min_element(first + i, first + i + together));
      const int64_t high = std::min(to, *std::max_element(last + i, last + i + together));
      const float* key = block + (low - from) * width;
      float* found = scores + i * stride + low - begin;
      const auto with_all = together == 1 ? products_with<1> : together == 2 ? products_with<2>
                                                                             : products_with<kQueriesTogether>;
      with_all(q + i * width, key, high - low, width, found, stride);
      i += together;
    }
  }

  for (int64_t i = 0; i < count; i++) {
    const float slope = p.slopes[head % p.heads * p.groups + (start + i) / p.queries];
    if (first[i] < last[i]) softmax<Number>(scores + i * stride + first[i] - begin, last[i] - first[i], p.scale, slope);
  }

  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = std::min(from + kBlock, end);
    widen<Number>(v + from * row_bytes, to - from, p.size, width, block);
    for (int64_t i = 0; i < count;) {
      const int64_t together = i + kRowsTogether <= count ? kRowsTogether : 1;
      // Keys that all of them see are added together, those before and after them query by query: what one does not
      // see may be NaN, which not even a weight of zero removes.
      const int64_t low = std::max(from, *std::max_element(first + i, first + i + together));
      const int64_t high = std::min(to, *std::min_element(last + i, last + i + together));
      const auto alone = [&](int64_t j, int64_t low, int64_t high) {
        add_all<1, 4>(scores + j * stride + low - begin, stride, block + (low - from) * width, high - low, width,
                      mixed + j * width);
      };
      for (int64_t j = i; j < i + together; j++) {
        const int64_t own = std::max(from, first[j]), before = together == 1 || low >= high ? last[j] : low;
        alone(j, own, std::min(to, before));
      }
      if (together > 1 && low < high) {
        add_all<kRowsTogether, 1>(scores + i * stride + low - begin, stride, block + (low - from) * width, high - low,
                                  width, mixed + i * width);
        for (int64_t j = i; j < i + together; j++) alone(j, high, std::min(to, last[j]));
      }
      i += together;
    }
  }
  for (int64_t i = 0; i < count; i++) {
    if (first[i] < last[i]) std::memcpy(y + i * p.size, mixed + i * width, p.size * sizeof(float));
  }
}

template <typename Number>
void run(const AttentionArgs& p, int64_t first, int64_t last) {
  for (int64_t number = first; number < last; number++) tile<Number>(p, number);
}

}  // namespace

void MPT_EQX_NAME(attention)(const AttentionArgs& p, int64_t first, int64_t last) {
  switch (p.kind) {
    case Kind::kBFloat16: return run<BFloat16>(p, first, last);
    case Kind::kFloat16: return run<Float16>(p, first, last);
    default: return run<Float32>(p, first, last);
  }
}
