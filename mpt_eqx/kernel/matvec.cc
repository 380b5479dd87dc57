// The custom call: a product of a weight with a few vectors, shared among the threads of XLA's own pool.

#include <algorithm>
#include <atomic>
#include <memory>

#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Weights of a share: large enough that taking one costs nothing, small enough to stay in the second-level cache for
// all vectors and to end evenly.
constexpr int64_t kShareBytes = 128 * 1024;

RowsFunction* best() {
#ifdef MPT_EQX_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return rows_v4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return rows_v3;
#endif
  return rows_default;
}

// Shares are taken from a counter by the thread that was called and by those of the pool that come in time. It waits
// for shares that others have taken, never for others to come: they may all be waiting in calls of their own.
struct Work {
  Rows rows;
  int64_t share, shares;
  std::atomic<int64_t> taken{0}, finished{0};

  void help() {
    static RowsFunction* const function = best();
    for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < shares;) {
      function(rows, i * share, std::min((i + 1) * share, rows.out));
      finished.fetch_add(1, std::memory_order_release);
    }
  }
};

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
  const int64_t share = std::max<int64_t>(kShareBytes / row_bytes / 8 * 8, 8);
  auto work = std::make_shared<Work>();
  work->rows = rows;
  work->share = share;
  work->shares = (rows.out + share - 1) / share;
  const int64_t helpers = std::min(pool.num_threads(), work->shares) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule([work] { work->help(); });
  work->help();
  while (work->finished.load(std::memory_order_acquire) < work->shares) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mpt_eqx_matvec, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
