"""CUDA text of attention of a few queries over rows, in one kernel.

A block takes a part of the columns, a key-value head (and up to eight of its query rows) and a row of the
batch; the one that is done last puts the parts together. Constants stand in front as in ``cuda_encode``, and
the number of query rows and warps of a block. Scores are in units of log 2: exponentials are powers of two.
"""

__all__ = ["ATTEND"]

ATTEND = r"""
namespace optiq {

constexpr int PADDED = (ROWS + 3) / 4 * 4;
constexpr int PART = V_DIM + 2;  // of a split: maximum, sum of weights, weighted values

// Lanes that share a token, eight numbers each.
constexpr int span(int dim) { return dim <= 32 ? 4 : dim <= 64 ? 8 : dim <= 128 ? 16 : 32; }

__device__ inline void copy(uint32_t* to, const uint32_t* from, bool by_four) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if (by_four) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(address), "l"(from));
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(address), "l"(from));
}

// Rows of up to 32 tokens into a warp's buffer; zeros behind the last one.
__device__ inline void fetch(uint32_t* buffer, const uint32_t* from, int count) {
  const int lane = threadIdx.x % 32;
  if (count == 32 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll 4
    for (int at = 4 * lane; at < 32 * WIDTH; at += 128) copy(buffer + at, from + at, true);
  } else {
    for (int at = lane; at < 32 * WIDTH; at += 32) {
      if (at < count * WIDTH) copy(buffer + at, from + at, false);
      else buffer[at] = 0;
    }
  }
  asm volatile("cp.async.commit_group;\n");
}

template <int PENDING>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
  __syncwarp();
}

// Numbers of the index-th eight of a token. A code in the mantissa of 2^BITS stands for 2^BITS + code.
template <int BITS>
__device__ inline void eight(const uint32_t* codes, int index, float2 line, float (&out)[8]) {
  const int bit = index * 8 * BITS, shift = bit % 32;
  uint32_t low = codes[bit / 32], high = 0;
  if (shift + 8 * BITS > 32) high = codes[bit / 32 + 1];
  low = __funnelshift_r(low, high, shift);
  high >>= shift;
  const float offset = line.y - (1 << BITS) * line.x;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = i * BITS;
    const uint32_t word = at >= 32 ? high >> (at - 32) : __funnelshift_r(low, high, at);
    const uint32_t code = word & ((1u << BITS) - 1);
    out[i] = fmaf(line.x, __uint_as_float((127 + BITS) << 23 | code << (23 - BITS)), offset);
  }
}

// Products of the warp's 32 tokens with the query rows: the lane gets those of token_of(lane). Every lane
// multiplies its eight numbers of one token after the other; halves of the lanes swap halves of the tokens.
constexpr int K_SPAN = span(K_DIM);

__device__ inline int token_of(int lane) { return lane % K_SPAN * (32 / K_SPAN) + lane / K_SPAN; }

template <int COUNT>
__device__ inline void score(
    const uint32_t* tokens, int index, const float (&queries)[ROWS][8], float (&out)[ROWS], int first) {
  const int lane = threadIdx.x % 32;
  if constexpr (COUNT == 1) {
    const uint32_t* const token = tokens + (first * (32 / K_SPAN) + lane / K_SPAN) * WIDTH;
    float key[8];
    eight<K_BITS>(token, index, affine(token + K_AFFINE, index * 8 / K_GROUP), key);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      out[r] = queries[r][0] * key[0];
#pragma unroll
      for (int e = 1; e < 8; ++e) out[r] = fmaf(queries[r][e], key[e], out[r]);
    }
  } else {
    float other[ROWS];
    score<COUNT / 2>(tokens, index, queries, out, first);
    score<COUNT / 2>(tokens, index, queries, other, first + COUNT / 2);
    const bool upper = lane & (COUNT / 2);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float sent = upper ? out[r] : other[r], kept = upper ? other[r] : out[r];
      out[r] = kept + __shfl_xor_sync(0xffffffffu, sent, COUNT / 2);
    }
  }
}

} // namespace optiq
// BODY
  using namespace optiq;
  extern __shared__ uint4 memory[];
  __shared__ bool is_last;
  float* const all_weights = reinterpret_cast<float*>(memory);
  uint32_t* const staged = reinterpret_cast<uint32_t*>(all_weights + WARPS * 32 * PADDED);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int heads = words_shape[1], columns = words_shape[2];
  const int query_heads = queries_shape[1], length = queries_shape[2];
  const int rows = query_heads / heads * length, tiles = (rows + ROWS - 1) / ROWS;
  const int head = blockIdx.y / tiles, tile = blockIdx.y % tiles, first_row = tile * ROWS;
  const int64_t batch = blockIdx.z;
  const int steps = (columns + 31) / 32, steps_here = (steps + gridDim.x - 1) / gridDim.x;
  const int first_step = blockIdx.x * steps_here + warp;
  const int last_step = min(steps, static_cast<int>(blockIdx.x + 1) * steps_here);

  // Query rows, in units of log 2 and turned like keys; a lane keeps its eight numbers of each.
  float* const given = reinterpret_cast<float*>(staged);
  float* const turned_queries = K_ORDER > 0 ? given + ROWS * K_DIM : given;
  for (int i = threadIdx.x; i < ROWS * K_DIM; i += 32 * WARPS) {
    const int row = first_row + i / K_DIM;
    float x = 0;
    if (row < rows) {
      x = queries[batch * queries_strides[0] + (head * (rows / length) + row / length) * queries_strides[1] +
                  row % length * queries_strides[2] + i % K_DIM * queries_strides[3]];
    }
    given[i] = x * QUERY_FACTOR;
  }
  __syncthreads();
  if constexpr (K_ORDER > 0) {
    for (int i = threadIdx.x; i < ROWS * K_DIM; i += 32 * WARPS) {
      turned_queries[i] = turned<(K_ORDER > 0 ? K_ORDER : 32)>(given + i / K_DIM * K_DIM, K_SIGNS, i % K_DIM);
    }
    __syncthreads();
  }
  const int key_eighth = min(lane % K_SPAN, K_DIM / 8 - 1);
  float query[ROWS][8], most[ROWS], total[ROWS], sums[ROWS][8];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    most[r] = NOTHING;
    total[r] = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      query[r][e] = lane % K_SPAN < K_DIM / 8 ? turned_queries[r * K_DIM + key_eighth * 8 + e] : 0.0f;
      sums[r][e] = 0;
    }
  }
  __syncthreads();

  // Each warp takes 32 columns at a time and keeps its own maximum, sum and weighted values (online softmax).
  const uint32_t* const from = words + batch * words_strides[0] + head * words_strides[1];
  uint32_t* const buffers = staged + warp * 2 * 32 * WIDTH;
  float* const weights = all_weights + warp * 32 * PADDED;
  constexpr int SPAN = span(V_DIM);
  const int eighth = min(lane % SPAN, V_DIM / 8 - 1);
  if (first_step < last_step) {
    fetch(buffers, from + int64_t(first_step) * 32 * WIDTH, min(32, columns - first_step * 32));
  }
  int buffer = 0;
  for (int step = first_step; step < last_step; step += WARPS) {
    const int next = step + WARPS;
    if (next < last_step) {
      uint32_t* const other = buffers + (1 - buffer) * 32 * WIDTH;
      fetch(other, from + int64_t(next) * 32 * WIDTH, min(32, columns - next * 32));
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    const uint32_t* const tokens = buffers + buffer * 32 * WIDTH;
    const int column = step * 32 + token_of(lane);
    float scores[ROWS], shrink[ROWS];
    score<K_SPAN>(tokens, key_eighth, query, scores, 0);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int row = min(first_row + r, rows - 1);
      if (CAUSAL && column > columns - length + row % length) scores[r] = LOWEST;
#if MASK
      const int64_t at = batch * mask_strides[0] + (head * (rows / length) + row / length) * mask_strides[1] +
                         row % length * mask_strides[2] + min(column, columns - 1) * mask_strides[3];
#if MASK == 1
      if (!mask[at]) scores[r] = LOWEST;
#else
      scores[r] = fmaxf(fmaf(static_cast<float>(mask[at]), LOG2_E, scores[r]), LOWEST);
#endif
#endif
      if (column >= columns) scores[r] = NOTHING;
      float top = scores[r];
      for (int offset = 16; offset; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
      top = fmaxf(top, most[r]);
      shrink[r] = exp2f(most[r] - top);
      most[r] = top;
      const float weight = exp2f(scores[r] - top);
      total[r] = fmaf(total[r], shrink[r], weight);
      weights[token_of(lane) * PADDED + r] = weight;
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[r][e] *= shrink[r];
    }
#pragma unroll 4
    for (int t = lane / SPAN; t < 32; t += 32 / SPAN) {
      const uint32_t* const token = tokens + t * WIDTH;
      float value[8], weight[PADDED];
      eight<V_BITS>(token + V_CODES, eighth, affine(token + V_AFFINE, eighth * 8 / V_GROUP), value);
#pragma unroll
      for (int r = 0; r < PADDED; r += 4) {
        *reinterpret_cast<float4*>(weight + r) = *reinterpret_cast<const float4*>(weights + t * PADDED + r);
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[r][e] = fmaf(weight[r], value[e], sums[r][e]);
      }
    }
    __syncwarp();
    buffer = 1 - buffer;
  }

  // Lanes of a warp, then warps of the block, are put together; buffers are free by then.
  __syncthreads();
  float* const warp_sums = reinterpret_cast<float*>(staged);
  float* const warp_stats = all_weights;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    for (int offset = 16; offset; offset /= 2) total[r] += __shfl_xor_sync(0xffffffffu, total[r], offset);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      for (int offset = 16; offset >= SPAN; offset /= 2) {
        sums[r][e] += __shfl_xor_sync(0xffffffffu, sums[r][e], offset);
      }
      if (lane < V_DIM / 8) warp_sums[(warp * ROWS + r) * V_DIM + lane * 8 + e] = sums[r][e];
    }
    if (lane == 0) {
      warp_stats[(warp * ROWS + r) * 2] = most[r];
      warp_stats[(warp * ROWS + r) * 2 + 1] = total[r];
    }
  }
  __syncthreads();
  const int64_t first_out = (batch * heads + head) * rows + first_row;
  const int splits = gridDim.x, rows_here = min(ROWS, rows - first_row);
  for (int i = threadIdx.x; i < rows_here * V_DIM; i += 32 * WARPS) {
    const int r = i / V_DIM;
    float top = NOTHING, sum = 0, all = 0;
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, warp_stats[(w * ROWS + r) * 2]);
    for (int w = 0; w < WARPS; ++w) {
      const float share = exp2f(warp_stats[(w * ROWS + r) * 2] - top);
      sum = fmaf(share, warp_sums[(w * ROWS + r) * V_DIM + i % V_DIM], sum);
      all = fmaf(share, warp_stats[(w * ROWS + r) * 2 + 1], all);
    }
    float* const part = parts + ((first_out + r) * splits + blockIdx.x) * PART;
    part[2 + i % V_DIM] = sum;
    if (i % V_DIM == 0) {
      part[0] = top;
      part[1] = all;
    }
  }

  // The block that is done last puts all parts of the columns together and turns the answer back.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* const counter = const_cast<int*>(counters) + (batch * heads + head) * counters_shape[2] + tile;
    is_last = atomicAdd(counter, 1) == splits - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  float* const found = warp_sums;
  for (int i = threadIdx.x; i < rows_here * V_DIM; i += 32 * WARPS) {
    const int r = i / V_DIM;
    const float* const row_parts = parts + (first_out + r) * splits * PART;
    float top = NOTHING, sum = 0, all = 0;
    for (int k = 0; k < splits; ++k) top = fmaxf(top, __ldcg(row_parts + k * PART));
#if SINKS
    const int row = first_row + r;
    const float sink = LOG2_E * sinks[batch * sinks_strides[0] + row % length * sinks_strides[2] +
                                      (head * (rows / length) + row / length) * sinks_strides[1]];
    top = fmaxf(top, sink);
    all = exp2f(sink - top);
#endif
#pragma unroll 4
    for (int k = 0; k < splits; ++k) {
      const float* const part = row_parts + k * PART;
      const float share = exp2f(__ldcg(part) - top);
      all = fmaf(share, __ldcg(part + 1), all);
      sum = fmaf(share, __ldcg(part + 2 + i % V_DIM), sum);
    }
    sum /= all;
    if constexpr (V_ORDER > 0) found[i] = sum * OUT_FACTOR;
    else out[first_out * V_DIM + i] = static_cast<Out>(sum);
  }
  if constexpr (V_ORDER > 0) {
    __syncthreads();
    for (int i = threadIdx.x; i < rows_here * V_DIM; i += 32 * WARPS) {
      const float* const row = found + i / V_DIM * V_DIM;
      const float x = turned<(V_ORDER > 0 ? V_ORDER : 32)>(row, V_SIGNS, i % V_DIM);
      out[first_out * V_DIM + i] = static_cast<Out>(x);
    }
  }
"""
