"""CUDA text of storing tokens, and what all kernels share.

``cuda`` puts constants in front, made for each storage: dimensions and widths of keys and values (``K_``,
``V_``), words of a row, orders of rotations (0: none), the number type of scales. What stands behind
``// BODY`` is the kernel's own body.
"""

__all__ = ["ENCODE", "SHARED"]

SHARED = r"""
#define NOTHING __uint_as_float(0xff800000u)  // minus infinity: no score at all

namespace optiq {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -3.4028234663852886e38f;  // the score of a masked column

// Scale and bias of one group.
__device__ inline float2 affine(const uint32_t* at, int group) {
  if constexpr (sizeof(Number) == 4) {
    return make_float2(__uint_as_float(at[2 * group]), __uint_as_float(at[2 * group + 1]));
  } else if constexpr (NUMBER_IS_HALF) {
    const uint32_t word = at[group];
    return make_float2(
        __half2float(__ushort_as_half(word & 0xffff)), __half2float(__ushort_as_half(word >> 16)));
  } else {
    const uint32_t word = at[group];
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
}

// Sum of ORDER numbers, each with its sign: one row of a product with a Hadamard matrix.
template <int ORDER>
__device__ inline float signed_sum(const float* numbers, const uint32_t* signs) {
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int word = 0; word < ORDER / 32; ++word) {
    const uint32_t bits = signs[word];
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(numbers + 32 * word + i);
      sum.x += __uint_as_float(__float_as_uint(x.x) ^ ((bits << (31 - i)) & 0x80000000u));
      sum.y += __uint_as_float(__float_as_uint(x.y) ^ ((bits << (30 - i)) & 0x80000000u));
      sum.z += __uint_as_float(__float_as_uint(x.z) ^ ((bits << (29 - i)) & 0x80000000u));
      sum.w += __uint_as_float(__float_as_uint(x.w) ^ ((bits << (28 - i)) & 0x80000000u));
    }
  }
  return (sum.x + sum.y) + (sum.z + sum.w);
}

template <int ORDER>
__device__ inline float turned(const float* row, const uint32_t* signs, int column) {
  return signed_sum<ORDER>(row + column / ORDER * ORDER, signs + column * (ORDER / 32));
}

} // namespace optiq
"""

ENCODE = r"""
namespace optiq {

__device__ inline uint32_t bits_of(float x) {
  if constexpr (NUMBER_IS_HALF) return __half_as_ushort(__float2half_rn(x));
  else return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// One token of one head, a thread per number: turned, rounded to the cache's type, quantized as MLX does.
template <int DIM, int BITS, int GROUP, int ORDER>
__device__ inline void encode(
    float value, const uint32_t* signs, float factor, uint32_t* codes_out, uint32_t* affine_out) {
  __shared__ alignas(16) float row[DIM];
  __shared__ uint32_t codes[DIM];
  __shared__ float lowest[DIM / 32], highest[DIM / 32];
  const int j = threadIdx.x;
  const bool inside = j < DIM;
  if constexpr (ORDER > 0) {
    if (inside) row[j] = value;
    __syncthreads();
    if (inside) value = factor * turned<ORDER>(row, signs, j);
  }
  value = static_cast<float>(static_cast<Number>(value));
  float low = value, high = fmaxf(value, 0.0f);
  for (int offset = 16; offset; offset /= 2) {
    low = fminf(low, __shfl_xor_sync(0xffffffffu, low, offset));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, offset));
  }
  if (inside && j % 32 == 0) {
    lowest[j / 32] = low;
    highest[j / 32] = high;
  }
  __syncthreads();
  if (inside) {
    const int first = j / GROUP * (GROUP / 32);
    for (int i = first; i < first + GROUP / 32; ++i) {
      low = fminf(low, lowest[i]);
      high = fmaxf(high, highest[i]);
    }
    constexpr float MOST = (1 << BITS) - 1;
    float scale = fmaxf((high - low) / MOST, 1e-7f);
    const bool from_low = fabsf(low) > fabsf(high);
    scale = from_low ? scale : -scale;
    const float edge = from_low ? low : high;
    const float steps = roundf(edge / scale);
    const bool at_zero = steps == 0.0f;
    scale = at_zero ? scale : edge / steps;
    const float bias = at_zero ? 0.0f : edge;
    codes[j] = static_cast<uint32_t>(fminf(roundf((value - bias) / scale), MOST));
    if (j % GROUP == 0) {
      const int group = j / GROUP;
      if constexpr (sizeof(Number) == 4) {
        affine_out[2 * group] = __float_as_uint(scale);
        affine_out[2 * group + 1] = __float_as_uint(bias);
      } else {
        affine_out[group] = bits_of(scale) | bits_of(bias) << 16;
      }
    }
  }
  __syncthreads();
  if (j < DIM * BITS / 32) {
    uint32_t word = 0;
    for (int c = 32 * j / BITS; c * BITS < 32 * j + 32; ++c) {
      const int shift = c * BITS - 32 * j;
      word |= shift >= 0 ? codes[c] << shift : codes[c] >> -shift;
    }
    codes_out[j] = word;
  }
}

} // namespace optiq
// BODY
  using namespace optiq;
  const int heads = keys_shape[1], tokens = keys_shape[2];
  const int64_t row = blockIdx.x;
  const int token = row % tokens, head = row / tokens % heads;
  const int64_t batch = row / tokens / heads;
  uint32_t* out = words + row * WIDTH;
  const int j = threadIdx.x;
  if (blockIdx.y == 0) {
    if (token == 0 && j < COUNTERS) counters[(batch * heads + head) * COUNTERS + j] = 0;
    float value = 0;
    if (j < K_DIM) {
      value = keys[batch * keys_strides[0] + head * keys_strides[1] + token * keys_strides[2] +
                   j * keys_strides[3]];
#if K_MEAN
      value -= static_cast<float>(key_mean[head * K_DIM + j]);
#endif
    }
    encode<K_DIM, K_BITS, K_GROUP, K_ORDER>(value, K_SIGNS, K_FACTOR, out, out + K_AFFINE);
  } else {
    float value = 0;
    if (j < V_DIM) {
      value = values[batch * values_strides[0] + head * values_strides[1] + token * values_strides[2] +
                     j * values_strides[3]];
    }
    encode<V_DIM, V_BITS, V_GROUP, V_ORDER>(value, V_SIGNS, V_FACTOR, out + V_CODES, out + V_AFFINE);
  }
"""
