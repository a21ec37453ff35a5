// Sums of rows by code, for one instruction set. No include guard: see foreach_isa.h.
#include "cpu/vq_layout.h"

constexpr int kAhead = 8;  // rows that are asked for in advance: a code's rows lie anywhere

template <class T, class R>
VAEOPS_INLINE const T* next_row(const SegmentTile<T, R>& t, int64_t at) {
  if (at + kAhead < static_cast<int64_t>(t.start[t.codes])) {
    const T* const ahead = t.values.row(static_cast<int64_t>(t.rows[at + kAhead]));
    const char* const first = reinterpret_cast<const char*>(ahead + t.begin);
    const char* const last = reinterpret_cast<const char*>(ahead + t.begin + t.n - 1);
    for (const char* p = first; p <= last && p < first + 512; p += 64) __builtin_prefetch(p);
    __builtin_prefetch(last);
  }
  return t.values.row(static_cast<int64_t>(t.rows[at]));
}

template <class T>
VAEOPS_INLINE void add_row(double* __restrict sums, const T* __restrict row, int64_t n) {
  for (int64_t d = 0; d < n; ++d) sums[d] += wide(row[d]);
}
template <class T>
VAEOPS_INLINE void add_row(double* __restrict sums, const T* __restrict row, int64_t n, double weight) {
  for (int64_t d = 0; d < n; ++d) sums[d] += weight * wide(row[d]);
}
// Adding 1.5 * 2^52 rounds to an integer, which then stands in the low bits of the sum.
template <class T>
VAEOPS_INLINE void add_row_fixed(int64_t* __restrict sums, const T* __restrict row, int64_t n,
                                 const double (&scale)[2]) {
  for (int64_t d = 0; d < n; ++d) {
    double value = wide(row[d]) * scale[0] * scale[1];
    value = value > -0x1p36 ? value : -0x1p36;
    value = value < 0x1p36 ? value : 0x1p36;
    const double shifted = value + 0x1.8p52;
    int64_t bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    sums[d] += bits - 0x4338000000000000;
  }
}

// The results of code k; no sums: zeros.
template <class C, class Tile>
VAEOPS_INLINE void store_code(const Tile& t, int64_t k, double count, const double* __restrict sums) {
  C* __restrict const out = static_cast<C*>(t.sums) + k * t.dims + t.out_begin;
  if (sums == nullptr) {
    __builtin_memset(out, 0, static_cast<size_t>(t.n) * sizeof(C));
  } else {
    for (int64_t d = 0; d < t.n; ++d) out[d] = static_cast<C>(sums[d]);
  }
  if (t.counts != nullptr) static_cast<C*>(t.counts)[k] = static_cast<C>(count);
}

// Codes [first, last); `sums` holds n elements.
template <class T, class R>
static void sum_codes(const SegmentTile<T, R>& t, int64_t first, int64_t last, double* sums) {
  const int64_t n = t.n;
  for (int64_t k = first; k < last; ++k) {
    double count = 0;
    const double* const used = t.start[k] < t.start[k + 1] ? sums : nullptr;
    for (int64_t d = 0; used != nullptr && d < n; ++d) sums[d] = 0;
    for (int64_t at = t.start[k]; at < static_cast<int64_t>(t.start[k + 1]); ++at) {
      const T* const row = next_row(t, at);
      if (t.skip_nonfinite && any_not_finite(row, t.width)) continue;
      if (t.weights == nullptr) {
        count += 1;
        add_row(sums, row + t.begin, n);
      } else {
        const double weight = t.weights_f64 ? static_cast<const double*>(t.weights)[t.rows[at]]
                                            : static_cast<const float*>(t.weights)[t.rows[at]];
        count += weight;
        add_row(sums, row + t.begin, n, weight);
      }
    }
    t.out_f64 ? store_code<double>(t, k, count, used) : store_code<float>(t, k, count, used);
  }
}

// The same in fixed point.
template <class T, class R>
static void sum_codes_fixed(const SegmentTile<T, R>& t, int64_t first, int64_t last) {
  const int64_t n = t.n;
  for (int64_t k = first; k < last; ++k) {
    int64_t count = 0;
    int64_t* const sums = static_cast<int64_t*>(t.sums) + k * t.dims + t.out_begin;
    for (int64_t d = 0; d < n; ++d) sums[d] = 0;
    for (int64_t at = t.start[k]; at < static_cast<int64_t>(t.start[k + 1]); ++at) {
      const T* const row = next_row(t, at);
      if (t.skip_nonfinite && any_not_finite(row, t.width)) continue;
      ++count;
      add_row_fixed(sums, row + t.begin, n, t.scale);
    }
    if (t.counts != nullptr) static_cast<int64_t*>(t.counts)[k] = count;
  }
}

template <class T>
static bool row_not_finite(const T* row, int64_t dims) {
  return any_not_finite(row, dims);
}
