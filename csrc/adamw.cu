// The last kernel of fastdraft/kernels/adamw.py's step, whose docstring has the formulas: one pass over the flat buffers,
// 16 bytes of each a thread, none of which is read again, so none stays in a cache.
#include "stable.h"

namespace {

constexpr int kThreads = 256, kVector = 4;

__device__ void load(const float* from, int num, float (&x)[kVector]) {
  if (num == kVector) {
    const float4 v = __ldcs(reinterpret_cast<const float4*>(from));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    for (int i = 0; i < kVector; i++) x[i] = i < num ? from[i] : 0.0f;
  }
}

__device__ void store(float* to, int num, const float (&x)[kVector]) {
  if (num == kVector)
    __stcs(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
  else
    for (int i = 0; i < kVector; i++)
      if (i < num) to[i] = x[i];
}

__global__ void __launch_bounds__(kThreads) adamw_kernel(
    float* grad_ptr,  // [count]; 0 after
    float* master_ptr,  // [count]
    float* m_ptr,  // [count]
    float* v_ptr,  // [count]
    __nv_bfloat16* weights_ptr,  // [count] or null
    const int64_t* not_decayed,  // [ranges, 2]
    const float* scalars,  // [4]: factor of G, go, factor of m, factor of sqrt(v)
    int64_t count, int ranges, float lr, float rest1, float rest2, float eps, float weight_decay) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector;
  if (at >= count) return;
  const int num = static_cast<int>(min(static_cast<int64_t>(kVector), count - at));
  const float factor = scalars[0], go = scalars[1], factor_m = scalars[2], factor_v = scalars[3];
  float grad[kVector], master[kVector], m[kVector], v[kVector], decay[kVector];
  load(grad_ptr + at, num, grad);
  load(master_ptr + at, num, master);
  load(m_ptr + at, num, m);
  load(v_ptr + at, num, v);
#pragma unroll
  for (int i = 0; i < kVector; i++) decay[i] = weight_decay != 0.0f ? master[i] * weight_decay : 0.0f;
  for (int k = 0; k < ranges; k++) {
    const int64_t first = not_decayed[2 * k], last = not_decayed[2 * k + 1];
    if (first >= at + kVector || last <= at) continue;
#pragma unroll
    for (int i = 0; i < kVector; i++)
      if (at + i >= first && at + i < last) decay[i] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kVector; i++) {
    const float g = grad[i] * factor;
    m[i] += go * rest1 * (g - m[i]);
    v[i] += go * rest2 * (g * g - v[i]);
    master[i] -= go * lr * (m[i] * factor_m / (sqrtf(v[i]) * factor_v + eps) + decay[i]);
    grad[i] = 0.0f;
  }
  store(master_ptr + at, num, master);
  store(m_ptr + at, num, m);
  store(v_ptr + at, num, v);
  store(grad_ptr + at, num, grad);
  if (!weights_ptr) return;
  if (num == kVector) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(master[0], master[1]), high = __floats2bfloat162_rn(master[2], master[3]);
    const uint2 both = {*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high)};
    __stcs(reinterpret_cast<uint2*>(weights_ptr + at), both);
  } else {
    for (int i = 0; i < kVector; i++)
      if (i < num) weights_ptr[at + i] = __float2bfloat16_rn(master[i]);
  }
}

void adamw(
    Tensor grad, Tensor master, Tensor m, Tensor v, std::optional<Tensor> weights, Tensor not_decayed, Tensor scalars,
    double lr, double rest1, double rest2, double eps, double weight_decay) {
  const int64_t count = grad.numel(), blocks = (count + kThreads * kVector - 1) / (kThreads * kVector);
  const int ranges = weight_decay != 0.0 ? static_cast<int>(not_decayed.size(0)) : 0;
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  adamw_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, current_stream(grad)>>>(
      data<float>(grad), data<float>(master), data<float>(m), data<float>(v),
      weights.has_value() ? data<__nv_bfloat16>(*weights) : nullptr, data<int64_t>(not_decayed), data<float>(scalars), count,
      ranges, static_cast<float>(lr), static_cast<float>(rest1), static_cast<float>(rest2), static_cast<float>(eps),
      static_cast<float>(weight_decay));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastdraft, m) {
  m.def(
      "adamw(Tensor(a!) grad, Tensor(b!) master, Tensor(c!) m, Tensor(d!) v, Tensor(e!)? weights, Tensor not_decayed, "
      "Tensor scalars, float lr, float rest1, float rest2, float eps, float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdraft, CUDA, m) { m.impl("adamw", TORCH_BOX(&adamw)); }

}  // namespace
