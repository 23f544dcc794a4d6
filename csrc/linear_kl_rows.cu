// The row kernel of fastdraft/kernels/linear_kl.py, whose docstring has the mathematics, for bf16 logits on Hopper and newer.
//
// A persistent block takes every gridDim-th row. Its last warp fetches: bulk copies bring a row's student and teacher logits,
// chunk by chunk, into a ring of slots in shared memory, and the next row's as soon as a slot is free. The other warps read a
// row from there: pass A (maximum, argmax, sum of exponentials) as chunks come in, pass B (the losses' sums; for kl also the
// gradient), and for the LK losses pass C (their gradient, which needs B's sums). So HBM gives every logit once and takes
// every gradient once, 6 * Vd bytes a row, for all losses.
//
// Thread i reads vector i of each chunk (8 columns), in every pass: what a thread waited for in A it need not wait for again.
// Every sum has a fixed order, that of the columns in a thread, then a butterfly over lanes, then over warps.
#include "stable.h"

#include <algorithm>
#include <array>
#include <climits>
#include <map>
#include <mutex>

namespace {

enum Loss { kKL, kAlpha, kLambda };

struct Rows {
  __nv_bfloat16* z;  // [n, vocab] student logits; their gradient after
  const __nv_bfloat16* t;  // [m, vocab] teacher logits
  const float* lse_draft;  // [m]
  const float* lse_full;  // [m]
  const int64_t* draft_argmax;  // [m]
  const int64_t* teacher_row;  // [n]
  const float* w;  // [n]
  float* loss;  // [n]
  float* alpha;  // [n]
  bool* hit;  // [n]
  int64_t n;
  int vocab;  // a multiple of 8
  int slots;  // of the ring, each 8 columns a thread of z and as many of t
  float lk_scale, lk_decay;
};

constexpr int kMaxThreads = 512, kMaxSlots = 32, kScratch = 1024;  // kScratch: bytes of shared memory beside the ring
constexpr int slot_bytes(int threads) { return 32 * threads; }
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f, kTiny = 1.1754943508222875e-38f;
constexpr float kLowest = -3e38f;  // finite: a thread that never sees a column must not make inf - inf

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void barrier_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(bar)), "r"(count) : "memory");
}

__device__ void barrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(bar)) : "memory");
}

__device__ void barrier_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(bar)), "r"(bytes) : "memory");
}

__device__ void barrier_wait(uint64_t* bar, uint32_t phase) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address(bar)), "r"(phase)
        : "memory");
  }
}

__device__ void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(address(bar))
      : "memory");
}

__device__ void sync_readers(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

__device__ float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A place in the ring. `phase` is the parity of the ring's round, which is what an mbarrier is asked for.
struct Place {
  int slot = 0;
  uint32_t phase = 0;
  __device__ void next(int slots) {
    if (++slot == slots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

struct Ring {
  unsigned char* bytes;
  uint64_t* full;
  uint64_t* empty;
  int slots, threads;
  __device__ uint4* z(int slot) const { return reinterpret_cast<uint4*>(bytes) + slot * 2 * threads; }
  __device__ uint4* t(int slot) const { return z(slot) + threads; }
};

__device__ void unpack(const uint4& v, float (&x)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ float largest(const uint4& v) {
  const auto max2 = [](uint32_t a, uint32_t b) {
    const __nv_bfloat162 m = __hmax2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&m);
  };
  const uint32_t m = max2(max2(v.x, v.y), max2(v.z, v.w));
  return fmaxf(__uint_as_float(m << 16), __uint_as_float(m & 0xffff0000u));
}

// The largest logit of all, the sum of exp(z - it), and the first column that holds it.
struct Softmax {
  float peak, sum;
  uint32_t first;
  __device__ void fold_lanes() {
    float top = peak;
    for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
    sum *= exp2_((peak - top) * kLog2E);
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    first = __reduce_min_sync(~0u, peak == top ? first : UINT_MAX);
    peak = top;
  }
};

template <int N>
__device__ void fold_lanes(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++)
    for (int o = 16; o; o >>= 1) x[i] += __shfl_xor_sync(~0u, x[i], o);
}

__device__ void fetch(const Rows& a, const Ring& ring) {
  const int columns = 8 * ring.threads;
  Place at;
  for (int64_t row = blockIdx.x; row < a.n; row += gridDim.x) {
    if (a.w[row] == 0.0f) continue;
    const __nv_bfloat16* z = a.z + row * a.vocab;
    const __nv_bfloat16* t = a.t + a.teacher_row[row] * a.vocab;
    for (int start = 0; start < a.vocab; start += columns, at.next(ring.slots)) {
      const uint32_t bytes = 2 * min(columns, a.vocab - start);
      barrier_wait(ring.empty + at.slot, at.phase ^ 1);  // in the first round at once
      barrier_expect(ring.full + at.slot, 2 * bytes);
      bulk_copy(ring.z(at.slot), z + start, bytes, ring.full + at.slot);
      bulk_copy(ring.t(at.slot), t + start, bytes, ring.full + at.slot);
    }
  }
}

template <int LOSS, bool GRAD>
__device__ void read(const Rows& a, const Ring& ring) {
  constexpr bool kLast = LOSS == kKL || !GRAD;  // pass B is the last
  constexpr int kSums = LOSS == kLambda ? 3 : 2;
  __shared__ Softmax softmaxes[kMaxThreads / 32];
  __shared__ float sums[kMaxThreads / 32][3];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, warps = ring.threads / 32;
  const int vectors = a.vocab / 8;
  Place begin;
  int64_t row = blockIdx.x;
  float w = row < a.n ? a.w[row] : 0.0f;
  int64_t u = row < a.n ? a.teacher_row[row] : 0;
  while (row < a.n) {
    const int64_t next = row + gridDim.x;
    const float next_w = next < a.n ? a.w[next] : 0.0f;  // loads that the next row would wait for
    const int64_t next_u = next < a.n ? a.teacher_row[next] : 0;
    uint4* out = reinterpret_cast<uint4*>(a.z + row * a.vocab);
    if (w == 0.0f) {
      if (thread == 0) a.loss[row] = a.alpha[row] = 0.0f, a.hit[row] = false;
      if (GRAD)
        for (int v = thread; v < vectors; v += ring.threads) __stcs(out + v, make_uint4(0, 0, 0, 0));
      row = next, w = next_w, u = next_u;
      continue;
    }
    const float lse_draft = a.lse_draft[u], lse_full = a.lse_full[u];
    const int64_t draft_argmax = a.draft_argmax[u];

    Softmax own = {kLowest, 0.0f, static_cast<uint32_t>(a.vocab - 1)};
    int best = -1, best_slot = 0;
    Place at = begin;
    for (int v = thread, first = 0; first < vectors; v += ring.threads, first += ring.threads, at.next(ring.slots)) {
      barrier_wait(ring.full + at.slot, at.phase);
      if (v >= vectors) continue;
      const uint4 packed = ring.z(at.slot)[thread];
      const float top = largest(packed);
      if (top > own.peak) {
        own.sum *= exp2_((own.peak - top) * kLog2E);
        own.peak = top, best = v, best_slot = at.slot;
      }
      float z[8];
      unpack(packed, z);
#pragma unroll
      for (int i = 0; i < 8; i++) own.sum += exp2_((z[i] - own.peak) * kLog2E);
    }
    if (best >= 0) {
      float z[8];
      unpack(ring.z(best_slot)[thread], z);
#pragma unroll
      for (int i = 7; i >= 0; i--)
        if (z[i] == own.peak) own.first = 8 * best + i;
    }
    own.fold_lanes();
    if (lane == 0) softmaxes[warp] = own;
    sync_readers(ring.threads);
    own = lane < warps ? softmaxes[lane] : Softmax{kLowest, 0.0f, UINT_MAX};
    own.fold_lanes();
    const float top = own.peak, log2_total = log2f(own.sum), log_total = log2_total * kLn2;
    const float outside = exp2_((lse_draft - lse_full) * kLog2E);  // P = P~ * outside

    float part[kSums] = {};  // alpha; CE (kl, lambda) or S (alpha); S (lambda)
    at = begin;
    for (int v = thread, first = 0; first < vectors; v += ring.threads, first += ring.threads, at.next(ring.slots)) {
      if (v < vectors) {
        float z[8], t[8], dz[8];
        unpack(ring.z(at.slot)[thread], z);
        unpack(ring.t(at.slot)[thread], t);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float d = z[i] - top;
          if (LOSS == kAlpha) {  // min(P, Q) is the exponential of the smaller logarithm: one instead of two
            const float log_q = d - log_total, log_p = t[i] - lse_full;
            const float smaller = exp2_(fminf(log_p, log_q) * kLog2E);
            part[0] += smaller;
            part[1] += log_p > log_q ? smaller : log_p == log_q ? 0.5f * smaller : 0.0f;
          } else {
            const float q = exp2_(fmaf(d, kLog2E, -log2_total)), p_draft = exp2_((t[i] - lse_draft) * kLog2E);
            const float p = p_draft * outside;
            part[0] += fminf(p, q);
            part[1] -= p_draft * (d - log_total);
            if (LOSS == kLambda) part[kSums - 1] += p > q ? q : p == q ? 0.5f * q : 0.0f;
            dz[i] = w * (q - p_draft);
          }
        }
        if (LOSS == kKL && GRAD)
          __stcs(out + v, make_uint4(pack(dz[0], dz[1]), pack(dz[2], dz[3]), pack(dz[4], dz[5]), pack(dz[6], dz[7])));
      }
      if (kLast) {
        __syncwarp();
        if (lane == 0) barrier_arrive(ring.empty + at.slot);
      }
    }
    fold_lanes(part);
    if (lane == 0)
      for (int i = 0; i < kSums; i++) sums[warp][i] = part[i];
    sync_readers(ring.threads);
    for (int i = 0; i < kSums; i++) part[i] = lane < warps ? sums[lane][i] : 0.0f;
    fold_lanes(part);
    const float alpha = part[0], total_c = part[kSums - 1];
    const float least = fmaxf(alpha, kTiny), mix = LOSS == kLambda ? a.lk_scale * exp2_(-a.lk_decay * alpha * kLog2E) : 0.0f;
    if (thread == 0) {
      a.alpha[row] = alpha;
      a.hit[row] = own.first == draft_argmax;
      a.loss[row] = LOSS == kKL ? part[1] : LOSS == kAlpha ? -logf(least) : mix * part[1] + (1.0f - mix) * (1.0f - alpha);
    }

    if (!kLast) {
      // w dloss/dz = ca (Q - P~) + cb Q (c - S); the second factor has three values
      const float ca = w * mix, cb = LOSS == kLambda ? w * (mix - 1.0f) : alpha < kTiny ? 0.0f : -w / least;
      const float more = cb * (1.0f - total_c), same = cb * (0.5f - total_c), less = -cb * total_c;
      at = begin;
      for (int v = thread, first = 0; first < vectors; v += ring.threads, first += ring.threads, at.next(ring.slots)) {
        if (v < vectors) {
          float z[8], t[8], dz[8];
          unpack(ring.z(at.slot)[thread], z);
          unpack(ring.t(at.slot)[thread], t);
#pragma unroll
          for (int i = 0; i < 8; i++) {
            const float d = z[i] - top, q = exp2_(fmaf(d, kLog2E, -log2_total));
            if (LOSS == kAlpha) {
              const float log_q = d - log_total, log_p = t[i] - lse_full;
              dz[i] = q * (log_p > log_q ? more : log_p == log_q ? same : less);
            } else {
              const float p_draft = exp2_((t[i] - lse_draft) * kLog2E), p = p_draft * outside;
              dz[i] = ca * (q - p_draft) + q * (p > q ? more : p == q ? same : less);
            }
          }
          __stcs(out + v, make_uint4(pack(dz[0], dz[1]), pack(dz[2], dz[3]), pack(dz[4], dz[5]), pack(dz[6], dz[7])));
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(ring.empty + at.slot);
      }
    }
    begin = at;
    row = next, w = next_w, u = next_u;
  }
}

#endif

template <int LOSS, bool GRAD>
__global__ void __launch_bounds__(kMaxThreads + 32, 1) kl_rows_kernel(const Rows a) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char bytes[];
  __shared__ uint64_t full[kMaxSlots], empty[kMaxSlots];
  const int threads = blockDim.x - 32;
  const Ring ring = {bytes, full, empty, a.slots, threads};
  if (threadIdx.x == 0) {
    for (int s = 0; s < a.slots; s++) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, threads / 32);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // bulk copies see the barriers
  }
  __syncthreads();
  if (threadIdx.x < threads)
    read<LOSS, GRAD>(a, ring);
  else if (threadIdx.x == threads)
    fetch(a, ring);
#else
  __trap();  // linear_kl.py asks for compute capability 9.0
#endif
}

using Kernel = void (*)(const Rows);

struct Fit {
  int slots;  // of the ring
  int blocks;  // on all SMs at a time
};

// What a GPU fits of a kernel with so many reading threads, of which `in_sm` blocks share an SM. The driver is asked once for
// each: at every launch its answers are host time for nothing. The kernel's limit of shared memory is the GPU's whatever the
// number of threads, so that no later question takes back what an earlier one was told.
Fit fit(Kernel kernel, int device, int kind, bool grad, int threads, int in_sm) {
  static std::mutex mutex;
  static std::map<std::array<int, 4>, Fit> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::array<int, 4> key = {device, kind, grad, threads};
  if (const auto found = known.find(key); found != known.end()) return found->second;
  int most, whole, sms, blocks;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&whole, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  // The system takes a kilobyte of each block.
  const int slots = std::min((std::min(most, whole / in_sm - 1024) - kScratch) / slot_bytes(threads), kMaxSlots);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - kScratch));
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  STD_CUDA_CHECK(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads + 32, slots * slot_bytes(threads)));
  return known[key] = {slots, blocks * sms};
}

void kl_rows(
    Tensor z, Tensor t, Tensor lse_draft, Tensor lse_full, Tensor draft_argmax, Tensor teacher_row, Tensor w, Tensor loss,
    Tensor alpha, Tensor hit, int64_t kind, double lk_scale, double lk_decay, bool grad) {
  const int64_t n = z.size(0), vocab = z.size(1);
  const int threads = vocab <= 16384 ? 256 : 512, in_sm = vocab <= 16384 ? 3 : 1;  // short rows: three blocks share an SM
  if (n == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  const Kernel kernel = kind == kKL ? (grad ? kl_rows_kernel<kKL, true> : kl_rows_kernel<kKL, false>)
      : kind == kAlpha              ? (grad ? kl_rows_kernel<kAlpha, true> : kl_rows_kernel<kAlpha, false>)
                                    : (grad ? kl_rows_kernel<kLambda, true> : kl_rows_kernel<kLambda, false>);
  const auto [slots, blocks] = fit(kernel, z.get_device_index(), static_cast<int>(kind), grad, threads, in_sm);
  STD_TORCH_CHECK(
      vocab % 8 == 0 && vocab <= static_cast<int64_t>(slots) * 8 * threads,
      "kl_rows takes rows of a multiple of 8 columns that fit its ", slots, " slots, not ", vocab, " columns");
  const Rows rows = {
      data<__nv_bfloat16>(z), data<__nv_bfloat16>(t), data<float>(lse_draft), data<float>(lse_full),
      data<int64_t>(draft_argmax), data<int64_t>(teacher_row), data<float>(w), data<float>(loss),
      data<float>(alpha), data<bool>(hit), n, static_cast<int>(vocab),
      slots, static_cast<float>(lk_scale), static_cast<float>(lk_decay)};
  const int grid = static_cast<int>(std::min<int64_t>(n, blocks));
  kernel<<<grid, threads + 32, slots * slot_bytes(threads), current_stream(z)>>>(rows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastdraft, m) {
  m.def(
      "kl_rows(Tensor(a!) z, Tensor t, Tensor lse_draft, Tensor lse_full, Tensor draft_argmax, Tensor teacher_row, Tensor w, "
      "Tensor(b!) loss, Tensor(c!) alpha, Tensor(d!) hit, int kind, float lk_scale, float lk_decay, bool grad) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdraft, CUDA, m) { m.impl("kl_rows", TORCH_BOX(&kl_rows)); }

}  // namespace
