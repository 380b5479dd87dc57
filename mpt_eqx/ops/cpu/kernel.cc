// The two custom calls. Their work is shared among the threads of XLA's own pool.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

#if defined(MPT_EQX_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Weights of a share: large enough that taking one costs nothing, small enough to stay in the second-level cache for
// all vectors and to end evenly.
constexpr int64_t kShareBytes = 128 * 1024;

#ifdef MPT_EQX_X86
bool has_v4() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_v3() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
MatmulFunction* const matmul_function = has_v4() ? matmul_v4 : has_v3() ? matmul_v3 : matmul_default;
PackFunction* const pack_function = has_v4() ? pack_v4 : has_v3() ? pack_v3 : pack_default;
GemmFunction* const gemm_function = has_v4() ? gemm_v4 : has_v3() ? gemm_v3 : gemm_default;
AttentionFunction* const attention_function = has_v4() ? attention_v4 : has_v3() ? attention_v3 : attention_default;
#else
MatmulFunction* const matmul_function = matmul_default;
PackFunction* const pack_function = pack_default;
GemmFunction* const gemm_function = gemm_default;
AttentionFunction* const attention_function = attention_default;
#endif

#if defined(MPT_EQX_X86) && defined(__linux__)
// Some compilers know no tiles, and the system keeps those of a process once it has asked: ARCH_REQ_XCOMP_PERM, XTILEDATA.
#pragma weak gemm_amx
#pragma weak pack_amx
bool may_use_tiles() {
  // Asked of the processor: compilers that have no tiles have no names for them either.
  unsigned a[2] = {}, b, c, d[2] = {};
  const bool known = __get_cpuid_count(7, 0, &a[0], &b, &c, &d[0]) && __get_cpuid_count(7, 1, &a[1], &b, &c, &d[1]);
  const bool avx512_bf16 = a[1] >> 5 & 1, amx_bf16 = d[0] >> 22 & 1, amx_tile = d[0] >> 24 & 1;
  return gemm_amx != nullptr && has_v4() && known && avx512_bf16 && amx_bf16 && amx_tile &&
         syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
const bool has_tiles = may_use_tiles();
#else
constexpr bool has_tiles = false;
GemmFunction* const gemm_amx = nullptr;
PackFunction* const pack_amx = nullptr;
#endif

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Shares are taken from a counter by the thread that was called and by those of the pool that come in time. It waits
// for shares that others have taken, never for others to come: they may all be waiting in calls of their own.
struct Work {
  std::function<void(int64_t first, int64_t last)> function;
  int64_t count, share, shares;
  std::atomic<int64_t> taken{0}, finished{0};

  void help() {
    for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < shares;) {
      function(i * share, std::min((i + 1) * share, count));
      finished.fetch_add(1, std::memory_order_release);
    }
  }
};

// A step makes a hundred calls, and to wake a thread takes longer than many of them. A thread that has helped therefore
// looks out for the next call for a moment before it goes back to the pool.
constexpr auto kPatience = std::chrono::microseconds(50);
std::mutex newest_mutex;
std::shared_ptr<Work> newest;
std::atomic<uint64_t> calls{0};
std::atomic<int64_t> waiting{0};

void help_and_wait(std::shared_ptr<Work> work) {
  while (work) {
    const uint64_t seen = calls.load(std::memory_order_acquire);
    work->help();
    work.reset();
    waiting.fetch_add(1, std::memory_order_relaxed);
    const auto until = std::chrono::steady_clock::now() + kPatience;
    for (int tries = 1; calls.load(std::memory_order_acquire) == seen; tries++) {
      if (tries % 64 == 0 && std::chrono::steady_clock::now() > until) break;
      pause();
    }
    waiting.fetch_sub(1, std::memory_order_relaxed);
    if (calls.load(std::memory_order_acquire) != seen) {
      const std::lock_guard<std::mutex> lock(newest_mutex);
      work = newest;
    }
  }
}

ffi::Error shared(ffi::ThreadPool& pool, std::function<void(int64_t, int64_t)> function, int64_t count, int64_t share) {
  auto work = std::make_shared<Work>();
  work->function = std::move(function);
  work->count = count;
  work->share = share;
  work->shares = (count + share - 1) / share;
  const int64_t helpers = std::min(pool.num_threads(), work->shares) - 1;
  if (helpers > 0) {
    {
      const std::lock_guard<std::mutex> lock(newest_mutex);
      newest = work;
    }
    calls.fetch_add(1, std::memory_order_release);
    for (int64_t i = waiting.load(std::memory_order_relaxed); i < helpers; i++) {
      pool.Schedule([work] { help_and_wait(work); });
    }
  }
  work->help();
  // A share takes microseconds, so that waiting costs less than sleeping; unless its thread has lost its core.
  for (int tries = 0; work->finished.load(std::memory_order_acquire) < work->shares; tries++) {
    if (tries > 10000) std::this_thread::yield();
    pause();
  }
  return ffi::Error::Success();
}

// The last word on what is read and written: whoever calls, and whatever traced the call, has to pass here.
#define MPT_EQX_EXPECT(condition) \
  if (!(condition)) return ffi::Error::InvalidArgument("mpt_eqx: the kernel expected " #condition)

template <typename Array>
bool has_shape(const Array& array, std::initializer_list<int64_t> shape) {
  const auto found = array.dimensions();
  return std::equal(found.begin(), found.end(), shape.begin(), shape.end());
}

bool kind_of(const ffi::AnyBuffer& numbers, Kind& kind) {
  switch (numbers.element_type()) {
    case ffi::F32: kind = Kind::kFloat32; return true;
    case ffi::BF16: kind = Kind::kBFloat16; return true;
    case ffi::F16: kind = Kind::kFloat16; return true;
    case ffi::S8: kind = Kind::kInt8; return true;
    case ffi::U8: kind = Kind::kInt4; return true;
    default: return false;
  }
}

struct Aligned {
  void operator()(float* numbers) const { ::operator delete[](numbers, std::align_val_t(64)); }
};
std::unique_ptr<float[], Aligned> floats(int64_t count) {
  return std::unique_ptr<float[], Aligned>(
      static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t(64))));
}

// Vectors that are multiplied at a time: with more, panels and sums would take much memory; with fewer, widening would
// take much of the time.
constexpr int64_t kGemmVectors = 512;

ffi::Error gemm(ffi::ThreadPool& pool, GemmArgs all, int64_t x_bytes) {
  const bool tiles = has_tiles && all.x_kind == Kind::kBFloat16 && all.kind != Kind::kFloat32 &&
                     all.kind != Kind::kFloat16 && all.in % 32 == 0 && all.out % kTileRows == 0;
  const auto pack = tiles ? pack_amx : pack_function;
  const auto multiply = tiles ? gemm_amx : gemm_function;
  const int64_t most = std::min(kGemmVectors, all.vectors), threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t apart = tiles ? 32 : 16, padded = (most + apart - 1) / apart * apart;
  const auto panels = floats(padded * all.in / (tiles ? 2 : 1));
  all.panels = panels.get();
  // Several shares for each thread, so that all end together.
  const int64_t rows =
      tiles ? kTileRows : std::clamp<int64_t>(all.out / (threads * 8) / 12 * 12, 12, kGemmRows);
  const int64_t buffer_size = tiles ? 16 * all.in : kGemmRows * (kGemmBlock + 16 + padded);
  const int64_t end = all.vectors;
  for (int64_t first = 0; first < end; first += kGemmVectors) {
    GemmArgs some = all;
    some.x = static_cast<const uint8_t*>(all.x) + first * all.in * x_bytes;
    some.y = all.y + first * all.out;
    some.vectors = std::min(kGemmVectors, end - first);
    const int64_t count = (some.vectors + apart - 1) / apart * apart / 16;
    shared(pool, [some, pack](int64_t first, int64_t last) { pack(some, first, last); }, count, 1);
    shared(pool, [some, multiply, buffer_size](int64_t first, int64_t last) {
      const auto buffer = floats(buffer_size);
      multiply(some, first, last, buffer.get());
    }, all.out, rows);
  }
  return ffi::Error::Success();
}

// Operands are the number of a layer, x, the weights of all layers, and their scales if they have any. One weight is read.
ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> number, ffi::AnyBuffer x, ffi::RemainingArgs rest,
                   ffi::ResultBuffer<ffi::F32> y, int64_t layers, bool many) {
  const int64_t operands = rest.size();
  MPT_EQX_EXPECT(number.element_count() == 1 && layers > 0 && (operands == layers || operands == 2 * layers));
  // As jax.lax.switch has it, the layer before the first is the first, and that behind the last the last.
  const int64_t layer = std::clamp<int64_t>(number.typed_data()[0], 0, layers - 1);
  const auto weight = rest.get<ffi::AnyBuffer>(layer), scale = rest.get<ffi::AnyBuffer>(operands - layers + layer);
  MPT_EQX_EXPECT(weight.has_value() && scale.has_value());
  MPT_EQX_EXPECT(weight->dimensions().size() == 2 && x.dimensions().size() == 2);
  const int64_t out = weight->dimensions()[0], vectors = x.dimensions()[0], in = x.dimensions()[1];
  Kind kind, x_kind;
  if (!kind_of(*weight, kind)) {
    return ffi::Error::InvalidArgument("mpt_eqx: no product with a weight of this type");
  }
  MPT_EQX_EXPECT(kind_of(x, x_kind) && x_kind <= (many ? Kind::kFloat16 : Kind::kFloat32));
  MPT_EQX_EXPECT(has_shape(*weight, {out, kind == Kind::kInt4 ? in / 2 : in}) && has_shape(*y, {vectors, out}));
  MPT_EQX_EXPECT((operands == layers) == (kind != Kind::kInt8 && kind != Kind::kInt4));
  if (kind == Kind::kInt8) {
    MPT_EQX_EXPECT(scale->element_type() == ffi::F32 && has_shape(*scale, {out, 1}));
  } else if (kind == Kind::kInt4) {
    MPT_EQX_EXPECT(in % 32 == 0);
    MPT_EQX_EXPECT(scale->element_type() == ffi::BF16 && has_shape(*scale, {out, in / 32}));
  }
  const void* const scales = operands == layers ? nullptr : scale->untyped_data();
  if (many) {
    return gemm(pool, {kind, x_kind, weight->untyped_data(), scales, x.untyped_data(), nullptr, y->typed_data(), out,
                       in, vectors}, x_kind == Kind::kFloat32 ? 4 : 2);
  }
  const MatmulArgs rows{kind, weight->untyped_data(), scales, static_cast<const float*>(x.untyped_data()),
                        y->typed_data(), out, in, vectors};
  const int64_t row_bytes = std::max<int64_t>(weight->size_bytes() / std::max<int64_t>(out, 1), 1);
  const auto function = [rows](int64_t first, int64_t last) { matmul_function(rows, first, last); };
  return shared(pool, function, out, std::max<int64_t>(kShareBytes / row_bytes / 8 * 8, 8));
}

ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::F32> slopes, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> position,
                     ffi::ResultBuffer<ffi::F32> y, int32_t kind, float scale, int64_t window) {
  const auto keys = k.dimensions();
  MPT_EQX_EXPECT(q.dimensions().size() == 5 && (keys.size() == 4 || keys.size() == 5));
  const int64_t batch = q.dimensions()[0], key_heads = q.dimensions()[1], groups = q.dimensions()[2];
  const int64_t queries = q.dimensions()[3], size = q.dimensions()[4];
  const bool one_layer = keys.size() == 4;
  const int64_t layers = one_layer ? 1 : keys[1], capacity = keys[keys.size() - 2];
  MPT_EQX_EXPECT(one_layer ? has_shape(k, {batch, key_heads, capacity, size})
                           : has_shape(k, {batch, layers, key_heads, capacity, size}));
  MPT_EQX_EXPECT(std::equal(keys.begin(), keys.end(), v.dimensions().begin(), v.dimensions().end()));
  MPT_EQX_EXPECT(has_shape(slopes, {key_heads, groups}) && has_shape(layer, {batch}));
  MPT_EQX_EXPECT(has_shape(position, {batch, queries}));
  MPT_EQX_EXPECT(has_shape(*y, {batch, key_heads, groups, queries, size}));
  MPT_EQX_EXPECT(k.element_type() == v.element_type());
  switch (static_cast<Kind>(kind)) {
    case Kind::kFloat32: MPT_EQX_EXPECT(k.element_type() == ffi::F32); break;
    case Kind::kBFloat16: MPT_EQX_EXPECT(k.element_type() == ffi::BF16 || k.element_type() == ffi::U16); break;
    case Kind::kFloat16: MPT_EQX_EXPECT(k.element_type() == ffi::F16 || k.element_type() == ffi::U16); break;
    default: return ffi::Error::InvalidArgument("mpt_eqx: no attention to keys of this type");
  }
  AttentionArgs heads;
  heads.kind = static_cast<Kind>(kind);
  heads.q = q.typed_data();
  heads.k = k.untyped_data();
  heads.v = v.untyped_data();
  heads.slopes = slopes.typed_data();
  heads.layer = layer.typed_data();
  heads.position = position.typed_data();
  heads.y = y->typed_data();
  heads.layers = layers;
  heads.heads = key_heads;
  heads.groups = groups;
  heads.queries = queries;
  heads.size = size;
  heads.capacity = capacity;
  heads.window = window;
  heads.scale = scale;
  const auto function = [heads](int64_t first, int64_t last) { attention_function(heads, first, last); };
  return shared(pool, function, batch * key_heads * ((groups * queries + kTile - 1) / kTile), 1);
}

}  // namespace

// Of the interface that this was compiled with; no older JAX takes it.
extern "C" const int mpt_eqx_ffi_minor = XLA_FFI_API_MINOR;

// Whether products of many vectors of bfloat16 are those of amx.cc.
extern "C" int mpt_eqx_has_tiles() { return has_tiles; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpt_eqx_matmul, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("layers")
                                  .Attr<bool>("many"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpt_eqx_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("kind")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window"));
