// Sixteen numbers at a time, whatever the processor: the compiler makes of them what its instruction set has.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

// A name for each instruction set, so that all copies can be linked: rows becomes matmul_v4.
#define MPT_EQX_JOIN(name, isa) name##_##isa
#define MPT_EQX_EXPAND(name, isa) MPT_EQX_JOIN(name, isa)
#define MPT_EQX_NAME(name) MPT_EQX_EXPAND(name, MPT_EQX_ISA)

namespace {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef float Half __attribute__((vector_size(2 * kLanes)));
typedef float Quarter __attribute__((vector_size(kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

// A register of the instruction set: GCC keeps arrays of wider vectors in memory, and fills them number by number.
#if defined(__AVX512F__)
typedef Floats Register;
#elif defined(__AVX2__)
typedef Half Register;
#else
typedef Quarter Register;
#endif

template <typename T>
inline T load(const void* from) {
  T vector;
  std::memcpy(&vector, from, sizeof(T));
  return vector;
}

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

#if defined(__clang__)
#define MPT_EQX_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t FourInts __attribute__((vector_size(kLanes)));
#define MPT_EQX_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourInts{__VA_ARGS__})
#endif

// GCC makes two halves of these conversions, or takes single numbers out of the vector, if it is not told.
inline Ints widened(Bytes numbers) {
#ifdef __AVX512F__
  return bits<Ints>(_mm512_cvtepi8_epi32(bits<__m128i>(numbers)));
#else
  return __builtin_convertvector(__builtin_convertvector(numbers, Shorts), Ints);
#endif
}

inline Words widened(Halves numbers) {
#ifdef __AVX512F__
  return bits<Words>(_mm512_cvtepu16_epi32(bits<__m256i>(numbers)));
#else
  return __builtin_convertvector(numbers, Words);
#endif
}

template <typename Part, typename Vector>
inline Part folded(Vector v) {
  Part halves[2];
  std::memcpy(halves, &v, sizeof(v));
  return halves[0] + halves[1];
}

inline float total(Quarter v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float total(Half v) { return total(folded<Quarter>(v)); }
inline float total(Floats v) { return total(folded<Half>(v)); }

// How sixteen numbers from column `at` on of a row that begins at `row` become float32, and how one does.
struct Float32 {
  static constexpr int kBytes = 4;
  static float one(const uint8_t* from) { return load<float>(from); }
  static Floats read(const uint8_t* row, int64_t at) { return load<Floats>(row + 4 * at); }
};

struct BFloat16 {
  static constexpr int kBytes = 2;
  static float one(const uint8_t* from) { return bits<float>(static_cast<uint32_t>(load<uint16_t>(from)) << 16); }
  static Floats read(const uint8_t* row, int64_t at) {
    return bits<Floats>(widened(load<Halves>(row + 2 * at)) << 16);
  }
};

struct Float16 {
  static constexpr int kBytes = 2;
  static float one(const uint8_t* from) {
    const uint32_t word = load<uint16_t>(from), magnitude = word & 0x7fff;
    // As below.
    const uint32_t normal = (magnitude << 13) + 0x38000000u + (magnitude >= 0x7c00 ? 0x38000000u : 0);
    const uint32_t subnormal = bits<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    return bits<float>((magnitude < 0x400 ? subnormal : normal) | ((word & 0x8000) << 16));
  }
  static Floats read(const uint8_t* row, int64_t at) {
    const Halves half = load<Halves>(row + 2 * at);
#if defined(__AVX512F__)
    return bits<Floats>(_mm512_cvtph_ps(bits<__m256i>(half)));
#elif defined(__F16C__)
    __m128i parts[2];
    std::memcpy(parts, &half, sizeof(half));
    const __m256 wide[2] = {_mm256_cvtph_ps(parts[0]), _mm256_cvtph_ps(parts[1])};
    return load<Floats>(wide);
#else
    const Words word = widened(half), magnitude = word & 0x7fff;
    // The exponent moves from bias 15 to bias 127, that of infinity and NaN to the largest. What is subnormal is a
    // whole number of 2^-24; bits of subnormal float32 would not do, since XLA's threads take those for zero.
    const Words normal = (magnitude << 13) + 0x38000000u + ((Words)(magnitude >= 0x7c00) & 0x38000000u);
    const Words subnormal = bits<Words>(__builtin_convertvector(bits<Ints>(magnitude), Floats) * 0x1p-24f);
    const Words small = (Words)(magnitude < 0x400);
    return bits<Floats>((small & subnormal) | (~small & normal) | ((word & 0x8000) << 16));
#endif
  }
};

struct Int8 {
  static constexpr int kBytes = 1;
  static float one(const uint8_t* from) { return static_cast<float>(load<int8_t>(from)); }
  static Floats read(const uint8_t* row, int64_t at) {
    return __builtin_convertvector(widened(load<Bytes>(row + at)), Floats);
  }
};

}  // namespace
