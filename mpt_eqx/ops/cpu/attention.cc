// Attention of a step of decoding. Compiled once for each instruction set.

#include <algorithm>
#include <limits>
#include <vector>

#include "kernel.h"
#include "simd.h"

namespace {

constexpr float kLowest = -3.40282347e38f;

// e^x for x ≤ 0, to about two units in the last place; less than the smallest normal number is zero.
// 2^n · e^r with |r| ≤ ln 2 / 2, where e^r is its Taylor series up to r^7.
inline Floats exponential(Floats x) {
  const Floats clipped = x > -87.0f ? x : Floats{} - 87.0f;
  const Floats shifted = clipped * 1.44269504f + 0x1.8p23f;  // rounds to whole numbers
  const Floats n = shifted - 0x1.8p23f;
  const Floats r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats sum = r * (1.0f / 5040) + 1.0f / 720;
  for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + factor;
  const Floats power = bits<Floats>((bits<Words>(shifted) << 23) + 0x3f800000u);
  const Words there = (Words)(x > -87.0f);
  return bits<Floats>(bits<Words>(sum * power) & there);
}

// Rounds to the type that the reference keeps its numbers in.
template <typename Number>
inline Floats rounded(Floats x);

template <>
inline Floats rounded<Float32>(Floats x) {
  return x;
}

template <>
inline Floats rounded<BFloat16>(Floats x) {
  const Words word = bits<Words>(x);
  const Words even = (word + 0x7fff + ((word >> 16) & 1)) & 0xffff0000u;
  const Words number = (Words)(x == x);
  return bits<Floats>((even & number) | (word & ~number));
}

template <>
inline Floats rounded<Float16>(Floats x) {
  for (int i = 0; i < kLanes; i++) x[i] = static_cast<float>(static_cast<_Float16>(x[i]));
  return x;
}

template <typename Number>
inline Floats columns(const uint8_t* row, int64_t at, int64_t size) {
  if (at + kLanes <= size) return Number::read(row, at);
  uint8_t rest[kLanes * 4] = {};
  std::memcpy(rest, row + at * Number::kBytes, (size - at) * Number::kBytes);
  return Number::read(rest, 0);
}

inline Floats columns(const float* row, int64_t at, int64_t size) {
  return columns<Float32>(reinterpret_cast<const uint8_t*>(row), at, size);
}

template <typename Number>
void head(const AttentionArgs& p, int64_t number, std::vector<float>& scores) {
  const int64_t row = number / p.heads, position = p.position[row], layer = p.layer[row];
  if (position < 0 || position >= p.capacity || layer < 0 || layer >= p.layers) {
    const int64_t numbers = p.groups * p.size;
    std::fill_n(p.y + number * numbers, numbers, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const int64_t first = p.window < 0 ? 0 : std::max<int64_t>(position - p.window, 0);
  const int64_t keys = position + 1 - first;
  const int64_t row_bytes = p.size * Number::kBytes;
  const int64_t start = (((row * p.layers + layer) * p.heads + number % p.heads) * p.capacity + first) * row_bytes;
  const uint8_t* k = static_cast<const uint8_t*>(p.k) + start;
  const uint8_t* v = static_cast<const uint8_t*>(p.v) + start;
  const int64_t padded = (keys + kLanes - 1) / kLanes * kLanes;
  scores.resize(padded);

  for (int64_t group = 0; group < p.groups; group++) {
    const float* q = p.q + (number * p.groups + group) * p.size;
    float* y = p.y + (number * p.groups + group) * p.size;
    const float slope = p.slopes[number % p.heads * p.groups + group];

    for (int64_t key = 0; key < keys; key++) {
      Floats sum = {};
      for (int64_t at = 0; at < p.size; at += kLanes) {
        sum += columns(q, at, p.size) * columns<Number>(k + key * row_bytes, at, p.size);
      }
      scores[key] = total(sum);
    }
    std::fill(scores.begin() + keys, scores.end(), 0.0f);

    Floats largest = Floats{} + kLowest, places;
    for (int i = 0; i < kLanes; i++) places[i] = static_cast<float>(i - (keys - 1));
    for (int64_t at = 0; at < padded; at += kLanes) {
      const Floats distance = places + static_cast<float>(at);
      Floats score = rounded<Number>(rounded<Number>(load<Floats>(&scores[at])) * p.scale) + slope * distance;
      score = distance <= 0 ? score : Floats{} + kLowest;
      std::memcpy(&scores[at], &score, sizeof(score));
      largest = largest > score ? largest : score;
    }
    float maximum = kLowest;
    for (int i = 0; i < kLanes; i++) maximum = std::max(maximum, largest[i]);

    Floats sums = {};
    for (int64_t at = 0; at < padded; at += kLanes) {
      const Floats score = load<Floats>(&scores[at]);
      // NaN for NaN, which comparisons have passed over, and for +∞; −∞ has no weight.
      const Floats wrong = score < std::numeric_limits<float>::infinity() ? Floats{} : score - score;
      Floats weight = exponential(score - maximum) + wrong;
      weight = places + static_cast<float>(at) <= 0 ? weight : Floats{};
      std::memcpy(&scores[at], &weight, sizeof(weight));
      sums += weight;
    }
    const float sum = total(sums);
    for (int64_t at = 0; at < padded; at += kLanes) {
      const Floats weight = rounded<Number>(load<Floats>(&scores[at]) / sum);
      std::memcpy(&scores[at], &weight, sizeof(weight));
    }

    constexpr int kTogether = 4;
    for (int64_t at = 0; at < p.size; at += kTogether * kLanes) {
      Floats mixed[kTogether] = {};
      for (int64_t key = 0; key < keys; key++) {
        for (int i = 0; i < kTogether; i++) {
          const int64_t column = at + i * kLanes;
          if (column < p.size) mixed[i] += columns<Number>(v + key * row_bytes, column, p.size) * scores[key];
        }
      }
      for (int i = 0; i < kTogether; i++) {
        const int64_t column = at + i * kLanes, count = std::min<int64_t>(p.size - column, kLanes);
        if (count > 0) std::memcpy(y + column, &mixed[i], count * sizeof(float));
      }
    }
  }
}

template <typename Number>
void run(const AttentionArgs& p, int64_t first, int64_t last) {
  std::vector<float> scores;
  for (int64_t number = first; number < last; number++) head<Number>(p, number, scores);
}

}  // namespace

void MPT_EQX_NAME(attention)(const AttentionArgs& p, int64_t first, int64_t last) {
  switch (p.kind) {
    case Kind::kBFloat16: return run<BFloat16>(p, first, last);
    case Kind::kFloat16: return run<Float16>(p, first, last);
    default: return run<Float32>(p, first, last);
  }
}
