// Calls what the kernel computes with arrays of exactly the sizes that they should have, odd ones too: compiled with
// AddressSanitizer and UBSan, which end the program where it reads or writes beside them.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kernel.h"

extern "C" MatmulFunction MPT_EQX_MATMUL;
extern "C" PackFunction MPT_EQX_PACK;
extern "C" GemmFunction MPT_EQX_GEMM;
extern "C" AttentionFunction MPT_EQX_ATTENTION;

namespace {

std::mt19937 random_bits(0);

// Any bits, so that NaN, infinities and subnormal numbers are among them, at the very end of what was allocated.
std::unique_ptr<uint8_t[]> bytes(int64_t count) {
  std::unique_ptr<uint8_t[]> made(new uint8_t[count]);
  for (int64_t i = 0; i < count; i++) made[i] = static_cast<uint8_t>(random_bits());
  return made;
}

int64_t calls = 0;

void products(Kind kind, int64_t out, int64_t in, int64_t vectors) {
  const int64_t sizes[] = {4, 2, 2, 1, 0}, size = sizes[static_cast<int>(kind)];
  const auto weight = bytes(kind == Kind::kInt4 ? out * in / 2 : out * in * size);
  const auto scale = bytes(kind == Kind::kInt8 ? out * 4 : kind == Kind::kInt4 ? out * (in / 32) * 2 : 0);
  const auto x = bytes(vectors * in * 4), y = bytes(vectors * out * 4);
  const bool scaled = kind == Kind::kInt8 || kind == Kind::kInt4;
  const MatmulArgs args{kind, weight.get(), scaled ? scale.get() : nullptr, reinterpret_cast<float*>(x.get()),
                        reinterpret_cast<float*>(y.get()), out, in, vectors};
  // In shares, as threads take them.
  for (int64_t first = 0; first < out; first += 8) MPT_EQX_MATMUL(args, first, std::min(first + 8, out));
  calls++;
}

void many(Kind kind, Kind x_kind, int64_t out, int64_t in, int64_t vectors) {
  const int64_t sizes[] = {4, 2, 2, 1, 0}, size = sizes[static_cast<int>(kind)];
  const int64_t panels = (vectors + 15) / 16;
  const auto weight = bytes(kind == Kind::kInt4 ? out * in / 2 : out * in * size);
  const auto scale = bytes(kind == Kind::kInt8 ? out * 4 : kind == Kind::kInt4 ? out * (in / 32) * 2 : 0);
  const auto x = bytes(vectors * in * sizes[static_cast<int>(x_kind)]), y = bytes(vectors * out * 4);
  const auto packed = bytes(panels * 16 * in * 4), buffer = bytes(kGemmRows * (kGemmBlock + 16 + panels * 16) * 4);
  const GemmArgs args{kind, x_kind, weight.get(), scale.get(), x.get(), reinterpret_cast<float*>(packed.get()),
                      reinterpret_cast<float*>(y.get()), out, in, vectors};
  MPT_EQX_PACK(args, 0, panels);
  for (int64_t first = 0; first < out; first += kGemmRows) {
    MPT_EQX_GEMM(args, first, std::min(first + kGemmRows, out), reinterpret_cast<float*>(buffer.get()));
  }
  calls++;
}

void attention(Kind kind, int64_t heads, int64_t groups, int64_t queries, int64_t size, int64_t capacity,
               int64_t window) {
  constexpr int32_t lowest = std::numeric_limits<int32_t>::min(), largest = std::numeric_limits<int32_t>::max();
  const int32_t last = static_cast<int32_t>(capacity) - 1;
  const std::vector<int32_t> positions = {0, last / 2, last, last + 1, -1, lowest, largest};
  const int64_t rows = positions.size(), number = kind == Kind::kFloat32 ? 4 : 2;
  constexpr int64_t layers = 2;
  std::unique_ptr<int32_t[]> position(new int32_t[rows * queries]), layer(new int32_t[rows]);
  for (int64_t i = 0; i < rows * queries; i++) position[i] = positions[(i / queries + i % queries / 4) % rows];
  for (int64_t row = 0; row < rows; row++) layer[row] = row % layers;
  const int64_t all = rows * heads * groups * queries;
  const auto q = bytes(all * size * 4), slopes = bytes(heads * groups * 4);
  const int64_t numbers = rows * layers * heads * capacity * size;
  const auto k = bytes(numbers * number), v = bytes(numbers * number);
  const auto y = bytes(all * size * 4);
  float* found = reinterpret_cast<float*>(y.get());
  const AttentionArgs args{kind, reinterpret_cast<float*>(q.get()), k.get(), v.get(),
                           reinterpret_cast<float*>(slopes.get()), layer.get(), position.get(), found,
                           layers, heads, groups, queries, capacity, size, window, 0.3f};
  const int64_t tiles = (groups * queries + kTile - 1) / kTile;
  for (int64_t tile = 0; tile < rows * heads * tiles; tile++) MPT_EQX_ATTENTION(args, tile, tile + 1);
  for (int64_t i = 0; i < all * size; i++) {
    const int64_t query = i / size, at = position[query / (heads * groups * queries) * queries + query % queries];
    if ((at < 0 || at >= capacity) && !std::isnan(found[i])) {
      std::fprintf(stderr, "a query outside of the cache gets %f\n", found[i]);
      std::exit(1);
    }
  }
  calls++;
}

}  // namespace

int main() {
  for (Kind kind : {Kind::kFloat32, Kind::kBFloat16, Kind::kFloat16, Kind::kInt8, Kind::kInt4}) {
    for (int64_t out : {1, 3, 7, 8, 33}) {
      for (int64_t in : {1, 15, 16, 17, 32, 63, 96}) {
        if (kind == Kind::kInt4 && in % 32) continue;
        for (int64_t vectors : {1, 2, 3, 5, 9}) products(kind, out, in, vectors);
      }
    }
  }
  for (Kind kind : {Kind::kFloat32, Kind::kBFloat16, Kind::kFloat16, Kind::kInt8, Kind::kInt4}) {
    for (Kind x_kind : {Kind::kFloat32, Kind::kBFloat16, Kind::kFloat16}) {
      for (int64_t out : {1, 7, 50}) {
        for (int64_t in : {1, 31, 32, 257, 544}) {
          if (kind == Kind::kInt4 && in % 32) continue;
          for (int64_t vectors : {1, 16, 33}) many(kind, x_kind, out, in, vectors);
        }
      }
    }
  }
  for (Kind kind : {Kind::kFloat32, Kind::kBFloat16, Kind::kFloat16}) {
    for (int64_t size : {1, 7, 16, 17, 40, 65}) {
      for (int64_t capacity : {1, 15, 16, 33}) {
        for (int64_t window : {int64_t{-1}, int64_t{0}, int64_t{5}, std::numeric_limits<int64_t>::max()}) {
          for (int64_t queries : {1, 13}) attention(kind, 2, 3, queries, size, capacity, window);
        }
      }
    }
  }
  std::printf("%lld calls\n", static_cast<long long>(calls));
}
