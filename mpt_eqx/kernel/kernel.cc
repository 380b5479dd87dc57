// The two custom calls. Their work is shared among the threads of XLA's own pool.

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

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
RowsFunction* const rows_function = has_v4() ? rows_v4 : has_v3() ? rows_v3 : rows_default;
HeadsFunction* const heads_function = has_v4() ? heads_v4 : has_v3() ? heads_v3 : heads_default;
#else
RowsFunction* const rows_function = rows_default;
HeadsFunction* const heads_function = heads_default;
#endif

// Shares are taken from a counter by the thread that was called and by those of the pool that come in time. It waits
// for shares that others have taken, never for others to come: they may all be waiting in calls of their own.
template <typename Problem>
struct Work {
  Problem problem;
  void (*function)(const Problem&, int64_t, int64_t);
  int64_t count, share, shares;
  std::atomic<int64_t> taken{0}, finished{0};

  void help() {
    for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < shares;) {
      function(problem, i * share, std::min((i + 1) * share, count));
      finished.fetch_add(1, std::memory_order_release);
    }
  }
};

template <typename Problem>
ffi::Error shared(ffi::ThreadPool& pool, const Problem& problem, void (*function)(const Problem&, int64_t, int64_t),
                  int64_t count, int64_t share) {
  auto work = std::make_shared<Work<Problem>>();
  work->problem = problem;
  work->function = function;
  work->count = count;
  work->share = share;
  work->shares = (count + share - 1) / share;
  const int64_t helpers = std::min(pool.num_threads(), work->shares) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule([work] { work->help(); });
  work->help();
  // A share takes microseconds, so that waiting costs less than sleeping; unless its thread has lost its core.
  for (int tries = 0; work->finished.load(std::memory_order_acquire) < work->shares; tries++) {
    if (tries > 10000) std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return ffi::Error::Success();
}

ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer weight, ffi::AnyBuffer scale, ffi::Buffer<ffi::F32> x,
                   ffi::ResultBuffer<ffi::F32> y) {
  Rows rows;
  switch (weight.element_type()) {
    case ffi::F32: rows.kind = Kind::kFloat32; break;
    case ffi::BF16: rows.kind = Kind::kBFloat16; break;
    case ffi::F16: rows.kind = Kind::kFloat16; break;
    case ffi::S8: rows.kind = Kind::kInt8; break;
    case ffi::U8: rows.kind = Kind::kInt4; break;
    default: return ffi::Error::InvalidArgument("mpt_eqx: no product with a weight of this type");
  }
  rows.weight = weight.untyped_data();
  rows.scale = scale.element_count() ? scale.untyped_data() : nullptr;
  rows.x = x.typed_data();
  rows.y = y->typed_data();
  rows.vectors = x.dimensions()[0];
  rows.in = x.dimensions()[1];
  rows.out = weight.dimensions()[0];
  const int64_t row_bytes = std::max<int64_t>(weight.size_bytes() / std::max<int64_t>(rows.out, 1), 1);
  return shared(pool, rows, rows_function, rows.out, std::max<int64_t>(kShareBytes / row_bytes / 8 * 8, 8));
}

ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::F32> slopes, ffi::Buffer<ffi::S32> position, ffi::ResultBuffer<ffi::F32> y,
                     int32_t kind, float scale, int64_t window) {
  Heads heads;
  heads.kind = static_cast<Kind>(kind);
  heads.q = q.typed_data();
  heads.k = k.untyped_data();
  heads.v = v.untyped_data();
  heads.slopes = slopes.typed_data();
  heads.position = position.typed_data();
  heads.y = y->typed_data();
  heads.heads = q.dimensions()[1];
  heads.groups = q.dimensions()[2];
  heads.size = q.dimensions()[3];
  heads.capacity = k.dimensions()[2];
  heads.window = window;
  heads.scale = scale;
  return shared(pool, heads, heads_function, q.dimensions()[0] * heads.heads, int64_t{1});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpt_eqx_matvec, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpt_eqx_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("kind")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window"));
